"""The slow state of one weight: W0, its experts, and coefficients. Every value is computed from W0 and rounded once.

Algorithm.md, "The slow state is small": slow and fast weights are two coefficient vectors over the same experts.
`start` is the vector from which the running stage started: the slow one, or under restart = fast that of the fast
weights. A `SlowWeight` is never changed; `absorb` returns the next one, so that a transition that fails has changed
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch

from lorasc_fx.branch.accumulate import accumulate, exact_products
from lorasc_fx.branch.noise import draw
from lorasc_fx.branch.quantized import dense, is_quantized
from lorasc_fx.branch.rows import Rows
from lorasc_fx.spec import Noise, Restart

__all__ = ["Expert", "Factors", "KeptNoise", "Past", "SlowWeight", "Which"]

Which = Literal["slow", "fast", "base"]


@dataclass(frozen=True)
class Factors:
    """`b` [rows, r] with the branch's scale folded in, and `a` [r, columns]: `b @ a` is added to the weight as stored.

    For stacked experts both have the axis of experts before.
    """

    b: torch.Tensor
    a: torch.Tensor

    @cached_property
    def bound(self) -> float:
        """A number that no entry of `b @ a` exceeds: the product of their norms (Cauchy and Schwarz)."""
        b, a = (torch.linalg.vector_norm(each, dtype=torch.float64).item() for each in (self.b, self.a))
        return b * a if math.isfinite(b * a) else math.inf


@dataclass(frozen=True)
class Expert:
    """A trained branch that the slow weights keep, and the stage that trained it."""

    stage: int
    factors: Factors


@dataclass(frozen=True)
class KeptNoise:
    """The noise of a stage that stays in the weights (noise.keep): its address and amplitude, not its values."""

    noise: Noise
    seed: int
    stage: int
    amplitude: float


@dataclass(frozen=True)
class Past:
    """The slow coefficients at the end of a stage; None where the experts of that time are gone into a dense delta."""

    stage: int
    slow: tuple[float, ...] | None


@dataclass(frozen=True)
class SlowWeight:
    """W0 with what the stages added.

    Args:
        name: of the weight.
        base: W0, in the weight's own dtype; never written to.
        stacked: the first axis counts experts.
        experts: the trained branches, oldest first.
        slow, start: one coefficient per expert.
        dense_slow, dense_start: what was left of experts at the dense collapse, [out, columns].
        kept: noise that stays.
        past: the slow coefficients at the end of each stage, oldest first.
        rows: which rows of the weight all of this is of, where other processes hold the others.
    """

    name: str
    base: torch.Tensor
    stacked: bool = False
    experts: tuple[Expert, ...] = ()
    slow: tuple[float, ...] = ()
    start: tuple[float, ...] = ()
    dense_slow: torch.Tensor | None = None
    dense_start: torch.Tensor | None = None
    kept: tuple[KeptNoise, ...] = ()
    past: tuple[Past, ...] = ()
    rows: Rows | None = None

    def every(self, flag: bool) -> bool:
        """Whether it holds here, and on every process that holds rows of this weight."""
        return flag if self.rows is None else self.rows.together.every(flag)

    def exact(
        self,
        which: Which,
        dtype: torch.dtype,
        live: Factors | None = None,
        device: torch.device | None = None,
    ) -> torch.Tensor:
        """Return W0 + delta in the dtype of the arithmetic, before the one rounding.

        `fast` is the start of the running stage plus `live`, the running branch (F_t of algorithm.md).
        """
        total = torch.empty(self.base.shape, dtype=dtype, device=self.base.device if device is None else device)
        self.write(total, which, dtype, live)
        return total

    def write(self, out: torch.Tensor, which: Which, dtype: torch.dtype, live: Factors | None = None) -> None:
        """Write what `exact` returns into `out`, of the weight's shape; computed in `dtype`, rounded once to that of
        `out`.
        """
        if which == "base":
            out.copy_(dense(self.base))
            return
        if self.kept and out.dtype != dtype:
            out.copy_(self.exact(which, dtype, live, out.device))
            return
        delta = self.dense_slow if which == "slow" else self.dense_start
        coefficients = self.slow if which == "slow" else self.start
        pairs = [(c, expert.factors) for c, expert in zip(coefficients, self.experts, strict=True) if c != 0]
        if which == "fast" and live is not None:
            pairs.append((1.0, live))
        pair = _joined(pairs, dtype, out.device) if pairs else None
        delta = delta.view(self.base.shape) if delta is not None else None
        kept = self.kept
        draws = (draw(each.noise, each.seed, each.stage, self.name, out.shape, self.rows).to(out) for each in kept)
        noise = next(draws, None)  # before anything is written: where there is no memory for it, `out` is as it was
        accumulate(out, dense(self.base), dtype, delta, pair, self.stacked)
        for each in self.kept:
            assert noise is not None
            out += noise.mul_(each.amplitude)
            noise = None  # one at a time
            noise = next(draws, None)

    def absorb(self, stage: int, live: Factors | None, pace: float, restart: Restart) -> SlowWeight:
        """Return the state after the slow update: `S_t = S_{t-1} + pace * (F_t - S_{t-1})` (algorithm.md).

        `live` is None for a weight whose branch is left out, or that has none. One that is zero, as it started, is not
        kept: a longer product sums in another order, and a stage that trains nothing moves no weight.
        """
        experts, moved = self.experts, self.start
        if live is not None and not self.every(not live.b.any()):
            experts, moved = (*experts, Expert(stage, live)), (*moved, 1.0)
        old = (*self.slow, *([0.0] * (len(moved) - len(self.slow))))
        slow = tuple(s if s == f else s + pace * (f - s) for s, f in zip(old, moved, strict=True))
        collapsed = self.dense_slow
        if collapsed is not None and self.dense_start is not None and self.dense_start is not collapsed:
            collapsed = torch.lerp(collapsed, self.dense_start, pace)
        start = slow if restart == "slow" else moved
        dense_start = collapsed if restart == "slow" else self.dense_start
        past = self.past if collapsed is self.dense_slow else tuple(Past(each.stage, None) for each in self.past)
        after = replace(self, experts=experts, slow=slow, start=start, dense_slow=collapsed, dense_start=dense_start)
        after = replace(after, past=_pruned((*past, Past(stage, slow))))
        return after.collapsed() if after.crowded else after

    def reach(self, which: Literal["slow", "start"]) -> float:
        """Return a number that no entry of the weight has moved by, seen from W0."""
        coefficients, delta = (self.slow, self.dense_slow) if which == "slow" else (self.start, self.dense_start)
        total = sum(abs(c) * expert.factors.bound for c, expert in zip(coefficients, self.experts, strict=True) if c)
        if delta is not None and delta.numel():
            total += max(abs(each.item()) for each in torch.aminmax(delta))
        return total + sum(8 * each.amplitude for each in self.kept)

    def faults(self) -> list[str]:
        """Return what is wrong with the experts, each as the end of a sentence about the slow state."""
        found = []
        if not len(self.experts) == len(self.slow) == len(self.start):
            counts = f"{len(self.slow)} slow and {len(self.start)} start coefficients"
            found.append(f"has {len(self.experts)} experts, but {counts}")
        *stack, rows, columns = self.matrix
        for expert in self.experts:
            b, a = tuple(expert.factors.b.shape), tuple(expert.factors.a.shape)
            rank = a[-2] if len(a) > 1 else 0
            if b != (*stack, rows, rank) or a != (*stack, rank, columns):
                found.append(
                    f"has an expert of stage {expert.stage} of {b} and {a}, which is no delta of {self.matrix}"
                )
        for delta in (self.dense_slow, self.dense_start):
            if delta is not None and tuple(delta.shape) != self.matrix:
                found.append(f"has a dense delta of {tuple(delta.shape)}, which is none of {self.matrix}")
        held = [each for expert in self.experts for each in (expert.factors.b, expert.factors.a)]
        held += [delta for delta in (self.dense_slow, self.dense_start) if delta is not None]
        if not all(bool(torch.isfinite(each).all()) for each in held) or not all(
            map(math.isfinite, self.slow + self.start)
        ):
            found.append("holds inf or nan")
        return found

    def at(self, stage: int) -> SlowWeight | None:
        """Return the state at the end of a stage (0: W0), as both slow and start; None where its experts are gone.

        A weight that was not known yet had no delta.
        """
        gone = max((each.stage for each in self.past if each.slow is None), default=0)
        if 0 < stage <= gone:
            return None
        past = tuple(each for each in self.past if each.stage <= stage)
        if not past:
            return SlowWeight(self.name, self.base, self.stacked, rows=self.rows)
        slow = past[-1].slow
        if slow is None:
            return None
        kept = tuple(each for each in self.kept if each.stage <= stage)
        after = replace(self, experts=self.experts[: len(slow)], slow=slow, start=slow, kept=kept, past=past)
        return replace(after, dense_start=self.dense_slow)

    def carried(self, which: Literal["slow", "start"]) -> Factors | None:
        """Return what the stages added as one pair of factors, for a quantized weight that cannot hold it."""
        terms = zip(self.slow if which == "slow" else self.start, self.experts, strict=True)
        pairs = [(c, expert.factors) for c, expert in terms if c != 0]
        if not pairs:
            return None
        b = torch.cat([factors.b * c for c, factors in pairs], dim=-1)
        return Factors(b, torch.cat([factors.a for _, factors in pairs], dim=-2))

    def with_noise(self, kept: KeptNoise) -> SlowWeight:
        """Return the state in which this noise stays."""
        return replace(self, kept=(*self.kept, kept))

    @property
    def matrix(self) -> tuple[int, ...]:
        """Shape of the weight seen as a matrix [rows, columns], or as a stack of them."""
        stack, (first, *rest) = (self.base.shape[:1], self.base.shape[1:]) if self.stacked else ((), self.base.shape)
        return (*stack, first, math.prod(rest))

    @property
    def crowded(self) -> bool:
        """Whether the experts together hold more numbers than the weight itself, or than the dense delta that is there
        already; those of a quantized one stay.
        """
        if is_quantized(self.base):
            return False
        if self.dense_slow is not None:
            return bool(self.experts)
        ranks = sum(expert.factors.a.shape[-2] for expert in self.experts)
        rows, columns = self.matrix[-2:]
        if self.rows is not None and not self.stacked:  # so that all processes come to the same
            whole = self.rows.shape_of_whole(self.base.shape)
            rows, columns = whole[0], math.prod(whole[1:])
        return ranks * (rows + columns) > rows * columns

    def collapsed(self) -> SlowWeight:
        """Return the same state with its experts summed into one dense delta (two where start differs from slow)."""
        slow = self._sum(self.slow, self.dense_slow)
        same = self.start == self.slow and self.dense_start is self.dense_slow
        start = slow if same else self._sum(self.start, self.dense_start)
        past = _pruned(tuple(Past(each.stage, () if each.slow == self.slow else None) for each in self.past))
        return replace(self, experts=(), slow=(), start=(), dense_slow=slow, dense_start=start, past=past)

    def _sum(self, coefficients: Sequence[float], before: torch.Tensor | None) -> torch.Tensor:
        dtype = summing(self.base.dtype)
        pairs = [(c, expert.factors) for c, expert in zip(coefficients, self.experts, strict=True)]
        like = self.experts[0].factors.b if before is None else before
        total = (
            torch.zeros(self.matrix, dtype=dtype, device=like.device) if before is None else before.to(dtype, copy=True)
        )
        b, a = _joined(pairs, dtype, total.device)
        with exact_products(total):
            total.baddbmm_(b, a) if self.stacked else total.addmm_(b, a)
        return total


def _pruned(past: tuple[Past, ...]) -> tuple[Past, ...]:
    """Return the ends of stages with the last of those alone that are gone: the earlier ones are gone as well."""
    gone = [each for each in past if each.slow is None]
    return (*gone[-1:], *(each for each in past if each.slow is not None))


def _joined(
    pairs: Sequence[tuple[float, Factors]], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `b` and `a` of all pairs side by side, the coefficients in `b`; of one pair that fits, its own tensors."""
    one = pairs[0][1] if len(pairs) == 1 else None
    b = one.b if one is not None else torch.cat([factors.b for _, factors in pairs], dim=-1)
    a = one.a if one is not None else torch.cat([factors.a for _, factors in pairs], dim=-2)
    b, a = b.to(device=device, dtype=dtype), a.to(device=device, dtype=dtype)
    if all(c == pairs[0][0] for c, _ in pairs):
        return (b if pairs[0][0] == 1 else b * pairs[0][0]), a
    columns = [c for c, factors in pairs for _ in range(factors.b.shape[-1])]
    return b * torch.tensor(columns, dtype=dtype, device=device), a


def summing(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a dense delta, to which every stage adds: fp64, so that its sum is rounded once however many
    there were; fp32 is fine enough for weights that are narrower.
    """
    return torch.float64 if dtype.itemsize >= 4 else torch.float32


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which weights of this dtype are computed: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
