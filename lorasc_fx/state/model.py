"""The slow state of a model: a `WeightState` for each weight that is adapted, gets noise, or is trained in full.

During a stage the user's parameters hold `W_t`. `SlowWeights` is immutable. A transition computes the next one, writes
its values, and then stores it in the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import nn

from lorasc_fx.branch import Branch, Delta
from lorasc_fx.plan import Plan
from lorasc_fx.quantized import is_quantized, quantized_in
from lorasc_fx.shards import ONE_PROCESS, ProcessGroup, ShardSpec, local, local_like, shard_of
from lorasc_fx.spec import TrainRule
from lorasc_fx.state.engine import (
    Learner,
    all_finite,
    begin_stage,
    delta_of,
    end_stage,
    has_trained,
    write_start,
)
from lorasc_fx.state.factor_products import Scratch, arithmetic
from lorasc_fx.state.weight import History, StageEnd, ViewName, WeightState

Memory = Literal["memory", "pinned", "device"]
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
        left_out: names of the weights that the last fold did not change, because the result was not finite.
        history: the stages that the slow weights are made of. A weight that was adapted later has the last ones.
        group: the process group that holds the shards of the weights.
    """

    states: Mapping[str, WeightState] = field(default_factory=dict)
    idle: bool = False
    left_out: frozenset[str] = frozenset()
    history: History = field(default_factory=History)
    group: ProcessGroup = ONE_PROCESS

    @cached_property
    def trained(self) -> Mapping[str, WeightState]:
        """The states of the parameters trained in full."""
        return {name: state for name, state in self.states.items() if state.full}

    @cached_property
    def quantized(self) -> tuple[str, ...]:
        """Names of the quantized weights. Their parameters cannot hold a delta, so their branches compute it."""
        return tuple(quantized_in({name: state.base for name, state in self.states.items() if not state.full}))

    def to_shard(self, specs: Mapping[str, ShardSpec], group: ProcessGroup, mapped: bool = False) -> SlowWeights:
        """Return the state for this rank's shards.

        Args:
            specs: the slice of each weight on this rank, by name.
            group: the process group of the shards.
            mapped: whether W0 is memory-mapped from files. Then its slices are views of the files.
        """
        states = {name: state.to_shard(specs[name], mapped) for name, state in self.states.items()}
        return replace(self, states=states, group=group)

    def without_base(self) -> SlowWeights:
        """Return the state with every W0 on the meta device, to be combined with the W0 of another run."""
        states = {name: replace(state, base=state.base.to("meta")) for name, state in self.states.items()}
        return replace(self, states=states)

    def with_weights(
        self,
        parameters: Mapping[str, nn.Parameter],
        plan: Plan,
        mapped: Mapping[str, torch.Tensor] | None = None,
        memory: Memory = "memory",
    ) -> SlowWeights:
        """Return a state with new weights, whose current values become W0. Known weights keep their state.

        Args:
            parameters: parameters of the model, by name. Of a DTensor, the local shard becomes W0.
            plan: plan of the running stage. It says which weights are stacked or transposed.
            mapped: W0 of some weights as memory-mapped tensors, equal to the current values, by name.
            memory: the kind of memory for W0 of all other weights.
        """
        sites, mapped = plan.by_weight, mapped or {}
        new = {
            name: WeightState(
                name,
                mapped[name] if name in mapped else base_of(value, memory),
                stacked=name in sites and sites[name].experts is not None,
                transposed=name in sites and sites[name].layout == "in_out",
                shard=shard_of(value),
            )
            for name, value in parameters.items()
            if name not in self.states
        }
        return replace(self, states={**self.states, **new})

    def with_trained(self, parameters: Mapping[str, nn.Parameter], rules: Mapping[str, TrainRule]) -> SlowWeights:
        """Return a state with these parameters added as trained in full. `rules` has train_rules for some of them."""
        new = {
            name: WeightState(name, host(value), shard=shard_of(value), full=True, rule=rules.get(name)).bare()
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
        rests: dict[int, History] = {}
        for state in self.states.values():
            rests.setdefault(len(state.history.ends), state.history.resting())
        return {name: state.resting(rests[len(state.history.ends)]) for name, state in self.states.items()}

    def write_resting(self, name: str, plan: Plan, out: torch.Tensor, scratch: Scratch | None = None) -> None:
        """Write the value that the parameter holds in the running stage: W_t, or the slow weight if idle.

        For a parameter trained in full, this is the value that its stage started from.
        """
        if self.idle:
            self.write_value(name, "fast", out)
        else:
            write_start(out, self.states[name], plan.spec, plan.stage, True, plan.step, scratch)

    def value(
        self, name: str, view: ViewName, like: torch.Tensor, learner: Learner | None = None, plan: Plan | None = None
    ) -> torch.Tensor:
        """Return the value of a weight, rounded once to the dtype of `like`, on its device; see `write_value`."""
        value = torch.empty(self.states[name].base.shape, dtype=like.dtype, device=like.device)
        with torch.no_grad():
            self.write_value(name, view, value, learner, plan)
        return value

    def write_value(
        self, name: str, view: ViewName, out: torch.Tensor, learner: Learner | None = None, plan: Plan | None = None
    ) -> None:
        """Write a weight into `out`, rounded once to the dtype of `out`.

        Args:
            name: name of the weight.
            view: the weights to compute.
            out: local tensor in the shape of the weight.
            learner: the branch, or the current value of a parameter trained in full. Without it, fast weights are the
                start of the running stage.
            plan: plan of the running stage. Required if `learner` is a branch and the view is "fast". With it, slow
                weights of parameters that do not follow the slow rule are their current values.
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

    def is_slow(self, name: str, view: ViewName) -> bool:
        """Whether a view of a weight is the slow weights."""
        return view == "slow" or (view == "averaged" and not self.states[name].differs("averaged"))

    def moved(self, learners: Mapping[str, Learner]) -> bool:
        """Whether a learner (by weight name) has changed since the start of its stage, on any rank."""
        trained = [has_trained(learner, self.started(name)) for name, learner in learners.items()]
        return self.group.any(any(trained))  # not lazily: every rank must make the same collective calls

    def after_stage(self, plan: Plan, learners: Mapping[str, Learner]) -> SlowWeights:
        """Return the state after the slow update of the running stage (docs/algorithm.md, row "slow update").

        Args:
            plan: plan of the stage that ends.
            learners: branches, and parameters trained in full, by weight name.

        Raises:
            NonFiniteBranch: a learner is not finite, or its weight would overflow, and spec.on_nonfinite is "raise".
        """
        spec, noisy = plan.spec, not self.idle
        branches = [learner for learner in learners.values() if isinstance(learner, Branch)]
        # Check all factors in one pass. `end_stage` checks each branch only if this fails.
        finite = self.group.all(all_finite(branches))
        # Small parameters trained in full keep a copy per stage, so that `rewind` can restore them.
        size = sum(factor.numel() for branch in branches for factor in branch.parameters())
        keeps = sum(state.base.numel() for state in self.trained.values()) <= max(MAX_FULL_ENTRIES, size)
        before = self.history.resting() if self.idle else self.history
        pace, share = spec.pace_at(plan.stage, before.count), None
        if spec.average:
            share = 1 / (before.averaged + 1)
        history = before.after(StageEnd(plan.stage, pace, spec.restart, share))
        ended, histories = {}, {len(history.ends): history}
        for name in self.states:
            state = self.started(name)
            count = len(state.history.ends) + 1
            # Weights that were adapted together share one history, and so its coefficients.
            own = histories[count] = histories.get(count) or History(history.ends[-count:])
            ended[name] = end_stage(state, learners.get(name), spec, own, noisy, finite, keeps)
        # Drop stages on which no expert depends, and whose weights are no longer available.
        states = {name: state for name, (state, _) in ended.items()}
        stages = [expert.stage for state in states.values() for expert in state.experts if expert.stage]
        first = min([plan.stage, max(state.gone for state in states.values()) + 1, *stages]) if states else 0
        since = {id(own): own.since(first) for own in histories.values()}
        history = since[id(history)]
        states = {name: replace(state, history=since[id(state.history)]) for name, state in states.items()}
        return replace(
            self,
            states=states,
            idle=False,
            left_out=frozenset(name for name, (_, left_out) in ended.items() if left_out),
            history=history,
        )

    def begin_stage(
        self, plan: Plan, branches: Mapping[str, Branch], restart: bool = False, keep: bool = True
    ) -> tuple[SlowWeights, dict[str, dict[str, torch.Tensor]]]:
        """Start a stage: return its state, and the initial values of its branches.

        Args:
            plan: plan of the stage that starts.
            branches: branches of the model, by weight name.
            restart: whether all branches get new initial values. Otherwise only branches whose initial values depend on
                the weight (PiSSA, DoRA) get them.
            keep: whether branches keep the factors that the spec says (A, or both).

        Returns:
            The state, and local tensors by weight name and parameter name.
        """
        states, values = dict(self.states), {}
        for name, branch in branches.items():
            if not restart and not branch.starts_from(plan.spec, not self.idle):
                continue  # its constructor has set its initial values
            site = plan.by_weight[name]
            states[name], started = begin_stage(
                states[name], branch, site, plan.spec, plan.stage, keep, not self.idle, name in self.left_out
            )
            values[name] = {key: local_like(value, branch.get_parameter(key)) for key, value in started.items()}
        return replace(self, states=states), values

    def faults(self) -> list[str]:
        """Return a sentence for each problem: a slow state with inf or nan, or with tensors of inconsistent shapes."""
        return [f"the slow state of {name} {fault}" for name, state in self.states.items() for fault in state.faults()]


@dataclass(frozen=True)
class Part:
    """One run in a weighted sum of runs.

    Args:
        name: name of the run, for messages.
        plan: plan of its running stage.
        slow: its slow weights with the running stage folded. W0 is on the meta device, because all runs share one.
        buffers: buffers of its model, and parameters that its forward writes, by name.
    """

    name: str
    plan: Plan
    slow: SlowWeights
    buffers: Mapping[str, torch.Tensor]


def host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of the local tensor in host memory.

    A quantized weight is not copied, because it is never written. A tensor on the meta device is not copied either.
    """
    if is_quantized(tensor) or tensor.is_meta:
        return tensor.detach()
    return local(tensor).detach().to("cpu", copy=True)


def base_of(weight: torch.Tensor, memory: Memory) -> torch.Tensor:
    """Return W0 of a weight in a kind of memory.

    If the weight is in this kind of memory already, W0 shares its memory until the first write
    (`WeightState.keep_base`). Otherwise W0 is a copy.
    """
    if is_quantized(weight) or weight.is_meta:
        return host(weight)
    if memory == "device" or (weight.device.type == "cpu" and memory == "memory"):
        # Only a plain parameter shares its memory: the copy before a write replaces `data` of the shared tensor.
        shared = type(weight) is nn.Parameter and not weight.is_inference()
        return weight.data if shared else local(weight).detach().clone()
    return host(weight).pin_memory() if memory == "pinned" else host(weight)
