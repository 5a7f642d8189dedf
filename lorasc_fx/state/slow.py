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
from typing import Any, Literal

import torch

from lorasc_fx.branch.base import dense, is_quantized
from lorasc_fx.branch.noise import draw
from lorasc_fx.shards import Rows
from lorasc_fx.spec import Restart
from lorasc_fx.state.kept import Began, Expert, Factors, KeptNoise, Past, pruned
from lorasc_fx.state.products import accumulate, exact_products, joined, summing
from lorasc_fx.state.turns import Turn, along, grown, scaled, times

__all__ = ["SlowWeight", "Which"]

Which = Literal["slow", "fast", "base", "averaged"]


@dataclass(frozen=True)
class SlowWeight:
    """W0 with what the stages added.

    Args:
        name: of the weight.
        base: W0, in the weight's own dtype; never written to.
        stacked: the first axis counts experts.
        turned: it is stored as [in, out].
        turns: row scales of the stages under DoRA, since the dense collapse.
        rows: the row scale of W0 [out] at the dense collapse, in fp64.
        experts: the trained branches, oldest first.
        slow, start: one coefficient per expert.
        dense_slow, dense_start: what was left of experts at the dense collapse, [out, columns].
        kept: noise that stays.
        past: the slow coefficients at the end of each stage, oldest first.
        began: where the running stage began; None for B = 0.
        average: one coefficient per expert, of the average of the slow weights over stages; None where it is the slow
            weights. dense_average: its dense delta, after a collapse.
        part: which rows of the weight all of this is of, where other processes hold the others.
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
    began: Began | None = None
    turned: bool = False
    turns: tuple[Turn, ...] = ()
    rows: torch.Tensor | None = None
    average: tuple[float, ...] | None = None
    dense_average: torch.Tensor | None = None
    part: Rows | None = None

    def every(self, flag: bool) -> bool:
        """Whether it holds here, and on every process that holds rows of this weight."""
        return flag if self.part is None else self.part.together.every(flag)

    def exact(
        self,
        which: Which,
        dtype: torch.dtype,
        live: Factors | None = None,
        device: torch.device | None = None,
        gain: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return W0 + delta in the dtype of the arithmetic, before the one rounding.

        `fast` is the start of the running stage plus `live`, the running branch (F_t of algorithm.md), with rows scaled
        by the `gain` [out] of one that has magnitudes.
        """
        total = torch.empty(self.base.shape, dtype=dtype, device=self.base.device if device is None else device)
        self.write(total, which, dtype, live, gain)
        return total

    def write(
        self,
        out: torch.Tensor,
        which: Which,
        dtype: torch.dtype,
        live: Factors | None = None,
        gain: torch.Tensor | None = None,
    ) -> None:
        """Write what `exact` returns into `out`, of the weight's shape; computed in `dtype`, rounded once to that of
        `out`.
        """
        if which == "base":
            out.copy_(dense(self.base))
            return
        if self.kept and out.dtype != dtype:
            out.copy_(self.exact(which, dtype, live, out.device))
            return
        base, delta, pairs = self.terms(which, live, gain)
        pair = joined(pairs, dtype, out.device) if pairs else None
        delta = delta.view(self.base.shape) if delta is not None else None
        kept = self.kept
        draws = (draw(each.noise, each.seed, each.stage, self.name, out.shape, part=self.part).to(out) for each in kept)
        noise = next(draws, None)  # before anything is written: where there is no memory for it, `out` is as it was
        accumulate(out, base, dtype, delta, pair, self.stacked)
        for each in self.kept:
            assert noise is not None
            out += noise.mul_(each.amplitude)
            noise = None  # one at a time
            noise = next(draws, None)

    def terms(
        self, which: Which, live: Factors | None = None, gain: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[tuple[float, Factors]]]:
        """Return what slow, fast or averaged weights are the sum of: W0, the dense delta, and pairs with their
        coefficients; under DoRA each with its rows scaled.
        """
        coefficients, delta = self.vector(which)
        base, pairs = dense(self.base), self._pairs(coefficients, gain)
        if which == "fast" and live is not None:
            pairs.append((1.0, scaled(live, gain, self.turned)))
        if delta is not None and (rows := times(grown(self.turns), gain)) is not None:
            delta = along(rows, delta, self.turned)
        if (rows := self.scale(gain)) is not None:
            base = along(rows, base.double(), self.turned)
        return base, delta, pairs

    def vector(self, which: Which) -> tuple[tuple[float, ...], torch.Tensor | None]:
        """Return the coefficients of slow, fast or averaged weights, and the dense delta beside the experts."""
        if which == "averaged" and self.average is not None:
            return self.average, self.dense_average
        return (self.start, self.dense_start) if which == "fast" else (self.slow, self.dense_slow)

    def _pairs(self, coefficients: Sequence[float], gain: torch.Tensor | None = None) -> list[tuple[float, Factors]]:
        both = enumerate(zip(coefficients, self.experts, strict=True))
        rows = [times(grown(self.turns, place), gain) for place in range(len(self.experts))]
        return [(c, scaled(each.factors, rows[i], self.turned)) for i, (c, each) in both if c != 0]

    def scale(self, gain: torch.Tensor | None = None) -> torch.Tensor | None:
        """Return the row scale of W0 [out] in fp64, times a gain; None where its rows are as they were."""
        return times(times(self.rows, grown(self.turns)), gain)

    def absorb(
        self,
        stage: int,
        live: Factors | None,
        pace: float,
        restart: Restart,
        share: float | None = None,
        gain: torch.Tensor | None = None,
    ) -> SlowWeight:
        """Return the state after the slow update: `S_t = S_{t-1} + pace * (F_t - S_{t-1})` (algorithm.md).

        `live` is None for a weight whose branch is left out, or that has none. One that is zero, as it started, is not
        kept: a longer product sums in another order, and a stage that trains nothing moves no weight. With a `share`
        the average takes so much of S_t. `gain` [out] is the row scale of a branch with magnitudes (`state.turns`).
        """
        if live is not None and gain is not None:
            turn, pair = Turn(stage, len(self.experts), 1 - pace + pace * gain), scaled(live, gain, self.turned)
            own = replace(self, turns=(*self.turns, turn))
            return own.absorb(stage, Factors(pair.b.to(live.b.dtype), pair.a.to(live.a.dtype)), pace, restart)
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
        after = replace(after, past=pruned((*past, Past(stage, slow))), began=None)
        after = after if share is None else replace(after, **self._averaged(after, share))
        return after.collapsed() if after.crowded else after

    def _averaged(self, after: SlowWeight, share: float) -> dict[str, Any]:
        """Return what the average becomes: `average + share * (S_t - average)`."""
        if share == 1:
            return {"average": None, "dense_average": None}
        average, delta = self.vector("averaged")
        average = (*average, *([0.0] * (len(after.slow) - len(average))))
        mixed = tuple(a if a == s else a + share * (s - a) for a, s in zip(average, after.slow, strict=True))
        if delta is not None and after.dense_slow is not None and delta is not after.dense_slow:
            delta = torch.lerp(delta, after.dense_slow, share)
        return {"average": mixed, "dense_average": delta}

    def reach(self, which: Literal["slow", "start"]) -> float:
        """Return a number that no entry of the weight has moved by, seen from W0."""
        if self.scale() is not None:
            return math.inf
        coefficients, delta = (self.slow, self.dense_slow) if which == "slow" else (self.start, self.dense_start)
        total = sum(abs(c) * expert.factors.bound for c, expert in zip(coefficients, self.experts, strict=True) if c)
        if delta is not None and delta.numel():
            total += max(abs(each.item()) for each in torch.aminmax(delta))
        return total + sum(8 * each.amplitude for each in self.kept)

    def at(self, stage: int) -> SlowWeight | None:
        """Return the state at the end of a stage (0: W0), as both slow and start; None where its experts are gone.

        A weight that was not known yet had no delta.
        """
        gone = max((each.stage for each in self.past if each.slow is None), default=0)
        if 0 < stage <= gone:
            return None
        past = tuple(each for each in self.past if each.stage <= stage)
        if not past:
            return SlowWeight(self.name, self.base, self.stacked, turned=self.turned, part=self.part)
        slow = past[-1].slow
        if slow is None:
            return None
        kept = tuple(each for each in self.kept if each.stage <= stage)
        turns = tuple(each for each in self.turns if each.stage <= stage)
        after = replace(self, experts=self.experts[: len(slow)], slow=slow, start=slow, kept=kept, past=past)
        after = replace(after, dense_start=self.dense_slow, began=None, turns=turns)
        return replace(after, average=None, dense_average=None)

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
    def taken_out(self) -> Factors | None:
        """What is added to the start of the running stage so that its branch adds nothing: `- s B_0 A_0`."""
        taken = self.began.factors if self.began is not None else None
        return Factors(-taken.b, taken.a) if taken is not None else None

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
        if self.part is not None and not self.stacked:  # so that all processes come to the same
            whole = self.part.shape_of_whole(self.base.shape)
            rows, columns = whole[0], math.prod(whole[1:])
        return ranks * (rows + columns) > rows * columns

    def collapsed(self) -> SlowWeight:
        """Return the same state with its experts summed into one dense delta (two where start differs from slow)."""
        slow = self._sum(self.slow, self.dense_slow)
        same = self.start == self.slow and self.dense_start is self.dense_slow
        start = slow if same else self._sum(self.start, self.dense_start)
        last = max((turn.stage for turn in self.turns), default=0)
        ends = [(each.stage, each.slow == self.slow and each.stage >= last) for each in self.past]
        past = pruned(tuple(Past(stage, () if is_now else None) for stage, is_now in ends))
        after = replace(self, experts=(), slow=(), start=(), dense_slow=slow, dense_start=start, past=past)
        after = replace(after, turns=(), rows=self.scale())
        if self.average is None:
            return after
        return replace(after, average=(), dense_average=self._sum(self.average, self.dense_average))

    def _sum(self, coefficients: Sequence[float], before: torch.Tensor | None) -> torch.Tensor:
        dtype = summing(self.base.dtype)
        pairs, rows = self._pairs(coefficients), grown(self.turns)
        like = self.experts[0].factors.b if before is None else before
        total = (
            torch.zeros(self.matrix, dtype=dtype, device=like.device) if before is None else before.to(dtype, copy=True)
        )
        if before is not None and rows is not None:
            total = along(rows, total, self.turned)
        if not pairs:
            return total
        b, a = joined(pairs, dtype, total.device)
        with exact_products(total):
            total.baddbmm_(b, a) if self.stacked else total.addmm_(b, a)
        return total
