"""The state of one weight: W0, the experts that stages have added, and named views (coefficients over the experts).

Slow weights, the start of the running stage, averages and the ends of earlier stages are views over the same experts
(docs/algorithm.md, "The slow state is small"). A state is immutable: `absorb` returns the next one, so a failed
transition changes nothing. Every weight is computed from W0 and rounded once.

A parameter trained in full has no experts. The dense tensor of each of its views is the value itself, not the
difference from W0, so it is restored bit for bit.

A field that holds tensors declares in its metadata which axes of the weight they share (`Side`). `Tree.map` visits
every such tensor. Moving, slicing, gathering and sharding a state all use it.

Under DoRA (2402.09353) a stage scales the rows of the weight that it started from. With pace p and row gain g,
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
from lorasc_fx.quantized import dense, is_quantized
from lorasc_fx.shards import UNSHARDED, ShardSpec
from lorasc_fx.spec import CascadeSpec, Noise, TrainRule
from lorasc_fx.state.factor_products import (
    accumulate,
    arithmetic,
    cast,
    exact_products,
    nearest_pair,
    scale_rows,
    scaled,
    sum_of,
    summing,
)

ViewName = Literal["slow", "fast", "base", "averaged"]

log = logging.getLogger("lorasc_fx")

MAX_ENDS = 100
"""A parameter trained in full keeps its values at the ends of this many stages, the latest ones."""


@dataclass(frozen=True)
class Expert(Factors):
    """The low-rank delta `b @ a` that one stage added to a weight.

    Args:
        stage: number of the stage that trained it; 0 for an expert from another run or tool.
        row_scale: [out] in fp64, under DoRA. The stage multiplied the rows of W0 and of all earlier experts by it. A
            stage that trained only magnitudes adds an expert of rank 0.
    """

    stage: int = 0
    row_scale: torch.Tensor | None = field(default=None, metadata={Side: Side.OUT})


@dataclass(frozen=True)
class View(Tree):
    """One value of a weight: a coefficient for each expert, and perhaps a dense delta.

    Args:
        coefficients: one for each expert that existed when the view was made.
        dense: the sum of the experts that were collapsed, [rows, columns]. For a parameter trained in full, the value
            itself, in the shape of the parameter.
    """

    coefficients: tuple[float, ...] = ()
    dense: torch.Tensor | None = field(default=None, metadata={Side: Side.WEIGHT})

    def to(self, dtype: torch.dtype) -> View:
        """Return the view with its dense tensor cast to a dtype. Returns this view itself if nothing changes."""
        return self if self.dense is None or self.dense.dtype == dtype else replace(self, dense=self.dense.to(dtype))

    def extended(self, more: Sequence[float]) -> View:
        """Return the view with coefficients appended for more experts."""
        return replace(self, coefficients=(*self.coefficients, *more))

    def toward(self, target: View, share: float) -> View:
        """Return `self + share * (target - self)`. An expert that only `target` has counts as 0 in this view."""
        missing = len(target.coefficients) - len(self.coefficients)
        pairs = zip(self.extended([0.0] * missing).coefficients, target.coefficients, strict=True)
        delta = self.dense
        if target.dense is not None and delta is not target.dense:
            delta = torch.zeros_like(target.dense) if delta is None else delta
            # With a share of 1 the tensor of the target is kept: slow and fast weights that are equal share memory.
            delta = target.dense if share == 1 else torch.lerp(delta, target.dense, share)
        return View(tuple(s if s == t else s + share * (t - s) for s, t in pairs), delta)

    def plus(self, addend: View, factor: float) -> View:
        """Return `self + factor * addend`. A missing coefficient or dense tensor counts as 0."""
        pairs = zip_longest(self.coefficients, addend.coefficients, fillvalue=0.0)
        delta = self.dense
        if addend.dense is not None:
            delta = factor * addend.dense if delta is None else delta + factor * addend.dense
        return View(tuple(c + factor * added for c, added in pairs), delta)


@dataclass(frozen=True)
class KeptNoise:
    """The noise of one stage that stays in the weights (`noise.keep`).

    Its values are drawn again from the seed and the stage, so only these and the amplitude are stored.
    """

    noise: Noise
    seed: int
    stage: int
    amplitude: float


@dataclass(frozen=True)
class SlowRule:
    """The slow update at the end of a stage: `S_t = S_{t-1} + pace * (F_t - S_{t-1})` (docs/algorithm.md).

    Args:
        stage: number of the stage that ends.
        pace, restart, carry_rank: values of the spec for this stage.
        share: weight of S_t in the average over stages, in (0, 1]; None if no average is kept.
        keeps: whether a parameter trained in full keeps its values at the ends of earlier stages.
    """

    stage: int
    pace: float
    restart: str = "slow"
    carry_rank: int | None = None
    share: float | None = None
    keeps: bool = False


@dataclass(frozen=True)
class WeightState(Tree):
    """W0 and the changes that stages have made to it.

    Args:
        name: name of the weight in the model.
        base: W0 in the weight's shape and dtype. It is never written.
        stacked: whether the first axis of the weight counts matrices (mixture-of-experts layers).
        transposed: whether the weight is stored as [in, out].
        experts: the deltas of the stages, oldest first.
        views: by name. `slow`: the slow weights. `start`: the weights that the running stage started from. `average`:
            the average over stages, unless it equals the slow weights. `stage/K`: the slow weights at the end of stage
            K.
        gone: number of the last stage whose `stage/K` was dropped, because its experts were summed into a dense delta.
        row_scale: [out] in fp64, under DoRA: the row scale of W0 by experts that were summed since.
        noises: the noise that stays in the weight.
        initial: factors and magnitudes that the running stage started from. None if its branch started at B = 0.
        shard: the slice of the weight that this rank holds. `base` and all other tensors are slices then.
        full: whether the parameter is trained in full. Then there are no experts and no noise.
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
    shard: ShardSpec = UNSHARDED
    full: bool = False
    rule: TrainRule | None = None

    # ---- a parameter trained in full

    def holding(self, value: torch.Tensor) -> WeightState:
        """Return the state of a parameter trained in full with this value as its slow weights and start.

        Its values at the ends of earlier stages are dropped.
        """
        dtype = arithmetic(self.base.dtype)
        slow = View((), value.to(dtype))
        start = slow if self.base.dtype == dtype else View((), value.to(self.base.dtype))
        return replace(self, views={"slow": slow, "start": start}, gone=max((self.gone, *self.ends)), full=True)

    def follows(self, spec: CascadeSpec) -> bool:
        """Whether the slow update uses the pace of the spec. Otherwise the slow weights equal the fast weights.

        Only parameters trained in full can opt out, by `slow_train` or by a rule.
        """
        return not self.full or (spec.slow_train if self.rule is None or self.rule.slow is None else self.rule.slow)

    def broken(self, value: torch.Tensor) -> bool:
        """Whether a value has inf or nan in an entry where W0 is finite."""
        return bool((~torch.isfinite(value) & torch.isfinite(self.base)).any())

    # ---- views

    @property
    def slow(self) -> View:
        """The slow weights."""
        return self.views["slow"]

    @property
    def start(self) -> View:
        """The weights that the running stage started from, without noise."""
        return self.views["start"]

    @property
    def start_differs(self) -> bool:
        """Whether the running stage started from other weights than the slow weights."""
        start, slow = self.start, self.slow
        return start.coefficients != slow.coefficients or start.dense is not slow.dense

    def differs_from_slow(self, noisy: bool) -> bool:
        """Whether the parameter differs from the slow weights during the stage. `noisy`: whether it has noise."""
        return noisy or self.initial is not None or self.start_differs

    def starts_at_base(self, noisy: bool) -> bool:
        """Whether the parameter holds W0 during the stage. `noisy`: whether it has noise."""
        changes = self.experts or self.noises or self.start.dense is not None or self.scale() is not None
        return not (changes or self.differs_from_slow(noisy))

    def view(self, name: ViewName) -> View:
        """Return the stored view for slow, fast or averaged weights.

        For fast weights this is `start`: the caller adds the delta of the running branch. Without an average, averaged
        weights equal the slow weights.
        """
        if name == "averaged" and "average" in self.views:
            return self.views["average"]
        return self.views["start" if name == "fast" else "slow"]

    @property
    def ends(self) -> Mapping[int, View]:
        """The slow weights at the ends of earlier stages, by stage number, oldest first."""
        return {int(name.removeprefix("stage/")): view for name, view in self.views.items() if "/" in name}

    # ---- values

    def keep_base(self, weight: torch.Tensor) -> None:
        """Copy W0 if it shares the memory of the weight. Call this before each write to the weight.

        The copy replaces `data` of the tensor, so every state that refers to this tensor sees the copy.
        """
        if is_quantized(self.base) or self.base.is_meta:
            return
        if self.base.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr():
            self.base.data = self.base.clone()

    def exact(
        self,
        view: ViewName,
        dtype: torch.dtype,
        running: Delta | torch.Tensor | None = None,
        device: torch.device | None = None,
    ) -> torch.Tensor:
        """Return W0 + delta in the shape of the weight, computed in `dtype` and not rounded to the weight's dtype.

        Args:
            view: the weights to compute.
            dtype: dtype of the arithmetic and of the result.
            running: for view="fast", the delta of the running branch, which gives F_t of docs/algorithm.md. For a
                parameter trained in full, its current value.
            device: device of the result, by default the device of W0.
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
        """Compute the weight in `dtype`, as `exact` does, and write it into `out`, rounded once to its dtype."""
        if view == "base":
            out.copy_(dense(self.base))
            return
        if self.full:
            value = self.view(view).dense if view != "fast" or running is None else running
            assert isinstance(value, torch.Tensor)
            out.copy_(value)
            return
        assert not isinstance(running, torch.Tensor)
        if self.noises and out.dtype != dtype:  # noise is added in place, and must not be added to a rounded weight
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
        """Return the terms of a weight: W0, the dense delta, and (coefficient, factors) pairs. Their sum is the weight.

        Under DoRA, the rows of each term are already scaled.
        """
        running = running if view == "fast" and running is not None else Delta()
        stored, gain = self.view(view), running.gain
        base, delta, pairs = dense(self.base), stored.dense, self._pairs(stored, gain)
        if running.factors is not None:
            pairs.append((1.0, scaled(running.factors, gain, self.transposed)))
        # Every later expert scales the dense delta, which was collapsed before any of them.
        if delta is not None and (rows := self._scale_since(0, gain)) is not None:
            delta = scale_rows(rows, delta, self.transposed)
        if running.dense is not None:
            change = running.dense.reshape(self.matrix)
            change = change if gain is None else scale_rows(gain, change, self.transposed)
            delta = change if delta is None else delta.to(change) + change
        if (rows := self.scale(gain)) is not None:
            base = scale_rows(rows, base.cpu().double(), self.transposed)
        return base, delta, pairs

    def _pairs(self, view: View, gain: torch.Tensor | None = None) -> list[tuple[float, Factors]]:
        """Return (coefficient, factors) of each expert in a view, its rows scaled by all later experts and `gain`."""
        return [
            (c, scaled(expert, self._scale_since(index + 1, gain), self.transposed))
            for index, (c, expert) in enumerate(zip(view.coefficients, self.experts, strict=True))
            if c != 0 and expert.rank
        ]

    def _scale_since(self, index: int, *extra: torch.Tensor | None) -> torch.Tensor | None:
        """Return the product [out] of the row scales of `experts[index:]` and the extra ones. None if all are None."""
        scales = [expert.row_scale for expert in self.experts[index:] if expert.row_scale is not None]
        product = torch.stack(scales).prod(0) if scales else None
        for scale in extra:
            if scale is not None:
                product = scale if product is None else product * scale
        return product

    def scale(self, gain: torch.Tensor | None = None) -> torch.Tensor | None:
        """Return the row scale of W0, [out] in fp64, times `gain`. None if its rows are not scaled."""
        return self._scale_since(0, self.row_scale, gain)

    def fits(self) -> bool:
        """Whether the slow and the start weights, rounded to the dtype of W0, are finite wherever W0 is."""
        if is_quantized(self.base):  # dense values are never computed for it
            return all(math.isfinite(expert.bound) for expert in self.experts)
        limits = torch.finfo(self.base.dtype)
        # Try a cheap bound first: a change below half the gap of the two largest numbers of the dtype cannot overflow.
        if not self.full and self.scale() is None:
            noise = sum(8 * kept.amplitude for kept in self.noises)  # more than any sample
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
        """Return the sum of the experts of a quantized weight as one pair of factors, which its branch computes.

        None for other weights, because their parameter holds the sum, and if there are no experts.
        """
        pairs = self._pairs(self.views[view]) if is_quantized(self.base) else []
        return sum_of(pairs, pairs[0][1].b.dtype, pairs[0][1].b.device) if pairs else None

    @property
    def unmerged_in_stage(self) -> Factors | None:
        """The factors that the branch of a quantized weight computes in the stage, in addition to its trained ones.

        These are the experts of earlier stages minus the factors that the branch started from. None if nothing remains.
        """
        pair, residual = self.unmerged("start"), self.residual
        if pair is None or residual is None or residual.factors is None:
            return pair
        # The initial factors often cancel a part of the experts exactly, which leaves a pair of lower rank.
        total = sum_of([(1.0, pair), (1.0, residual.factors)], torch.float64, torch.device("cpu"))
        remainder, _ = nearest_pair(total, None, 1e-5 * pair.bound)
        if not remainder.rank:
            return None
        return remainder.map(lambda factor, _: cast(factor, pair.b.dtype, pair.b.device))

    @property
    def residual(self) -> Delta | None:
        """The delta `-s B_0 A_0` that the parameter holds in the stage, because its branch starts at `s B_0 A_0`.

        None if the branch starts at zero.
        """
        initial = self.initial.factors if self.initial is not None else None
        return Delta(Factors(-initial.b, initial.a)) if initial is not None else None

    @property
    def changed(self) -> bool:
        """Whether the slow weights differ from W0 by an expert, noise, a dense delta or a row scale."""
        return bool(self.experts or self.noises) or self.slow.dense is not None or self.scale() is not None

    # ---- the next state

    def absorb(self, running: Delta | torch.Tensor | None, rule: SlowRule) -> WeightState:
        """Return the state after the slow update of a stage. The start of the next stage is set as well.

        Args:
            running: the delta of the branch, or the value of a parameter trained in full. None if the weight has no
                branch, or if its training is dropped.
            rule: the slow update of the stage that ends.
        """
        experts, old, fast, stage, pace = self.experts, self.slow, self.start, rule.stage, rule.pace
        # Step 1: the fast weights F_t, the start of the stage plus its delta.
        if isinstance(running, torch.Tensor):
            assert old.dense is not None
            fast = View((), running.to(old.dense.dtype))
        elif self.full:
            fast = old
        elif running is not None and running.factors is not None:
            pair, row_scale = running.factors, None
            if running.gain is not None:
                exact, row_scale = scaled(pair, running.gain, self.transposed), 1 - pace + pace * running.gain
                pair = Factors(exact.b.to(pair.b.dtype), exact.a.to(pair.a.dtype))
            # Drop factors that are zero: a longer product is summed in another order, which would change bits.
            if not self.shard.group.all(not pair.b.any()):
                experts, fast = (*experts, Expert(pair.b, pair.a, stage, row_scale)), fast.extended((1.0,))
            elif row_scale is not None:
                b, a = pair.b[..., :0].clone(), pair.a[..., :0, :].clone()
                experts = (*experts, Expert(b, a, stage, row_scale))
                old, fast = old.extended((1.0,)), fast.extended((1.0,))
        elif running is not None and running.dense is not None:
            change = running.dense.reshape(self.matrix).to(summing(self.base.dtype))
            fast = fast.plus(View(dense=change), 1.0)
        # Step 2: the slow update.
        slow = old.toward(fast, pace)
        # Step 3: the start of the next stage.
        start = fast if rule.restart == "fast" else slow
        if self.full:  # the parameter rounds its start to its own dtype
            start = start.to(running.dtype) if isinstance(running, torch.Tensor) else self.start
        views, gone, ends = {"slow": slow, "start": start}, self.gone, dict(self.ends)
        # Step 4: the ends of stages. They refer to the dense tensor of the slow weights. If it is replaced, drop them,
        # except the values of a parameter trained in full, which do not depend on it.
        if slow.dense is not self.slow.dense:
            for end in list(ends)[: 1 - MAX_ENDS if rule.keeps and self.full else None]:
                gone = max(gone, end)
                del ends[end]
        views |= {f"stage/{end}": view for end, view in ends.items()} | {f"stage/{stage}": slow}
        if rule.share is not None and rule.share != 1:  # with a share of 1 the average is S_t, and needs no view
            views["average"] = self.view("averaged").toward(slow, rule.share)
        elif rule.share is None and "average" in self.views:
            views["average"] = self.views["average"]
        return replace(self, experts=experts, views=views, gone=gone, initial=None).compact(rule.carry_rank)

    def added(self, expert: Expert) -> WeightState:
        """Return the state with an expert from another run or tool. No stage may have ended yet."""
        expert = expert.map(lambda value, _: value.to(self.base.device))
        views = {name: view.extended((1.0,)) for name, view in self.views.items()}
        return replace(self, experts=(*self.experts, expert), views=views).compact()

    def at(self, stage: int) -> WeightState | None:
        """Return the state at the end of a stage, as both slow and start. Stage 0 is W0.

        None if the end of this stage was dropped. A weight that became a site in a later stage is W0.
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
        """Return the state before the first stage: W0 without changes. `base` replaces W0."""
        base = self.base if base is None else base
        state = WeightState(
            self.name, base, self.stacked, self.transposed, shard=self.shard, full=self.full, rule=self.rule
        )
        return state.holding(base) if self.full else state

    @property
    def matrix(self) -> tuple[int, ...]:
        """Shape of the weight as a matrix [rows, columns], or [experts, rows, columns] if stacked.

        For a parameter trained in full, the shape of the parameter.
        """
        if self.full:
            return tuple(self.base.shape)
        lead = 2 if self.stacked else 1
        return (*self.base.shape[:lead], math.prod(self.base.shape[lead:]))

    @property
    def out(self) -> int:
        """Number of output features, which is the length of a row scale."""
        return self.matrix[-1 if self.transposed else -2]

    def compact(self, carry_rank: int | None = None) -> WeightState:
        """Return the state with its experts summed if they need more memory than their sum.

        Args:
            carry_rank: of the spec: the largest rank of the factors that a quantized weight keeps. Its sum cannot be
                dense, because its branch computes it.
        """
        ranks = sum(expert.rank for expert in self.experts)
        if is_quantized(self.base):
            rank = min(*self.matrix[-2:], *(() if carry_rank is None else (carry_rank,)))
            return self._collapsed(rank) if ranks > rank else self
        if self.slow.dense is not None:  # a dense delta is kept anyway, and adding to it needs no memory
            return self._collapsed() if ranks else self
        # Compare sizes of the full weight, so that all ranks of the process group decide alike.
        rows, *others = self.shard.full_shape(self.base.shape)[1 if self.stacked else 0 :]
        columns = math.prod(others)
        return self._collapsed() if ranks * (rows + columns) > rows * columns else self

    def _collapsed(self, rank: int | None = None) -> WeightState:
        """Return the state with the experts of each view replaced by their sum.

        Args:
            rank: for a quantized weight: the sum of each view becomes one expert of at most this rank. None for a dense
                sum.
        """
        current = {name: view for name, view in self.views.items() if "/" not in name}
        if not self.start_differs:
            del current["start"]
        experts: tuple[Expert, ...] = ()
        if rank is not None:
            stage = max(expert.stage for expert in self.experts)
            experts = tuple(self._low_rank(view, rank, stage) for view in current.values())
            # Each view has the coefficient 1 for its own expert, and 0 for the experts of the other views.
            summed = {name: View(tuple(float(name == owner) for owner in current)) for name in current}
        else:
            summed = {name: View((), self._sum(view)) for name, view in current.items()}
        slow = summed["slow"]
        # Keep the ends that equal the slow weights. An end before the last row scale had other rows of W0.
        last = max((expert.stage for expert in self.experts if expert.row_scale is not None), default=0)
        ends = self.ends
        same_ends = [end for end, view in ends.items() if view.coefficients == self.slow.coefficients and end >= last]
        gone = max((self.gone, *(end for end in ends if end not in same_ends)))
        views = {"slow": slow, "start": slow, **summed} | {f"stage/{end}": slow for end in same_ends}
        return replace(self, experts=experts, views=views, gone=gone, row_scale=self.scale())

    def _low_rank(self, view: View, rank: int, stage: int) -> Expert:
        """Return the best approximation of the delta of a view by one expert of at most this rank."""
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
        """Return the dense delta of a view, [rows, columns] in the dtype of `summing`, as a new tensor."""
        dtype, pairs, rows = summing(self.base.dtype), self._pairs(view), self._scale_since(0)
        if view.dense is None:
            total = torch.zeros(self.matrix, dtype=dtype, device=self.experts[0].b.device)
        else:
            total = view.dense.to(dtype, copy=True)
            total = total if rows is None else scale_rows(rows, total, self.transposed)
        if not pairs:
            return total
        pair = sum_of(pairs, dtype, total.device)
        with exact_products(total):
            total.baddbmm_(pair.b, pair.a) if self.stacked else total.addmm_(pair.b, pair.a)
        return total

    # ---- shards

    def axis(self, side: Side) -> int | None:
        """Return the axis along which a tensor of this side is sharded. None if each rank holds the full tensor."""
        return None if self.shard.axis is None else side.axis(self.shard.axis, self.stacked, self.transposed)

    def to_shard(self, shard: ShardSpec, mapped: bool = False) -> WeightState:
        """Return a copy of the state for the slice of the weight on this rank.

        Args:
            shard: the slice.
            mapped: whether W0 is memory-mapped from a file. Then its slice is a view of the file.
        """
        target = replace(self, shard=shard)

        def slice_of(value: torch.Tensor, side: Side) -> torch.Tensor:
            return target.cut(value, side, copied=not (mapped and not self.full and value is self.base))

        return target.map(slice_of)

    def cut(self, value: torch.Tensor, side: Side, copied: bool = True) -> torch.Tensor:
        """Return this rank's slice of a full tensor of this side: a copy if `copied`, otherwise a view.

        A tensor that is not sharded is returned unchanged.
        """
        axis = self.axis(side)
        if axis is None:
            return value
        view = value.narrow(axis, self.shard.start, self.shard.count)
        return view.clone() if copied else view

    def whole(self, value: torch.Tensor, side: Side) -> torch.Tensor:
        """Gather the full tensor from the slices of all ranks. Every rank must call this at the same point."""
        axis = self.axis(side)
        return replace(self.shard, axis=axis).gather(value)

    # ---- faults

    def faults(self) -> list[str]:
        """Return the problems of a state from a checkpoint, each as a predicate to "the slow state of NAME"."""
        sentences, count = [], len(self.experts)
        for name, view in self.views.items():
            found = len(view.coefficients)
            if found > count or (found < count and "/" not in name):  # the end of a stage lacks later experts
                sentences.append(f"has {count} experts, but {found} coefficients of the view {name}")
            if self.full and view.dense is None:
                sentences.append(f"has no value of the view {name}")
        sentences += [f"has no view {name}" for name in ("slow", "start") if name not in self.views]
        initial = self.initial.factors if self.initial is not None else None
        pairs = [*self.experts, *(() if initial is None else (initial,))]
        for pair in pairs:
            *stack, rows, columns = self.matrix
            b, a = tuple(pair.b.shape), tuple(pair.a.shape)
            rank = a[-2] if len(a) > 1 else 0
            if b != (*stack, rows, rank) or a != (*stack, rank, columns):
                sentences.append(f"has factors of {b} and {a}, which are no delta of {self.matrix}")
        deltas = {id(view.dense): view.dense for view in self.views.values() if view.dense is not None}.values()
        for delta in deltas:
            if tuple(delta.shape) != self.matrix:
                sentences.append(f"has a dense delta of {tuple(delta.shape)}, which is none of {self.matrix}")
        magnitude = self.initial.magnitude if self.initial is not None else None
        scales = [self.row_scale, magnitude, *(expert.row_scale for expert in self.experts)]
        lengths = [scale for scale in scales if scale is not None]
        for scale in lengths:
            if tuple(scale.shape) != (self.out,):
                sentences.append(f"scales {tuple(scale.shape)} rows, not {self.out}")
        tensors = [factor for pair in pairs for factor in (pair.b, pair.a)] + lengths
        is_complex = self.full and self.base.is_complex()
        odd = [value.dtype for value in tensors if not value.is_floating_point()]
        odd += [
            value.dtype for value in deltas if not (value.is_complex() if is_complex else value.is_floating_point())
        ]
        sentences += [f"has a tensor of {dtype}" for dtype in odd]
        if sentences:  # values of another shape cannot be compared with W0
            return sentences
        numbers = [number for view in self.views.values() for number in view.coefficients]
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in tensors) and all(map(math.isfinite, numbers))
        if not finite or any(self.broken(delta) if self.full else not torch.isfinite(delta).all() for delta in deltas):
            sentences.append("holds inf or nan")
        return sentences
