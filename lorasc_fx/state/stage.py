"""The start and the end of a stage, for one weight and for all. The cascade and the passes both call these functions.

Source: docs/algorithm.md, "One site".

During a stage the user's parameters hold `W_t`. A transition computes the next `SlowWeights`, writes its values, and
then stores it in the run.

PiSSA (2404.02948) subtracts initial factors from the weight. During the stage the parameter holds the residual
`W_t - s B_0 A_0`, so that the branch changes nothing at the start. The delta of the stage is `s (B A - B_0 A_0)`. It is
kept as one pair of twice the rank, `[B - B_0, B_0] [A; A - A_0]`. Both of its terms are as small as the change, and
exactly zero before the first step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import nn

from lorasc_fx.branch import (
    BUILT_IN,
    Branch,
    Delta,
    Factors,
    InitialFactors,
    Side,
    amplitude,
    check_registered,
    draw,
)
from lorasc_fx.branch.deltas import Scratch, arithmetic, cast, exact_products, truncated
from lorasc_fx.branch.lora import DOWN, UP, LoraBranch
from lorasc_fx.branch.noise import add_noise
from lorasc_fx.errors import NonFiniteBranch, SpecError
from lorasc_fx.plan import Plan, Site
from lorasc_fx.quantized import is_quantized
from lorasc_fx.shards import ONE_PROCESS, ProcessGroup, ShardSpec, full_tensor, local, local_like, shard_of
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.state.weight import History, KeptNoise, StageEnd, Summed, ViewName, WeightState

Learner = Branch | torch.Tensor
"""The trained part of a weight in a stage: its branch, or the parameter itself if it is trained in full."""


def start_weight(
    state: WeightState,
    spec: CascadeSpec,
    stage: int,
    noisy: bool = True,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Return the weight that a stage trains on, in the shape of the weight, rounded once to its dtype.

    This is `W_t = W0 + S_{t-1} + N_t`, or `W0 + F_{t-1} + N_t` under restart="fast", minus the initial factors of the
    branch (docs/algorithm.md, "start of stage t").

    Args:
        spec, stage: of the plan.
        noisy: whether to add the noise N_t if the spec has noise.
        device: device of the result, by default the device of W0.
    """
    start = torch.empty(
        state.base.shape, dtype=state.base.dtype, device=state.base.device if device is None else device
    )
    write_start(start, state, spec, stage, noisy)
    return start


def write_start(
    out: torch.Tensor,
    state: WeightState,
    spec: CascadeSpec,
    stage: int,
    noisy: bool,
    scratch: Scratch | None = None,
) -> None:
    """Write the weight that `start_weight` returns into `out`.

    The noise depends on (seed, stage, weight name) and is drawn block by block. If `out` is narrower than the
    arithmetic, the exact weight is computed in `scratch`.
    """
    dtype = arithmetic(state.base.dtype)
    if state.base.dtype not in (out.dtype, dtype):  # the parameter was cast since: round to the dtype of W0 first
        out.copy_(start_weight(state, spec, stage, noisy, out.device))
        return
    if not noisy or not spec.noise.strength > 0 or state.full:
        state.write(out, "fast", dtype, state.residual)
        return
    # Initial factors are subtracted last, because the noise depends on the standard deviation of the full weight.
    exact = out if out.dtype == dtype else (scratch or Scratch()).like(out, dtype)
    state.write(exact, "fast", dtype)
    size = amplitude(spec.noise, exact, state.shard)
    if not math.isfinite(size):
        raise SpecError(
            f"noise.strength is {spec.noise.strength}, and the standard deviation of {state.name} is not finite: it "
            "holds inf or nan, or numbers whose squares overflow. So its noise is undefined. "
            f"Give exclude=({state.name!r},) or noise.strength=0"
        )
    if state.initial is not None:
        state.write(exact, "fast", dtype, state.residual)
    if size:
        address = (spec.noise, spec.seed, stage, state.name)
        add_noise(exact, draw(*address, exact.shape, state.shard, exact.device), size)
    if exact is not out:
        out.copy_(exact)
    # A check of all entries takes a pass over the weight, so it is skipped unless the noise could overflow the dtype.
    limits = torch.finfo(out.dtype)
    if size > limits.max * limits.eps / 64 and not bool(torch.isfinite(out).all()):
        raise SpecError(
            f"noise.strength is {spec.noise.strength}: in stage {stage} the noise makes {state.name} overflow "
            f"{out.dtype}. Give a smaller strength, or exclude=({state.name!r},)"
        )


@dataclass(frozen=True)
class StageWeight:
    """The weight of a branch at the start of a stage, a `branch.StartWeight`. Its values are computed on each call.

    Args:
        state: state of the weight in the stage.
        spec, stage: of the plan of the stage.
        with_noise: whether the stage runs, so that its weight has noise.
        device: device of the values.
    """

    state: WeightState
    spec: CascadeSpec
    stage: int
    with_noise: bool
    device: torch.device

    @property
    def shard(self) -> ShardSpec:
        """The slice of the weight on this rank."""
        return self.state.shard

    def exact(self) -> torch.Tensor:
        """Return the full weight without noise, in the dtype of the arithmetic."""
        exact = self.state.exact("fast", arithmetic(self.state.base.dtype), device=self.device)
        return self.state.whole(exact, Side.WEIGHT)

    def noisy(self) -> torch.Tensor:
        """Return the slice that the stage trains on."""
        return start_weight(self.state, self.spec, self.stage, self.with_noise, self.device)

    def cut(self, value: torch.Tensor, side: Side) -> torch.Tensor:
        """Slice a full tensor."""
        return self.state.cut(value, side)

    def whole(self, value: torch.Tensor, side: Side) -> torch.Tensor:
        """Gather a full tensor."""
        return self.state.whole(value, side)


def begin_stage(
    state: WeightState,
    branch: Branch,
    site: Site,
    spec: CascadeSpec,
    stage: int,
    keep: bool = True,
    noisy: bool = True,
) -> tuple[WeightState, dict[str, torch.Tensor]]:
    """Start a stage: return its state, and the full initial values of the branch's parameters, by name.

    If the weight is sharded, every rank must call this at the same point, because a decomposition gathers the weight.

    Args:
        state: state of the weight after the stage before.
        branch: branch of the stage before. It is not changed.
        site, spec, stage: of the plan of the new stage. The values have the rank of this site.
        keep: whether the branch keeps the factors that the spec says (A, or both).
        noisy: whether the new stage runs. If it waits, its weight has no noise, and no factors are subtracted from it.
    """
    parameter, needs = next(branch.parameters()).detach(), branch.starts_from(spec, noisy)
    decomposes = "factors" in needs
    pairs = keep and noisy and not branch.restarts(spec)
    factors = magnitude = None
    with torch.no_grad():
        values = branch.values_like(parameter, site, spec.seed, stage)
        if keep and spec.restart_factors != "both":
            values |= branch.kept_values(values, spec, pairs)
        if decomposes:
            assert isinstance(branch, LoraBranch)
            exact = StageWeight(state, spec, stage, noisy, parameter.device).exact()
            values |= decomposed(exact, branch, site, values, state.shard.group)
        if pairs or decomposes:
            # The fold has added kept factors to the weight. So they are subtracted, like all other initial factors.
            assert isinstance(branch, LoraBranch)
            factors = branch.exact_factors(values, site.scale).map(state.cut)
        state = replace(state, initial=None if factors is None else InitialFactors(factors))
        if needs:
            computed = branch.values_from(site, values, StageWeight(state, spec, stage, noisy, parameter.device))
            values |= {name: value.to(values[name]) for name, value in computed.items()}
        if branch.magnitude:
            magnitude = state.cut(values[branch.magnitude], Side.OUT).cpu().double().clone()
            state = replace(state, initial=InitialFactors(factors, magnitude))
        if state.initial is None and type(branch) not in BUILT_IN:
            started = branch.with_values(values)
            check_registered(started, site, lambda: state.exact("fast", arithmetic(state.base.dtype)))
    return state, values


def all_finite(learners: Iterable[Learner]) -> bool:
    """Whether no parameter of any branch holds inf or nan. Parameters trained in full are not checked.

    If the sum of each tensor is finite, all entries are. This takes one synchronization per device. The reverse does
    not hold, because a sum of finite entries may overflow, so all entries are checked then.
    """
    learners, sums = list(learners), dict[torch.device, list[torch.Tensor]]()
    with torch.no_grad():
        for learner in learners:
            for factor in learner.parameters() if isinstance(learner, Branch) else ():
                total = local(factor).sum()
                sums.setdefault(total.device, []).append(total)
        for totals in sums.values():
            if not math.isfinite(torch.stack(totals).sum().item()):
                return all(learner.finite() for learner in learners if isinstance(learner, Branch))
    return True


def check_finite(branch: Branch, stage: int) -> None:
    """Raise NonFiniteBranch if the branch holds inf or nan."""
    if not branch.finite():
        raise _not_folded(f"the branch of {branch.weight_name} holds inf or nan", stage)


def _not_folded(fault: str, stage: int) -> NonFiniteBranch:
    return NonFiniteBranch(
        f"{fault} at the end of stage {stage}; nothing was folded. Lower the learning rate or clip gradients"
    )


def end_stage(
    state: WeightState,
    learner: Learner | None,
    spec: CascadeSpec,
    history: History,
    noisy: bool,
    checked: bool,
    keeps: bool = False,
) -> WeightState:
    """End a stage: return the slow state after it. The noise of the stage is added to it if `noise.keep` is set.

    Args:
        learner: the branch, or the parameter trained in full. None for a weight that only has noise.
        spec: of the plan.
        history: the history of the weight with this stage.
        noisy: whether the stage ran, so that its weight had noise.
        checked: whether the factors of branches are known to be finite.
        keeps: whether a parameter trained in full keeps its values at the ends of earlier stages.
    """
    stage, on_all = history.ends[-1].number, state.shard.group.all
    if state.full:
        assert isinstance(learner, torch.Tensor)
        value = local(learner).detach().to("cpu", copy=True)
        if not on_all(not state.broken(value)):
            raise _not_folded(f"{state.name}, which is trained in full, holds inf or nan", stage)
        pace = history.ends[-1].pace if state.follows(spec) else 1.0
        after = state.absorb_value(value, history, pace, keeps)
    elif isinstance(learner, Branch):
        if not (checked or on_all(learner.finite())):
            raise _not_folded(f"the branch of {state.name} holds inf or nan", stage)
        # All ranks must agree, because each rank has the same number of experts.
        moved = not on_all(not has_trained(learner, state))
        delta = delta_of(learner, state, spec, stage, noisy, state.base.device) if moved else None
        device = next(learner.parameters()).device
        after = state.absorb(delta, history, device)
        if not on_all(after.fits(device if state.grid else None)):
            raise _not_folded(f"the branch of {state.name} makes the weight overflow {state.base.dtype}", stage)
    else:
        after = state.absorb(None, history)
    if noisy and spec.noise.strength > 0 and spec.noise.keep and not state.full:
        size = amplitude(spec.noise, state.exact("fast", arithmetic(state.base.dtype)), state.shard)
        after = replace(after, noises=(*after.noises, KeptNoise(spec.noise, spec.seed, stage, size)))
    return after


def decomposed(
    weight: torch.Tensor,
    branch: LoraBranch,
    site: Site,
    values: Mapping[str, torch.Tensor],
    group: ProcessGroup,
) -> dict[str, torch.Tensor]:
    """Decompose a weight into initial factors, the largest singular triplets (PiSSA, 2404.02948).

    If the branch has a larger rank than the matrix, the remaining rows of A keep LoRA's values. The remaining columns
    of B are zero.

    Returns:
        A [r, in] and B [out, r] by the names of their parameters. Stacked matrices have one more axis.
    """
    if not bool(torch.isfinite(weight).all()):
        raise SpecError(
            f"start='pissa' decomposes the weight, but {branch.weight_name} holds inf or nan. "
            f"Give exclude=({branch.weight_name!r},) or start='lora'",
            code="non-finite",
        )
    a, b = values[DOWN].to(weight, copy=True), torch.zeros_like(values[UP]).to(weight)
    out, columns, stack = b.shape[-2], a.shape[-1], tuple(b.shape[:-2])
    matrix = weight.reshape(*stack, columns, out).mT if branch.transposed else weight.reshape(*stack, out, columns)
    with exact_products(matrix):
        u, singular, vh = torch.linalg.svd(matrix, full_matrices=False)
        initial = truncated(u, singular, vh, site.rank, site.scale)
        b[..., : initial.rank] = initial.b
        a[..., : initial.rank, :] = initial.a
    return {name: group.broadcast(value).to(values[name]) for name, value in ((UP, b), (DOWN, a))}


def has_trained(learner: Learner, state: WeightState) -> bool:
    """Whether a branch, or a parameter trained in full, has changed since the start of its stage.

    A cast does not count as a change. The answer is for the slice on this rank. Every rank must call this at the same
    point.
    """
    if isinstance(learner, Branch):
        return learner.moved(state.initial, state.cut)
    start = state.dense_in("fast")
    assert start is not None
    return not torch.equal(local(learner).detach().cpu(), start.to(learner.dtype))


def delta_of(
    branch: Branch,
    state: WeightState,
    spec: CascadeSpec,
    stage: int,
    noisy: bool,
    device: torch.device,
) -> Delta:
    """Return the delta that a branch has added to its weight since the start of the stage, as copies on a device.

    It is the delta of this rank's slice of the weight. A branch that started at zero contributes its factors. A branch
    that started from factors of the weight contributes `[B - B_0, B_0]` and `[A; A - A_0]` (see the module docstring).
    """
    parameter = next(branch.parameters())
    weight = StageWeight(state, spec, stage, noisy, parameter.device)
    with torch.no_grad():
        gain = branch.gain(weight) if branch.magnitude else None
        gain = None if gain is None else gain.cpu().double()
        if state.initial is not None and state.initial.factors is not None:
            assert isinstance(branch, LoraBranch)
            current, start = branch.exact_factors().map(state.cut), state.initial.factors
            # s (B A - B_0 A_0) as one pair: both terms are as small as the change.
            b = torch.cat([current.b - start.b, start.b], dim=-1)
            a = torch.cat([current.a, current.a - start.a], dim=-2)
            return Delta(Factors(cast(b, parameter.dtype, device), cast(a, parameter.dtype, device)), gain=gain)
        source = (
            branch if isinstance(branch, LoraBranch) else branch.whole()
        )  # LoRA's factors are sharded like the weight
        delta = source.delta(weight.exact() if branch.uses_weight else None)
        if isinstance(delta, torch.Tensor):
            return Delta(dense=state.cut(full_tensor(delta), Side.WEIGHT).to(device, copy=True), gain=gain)
        parts = []
        for factor, side in ((delta.b, Side.LEFT), (delta.a, Side.RIGHT)):
            if state.axis(side) is None:  # each rank needs the full factor
                part = full_tensor(factor)
            elif shard_of(factor).axis == state.shard.axis:  # sharded like the weight
                part = local(factor)
            else:
                part = state.shard.take(full_tensor(factor))
            parts.append(part.to(device, copy=True))
        return Delta(Factors(*parts), gain=gain)


BaseMemory = Literal["memory", "pinned", "device"]
"""Where W0 is kept: in host memory, in page-locked host memory, or in the memory of the weight's device."""

MAX_FULL_ENTRIES = 1 << 20
"""Limit on the entries of all parameters trained in full together, up to which each stage keeps a copy of them. If the
branches have more entries than this, their number is the limit."""


@dataclass(frozen=True)
class SlowWeights:
    """The slow states of all weights of a model.

    Args:
        states: by weight name: sites, parameters trained in full, and every other matrix that gets noise.
        idle: whether no stage runs. Then the parameters hold the slow weights without noise.
        history: the stages that the slow weights are made of.
        group: the process group that holds the shards of the weights.
    """

    states: Mapping[str, WeightState] = field(default_factory=dict)
    idle: bool = False
    history: History = field(default_factory=History)
    group: ProcessGroup = ONE_PROCESS

    @cached_property
    def trained(self) -> Mapping[str, WeightState]:
        """The states of the parameters trained in full."""
        trained = dict[str, WeightState]()
        for name, state in self.states.items():
            if state.full:
                trained[name] = state
        return trained

    @cached_property
    def quantized(self) -> tuple[str, ...]:
        """Names of the quantized weights. Their parameters cannot hold a delta, so their branches compute it."""
        names = list[str]()
        for name, state in self.states.items():
            if not state.full and is_quantized(state.base):
                names.append(name)
        return tuple(names)

    def pace(self, plan: Plan) -> float:
        """Return the share of the fast weights that the running stage adds to the slow ones (`CascadeSpec.pace`)."""
        if plan.spec.pace == "mean":
            return 1 / (len(self.history.ends) + 1)
        shares = plan.spec.pace if isinstance(plan.spec.pace, tuple) else (plan.spec.pace,)
        return shares[min(plan.stage, len(shares)) - 1]

    def to_shard(self, specs: Mapping[str, ShardSpec], group: ProcessGroup) -> SlowWeights:
        """Return the state for this rank's shards. `specs` has the slice of each weight on this rank, by name."""
        states = {name: state.to_shard(specs[name]) for name, state in self.states.items()}
        return replace(self, states=states, group=group)

    def without_base(self) -> SlowWeights:
        """Return the state with every W0 on the meta device, to be combined with the W0 of another run."""
        states = {name: replace(state, base=state.base.to("meta")) for name, state in self.states.items()}
        return replace(self, states=states)

    def with_weights(
        self, parameters: Mapping[str, nn.Parameter], plan: Plan, memory: BaseMemory = "memory"
    ) -> SlowWeights:
        """Return a state with new weights, whose current values become W0. Known weights keep their state.

        Args:
            parameters: parameters of the model, by name. Of a DTensor, the local shard becomes W0.
            plan: plan of the running stage. It says which weights are stacked or transposed.
            memory: the kind of memory for W0.
        """
        sites = plan.by_weight
        new = {
            name: WeightState(
                name,
                base_of(value, memory),
                stacked=name in sites and sites[name].stacked,
                transposed=name in sites and sites[name].layout == "in_out",
                history=self.history,
                shard=shard_of(value),
                grid=sites[name].options.grid_of(value) if name in sites else "",
            )
            for name, value in parameters.items()
            if name not in self.states
        }
        return replace(self, states={**self.states, **new})

    def with_trained(self, parameters: Mapping[str, nn.Parameter]) -> SlowWeights:
        """Return a state with these parameters added as trained in full."""
        new = {
            name: WeightState(name, host(value), shard=shard_of(value), full=True).bare()
            for name, value in parameters.items()
        }
        return replace(self, states={**self.states, **new})

    def started(self, name: str) -> WeightState:
        """Return the state of a weight whose start equals the weights in place.

        If the cascade is idle, these are the slow weights, whatever the next stage starts from.
        """
        return (self._resting if self.idle else self.states)[name]

    @cached_property
    def _resting(self) -> Mapping[str, WeightState]:
        """The states with the slow weights as their start."""
        history = self.history.resting()
        return {name: state.resting(history) for name, state in self.states.items()}

    def value(
        self, name: str, view: ViewName, like: torch.Tensor, learner: Learner | None = None, plan: Plan | None = None
    ) -> torch.Tensor:
        """Return the value of a weight, rounded once to the dtype of `like`, on its device; see `write_value`."""
        value = torch.empty(self.states[name].base.shape, dtype=like.dtype, device=like.device)
        with torch.no_grad():
            self.write_value(name, view, value, learner, plan)
        return value

    def write_value(
        self,
        name: str,
        view: ViewName,
        out: torch.Tensor,
        learner: Learner | None = None,
        plan: Plan | None = None,
        on_grid: bool = True,
    ) -> None:
        """Write a weight into `out`, rounded once to the dtype of `out`.

        Args:
            view: the weights to compute.
            out: local tensor in the shape of the weight.
            learner: the branch, or the current value of a parameter trained in full. Without it, fast weights are the
                start of the running stage.
            plan: plan of the running stage. Required if `learner` is a branch and the view is "fast". With it, slow
                weights of parameters that do not follow the slow rule are their current values.
            on_grid: whether to round to the grid of the site. A weight in place is not, because its branch does.
        """
        state = self.started(name)
        running: Delta | torch.Tensor | None = None
        if isinstance(learner, torch.Tensor):
            running = learner
            if plan is not None and self.is_slow(name, view) and not state.follows(plan.spec):
                view = "fast"
        elif learner is not None and view == "fast" and not state.shard.group.all(not has_trained(learner, state)):
            assert plan is not None, "the delta of a branch depends on the plan of its stage"
            running = delta_of(learner, state, plan.spec, plan.stage, not self.idle, out.device)
        state.write(out, view, arithmetic(out.dtype), running)
        if on_grid and state.grid and view != "base":
            out.copy_(state.on_grid(out))

    def is_slow(self, name: str, view: ViewName) -> bool:
        """Whether a view of a weight is the slow weights."""
        return view == "slow" or (view == "averaged" and not self.states[name].differs("averaged"))

    def moved(self, learners: Mapping[str, Learner]) -> bool:
        """Whether a learner (by weight name) has changed since the start of its stage, on any rank."""
        trained = False
        for name, learner in learners.items():  # all of them: every rank must make the same collective calls
            trained |= has_trained(learner, self.started(name))
        return self.group.any(trained)

    def after_stage(self, plan: Plan, learners: Mapping[str, Learner]) -> SlowWeights:
        """Return the state after the slow update of the running stage (docs/algorithm.md, row "slow update")."""
        spec, noisy = plan.spec, not self.idle
        # Check all factors in one pass. `end_stage` checks each branch only if this fails.
        finite = self.group.all(all_finite(learners.values()))
        keeps = True
        if self.trained:  # if they are small, they keep a copy per stage, so that `rewind` can restore them
            branches = [learner for learner in learners.values() if isinstance(learner, Branch)]
            size = sum(factor.numel() for branch in branches for factor in branch.parameters())
            keeps = sum(state.base.numel() for state in self.trained.values()) <= max(MAX_FULL_ENTRIES, size)
        before = self.history.resting() if self.idle else self.history
        share = 1 / (before.averaged + 1) if spec.average else None
        history = History((*before.ends, StageEnd(plan.stage, self.pace(plan), spec.restart, share)))
        states = {}
        for name in self.states:
            states[name] = end_stage(self.started(name), learners.get(name), spec, history, noisy, finite, keeps)
        return replace(self, states=states, idle=False, history=history)

    def begin_stage(
        self, plan: Plan, branches: Mapping[str, Branch], restart: bool = False, keep: bool = True
    ) -> tuple[SlowWeights, dict[str, dict[str, torch.Tensor]]]:
        """Start a stage: return its state, and the initial values of its branches.

        Args:
            branches: branches of the model, by weight name.
            restart: whether all branches get new initial values. Otherwise only branches whose initial values depend on
                the weight (PiSSA, DoRA) get them.
            keep: whether branches keep the factors that the spec says (A, or both).

        Returns:
            The state, and local tensors by weight name and parameter name.
        """
        states, values = dict(self.states), {}
        for site in plan.sites:
            name, branch = site.weight, branches.get(site.weight)
            if branch is None or not (restart or branch.starts_from(plan.spec, not self.idle)):
                continue  # its constructor has set its initial values
            states[name], started = begin_stage(states[name], branch, site, plan.spec, plan.stage, keep, not self.idle)
            for key, value in started.items():
                started[key] = local_like(value, branch.get_parameter(key))
            values[name] = started
        return replace(self, states=states), values

    def faults(self) -> list[str]:
        """Return a sentence for each problem: a slow state with inf or nan, or with tensors of inconsistent shapes."""
        return [f"the slow state of {name} {fault}" for name, state in self.states.items() for fault in state.faults()]


@dataclass(frozen=True)
class Part:
    """One run in a weighted sum of runs."""

    name: str
    plan: Plan
    slow: SlowWeights
    buffers: Mapping[str, torch.Tensor]


def host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of the local tensor in host memory.

    A quantized weight is not copied, because it is never written.
    """
    if is_quantized(tensor):
        return tensor.detach()
    return local(tensor).detach().to("cpu", copy=True)


def base_of(weight: torch.Tensor, memory: BaseMemory) -> torch.Tensor:
    """Return W0 of a weight in a kind of memory.

    If the weight is in this kind of memory already, W0 shares its memory until the first write
    (`WeightState.keep_base`). Otherwise W0 is a copy.
    """
    if is_quantized(weight):
        return host(weight)
    if memory == "device" or (weight.device.type == "cpu" and memory == "memory"):
        # Only a plain parameter shares its memory: the copy before a write replaces `data` of the shared tensor.
        shared = type(weight) is nn.Parameter and not weight.is_inference()
        return weight.data if shared else local(weight).detach().clone()
    return host(weight).pin_memory() if memory == "pinned" else host(weight)


# ---- How much of the trained change a fold keeps, after its weights are rounded to the dtype of the model

ROWS = 16
"""Rows of a weight that are compared, evenly spaced. The numbers of a row tell those of the others."""
ENOUGH = 0.9
"""A fold that keeps a smaller share of the change of a weight warns."""


class Kept(NamedTuple):
    """How much of the change of a weight since W0 a fold keeps. Computed in fp64.

    Args:
        share: projection of the stored change on the exact one, divided by the norm of the exact one. 1 if nothing is
            lost, 0 if all is lost. Errors that have nothing to do with the change do not count.
        error: norm of the difference between the stored change and the exact one, divided by the norm of the exact one.
    """

    share: float
    error: float

    @classmethod
    def of(cls, change: torch.Tensor, stored: torch.Tensor) -> Kept:
        """Compare an exact change with the stored one, in the same shape."""
        change, stored = change.double().flatten(), stored.double().flatten()
        size = change.dot(change)
        if not size > 0:
            return cls(1.0, 0.0)
        return cls(float(change.dot(stored) / size), float((stored - change).norm() / size.sqrt()))


def kept_by(state: WeightState, view: Summed = "slow") -> Kept | None:
    """Return how much of the change of a weight its own dtype keeps.

    None if the weight is trained in full, quantized, unchanged, or trained on a grid, which loses nothing.
    """
    if state.full or state.grid or is_quantized(state.base) or not state.changed:
        return None
    part = state.sampled(ROWS)
    change = part.exact(view, torch.float64)
    stored = change.to(part.base.dtype).double().sub_(part.base)
    return Kept.of(change.sub_(part.base), stored)


def loss_of(shares: Mapping[str, Kept]) -> str:
    """Return a sentence about the weight that keeps the least, if that is less than `ENOUGH`. Otherwise ""."""
    name, kept = min(shares.items(), key=lambda item: item[1].share)
    if kept.share >= ENOUGH:
        return ""
    return (
        f"the rounding of {name} keeps {kept.share:.2f} of what was trained (relative error {kept.error:.2g}). Train "
        "with the rounded weights (CascadeSpec.grid), keep the branches (lorasc_fx.save, export.peft), or fold into a "
        "wider dtype"
    )
