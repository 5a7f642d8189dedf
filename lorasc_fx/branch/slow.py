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
from typing import Literal

import torch

from lorasc_fx.branch.noise import draw
from lorasc_fx.branch.quantized import dense, is_quantized
from lorasc_fx.spec import Noise, Restart

__all__ = ["Expert", "Factors", "KeptNoise", "SlowWeight", "Which"]

Which = Literal["slow", "fast", "base"]


@dataclass(frozen=True)
class Factors:
    """`b` [rows, r] with the branch's scale folded in, and `a` [r, columns]: `b @ a` is added to the weight as stored.

    For stacked experts both have the axis of experts before.
    """

    b: torch.Tensor
    a: torch.Tensor


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
        device = self.base.device if device is None else device
        total = dense(self.base).to(device=device, dtype=dtype, copy=True).contiguous()
        if which == "base":
            return total
        collapsed = self.dense_slow if which == "slow" else self.dense_start
        terms = list(zip(self.slow if which == "slow" else self.start, self.experts, strict=True))
        pairs = [(coefficient, expert.factors) for coefficient, expert in terms if coefficient != 0]
        if which == "fast" and live is not None:
            pairs.append((1.0, live))
        matrix = total.view(self.matrix)
        if collapsed is not None:
            matrix += collapsed.to(device=device, dtype=dtype)
        if pairs:
            b = torch.cat([factors.b.to(device=device, dtype=dtype) * c for c, factors in pairs], dim=-1)
            a = torch.cat([factors.a.to(device=device, dtype=dtype) for _, factors in pairs], dim=-2)
            matrix += b @ a
        for each in self.kept:
            values = draw(each.noise, each.seed, each.stage, self.name, total.shape)
            total += values.to(device=device, dtype=dtype) * each.amplitude
        return total

    def absorb(self, stage: int, live: Factors | None, pace: float, restart: Restart) -> SlowWeight:
        """Return the state after the slow update: `S_t = S_{t-1} + pace * (F_t - S_{t-1})` (algorithm.md).

        `live` is None for a weight whose branch is left out, or that has none.
        """
        experts, moved = self.experts, self.start
        if live is not None:
            experts, moved = (*experts, Expert(stage, live)), (*moved, 1.0)
        old = (*self.slow, *([0.0] * (len(moved) - len(self.slow))))
        slow = tuple(s if s == f else s + pace * (f - s) for s, f in zip(old, moved, strict=True))
        collapsed = self.dense_slow
        if collapsed is not None and self.dense_start is not None and self.dense_start is not collapsed:
            collapsed = torch.lerp(collapsed, self.dense_start, pace)
        start = slow if restart == "slow" else moved
        dense_start = collapsed if restart == "slow" else self.dense_start
        after = replace(self, experts=experts, slow=slow, start=start, dense_slow=collapsed, dense_start=dense_start)
        return after.collapsed() if after.crowded else after

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
        """Whether the experts together hold more numbers than the weight itself; those of a quantized one stay."""
        if is_quantized(self.base):
            return False
        ranks = sum(expert.factors.a.shape[-2] for expert in self.experts)
        rows, columns = self.matrix[-2:]
        return ranks * (rows + columns) > rows * columns

    def collapsed(self) -> SlowWeight:
        """Return the same state with its experts summed into one dense delta (two where start differs from slow)."""
        slow = self._sum(self.slow, self.dense_slow)
        same = self.start == self.slow and self.dense_start is self.dense_slow
        start = slow if same else self._sum(self.start, self.dense_start)
        return replace(self, experts=(), slow=(), start=(), dense_slow=slow, dense_start=start)

    def _sum(self, coefficients: Sequence[float], before: torch.Tensor | None) -> torch.Tensor:
        dtype = arithmetic(self.base.dtype)
        total = torch.zeros(self.matrix, dtype=dtype) if before is None else before.clone()
        for coefficient, expert in zip(coefficients, self.experts, strict=True):
            total += (expert.factors.b.to(dtype) * coefficient) @ expert.factors.a.to(dtype)
        return total


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which weights of this dtype are computed: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
