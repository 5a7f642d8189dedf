"""The start and the end of a stage, for one or all weights. The cascade and the passes both call these functions.

Source: docs/algorithm.md, "One site".

During a stage the user's parameters hold `W_t`. A transition computes the next `SlowWeights`, writes the new values
into the parameters, and then stores the `SlowWeights` in the run.

PiSSA (2404.02948) subtracts initial factors from the weight. During the stage the parameter holds the residual
`W_t - s B_0 A_0`, so that parameter and branch together start at `W_t`. The delta of the stage is `s (B A - B_0 A_0)`.
It is stored as one pair of twice the rank, `[B - B_0, B_0] [A; A - A_0]`. The terms `(B - B_0) A` and `B_0 (A - A_0)`
of this product are as small as the change, and exactly zero before the first step.
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
    """Return the value that a parameter holds while a stage trains, rounded once to the dtype of the weight.

    This is `W_t = W0 + S_{t-1} + N_t`, or `W0 + F_{t-1} + N_t` under restart="fast", minus the initial factors of the
    branch (docs/algorithm.md, "start of stage t").

    Args:
        spec, stage: the spec, and the number of the stage.
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

    The noise depends on (seed, stage, weight name) and is drawn block by block. If `out` has a narrower dtype than the
    computation (`arithmetic`), the weight is computed in `scratch` first.
    """
    dtype = arithmetic(state.base.dtype)
    if state.base.dtype not in (out.dtype, dtype):  # the parameter was cast later: round to the dtype of W0 first
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
            f"noise.strength is {spec.noise.strength}, but the noise of {state.name} is undefined: the weight holds "
            "inf or nan, or the product of strength and standard deviation overflows. "
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
    """Implements `branch.StartWeight`: the weight of a branch at the start of a stage. Each call computes it again.

    Args:
        state: state of the weight in the stage.
        spec, stage: the spec, and the number of the stage.
        with_noise: whether the stage runs. The weight of an idle stage has no noise.
        device: device of the returned tensors.
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
        """Return the full weight without noise, in fp32, or in fp64 for an fp64 weight."""
        exact = self.state.exact("fast", arithmetic(self.state.base.dtype), device=self.device)
        return self.state.whole(exact, Side.WEIGHT)

    def noisy(self) -> torch.Tensor:
        """Return this rank's slice of the weight with noise, in the dtype of the weight."""
        return start_weight(self.state, self.spec, self.stage, self.with_noise, self.device)

    def cut(self, value: torch.Tensor, side: Side) -> torch.Tensor:
        """Return this rank's slice of a full tensor."""
        return self.state.cut(value, side)

    def whole(self, value: torch.Tensor, side: Side) -> torch.Tensor:
        """Gather the full tensor from the slices on all ranks."""
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
    """Return the state of a weight in a new stage, and the initial values of its branch as {name: full tensor}.

    If the weight is sharded, every rank must call this at the same point, because some methods gather the weight.

    Args:
        state: state of the weight after the stage before.
        branch: the branch, with its values from the stage before. It is not changed.
        site, spec, stage: from the plan of the new stage. The rank of the site is the rank of the values.
        keep: whether the factors that do not restart (`spec.restart_factors`) keep their values.
        noisy: whether the new stage starts now. Until then the weight has no noise, and no initial factors are
            subtracted from it.
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
            # The fold has added the delta of kept factors to the weight, so subtract it, like other initial factors.
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

    If the sums of all tensors are finite, so are their entries. Reading the sums takes one synchronization per device.
    A sum of finite entries may overflow. So if a sum is not finite, all entries are checked.
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
    """Return the slow state of a weight at the end of a stage. With `noise.keep`, it includes the noise of the stage.

    Args:
        learner: the branch, or the parameter trained in full. None for a weight that only has noise.
        history: the history of the run, whose last entry is this stage.
        noisy: whether the stage ran. The weight of an idle stage has no noise.
        checked: whether the caller has checked that all factors are finite.
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
        # All ranks must agree, because they must have the same number of experts.
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
    """Return initial factors from the largest singular triplets of a weight (PiSSA, 2404.02948).

    The rank of the branch may exceed the number of singular values. Then the remaining rows of A keep LoRA's random
    values, and the remaining columns of B are zero.

    Returns:
        {parameter name: factor}: A [r, in] and B [out, r]. For stacked matrices, both have the axis of the stack first.
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
    """Return the delta of a branch since the start of the stage, for this rank's slice of the weight, as copies.

    If the delta started at zero, the result has the current factors. If it started at `s B_0 A_0`, the result has
    `[B - B_0, B_0]` and `[A; A - A_0]` (see the module docstring). The copies are on `device`.
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
"""If the parameters trained in full have at most this many entries in total, each stage keeps a copy of them. If the
branches have more entries than this limit, the number of their entries is the limit instead."""


@dataclass(frozen=True)
class SlowWeights:
    """The slow states of all weights of a model.

    Args:
        states: {weight name: state}, for sites, parameters trained in full, and all other matrices that get noise.
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
        """The states of the parameters trained in full, by name."""
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
        """Return the state for this rank's shards. `specs` is {weight name: its slice on this rank}."""
        states = {name: state.to_shard(specs[name]) for name, state in self.states.items()}
        return replace(self, states=states, group=group)

    def without_base(self) -> SlowWeights:
        """Return the state with every W0 on the meta device, so that it can be combined with W0 of another run."""
        states = {name: replace(state, base=state.base.to("meta")) for name, state in self.states.items()}
        return replace(self, states=states)

    def with_weights(
        self, parameters: Mapping[str, nn.Parameter], plan: Plan, memory: BaseMemory = "memory"
    ) -> SlowWeights:
        """Return the state with more weights, whose current values become W0. Weights that have a state keep it.

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
        """Return the state of a weight. If no stage runs, its start is the slow weight, even under restart="fast"."""
        return (self._resting if self.idle else self.states)[name]

    @cached_property
    def _resting(self) -> Mapping[str, WeightState]:
        """The states with their slow weights as their start, by weight name."""
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
            plan: plan of the running stage. Required if `learner` is a branch and the view is "fast". If given, the
                slow weight of a parameter without the slow rule is its current value.
            on_grid: whether to round to the grid of the site. False for a parameter in place, because its branch
                rounds.
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
        """Whether a view of a weight equals its slow weight."""
        return view == "slow" or (view == "averaged" and not self.states[name].differs("averaged"))

    def moved(self, learners: Mapping[str, Learner]) -> bool:
        """Whether any learner, given by weight name, has changed since the start of the stage, on any rank."""
        trained = False
        for name, learner in learners.items():  # without an early exit: every rank must make the same collective calls
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
        """Start a stage of all weights.

        Args:
            branches: branches of the model, by weight name.
            restart: whether all branches get new initial values. Otherwise only branches whose initial values depend on
                the weight (PiSSA, DoRA) get them.
            keep: whether the factors that do not restart (`spec.restart_factors`) keep their values.

        Returns:
            The state in the new stage, and this rank's initial values as {weight name: {parameter name: tensor}}.
        """
        states, values = dict(self.states), {}
        for site in plan.sites:
            name, branch = site.weight, branches.get(site.weight)
            if branch is None or not (restart or branch.starts_from(plan.spec, not self.idle)):
                continue  # the constructor of the branch has set its initial values
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

    If no transfer is needed, W0 shares the memory of a plain weight until the first write to the weight
    (`WeightState.keep_base`). Otherwise W0 is a copy.
    """
    if is_quantized(weight):
        return host(weight)
    if memory == "device" or (weight.device.type == "cpu" and memory == "memory"):
        # Share memory only with a plain parameter, because `keep_base` later assigns `data` of the shared tensor.
        shared = type(weight) is nn.Parameter and not weight.is_inference()
        return weight.data if shared else local(weight).detach().clone()
    return host(weight).pin_memory() if memory == "pinned" else host(weight)


# ---- How much of the trained change a fold keeps, after its weights are rounded to the dtype of the model

ROWS = 16
"""Number of evenly spaced rows of a weight that `kept_by` compares, as a sample of all rows."""
ENOUGH = 0.9
"""Smallest share of the change of a weight that a fold may keep without a warning."""


class Kept(NamedTuple):
    """How much of the change of a weight since W0 a fold keeps. Computed in fp64.

    Args:
        share: projection of the stored change on the exact one, divided by the norm of the exact one. 1 if nothing is
            lost, 0 if all is lost. Errors orthogonal to the change do not count.
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

    None if the weight is trained in full, quantized or unchanged. Also None on a grid, whose fold loses nothing.
    """
    if state.full or state.grid or is_quantized(state.base) or not state.changed:
        return None
    part = state.sampled(ROWS)
    change = part.exact(view, torch.float64)
    stored = change.to(part.base.dtype).double().sub_(part.base)
    return Kept.of(change.sub_(part.base), stored)


def loss_of(shares: Mapping[str, Kept]) -> str:
    """Return a message about the weight that keeps the smallest share, or "" if this share is at least `ENOUGH`."""
    name, kept = min(shares.items(), key=lambda item: item[1].share)
    if kept.share >= ENOUGH:
        return ""
    return (
        f"the rounding of {name} keeps {kept.share:.2f} of what was trained (relative error {kept.error:.2g}). Train "
        "with the rounded weights (CascadeSpec.grid), keep the branches (lorasc_fx.save, export.peft), or fold into a "
        "wider dtype"
    )
