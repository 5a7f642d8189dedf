"""The state of one weight: W0, the experts that stages added, and views (coefficients over the experts).

Algorithm.md, "The slow state is small": slow and fast weights, averages and the ends of earlier stages are coefficient
vectors over the same experts. A state is immutable: `absorb` returns the next one, so a transition that fails changes
nothing. Every weight is computed from W0 and rounded once.

A parameter trained in full is a weight without experts. The dense tensor of its views is its value itself, not the
difference from W0, so it is restored bit for bit.

The metadata of a field with tensors says how they are laid out beside the weight (`Side`). `Tree.map` visits all of
them: moving, slicing and gathering a state are calls of it.

Under DoRA a stage multiplies the rows of the weight that it started from. With p the pace and g the gain of the branch,
`S_t + W0 = (1 - p) W_{t-1} + p diag(g) (W_{t-1} + s B A) = diag(1 - p + p g) W_{t-1} + p diag(g) s B A`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Literal

import torch

from lorasc_fx.branch.factors import Delta, Factors, InitialFactors, Side, Tree
from lorasc_fx.branch.noise import add_noise, draw
from lorasc_fx.options import RESTARTS, split_evenly
from lorasc_fx.quantized import dense, is_quantized
from lorasc_fx.shards import WHOLE, ShardSpec, local
from lorasc_fx.spec import CascadeSpec, Noise, TrainRule
from lorasc_fx.state.products import accumulate, arithmetic, cast, exact_products, summing

ViewName = Literal["slow", "fast", "base", "averaged"]

log = logging.getLogger("lorasc_fx")

MAX_ENDS = 100
"""Number of stages whose final value a parameter trained in full keeps: the latest ones."""


@dataclass(frozen=True)
class Expert(Factors):
    """The delta of one stage.

    Args:
        stage: the stage that trained it; 0 if it was trained elsewhere.
        row_scale: [out] in fp64, for DoRA: the stage multiplied the rows of W0 and of all earlier experts by it. A
            stage that trained only magnitudes leaves an expert of rank 0.
    """

    stage: int = 0
    row_scale: torch.Tensor | None = field(default=None, metadata={Side: Side.OUT})


@dataclass(frozen=True)
class View(Tree):
    """One value of a weight.

    Args:
        coefficients: one for each expert that existed then.
        dense: what summed experts have added, [rows, columns]. For a parameter trained in full, the value itself.
    """

    coefficients: tuple[float, ...] = ()
    dense: torch.Tensor | None = field(default=None, metadata={Side: Side.WEIGHT})

    def to(self, dtype: torch.dtype) -> View:
        """Return the view with its dense tensor in a dtype. If it has that dtype already, it is returned unchanged."""
        return self if self.dense is None or self.dense.dtype == dtype else replace(self, dense=self.dense.to(dtype))

    def extended(self, more: Sequence[float]) -> View:
        """Return the view with the coefficients of more experts."""
        return replace(self, coefficients=(*self.coefficients, *more))

    def toward(self, other: View, share: float) -> View:
        """Return `self + share * (other - self)`. The coefficient of an expert that only `other` has is 0 here."""
        missing = len(other.coefficients) - len(self.coefficients)
        pairs = zip(self.extended([0.0] * missing).coefficients, other.coefficients, strict=True)
        delta = self.dense
        if other.dense is not None and delta is not other.dense:
            delta = torch.zeros_like(other.dense) if delta is None else delta
            delta = other.dense if share == 1 else torch.lerp(delta, other.dense, share)
        return View(tuple(s if s == f else s + share * (f - s) for s, f in pairs), delta)

    def plus(self, other: View, factor: float) -> View:
        """Return `self + factor * other`; a missing coefficient is 0, and so is a missing dense tensor."""
        pairs = zip_longest(self.coefficients, other.coefficients, fillvalue=0.0)
        delta = self.dense
        if other.dense is not None:
            delta = factor * other.dense if delta is None else delta + factor * other.dense
        return View(tuple(one + factor * more for one, more in pairs), delta)


@dataclass(frozen=True)
class KeptNoise:
    """The noise of a stage that stays in the weights (noise.keep): its address and amplitude, not its values."""

    noise: Noise
    seed: int
    stage: int
    amplitude: float


@dataclass(frozen=True)
class SlowRule:
    """How a stage that ends changes the slow weights: `S_t = S_{t-1} + pace * (F_t - S_{t-1})` (algorithm.md).

    With momentum m it is Nesterov's (SNOO, 2510.15830): `d_t = F_t - S_{t-1}`, `v_t = m v_{t-1} + d_t` and
    `S_t = S_{t-1} + pace * (d_t + m v_t)`.

    Args:
        stage: that ends.
        pace, restart, momentum, carry_rank: of the spec, in this stage.
        share: of S_t in the average over stages; None if no average is kept.
        keeps: whether a parameter trained in full keeps its values at the ends of earlier stages.
    """

    stage: int
    pace: float
    restart: str = "slow"
    momentum: float = 0.0
    carry_rank: int | None = None
    share: float | None = None
    keeps: bool = False


@dataclass(frozen=True)
class WeightState(Tree):
    """W0 with what the stages added.

    Args:
        name: name of the weight.
        base: W0 in the weight's dtype. It is never written.
        stacked: whether the first axis counts matrices (a mixture of experts).
        transposed: whether the weight is stored as [in, out].
        experts: the trained branches, oldest first.
        views: by name. `slow`; `start`, from which the running stage started; `average` over stages, unless it equals
            the slow weights; `velocity`, v of the slow rule with momentum; `stage/K`, the slow weights at the end of
            stage K.
        gone: the last stage whose end has no view any more, because its experts were summed into a dense delta.
        row_scale: row scale of W0, [out] in fp64, at the time when experts were summed.
        noises: the noise that stays in the weight.
        initial: initial factors of the running stage. None if its branch started at B = 0.
        shard: the slice of the weight on this rank.
        full: whether the weight is trained in full. Then there are no experts and no noise.
        rule: for a parameter trained in full, the first of the spec's train_rules that matches it.
    """

    name: str
    base: torch.Tensor = field(metadata={Side: Side.WEIGHT})
    stacked: bool = False
    transposed: bool = False
    experts: tuple[Expert, ...] = ()
    views: Mapping[str, View] = field(default_factory=lambda: dict.fromkeys(("slow", "start"), View()))
    gone: int = 0
    row_scale: torch.Tensor | None = field(default=None, metadata={Side: Side.OUT})
    noises: tuple[KeptNoise, ...] = ()
    initial: InitialFactors | None = None
    shard: ShardSpec = WHOLE
    full: bool = False
    rule: TrainRule | None = None

    # ---- a parameter trained in full

    def holding(self, value: torch.Tensor) -> WeightState:
        """Return the state of a parameter trained in full whose stage starts from a value. Earlier ends are dropped."""
        dtype = arithmetic(self.base.dtype)
        slow = View((), value.to(dtype))
        start = slow if self.base.dtype == dtype else View((), value.to(self.base.dtype))
        return replace(self, views={"slow": slow, "start": start}, gone=max((self.gone, *self.ends)), full=True)

    def follows(self, spec: CascadeSpec) -> bool:
        """Whether the slow weights follow the pace of the spec. Otherwise they equal the fast weights."""
        return not self.full or (spec.slow_train if self.rule is None or self.rule.slow is None else self.rule.slow)

    def broken(self, value: torch.Tensor) -> bool:
        """Whether a value has an inf or nan where W0 has none."""
        return bool((~torch.isfinite(value) & torch.isfinite(self.base)).any())

    # ---- views

    @property
    def slow(self) -> View:
        """The slow weights."""
        return self.views["slow"]

    @property
    def start(self) -> View:
        """The weights from which the running stage started, without noise."""
        return self.views["start"]

    @property
    def start_differs(self) -> bool:
        """Whether the running stage started from other weights than the slow ones."""
        start, slow = self.start, self.slow
        return start.coefficients != slow.coefficients or start.dense is not slow.dense

    def differs_from_slow(self, noisy: bool) -> bool:
        """Whether the parameter holds other numbers than the slow weights while the stage runs."""
        return noisy or self.initial is not None or self.start_differs

    def view(self, name: ViewName) -> View:
        """Return the view of slow, fast or averaged weights. Fast weights are `start` plus the running branch."""
        if name == "averaged" and "average" in self.views:
            return self.views["average"]
        return self.views["start" if name == "fast" else "slow"]

    @property
    def ends(self) -> Mapping[int, View]:
        """The views at the ends of stages, by stage, oldest first."""
        return {int(name.removeprefix("stage/")): view for name, view in self.views.items() if "/" in name}

    # ---- values

    def exact(
        self,
        view: ViewName,
        dtype: torch.dtype,
        running: Delta | torch.Tensor | None = None,
        device: torch.device | None = None,
    ) -> torch.Tensor:
        """Return W0 + delta in the dtype of the arithmetic, before it is rounded.

        `fast` is the start of the running stage plus `running`, the delta of the running branch (F_t of algorithm.md).
        For a parameter trained in full, `running` is its current value.
        """
        total = torch.empty(self.base.shape, dtype=dtype, device=self.base.device if device is None else device)
        self.write(total, view, dtype, running)
        return total

    def write(
        self,
        out: torch.Tensor,
        view: ViewName,
        dtype: torch.dtype,
        running: Delta | torch.Tensor | None = None,
    ) -> None:
        """Compute the weight in `dtype`, like `exact`, and write it into `out`, rounded once to the dtype of `out`."""
        if view == "base":
            out.copy_(dense(self.base))
            return
        if self.full:
            value = self.view(view).dense if view != "fast" or running is None else running
            assert isinstance(value, torch.Tensor)
            out.copy_(value)
            return
        assert not isinstance(running, torch.Tensor)
        if self.noises and out.dtype != dtype:  # noise is added last, and the sum is rounded once
            out.copy_(self.exact(view, dtype, running, out.device))
            return
        base, delta, pairs = self.terms(view, running)
        pair = sum_of(pairs, dtype, out.device) if pairs else None
        delta = delta.view(self.base.shape) if delta is not None else None
        accumulate(out, base, dtype, delta, None if pair is None else (pair.b, pair.a), self.stacked)
        for kept in self.noises:
            drawn = draw(kept.noise, kept.seed, kept.stage, self.name, out.shape, 0, self.shard, out.device)
            add_noise(out, drawn, kept.amplitude)

    def terms(
        self, view: ViewName, running: Delta | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[tuple[float, Factors]]]:
        """Return W0, the dense delta, and pairs of coefficient and factors, whose sum are the weights of a view.

        If a method scales rows, each term has its rows scaled.
        """
        running = running if view == "fast" and running is not None else Delta()
        stored, gain = self.view(view), running.gain
        base, delta, pairs = dense(self.base), stored.dense, self._pairs(stored, gain)
        if running.factors is not None:
            pairs.append((1.0, scaled(running.factors, gain, self.transposed)))
        if delta is not None and (rows := self._scale_since(0, gain)) is not None:
            delta = _along(rows, delta, self.transposed)
        if running.dense is not None:
            more = running.dense.reshape(self.matrix)
            more = more if gain is None else _along(gain, more, self.transposed)
            delta = more if delta is None else delta.to(more) + more
        if (rows := self._scale_since(0, self.row_scale, gain)) is not None:
            base = _along(rows, base.cpu().double(), self.transposed)
        return base, delta, pairs

    def _pairs(self, view: View, gain: torch.Tensor | None = None) -> list[tuple[float, Factors]]:
        return [
            (c, scaled(expert, self._scale_since(index + 1, gain), self.transposed))
            for index, (c, expert) in enumerate(zip(view.coefficients, self.experts, strict=True))
            if c != 0 and expert.rank
        ]

    def _scale_since(self, index: int, *more: torch.Tensor | None) -> torch.Tensor | None:
        """Return the product of the row scales of the experts from this index on, and of more; None without any."""
        scales = [expert.row_scale for expert in self.experts[index:] if expert.row_scale is not None]
        product = torch.stack(scales).prod(0) if scales else None
        for scale in more:
            if scale is not None:
                product = scale if product is None else product * scale
        return product

    def scale(self, gain: torch.Tensor | None = None) -> torch.Tensor | None:
        """Return the row scale of W0 [out] in fp64, times a gain. None if its rows are not scaled."""
        return self._scale_since(0, self.row_scale, gain)

    def fits(self) -> bool:
        """Whether the slow and the start weights, rounded to the dtype of W0, are finite wherever W0 is.

        A sum over all entries is computed only if a bound on the change is not small enough: a change smaller than half
        the distance of the two largest numbers of the dtype makes no finite number infinite.
        """
        if is_quantized(self.base):
            return all(math.isfinite(expert.bound) for expert in self.experts)
        limits = torch.finfo(self.base.dtype)
        if not self.full and self.scale() is None:
            noise = sum(8 * kept.amplitude for kept in self.noises)
            bounds = []
            for view in (self.slow, self.start):
                experts = zip(view.coefficients, self.experts, strict=True)
                bound = sum(abs(c) * expert.bound for c, expert in experts if c)
                if view.dense is not None and view.dense.numel():
                    bound += max(abs(extreme.item()) for extreme in torch.aminmax(view.dense))
                bounds.append(bound + noise)
            if all(bound < limits.max * limits.eps / 8 for bound in bounds):
                return True
        names: tuple[ViewName, ...] = ("slow", "fast") if self.start_differs else ("slow",)
        exact = arithmetic(self.base.dtype)
        return not any(self.broken(self.exact(name, exact).to(self.base.dtype)) for name in names)

    def unmerged(self, view: Literal["slow", "start"]) -> Factors | None:
        """Return what the stages added to a quantized weight, as one pair of factors. None if there is nothing, and for
        weights that are not quantized, because these hold it themselves.
        """
        pairs = self._pairs(self.views[view]) if is_quantized(self.base) else []
        return sum_of(pairs, pairs[0][1].b.dtype, pairs[0][1].b.device) if pairs else None

    @property
    def beside(self) -> Factors | None:
        """What the branch of a quantized weight adds beside it while the stage runs: the deltas of earlier stages,
        minus the factors that the branch started from.
        """
        pair, residual = self.unmerged("start"), self.residual
        if pair is None or residual is None or residual.factors is None:
            return pair
        total = sum_of([(1.0, pair), (1.0, residual.factors)], torch.float64, torch.device("cpu"))
        rest, _ = nearest_pair(total, None, 1e-5 * pair.bound)
        return rest.map(lambda factor, _: cast(factor, pair.b.dtype, pair.b.device)) if rest.rank else None

    @property
    def residual(self) -> Delta | None:
        """What is added to the start weight while the stage trains, because its branch starts at `s B_0 A_0`: the
        negative of that. None if the branch starts at zero.
        """
        taken = self.initial.factors if self.initial is not None else None
        return Delta(Factors(-taken.b, taken.a)) if taken is not None else None

    @property
    def changed(self) -> bool:
        """Whether the stages left anything in the weight."""
        return bool(self.experts or self.noises) or self.slow.dense is not None or self.scale() is not None

    # ---- the next state

    def absorb(self, running: Delta | torch.Tensor | None, rule: SlowRule) -> WeightState:
        """Return the state after the slow update. The velocity of a rule with momentum is one more view.

        Zero factors are dropped: a longer product sums in another order, so weights would not stay bit-identical.

        Args:
            running: the delta of the branch, or the value of a parameter trained in full. None for a weight without a
                branch, and for one whose training is dropped.
            rule: the slow update of the stage that ends.
        """
        experts, old, moved, stage, pace = self.experts, self.slow, self.start, rule.stage, rule.pace
        if isinstance(running, torch.Tensor):
            assert old.dense is not None
            moved = View((), running.to(old.dense.dtype))
        elif self.full:
            moved = old
        elif running is not None and running.factors is not None:
            pair, row_scale = running.factors, None
            if running.gain is not None:
                wide, row_scale = scaled(pair, running.gain, self.transposed), 1 - pace + pace * running.gain
                pair = Factors(wide.b.to(pair.b.dtype), wide.a.to(pair.a.dtype))
            if not self.shard.group.all(not pair.b.any()):
                experts, moved = (*experts, Expert(pair.b, pair.a, stage, row_scale)), moved.extended((1.0,))
            elif row_scale is not None:
                b, a = pair.b[..., :0].clone(), pair.a[..., :0, :].clone()
                experts = (*experts, Expert(b, a, stage, row_scale))
                old, moved = old.extended((1.0,)), moved.extended((1.0,))
        elif running is not None and running.dense is not None:
            more = running.dense.reshape(self.matrix).to(summing(self.base.dtype))
            moved = moved.plus(View(dense=more), 1.0)
        slow, velocity = old.toward(moved, pace), self.views.get("velocity")
        if rule.momentum:
            step = moved.plus(old, -1.0)
            velocity = step if velocity is None else step.plus(velocity, rule.momentum)
            slow = slow.plus(velocity, pace * rule.momentum)
        start = RESTARTS[rule.restart].start(slow, moved)
        if self.full:  # what the parameter then holds, in its own dtype
            start = start.to(running.dtype) if isinstance(running, torch.Tensor) else self.start
        views, gone, ends = {"slow": slow, "start": start}, self.gone, dict(self.ends)
        # Earlier ends are vectors over the same experts. Once the dense tensor changes, they have no base any more.
        if slow.dense is not self.slow.dense:
            for end in list(ends)[: 1 - MAX_ENDS if rule.keeps and self.full else None]:
                gone = max(gone, end)
                del ends[end]
        views |= {f"stage/{end}": view for end, view in ends.items()} | {f"stage/{stage}": slow}
        if velocity is not None:
            views["velocity"] = velocity
        if rule.share is not None and rule.share != 1:  # with a share of 1 the average is S_t, and needs no view
            views["average"] = self.view("averaged").toward(slow, rule.share)
        elif rule.share is None and "average" in self.views:
            views["average"] = self.views["average"]
        return replace(self, experts=experts, views=views, gone=gone, initial=None).compact(rule.carry_rank)

    def added(self, experts: Sequence[Expert], coefficients: Sequence[float]) -> WeightState:
        """Return the state with experts that were trained elsewhere. The ends of stages do not get them."""
        views = {name: view.extended(coefficients) for name, view in self.views.items() if "/" not in name}
        views |= {name: view for name, view in self.views.items() if "/" in name}
        if "velocity" in self.views:  # these experts are not a step of this run
            views["velocity"] = self.views["velocity"].extended([0.0] * len(coefficients))
        return replace(self, experts=(*self.experts, *experts), views=views).compact()

    def at(self, stage: int) -> WeightState | None:
        """Return the state at the end of a stage (0: W0), as both slow and start. None if that end was dropped.

        A weight that was added in a later stage had no delta then.
        """
        if 0 < stage <= self.gone:
            return None
        ends = {end: view for end, view in self.ends.items() if end <= stage}
        if not ends:
            return self.bare() if stage == 0 or not self.gone else None
        view = ends[max(ends)]
        views = {"slow": view, "start": view} | {f"stage/{end}": past for end, past in ends.items()}
        noises = tuple(noise for noise in self.noises if noise.stage <= stage)
        experts = self.experts[: len(view.coefficients)]
        if self.full:
            views["start"] = view.to(self.base.dtype)
        return replace(self, experts=experts, views=views, noises=noises, initial=None)

    def bare(self, base: torch.Tensor | None = None) -> WeightState:
        """Return the state of the weight before the first stage, with another W0 if one is given."""
        base = self.base if base is None else base
        kept = self.name, base, self.stacked, self.transposed
        bare = WeightState(*kept, shard=self.shard, full=self.full, rule=self.rule)
        return bare.holding(base) if self.full else bare

    @property
    def matrix(self) -> tuple[int, ...]:
        """Shape of the weight as a matrix [rows, columns] or a stack of matrices. If trained in full, its own shape."""
        if self.full:
            return tuple(self.base.shape)
        stack, (first, *rest) = (self.base.shape[:1], self.base.shape[1:]) if self.stacked else ((), self.base.shape)
        return (*stack, first, math.prod(rest))

    @property
    def out(self) -> int:
        """Number of outputs: the length of a row scale."""
        return self.matrix[-1 if self.transposed else -2]

    def compact(self, carry_rank: int | None = None) -> WeightState:
        """Return the state with its experts summed if they need more memory than the sum.

        Args:
            carry_rank: of the spec, for quantized weights: the largest rank that is kept beside them.
        """
        ranks = sum(expert.rank for expert in self.experts)
        if is_quantized(self.base):
            rank = min(*self.matrix[-2:], *(() if carry_rank is None else (carry_rank,)))
            return self._collapsed(rank) if ranks > rank else self
        if self.slow.dense is not None:  # they are added to the dense delta that exists already
            return self._collapsed() if ranks else self
        # Sizes of the full weight, so that all ranks decide alike.
        rows, *rest = self.shard.full_shape(self.base.shape)[1 if self.stacked else 0 :]
        columns = math.prod(rest)
        return self._collapsed() if ranks * (rows + columns) > rows * columns else self

    def _collapsed(self, rank: int | None = None) -> WeightState:
        """Return the same state with one sum of experts for each view that differs.

        Args:
            rank: for a quantized weight, which needs low-rank sums. Otherwise the sums are dense.
        """
        current = {name: view for name, view in self.views.items() if "/" not in name}
        if not self.start_differs:
            del current["start"]
        experts: tuple[Expert, ...] = ()
        if rank is not None:
            stage = max(expert.stage for expert in self.experts)
            experts = tuple(self._low_rank(view, rank, stage) for view in current.values())
            summed = {name: View(tuple(float(name == other) for other in current)) for name in current}
        else:
            summed = {name: View((), self._sum(view)) for name, view in current.items()}
        slow = summed["slow"]
        # An end before the last row scale had other rows of W0, so the collapsed state cannot express it.
        last = max((expert.stage for expert in self.experts if expert.row_scale is not None), default=0)
        ends = self.ends
        same_ends = [end for end, view in ends.items() if view.coefficients == self.slow.coefficients and end >= last]
        gone = max((self.gone, *(end for end in ends if end not in same_ends)))
        views = {"slow": slow, "start": slow, **summed} | {f"stage/{end}": slow for end in same_ends}
        return replace(self, experts=experts, views=views, gone=gone, row_scale=self.scale())

    def _low_rank(self, view: View, rank: int, stage: int) -> Expert:
        """Return the expert of at most this rank that is nearest to the delta of a view."""
        dtype, pairs = summing(self.base.dtype), self._pairs(view)
        if not pairs:
            b, a = self.experts[0].b[..., :0], self.experts[0].a[..., :0, :]
            return Expert(b.to(dtype), a.to(dtype), stage)
        pair, share = nearest_pair(sum_of(pairs, torch.float64, torch.device("cpu")), rank)
        if share > 1e-6:
            text = "%s carries its delta at rank %d: %.3g %% of its norm is left out"
            log.info(text, self.name, pair.rank, 100 * share)
        device = pairs[0][1].b.device
        return Expert(cast(pair.b, dtype, device), cast(pair.a, dtype, device), stage)

    def _sum(self, view: View) -> torch.Tensor:
        dtype, before = summing(self.base.dtype), view.dense
        pairs, rows = self._pairs(view), self._scale_since(0)
        like = self.experts[0].b if before is None else before
        total = (
            torch.zeros(self.matrix, dtype=dtype, device=like.device) if before is None else before.to(dtype, copy=True)
        )
        if before is not None and rows is not None:
            total = _along(rows, total, self.transposed)
        if not pairs:
            return total
        pair = sum_of(pairs, dtype, total.device)
        with exact_products(total):
            total.baddbmm_(pair.b, pair.a) if self.stacked else total.addmm_(pair.b, pair.a)
        return total

    # ---- shards

    def axis(self, side: Side) -> int | None:
        """Return the axis along which a tensor of this side is sharded. None if each rank has all of it."""
        return None if self.shard.axis is None else side.axis(self.shard.axis, self.stacked, self.transposed)

    def to_shard(self, shard: ShardSpec, mapped: bool = False) -> WeightState:
        """Return a copy of the state for the slice on this rank. If `mapped`, W0 stays memory-mapped."""
        part = replace(self, shard=shard)

        def here(value: torch.Tensor, side: Side) -> torch.Tensor:
            return part.cut(value, side, copied=not (mapped and not self.full and value is self.base))

        return replace(part.map(here), shard=shard)

    def cut(self, value: torch.Tensor, side: Side, copied: bool = True) -> torch.Tensor:
        """Return this rank's slice of a full tensor of this side, as a copy if `copied`."""
        axis = self.axis(side)
        if axis is None:
            return value
        here = value.narrow(axis, self.shard.first, self.shard.count)
        return here.clone() if copied else here

    def whole(self, value: torch.Tensor, side: Side) -> torch.Tensor:
        """Return the full tensor of this rank's slice. Every rank must call this at the same point."""
        axis = self.axis(side)
        return replace(self.shard, axis=axis).whole(value)

    # ---- faults

    def faults(self) -> list[str]:
        """Return what is wrong with a state from a checkpoint, each as the end of a sentence about the slow state."""
        sentences = []
        counts = {name: len(view.coefficients) for name, view in self.views.items() if "/" not in name}
        if not len(self.experts) == counts["slow"] == counts["start"]:
            coefficients = f"{counts['slow']} slow and {counts['start']} start coefficients"
            sentences.append(f"has {len(self.experts)} experts, but {coefficients}")
        for name in ("average", "velocity"):
            if counts.get(name, len(self.experts)) != len(self.experts):
                sentences.append(f"has {len(self.experts)} experts, but {counts[name]} coefficients of the {name}")
        for expert in self.experts:
            *stack, rows, columns = self.matrix
            b, a = tuple(expert.b.shape), tuple(expert.a.shape)
            rank = a[-2] if len(a) > 1 else 0
            if b != (*stack, rows, rank) or a != (*stack, rank, columns):
                sentences.append(
                    f"has an expert of stage {expert.stage} of {b} and {a}, which is no delta of {self.matrix}"
                )
        deltas = [view.dense for view in self.views.values() if view.dense is not None]
        for delta in {id(delta): delta for delta in deltas}.values():
            if tuple(delta.shape) != self.matrix:
                sentences.append(f"has a dense delta of {tuple(delta.shape)}, which is none of {self.matrix}")
        scales = [self.row_scale, *(expert.row_scale for expert in self.experts)]
        lengths = [scale for scale in scales if scale is not None]
        sentences += [
            f"scales {tuple(scale.shape)} rows, not {self.out}"
            for scale in lengths
            if tuple(scale.shape) != (self.out,)
        ]
        held = [factor for expert in self.experts for factor in (expert.b, expert.a)] + lengths
        numbers = [number for view in self.views.values() for number in view.coefficients]
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in held) and all(map(math.isfinite, numbers))
        if not finite or any(self.broken(delta) if self.full else not torch.isfinite(delta).all() for delta in deltas):
            sentences.append("holds inf or nan")
        return sentences


# ---- W0


Memory = Literal["memory", "pinned", "device"]
"""Where W0 is kept: in host memory, in page-locked host memory, or in the memory of the weight's device."""


def host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of the local tensor in host memory.

    A quantized weight, which is never written, and a tensor on the meta device are not copied.
    """
    if is_quantized(tensor) or tensor.is_meta:
        return tensor.detach()
    return local(tensor).detach().to("cpu", copy=True)


def base_of(weight: torch.Tensor, memory: Memory = "memory") -> torch.Tensor:
    """Return W0 of a weight in a kind of memory.

    If the weight is in this kind of memory already, W0 shares it until the first write (`keep_base`). Otherwise W0 is
    a copy.
    """
    if is_quantized(weight) or weight.is_meta:
        return host(weight)
    if memory == "device" or (weight.device.type == "cpu" and memory == "memory"):
        shared = type(weight) is torch.nn.Parameter and not weight.is_inference()
        return weight.data if shared else local(weight).detach().clone()
    return host(weight).pin_memory() if memory == "pinned" else host(weight)


def keep_base(base: torch.Tensor, weight: torch.Tensor) -> None:
    """Copy W0 if it shares the memory of the weight. Call this before each write to the weight.

    The copy replaces the data of `base`, so every state that holds this tensor reads the copy.
    """
    if is_quantized(base) or base.is_meta:
        return
    if base.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr():
        base.data = base.clone()


# ---- pairs of factors


def sum_of(pairs: Sequence[tuple[float, Factors]], dtype: torch.dtype, device: torch.device) -> Factors:
    """Return the sum of `c * b @ a` as one pair: all `c b` side by side, and all `a` one below the other.

    The tensors of a single pair are returned without a copy if possible. Both are row-major: BLAS rounds the product of
    a transposed factor differently, and a checkpoint keeps no strides.
    """
    # Experts lie on the host, the factors of a running branch beside the model: concatenate where the experts are.
    home = pairs[0][1].b.device
    one = pairs[0][1] if len(pairs) == 1 else None
    b = one.b if one is not None else torch.cat([factors.b.to(home) for _, factors in pairs], dim=-1)
    a = one.a if one is not None else torch.cat([factors.a.to(home) for _, factors in pairs], dim=-2)
    b, a = cast(b, dtype, device), cast(a, dtype, device)
    if any(c != pairs[0][0] for c, _ in pairs):
        columns = [c for c, factors in pairs for _ in range(factors.b.shape[-1])]
        b = b * torch.tensor(columns, dtype=dtype, device=device)
    elif pairs[0][0] != 1:
        b = b * pairs[0][0]
    return Factors(_row_major(b), _row_major(a))


def nearest_pair(pair: Factors, rank: int | None, floor: float = 0.0) -> tuple[Factors, float]:
    """Return the nearest pair of a rank (Eckart and Young, 1936), and what share of the norm it leaves out.

    Singular values up to `floor`, and those that are zero up to rounding, are left out as well.
    """
    left, values, right = svd_of(pair)
    size = float(values.norm())
    least = max(floor, size * torch.finfo(values.dtype).eps * max(len(left), right.shape[-1]))
    count = int((values > least).sum())
    count = count if rank is None else min(rank, count)
    return truncated(left, values, right, count), float(values[count:].norm()) / size if size else 0.0


def svd_of(pair: Factors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the SVD `left diag(values) right` of `b a` or of a stack of them, of min(r, rows, columns) values.

    `b a` is never formed: it is that of the core `R_b R_a^T` of two QR decompositions.
    """
    left, upper = torch.linalg.qr(pair.b)
    right, lower = torch.linalg.qr(pair.a.mT)
    inner, values, outer = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    return left @ inner, values, outer @ right.mT


def truncated(left: torch.Tensor, values: torch.Tensor, right: torch.Tensor, rank: int) -> Factors:
    """Return the pair of a rank from an SVD, with the root of each value in either factor."""
    return Factors(*split_evenly(left[..., :rank], values[..., :rank], right[..., :rank, :], 1.0))


def _row_major(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor with the strides of a new one. `contiguous` does not change the strides of axes of length 1."""
    strides = torch.empty(tensor.shape, device="meta").stride()
    return tensor if tensor.stride() == strides else tensor.clone(memory_format=torch.contiguous_format)


def _along(rows: torch.Tensor, tensor: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Return `diag(rows) tensor` for a weight stored as [out, ...] or as [in, out], in its dtype."""
    spread = (1, -1) if transposed else (-1, *(1 for _ in tensor.shape[1:]))
    return tensor * rows.to(device=tensor.device, dtype=tensor.dtype).view(spread)


def scaled(pair: Factors, rows: torch.Tensor | None, transposed: bool) -> Factors:
    """Return the factors of `diag(rows) b a`; the scaled one is in fp64, on the host."""
    if rows is None:
        return pair
    if transposed:
        return Factors(pair.b, _along(rows, pair.a.cpu().double(), True))
    return Factors(_along(rows, pair.b.cpu().double(), False), pair.a)
