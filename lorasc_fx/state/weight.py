"""The state of one weight: W0, the experts that stages have added, and the history of the stages.

Slow weights, the start of the running stage and the mean over stages are sums over the same experts. Their coefficients
follow from the history of the stages (`History`). A state is immutable: `absorb` returns the next one, so a failed
transition changes nothing. Every weight is computed from W0 and rounded once.

A parameter trained in full has no experts. Its dense tensors are values, not differences from W0, so that they are
restored bit for bit.

The metadata of each field with tensors says which axes of the weight these tensors have (`Side`). `Tree.map` visits all
of these tensors, for example to slice a state.

Under DoRA (2402.09353) a stage scales the rows of the weight that it started from. With pace p and row gain g,
`S_t + W0 = (1 - p) W_{t-1} + p diag(g) (W_{t-1} + s B A) = diag(1 - p + p g) W_{t-1} + p diag(g) s B A`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import attrgetter
from typing import Annotated, Literal

import torch

from lorasc_fx.branch.deltas import (
    Delta,
    Factors,
    InitialFactors,
    Side,
    Tree,
    accumulate,
    arithmetic,
    cast,
    exact_products,
    has_fp64,
    rounded,
    scale_rows,
    scaled,
    shortest_pair,
    step,
    sum_of,
    summing,
)
from lorasc_fx.branch.noise import add_noise, draw
from lorasc_fx.quantized import dense, is_quantized
from lorasc_fx.shards import UNSHARDED, ShardSpec
from lorasc_fx.spec import OWN_GRID, CascadeSpec, Noise, Share
from lorasc_fx.util.decode import Check

ViewName = Literal["slow", "fast", "base", "averaged"]
"""Weights that `Cascade.weights` can put in place."""
Summed = Literal["slow", "fast", "averaged"]
"""Views that are sums over experts. `fast` is the start of the running stage, to which a caller adds the branch."""

MAX_ENDS = 100
"""Maximum number of stages, the latest ones, for which a parameter trained in full keeps its value at the end."""

Number = Annotated[int, Check(lambda number: 0 <= number < 2**31, "give an integer of 0 or more")]
Coefficients = tuple[float, float, float]
"""Coefficients of an expert in the slow weights, at the start of the running stage, and in the mean over stages."""


@dataclass(frozen=True)
class StageEnd:
    """The slow update at the end of one stage (docs/algorithm.md, "slow update").

    Args:
        number: number of the stage.
        pace: the share of the fast weights that was merged.
        restart: whether the next stage starts from the slow or the fast weights.
        share: weight of S_t in the mean over stages. None if no mean is kept.
    """

    number: Number
    pace: Share
    restart: Literal["slow", "fast"] = "slow"
    share: Share | None = None


@dataclass(frozen=True)
class History:
    """The stages that the weights of a run are made of, oldest first. A rewind drops the later ones.

    All weights of a run share one history.
    """

    ends: tuple[StageEnd, ...] = ()

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of the stages."""
        return tuple([end.number for end in self.ends])

    @property
    def last(self) -> int:
        """Number of the last stage; 0 before the first end."""
        return self.ends[-1].number if self.ends else 0

    @property
    def averaged(self) -> int:
        """Number n of stages in the mean over stages, from the share 1 / n of the last one."""
        share = self.ends[-1].share if self.ends else None
        return 0 if share is None else round(1 / share)

    def until(self, stage: int) -> History:
        """Return the history up to a stage, for a rewind. The next stage and the mean start from its slow weights."""
        kept = tuple(end for end in self.ends if end.number <= stage)
        last = (replace(end, restart="slow", share=None if end.share is None else 1.0) for end in kept[-1:])
        return History((*kept[:-1], *last))

    def resting(self) -> History:
        """Return the history with the slow weights as the start of the next stage."""
        return replace(self, ends=(*self.ends[:-1], *(replace(end, restart="slow") for end in self.ends[-1:])))

    def coefficients(self, stage: int, origin: Coefficients | None = None) -> Coefficients:
        """Return the current coefficients of an expert.

        Args:
            stage: number t of the stage that trained the expert. At the end of stage t, its coefficient in the fast
                weights F_t is 1. An expert of stage 0 has the coefficient 1 in every view from the beginning.
            origin: for an expert that replaces a sum of earlier ones: see `Expert`.
        """
        key = (stage, origin)
        if key in self._known:
            return self._known[key]
        first = origin is not None or stage == 0
        slow, start, average = (origin or (1.0, 1.0, 1.0)) if first else (0.0, 0.0, 0.0)
        for end in self.ends:
            if end.number < stage or (end.number == stage and first):
                continue
            fast = 1.0 if end.number == stage else start
            slow = slow if slow == fast else slow + end.pace * (fast - slow)
            start = fast if end.restart == "fast" else slow
            share = 1.0 if end.share is None else end.share
            average = slow if share == 1 or average == slow else average + share * (slow - average)
        self._known[key] = slow, start, average
        return self._known[key]

    @cached_property
    def _known(self) -> dict[tuple[int, Coefficients | None], Coefficients]:
        """Cache of `coefficients`. Weights share one history, so each vector is computed once per transition."""
        return {}


@dataclass(frozen=True)
class Expert(Factors):
    """The low-rank delta `b @ a` that one stage added to a weight.

    Args:
        stage: number of the stage that trained it; 0 for an expert from another run or tool.
        origin: None for an expert that the stage trained. For an expert that replaces a sum of earlier ones: the
            coefficients of the sum in the three views, right after the stage.
        row_scale: [out] in fp64, under DoRA. The stage multiplied the rows of W0 and of all earlier experts by it. A
            stage that trained only magnitudes adds an expert of rank 0.
    """

    stage: int = 0
    origin: Coefficients | None = None
    row_scale: torch.Tensor | None = field(default=None, metadata={Side: Side.OUT})

    def restarted(self, stage: int, averages: bool = False) -> Expert:
        """Return the expert for a start from the slow weights after a stage. Only a sum made by this stage changes.

        The start, and with `averages` the mean, get its slow coefficient.
        """
        if self.origin is None or self.stage != stage:
            return self
        slow, _, average = self.origin
        return replace(self, origin=(slow, slow, slow if averages else average))


@dataclass(frozen=True)
class KeptNoise:
    """The noise of one stage that stays in the weights (`noise.keep`).

    Its values are not stored, because they can be drawn again from these fields.
    """

    noise: Noise
    seed: int
    stage: int
    amplitude: float


@dataclass(frozen=True)
class WeightState(Tree):
    """W0 and the changes that stages have made to it.

    Args:
        name: name of the weight in the model.
        base: W0 in the weight's shape and dtype. It is never written.
        stacked: whether the first axis of the weight counts matrices (mixture-of-experts layers).
        transposed: whether the weight is stored as [in, out].
        experts: the deltas of the stages, oldest first.
        history: the stages that have ended in the run.
        dense: {view: tensor}: the sum of collapsed experts [rows, columns], or the value of a parameter trained in
            full. `fast` is the start of the running stage. A view without an entry uses the entry of `slow`.
        ends: for a parameter trained in full: {stage number: slow value at the end of this stage}.
        gone: number of the last stage whose slow weights are no longer available, because experts were summed or values
            dropped.
        row_scale: [out] in fp64, under DoRA: the product of the row scales of summed experts. It applies to W0.
        noises: the noise that stays in the weight.
        initial: factors and magnitudes that the running stage started from. None if its branch started at B = 0.
        shard: the slice of the weight that this rank holds. Tensors that have the sharded axis are slices.
        full: whether the parameter is trained in full. Then there are no experts and no noise.
        grid: the grid of the site (`CascadeSpec.grid`), or "" for none. On a grid, `branch.deltas.step` adds the deltas
            one after another.
    """

    name: str
    base: torch.Tensor = field(metadata={Side: Side.WEIGHT})
    stacked: bool = False
    transposed: bool = False
    experts: tuple[Expert, ...] = ()
    history: History = field(default_factory=History)
    dense: Mapping[Summed, torch.Tensor] = field(default_factory=dict, metadata={Side: Side.WEIGHT})
    ends: Mapping[int, torch.Tensor] = field(default_factory=dict, metadata={Side: Side.WEIGHT})
    gone: int = 0
    row_scale: torch.Tensor | None = field(default=None, metadata={Side: Side.OUT})
    noises: tuple[KeptNoise, ...] = ()
    initial: InitialFactors | None = None
    shard: ShardSpec = UNSHARDED
    full: bool = False
    grid: str = ""

    # ---- a parameter trained in full

    def holding(self, value: torch.Tensor) -> WeightState:
        """Return the state of a parameter trained in full with this value as its slow weights and start.

        Its values at the ends of earlier stages are dropped.
        """
        dtype = arithmetic(self.base.dtype)
        return replace(
            self, dense=_values(value.to(dtype), self.base.dtype), ends={}, gone=max((self.gone, *self.ends)), full=True
        )

    def follows(self, spec: CascadeSpec) -> bool:
        """Whether the slow update uses the pace of the spec. Otherwise the slow weights equal the fast weights.

        Only parameters trained in full can opt out, by `slow_train`.
        """
        return not self.full or spec.slow_train

    def broken(self, value: torch.Tensor) -> bool:
        """Whether a value has inf or nan in an entry where W0 is finite."""
        return bool((~torch.isfinite(value) & torch.isfinite(self.base)).any())

    # ---- views

    def coefficients(self, view: Summed) -> tuple[float, ...]:
        """Return the coefficient of each expert in a view."""
        place, coefficients = ("slow", "fast", "averaged").index(view), list[float]()
        for expert in self.experts:
            coefficients.append(self.history.coefficients(expert.stage, expert.origin)[place])
        return tuple(coefficients)

    def dense_in(self, view: Summed) -> torch.Tensor | None:
        """Return the dense tensor of a view, or None."""
        return self.dense.get(view, self.dense.get("slow"))

    def differs(self, view: Summed) -> bool:
        """Whether a view differs from the slow weights."""
        return view in self.dense or self.coefficients(view) != self.coefficients("slow")

    def differs_from_slow(self, noisy: bool) -> bool:
        """Whether the parameter differs from the slow weights during the stage. `noisy`: whether it has noise."""
        return noisy or self.initial is not None or self.differs("fast")

    def starts_at_base(self, noisy: bool) -> bool:
        """Whether the parameter holds W0 during the stage. `noisy`: whether it has noise."""
        changes = self.experts or self.noises or self.dense or self.scale() is not None
        return not (changes or self.differs_from_slow(noisy))

    # ---- values

    def on_base(self, base: torch.Tensor) -> WeightState:
        """Return the state with W0 from a model. `grid="own"` is dropped if this W0 is not quantized."""
        has_grid = self.grid != OWN_GRID or is_quantized(base)
        return replace(self, base=base, grid=self.grid if has_grid else "")

    def keep_base(self, weight: torch.Tensor) -> None:
        """Copy W0 if it shares the memory of the weight. Call this before each write to the weight.

        The copy replaces `data` of the tensor, so every state that refers to this tensor sees the copy.
        """
        if is_quantized(self.base):
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
        """Write the weight that `exact` returns into `out`, rounded once to the dtype of `out`."""
        if view == "base":
            out.copy_(dense(self.base))
            return
        if self.full:
            value = self.dense_in(view) if view != "fast" or running is None else running
            assert isinstance(value, torch.Tensor)
            out.copy_(value)
            return
        assert not isinstance(running, torch.Tensor)
        if self.grid:
            out.copy_(self._stepped(view, running, out.device))
            return
        if self.noises and out.dtype != dtype:  # noise is added in place, and must not be added to a rounded weight
            out.copy_(self.exact(view, dtype, running, out.device))
            return
        base, delta, pairs = self.terms(view, running)
        pair = sum_of(pairs, dtype, out.device) if pairs else None
        delta = delta.view(self.base.shape) if delta is not None else None
        accumulate(out, base, dtype, delta, None if pair is None else (pair.b, pair.a), self.stacked)
        for kept in self.noises:
            drawn = draw(kept.noise, kept.seed, kept.stage, self.name, out.shape, self.shard, out.device)
            add_noise(out, drawn, kept.amplitude)

    def _stepped(self, view: Summed, running: Delta | None, device: torch.device) -> torch.Tensor:
        """Return the weight of a view in the dtype of W0, with the deltas added one after another, as in training."""
        value = dense(self.base)
        if (total := self.dense_in(view)) is not None:
            place = device if has_fp64(device) else torch.device("cpu")
            value = step(value.to(place).double(), None, total.to(place)).to(value.dtype)
        value = value.to(device)
        dtype, running = arithmetic(value.dtype), running if view == "fast" else None
        for c, expert in zip(self.coefficients(view), self.experts, strict=True):
            if c != 0:
                pair = sum_of([(c, expert)], dtype, device)
                value = step(value, (pair.b, pair.a), gain=expert.row_scale, transposed=self.transposed)
        if running is not None and running.factors is not None:
            pair = running.factors if running.gain is None else running.factors.with_rows(running.gain, self.transposed)
            value = step(value, (pair.b, pair.a), gain=running.gain, transposed=self.transposed)
        elif running is not None and running.dense is not None:
            value = step(value, None, running.dense)
        return value

    def on_grid(self, value: torch.Tensor) -> torch.Tensor:
        """Return a value of the weight rounded to its grid. Without a grid, the value itself."""
        return rounded(self.grid, value, self.base, self.stacked)

    def terms(
        self, view: Summed, running: Delta | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[tuple[float, Factors]]]:
        """Return the terms of a weight: W0, the dense delta, and (coefficient, factors) pairs. Their sum is the weight.

        Under DoRA, the rows of each term are already scaled.
        """
        running = running if view == "fast" and running is not None else Delta()
        gain = running.gain
        base, delta, pairs = dense(self.base), self.dense_in(view), self._pairs(view, gain)
        if running.factors is not None:
            factors = running.factors if gain is None else scaled(running.factors, gain, self.transposed)
            pairs.append((1.0, factors))
        # All experts are newer than the dense delta, so their row scales apply to it.
        if delta is not None and (rows := self._scale_since(0, gain)) is not None:
            delta = scale_rows(rows, delta, self.transposed)
        if running.dense is not None:
            change = running.dense.reshape(self.matrix)
            change = change if gain is None else scale_rows(gain, change, self.transposed)
            delta = change if delta is None else delta.to(change) + change
        if (rows := self.scale(gain)) is not None:
            base = scale_rows(rows, base.cpu().double(), self.transposed)
        return base, delta, pairs

    def _pairs(self, view: Summed, gain: torch.Tensor | None = None) -> list[tuple[float, Factors]]:
        """Return (coefficient, factors) of each expert in a view, with rows scaled by all later experts and `gain`."""
        pairs: list[tuple[float, Factors]] = []
        for index, (c, expert) in enumerate(zip(self.coefficients(view), self.experts, strict=True)):
            if c != 0 and expert.rank:
                rows = self._scale_since(index + 1, gain)
                pairs.append((c, expert if rows is None else scaled(expert, rows, self.transposed)))
        return pairs

    def _scale_since(self, index: int, *extra: torch.Tensor | None) -> torch.Tensor | None:
        """Return the product [out] of the row scales of `experts[index:]` and the extra ones. None if all are None."""
        product: torch.Tensor | None = None
        for scale in (*map(attrgetter("row_scale"), self.experts[index:]), *extra):
            if scale is not None:
                product = scale if product is None else product * scale
        return product

    def scale(self, gain: torch.Tensor | None = None) -> torch.Tensor | None:
        """Return the row scale of W0, [out] in fp64, times `gain`. None if its rows are not scaled."""
        return self._scale_since(0, self.row_scale, gain)

    def fits(self, device: torch.device | None = None) -> bool:
        """Whether the slow and the start weights, rounded to the dtype of W0, are finite wherever W0 is.

        They are computed on `device`, by default the device of W0.
        """
        if is_quantized(self.base):  # no parameter holds the sum, because the branch computes the deltas
            return all(math.isfinite(expert.bound) for expert in self.experts)
        limits = torch.finfo(self.base.dtype)
        views: tuple[Summed, ...] = ("slow", "fast") if self.differs("fast") else ("slow",)
        # Try a cheap bound first: a change below half the gap of the two largest numbers cannot overflow.
        if not (self.full or self.grid) and self.scale() is None:
            for view in views:
                bound = 0.0
                for kept in self.noises:
                    bound += 8 * kept.amplitude  # more than any sample
                for c, expert in zip(self.coefficients(view), self.experts, strict=True):
                    bound += abs(c) * expert.bound if c else 0.0
                if (total := self.dense_in(view)) is not None and total.numel():
                    lowest, highest = torch.aminmax(total)
                    bound += max(-lowest.item(), highest.item())
                if not bound < limits.max * limits.eps / 8:
                    break
            else:
                return True
        exact = arithmetic(self.base.dtype)
        values = (self.exact(view, exact, device=device).to(self.base.dtype) for view in views)
        return not any(self.broken(self.on_grid(value).to(self.base.device)) for value in values)

    def unmerged_ranks(self, view: Summed) -> list[int]:
        """Return the rank of each expert in the sum that `unmerged` returns."""
        return [pair.rank for _, pair in self._pairs(view)]

    def unmerged(self, view: Summed) -> Factors | None:
        """Return the sum of the experts of a quantized weight as one pair of factors, which the branch computes.

        None without experts, and for other weights, because their parameters hold the sum.
        """
        pairs = self._pairs(view) if is_quantized(self.base) else []
        return sum_of(pairs, pairs[0][1].b.dtype, pairs[0][1].b.device) if pairs else None

    @property
    def unmerged_in_stage(self) -> Factors | None:
        """The factors that the branch of a quantized weight computes in the stage, in addition to its trained ones.

        These are the experts of earlier stages minus the factors that the branch started from. None if nothing remains.
        """
        pair, residual = self.unmerged("fast"), self.residual
        if pair is None or residual is None or residual.factors is None:
            return pair
        # The initial factors often cancel a part of the experts exactly, which leaves a pair of lower rank.
        total = sum_of([(1.0, pair), (1.0, residual.factors)], torch.float64, torch.device("cpu"))
        remainder = shortest_pair(total, 1e-5 * pair.bound)
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
        return bool(self.experts or self.noises or self.dense) or self.scale() is not None

    # ---- the next state

    def absorb(
        self, running: Delta | torch.Tensor | None, history: History, device: torch.device | None = None
    ) -> WeightState:
        """Return the state of a matrix after the slow update of a stage.

        Args:
            running: the delta of the branch. None if the weight has no branch, or one that has not moved.
            history: the history with the stage that ends.
            device: the device of the branch. On a grid, experts are summed there, because other devices round
                differently.
        """
        assert not isinstance(running, torch.Tensor)
        experts, end, fast = self.experts, history.ends[-1], self.dense.get("fast", self.dense.get("slow"))
        # Step 1: the fast weights F_t, the start of the stage plus its delta.
        if running is not None and running.factors is not None:
            pair, row_scale = running.factors, None
            if running.gain is not None:
                exact, row_scale = scaled(pair, running.gain, self.transposed), 1 - end.pace + end.pace * running.gain
                pair = Factors(exact.b.to(pair.b.dtype), exact.a.to(pair.a.dtype))
            # Drop factors that are zero: a longer product is summed in another order, which would change bits.
            if self.shard.group.all(not pair.b.any()):
                pair = Factors(pair.b[..., :0].clone(), pair.a[..., :0, :].clone())
            if pair.rank or row_scale is not None:
                experts = (*experts, Expert(pair.b, pair.a, end.number, row_scale=row_scale))
        elif running is not None and running.dense is not None and self.grid:
            if experts:  # of another run
                return self._collapsed(device).absorb(running, history, device)
            fast = self._difference(self._stepped("fast", running, device or self.base.device))
        elif running is not None and running.dense is not None:
            change = running.dense.reshape(self.matrix).to(summing(self.base.dtype))
            fast = change if fast is None else fast + change
        # Step 2: the slow update of dense tensors. The coefficients of experts follow from the history.
        dense, gone = self.dense, self.gone
        if fast is not None:
            slow = _toward(dense.get("slow"), fast, end.pace)
            if slow is not dense.get("slow"):  # earlier stages need the tensor that is replaced
                gone = max(gone, self.history.last)
            dense = self._views(slow, fast if end.restart == "fast" else slow, end)
        return replace(self, experts=experts, history=history, dense=dense, gone=gone, initial=None).compact(device)

    def absorb_value(self, value: torch.Tensor, history: History, pace: float, keeps: bool = False) -> WeightState:
        """Return the state of a parameter trained in full after the slow update of a stage.

        Args:
            value: the current value.
            history: the history with the stage that ends.
            pace: share of the change that is merged. 1 if the parameter does not follow the slow rule.
            keeps: whether the state keeps the values at the ends of earlier stages.
        """
        end, old = history.ends[-1], self.dense["slow"]
        fast = value.to(old.dtype)
        slow = _toward(old, fast, pace)
        assert slow is not None
        # The parameter rounds its start to its own dtype.
        start = (fast if end.restart == "fast" else slow).to(value.dtype)
        ends, gone = dict(self.ends), self.gone
        if slow is not old:
            for number in list(ends)[: 1 - MAX_ENDS if keeps else None]:
                gone = max(gone, number)
                del ends[number]
        ends[end.number] = slow
        return replace(self, history=history, dense=self._views(slow, start, end), ends=ends, gone=gone)

    def _views(
        self, slow: torch.Tensor | None, start: torch.Tensor | None, end: StageEnd
    ) -> dict[Summed, torch.Tensor]:
        """Return the dense tensors of the views after a stage. Equal views share one tensor."""
        average = slow if end.share in (None, 1) else _toward(self.dense_in("averaged"), slow, end.share)
        views: dict[Summed, torch.Tensor | None] = {"slow": slow, "fast": start, "averaged": average}
        return {
            view: tensor
            for view, tensor in views.items()
            if tensor is not None and (view == "slow" or tensor is not slow)
        }

    def added(self, expert: Expert) -> WeightState:
        """Return the state with an expert from another run or tool. No stage may have ended yet."""
        expert = expert.map(lambda value, _: value.to(self.base.device))
        return replace(self, experts=(*self.experts, expert)).compact()

    def resting(self, history: History) -> WeightState:
        """Return the state with the slow weights as its start. `history` is the result of `History.resting`."""
        experts = tuple(expert.restarted(self.history.last) for expert in self.experts)
        dense = dict(self.dense)
        dense.pop("fast", None)
        if self.full:
            dense |= _values(dense["slow"], self.base.dtype)
        return replace(self, experts=experts, history=history, dense=dense)

    @property
    def available(self) -> tuple[int, ...]:
        """The numbers of the stages whose slow weights at the end are available."""
        return tuple(number for number in self.history.numbers if number > self.gone)

    def at(self, stage: int) -> WeightState | None:
        """Return the state at the end of a stage, as both slow and start. Stage 0 is W0.

        None if the end of this stage was dropped. For a weight that became a site in a later stage, the state is W0.
        """
        if 0 < stage <= self.gone:
            return None
        numbers = [number for number in self.available if number <= stage]
        if not numbers:
            return self.bare() if stage == 0 or not self.gone else None
        last, history = numbers[-1], self.history.until(stage)
        experts = tuple(expert.restarted(last, True) for expert in self.experts if expert.stage <= last)
        noises = tuple(noise for noise in self.noises if noise.stage <= stage)
        if self.full:
            dense = _values(self.ends[last], self.base.dtype)
        else:
            dense = {view: tensor for view, tensor in self.dense.items() if view == "slow"}
        ends = {number: value for number, value in self.ends.items() if number <= stage}
        return replace(self, experts=experts, history=history, dense=dense, ends=ends, noises=noises, initial=None)

    def bare(self) -> WeightState:
        """Return the state before the first stage: W0 without changes."""
        state = WeightState(
            self.name, self.base, self.stacked, self.transposed, shard=self.shard, full=self.full, grid=self.grid
        )
        return state.holding(self.base) if self.full else state

    @property
    def matrix(self) -> tuple[int, ...]:
        """Shape of the weight as a matrix [rows, columns], or [matrices, rows, columns] if stacked.

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

    def compact(self, device: torch.device | None = None) -> WeightState:
        """Return the state with its experts summed if they need more memory than their sum. `device`: see `absorb`."""
        ranks = sum(map(attrgetter("rank"), self.experts))
        if is_quantized(self.base) and self.grid:  # a sum of experts would have other bits
            return self
        if is_quantized(self.base):
            return self._collapsed() if ranks > min(self.matrix[-2:]) else self
        if self.dense:  # a dense delta is kept anyway, and adding to it needs no memory
            return self._collapsed(device) if ranks else self
        # Compare sizes of the full weight, so that all ranks of the process group decide alike.
        rows, *others = self.shard.full_shape(self.base.shape)[1 if self.stacked else 0 :]
        columns = math.prod(others)
        return self._collapsed(device) if ranks * (rows + columns) > rows * columns else self

    def _collapsed(self, device: torch.device | None = None) -> WeightState:
        """Return the state with the experts of each view replaced by their sum.

        The sum is a dense tensor. For a quantized weight it is one expert, because the branch computes with factors.
        """
        views: tuple[Summed, ...] = ("slow", "fast", "averaged")
        experts: tuple[Expert, ...] = ()
        current = list[Summed]()
        for view in views:
            if view == "slow" or self.differs(view):
                current.append(view)
        dense: dict[Summed, torch.Tensor] = {}
        for view in current:
            if is_quantized(self.base):
                # Each view has the coefficient 1 for its own expert, and 0 for the experts of the other views.
                owners = [owner if owner in current else "slow" for owner in views]
                slow, start, average = (float(owner == view) for owner in owners)
                experts = (*experts, self._low_rank(view, (slow, start, average)))
            else:
                dense[view] = self._sum(view, device)
        gone = max(self.gone, self.history.ends[-2].number if len(self.history.ends) > 1 else 0)
        rows = None if self.grid else self.scale()
        return replace(self, experts=experts, dense=dense, gone=gone, row_scale=rows)

    def _difference(self, value: torch.Tensor) -> torch.Tensor:
        """Return `value - W0` as [rows, columns] in fp64. Adding it to W0 restores the bits of the value."""
        place = self.base.device if has_fp64(self.base.device) else torch.device("cpu")
        return (value.to(place).double() - self.base.to(place).double()).reshape(self.matrix)

    def _low_rank(self, view: Summed, origin: Coefficients) -> Expert:
        """Return the delta of a view as one expert with these coefficients."""
        dtype, pairs, stage = summing(self.base.dtype), self._pairs(view), self.history.last
        if not pairs:
            b, a = self.experts[0].b[..., :0], self.experts[0].a[..., :0, :]
            return Expert(b.to(dtype), a.to(dtype), stage, origin)
        pair = shortest_pair(sum_of(pairs, torch.float64, torch.device("cpu")))
        device = pairs[0][1].b.device
        return Expert(cast(pair.b, dtype, device), cast(pair.a, dtype, device), stage, origin)

    def _sum(self, view: Summed, device: torch.device | None) -> torch.Tensor:
        """Return the dense delta of a view, [rows, columns] in the dtype of `summing`, as a new tensor."""
        if self.grid:
            return self._difference(self._stepped(view, None, device or self.base.device))
        dtype, pairs, rows = summing(self.base.dtype), self._pairs(view), self._scale_since(0)
        if (dense := self.dense_in(view)) is None:
            total = torch.zeros(self.matrix, dtype=dtype, device=self.experts[0].b.device)
        else:
            total = dense.to(dtype, copy=True)
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

    def to_shard(self, shard: ShardSpec) -> WeightState:
        """Return a copy of the state for the slice of the weight on this rank."""
        target = replace(self, shard=shard)
        return target.map(target.cut)

    def cut(self, value: torch.Tensor, side: Side) -> torch.Tensor:
        """Return a copy of this rank's slice of a full tensor of this side, or the tensor itself if unsharded."""
        axis = self.axis(side)
        return value if axis is None else value.narrow(axis, self.shard.start, self.shard.count).clone()

    def sampled(self, rows: int) -> WeightState:
        """Return the state of some rows of the weight, evenly spaced, without kept noise."""
        along = 1 if self.stacked else 0
        count = self.base.shape[along]
        rows = (
            max(1, rows // max(1, self.base.shape[0])) if self.stacked else rows
        )  # a stack may have hundreds of matrices

        def take(value: torch.Tensor, side: Side) -> torch.Tensor:
            axis = side.axis(along, self.stacked, self.transposed)
            index = torch.arange(0, count, max(1, count // rows), device=value.device)
            return value if axis is None else value.index_select(axis, index)

        return replace(self, noises=()).map(take)

    def whole(self, value: torch.Tensor, side: Side) -> torch.Tensor:
        """Gather the full tensor from the slices of all ranks. Every rank must call this at the same point."""
        axis = self.axis(side)
        return replace(self.shard, axis=axis).gather(value)

    # ---- faults

    def faults(self) -> list[str]:
        """Return the problems of a state from a checkpoint, each as a predicate to "the slow state of NAME"."""
        sentences = []
        if odd_stages := {expert.stage for expert in self.experts} - {0, *self.history.numbers}:
            sentences.append(f"has an expert of stage {min(odd_stages)}, which has not ended")
        if self.full and ("slow" not in self.dense or {*self.available} - self.ends.keys()):
            sentences.append("lacks a value at the end of a stage")
        initial = self.initial.factors if self.initial is not None else None
        pairs = [*self.experts, *(() if initial is None else (initial,))]
        for pair in pairs:
            *stack, rows, columns = self.matrix
            b, a = tuple(pair.b.shape), tuple(pair.a.shape)
            rank = a[-2] if len(a) > 1 else 0
            if b != (*stack, rows, rank) or a != (*stack, rank, columns):
                sentences.append(f"has factors of shapes {b} and {a}, which do not fit a matrix of {self.matrix}")
        deltas = [*self.dense.values(), *self.ends.values()]
        for delta in deltas:
            if tuple(delta.shape) != self.matrix:
                sentences.append(f"has a dense delta of shape {tuple(delta.shape)}, but its matrix is {self.matrix}")
        magnitude = self.initial.magnitude if self.initial is not None else None
        scales = [self.row_scale, magnitude, *(expert.row_scale for expert in self.experts)]
        lengths = [scale for scale in scales if scale is not None]
        for scale in lengths:
            if tuple(scale.shape) != (self.out,):
                sentences.append(f"has row scales of shape {tuple(scale.shape)}, but {self.out} rows")
        tensors = [factor for pair in pairs for factor in (pair.b, pair.a)] + lengths
        is_complex = self.full and self.base.is_complex()
        odd = [value.dtype for value in tensors if not value.is_floating_point()]
        odd += [
            value.dtype for value in deltas if not (value.is_complex() if is_complex else value.is_floating_point())
        ]
        sentences += [f"has a tensor of the wrong dtype, {dtype}" for dtype in odd]
        if sentences:  # values of another shape cannot be compared with W0
            return sentences
        numbers = [number for expert in self.experts for number in expert.origin or ()]
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in tensors) and all(map(math.isfinite, numbers))
        if not finite or any(self.broken(delta) if self.full else not torch.isfinite(delta).all() for delta in deltas):
            sentences.append("holds inf or nan")
        return sentences


def _toward(value: torch.Tensor | None, target: torch.Tensor | None, share: float) -> torch.Tensor | None:
    """Return `value + share * (target - value)`. A missing value counts as 0, a missing target as the value."""
    if target is None or value is target:
        return value
    if share == 1:
        return target
    return torch.lerp(torch.zeros_like(target) if value is None else value, target, share)


def _values(slow: torch.Tensor, dtype: torch.dtype) -> dict[Summed, torch.Tensor]:
    """Return {view: tensor} of a parameter trained in full that starts from its slow value, rounded to `dtype`."""
    return {"slow": slow} if slow.dtype == dtype else {"slow": slow, "fast": slow.to(dtype)}
