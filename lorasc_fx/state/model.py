"""The state of a model: a `WeightState` for each weight that is adapted or gets noise, and what is trained in full.

While a stage trains, the user's parameters hold `W_t`. `SlowWeights` is a value: a transition makes the next one,
writes it, and only then is it the cascade's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from lorasc_fx.branch import Branch
from lorasc_fx.errors import NonFiniteBranch, warn
from lorasc_fx.options import RESTARTS
from lorasc_fx.plan import Plan
from lorasc_fx.quantized import is_quantized
from lorasc_fx.shards import ProcessGroup, ShardSpec, local, local_like, shard_of
from lorasc_fx.spec import CascadeSpec, TrainRule
from lorasc_fx.state.engine import all_finite, begin_stage, end_stage, factors_of, gain_of, has_trained, write_start
from lorasc_fx.state.products import Scratch, arithmetic
from lorasc_fx.state.weight import Side, Tree, WeightState, Which, ends_of

AFFORDABLE = 1 << 20
"""Entries trained in full of which a copy is kept at the end of each stage; more only if the branches hold as many."""
MOST = 100
"""Stages of which such copies are kept, the latest."""


@dataclass(frozen=True)
class Trained(Tree):
    """A parameter trained in full: a weight whose views are dense, each its value and not what was added to W0.

    Args:
        base: W0.
        views: by name, as of a `WeightState`: `slow`, `start`, `average` where it is not the slow value, and `stage/K`
            as long as these are affordable (`AFFORDABLE`). In the dtype of the arithmetic, but for `start`.
        rule: the first of the spec's train_rules that means the parameter.
    """

    base: torch.Tensor = field(metadata={Side: Side.WEIGHT})
    views: Mapping[str, torch.Tensor] = field(metadata={Side: Side.WEIGHT})
    rule: TrainRule | None = None

    @classmethod
    def of(cls, base: torch.Tensor, slow: torch.Tensor, rule: TrainRule | None = None) -> Trained:
        """Return one whose stage starts from a value."""
        return cls(base, {"slow": slow, "start": slow.to(base.dtype)}, rule)

    @property
    def slow(self) -> torch.Tensor:
        """The slow value."""
        return self.views["slow"]

    @property
    def start(self) -> torch.Tensor:
        """The value that the running stage started from."""
        return self.views["start"]

    @property
    def average(self) -> torch.Tensor | None:
        """The average of the slow values over stages; None where it is the slow value."""
        return self.views.get("average")

    @property
    def ends(self) -> Mapping[int, torch.Tensor]:
        """The slow values at the ends of stages, by stage, oldest first."""
        return ends_of(self.views)

    def resting(self, idle: bool) -> torch.Tensor:
        """Return what the parameter holds at the start of a stage, or when idle."""
        return self.slow.to(self.base.dtype) if idle else self.start

    def value(self, which: Which, live: torch.Tensor, follows: bool = True) -> torch.Tensor:
        """Return the slow, fast, averaged or base value; `live` is the present one, which is the slow one as well where
        the parameter does not follow the slow rule.
        """
        if which == "base":
            return self.base
        if which == "averaged" and self.average is not None:
            return self.average.to(live.dtype)
        return self.slow.to(live.dtype) if which != "fast" and follows else live

    def follows(self, spec: CascadeSpec) -> bool:
        """Whether the parameter follows the slow rule."""
        return spec.slow_train if self.rule is None or self.rule.slow is None else self.rule.slow

    def absorb(
        self, stage: int, fast: torch.Tensor, pace: float, restart: str, share: float | None, keep: bool
    ) -> Trained:
        """Return the state after the slow update from a fast value; `keep` notes the value as the end of the stage."""
        exact = fast.to(self.slow.dtype)
        slow = exact if pace == 1 else torch.lerp(self.slow, exact, pace)
        views = {"slow": slow, "start": fast if pace == 1 else RESTARTS[restart].start(slow.to(fast.dtype), fast)}
        if keep:
            ends = {**self.ends, stage: slow}
            views |= {f"stage/{end}": ends[end] for end in list(ends)[-MOST:]}
        return replace(self, views=views).averaged(self, share)

    def averaged(self, before: Trained, share: float | None) -> Trained:
        """Return it with `average + share * (slow - average)`, from the average before; without a share with none."""
        if share is None or share == 1:
            return self
        average = before.slow if before.average is None else before.average
        return replace(self, views={**self.views, "average": torch.lerp(average, self.slow, share)})

    def at(self, stage: int) -> Trained | None:
        """Return the state at the end of a stage (0: W0), from which a stage can start; None where it is gone."""
        values = {0: self.base.to(arithmetic(self.base.dtype)), **self.ends}
        if stage not in values:
            return None
        ends = {f"stage/{end}": value for end, value in self.ends.items() if end <= stage}
        views = {"slow": values[stage], "start": values[stage].to(self.base.dtype), **ends}
        return replace(self, views=views)

    def to_shard(self, shard: ShardSpec | None) -> Trained:
        """Return the state of this rank's shard of the parameter, in its own memory."""
        return self if shard is None else self.map(lambda value, _: shard.take(value).clone())


@dataclass(frozen=True)
class SlowWeights:
    """Slow states by weight name.

    Args:
        states: of the sites, and of every matrix that carries noise.
        trained: of the parameters trained in full.
        idle: no stage runs; the parameters hold the slow weights, without noise.
        left_out: names of the weights that the last fold did not move, because what had trained was not finite.
        averaged: number of stages whose slow weights are in the average.
        group: the processes that hold the weights in shards, of which this one has its own; None for one process.
    """

    states: Mapping[str, WeightState] = field(default_factory=dict)
    trained: Mapping[str, Trained] = field(default_factory=dict)
    idle: bool = False
    left_out: frozenset[str] = frozenset()
    averaged: int = 0
    group: ProcessGroup | None = None

    def some(self, flag: bool) -> bool:
        """Whether it holds here, or on a process that holds other shards."""
        return flag if self.group is None else self.group.any(flag)

    def to_shard(self, specs: Mapping[str, ShardSpec | None], group: ProcessGroup, mapped: bool = False) -> SlowWeights:
        """Return the state of this rank's shards of the weights, by name. If `mapped`, W0 stays in its file."""
        states = {name: state.to_shard(specs[name], mapped) for name, state in self.states.items()}
        trained = {name: entry.to_shard(specs[name]) for name, entry in self.trained.items()}
        return replace(self, states=states, trained=trained, group=group)

    def with_weights(
        self, parameters: Mapping[str, nn.Parameter], plan: Plan, mapped: Mapping[str, torch.Tensor] | None = None
    ) -> SlowWeights:
        """Return the state that knows these weights as well; their present values are W0, kept on the host.

        `mapped` are W0 of some of them, equal to the present values, kept where they are; of others W0 is the weight's
        own memory where it can be (`keep_base` before a weight is written). Of a DTensor the state is that of the shard
        that is here.
        """
        sites, mapped = plan.by_weight, mapped or {}
        new = {
            name: WeightState(
                name,
                mapped[name] if name in mapped else base_of(value),
                stacked=name in sites and sites[name].experts is not None,
                transposed=name in sites and sites[name].layout == "in_out",
                shard=shard_of(value),
            )
            for name, value in parameters.items()
            if name not in self.states
        }
        return replace(self, states={**self.states, **new})

    def with_trained(self, parameters: Mapping[str, nn.Parameter], rules: Mapping[str, TrainRule]) -> SlowWeights:
        """Return the state that knows these parameters, trained in full, some by a rule of their own."""
        new = {}
        for name, value in parameters.items():
            base = host(value)
            new[name] = Trained(base, {"slow": base.to(arithmetic(base.dtype)), "start": base}, rules.get(name))
        return replace(self, trained=new)

    def write_resting(self, name: str, plan: Plan, out: torch.Tensor, scratch: Scratch | None = None) -> None:
        """Write what the parameter of this name holds between two steps, W_t or when idle the slow weight, into `out`;
        of a parameter trained in full, what its stage started from. `scratch` is for one weight at a time.
        """
        if name in self.trained:
            out.copy_(self.trained[name].resting(self.idle))
        elif self.idle:
            self.write_value(name, "slow", out)
        else:
            write_start(out, self.states[name], plan.spec, plan.stage, True, plan.step, scratch)

    def value(self, name: str, which: Which, like: torch.Tensor, branch: Branch | None = None) -> torch.Tensor:
        """Return weights of this name, rounded once to the dtype of `like`, on its device."""
        state = self._as_run(self.states[name])
        value = torch.empty(state.base.shape, dtype=like.dtype, device=like.device)
        with torch.no_grad():
            self.write_value(name, which, value, branch)
        return value

    def write_value(
        self, name: str, which: Which, out: torch.Tensor, branch: Branch | None = None, plan: Plan | None = None
    ) -> None:
        """Write what `value` returns into `out`; for a branch with magnitudes the plan is that of its stage."""
        state, live, gain = self._as_run(self.states[name]), None, None
        moved = branch is not None and which == "fast" and not state.every(not has_trained(branch, state))
        if branch is not None and moved:
            live = factors_of(branch, out.device, state)
            if plan is not None:
                gain = gain_of(branch, state, plan.spec, plan.stage, not self.idle)
        state.write(out, which, arithmetic(out.dtype), live, gain)

    def moved(self, branches: Mapping[str, Branch]) -> bool:
        """Whether one of these branches, by weight name, has left the start of its stage, here or elsewhere."""
        trained = [has_trained(branch, self.states[name]) for name, branch in branches.items()]  # all: ranks talk
        return self.some(any(trained))

    def after_stage(
        self, plan: Plan, branches: Mapping[str, Branch], parameters: Mapping[str, torch.Tensor]
    ) -> SlowWeights:
        """Return the state after the slow update of the running stage (algorithm.md, row "slow update").

        Args:
            plan: of the stage that ends.
            branches: by weight name.
            parameters: those trained in full, by name, with their fast values.

        Raises:
            NonFiniteBranch: one of them is not finite, or makes a weight so, and spec.on_nonfinite is "raise".
        """
        spec, noisy, finite = plan.spec, not self.idle, not self.some(not all_finite(branches.values()))
        left_out: set[str] = set()
        size = sum(factor.numel() for branch in branches.values() for factor in branch.parameters())
        keeps = sum(entry.base.numel() for entry in self.trained.values()) <= max(AFFORDABLE, size)
        pace, share = spec.pace_at(plan.stage), spec.average_share(self.averaged)
        states = {
            name: end_stage(self._as_run(state), branches.get(name), spec, plan.stage, noisy, finite, left_out, share)
            for name, state in self.states.items()
        }
        trained = {}
        for name, entry in self.trained.items():
            fast = host(parameters[name])
            if _left_out(name, self.some(_broken(fast, entry.base)), plan):
                trained[name] = entry.averaged(entry, share)
                left_out.add(name)
                continue
            own_pace = pace if entry.follows(spec) else 1.0
            trained[name] = entry.absorb(plan.stage, fast, own_pace, spec.restart, share, keeps)
        after = replace(self, states=states, trained=trained, idle=False, left_out=frozenset(left_out))
        return after if share is None else replace(after, averaged=self.averaged + 1)

    def begin_stage(
        self, plan: Plan, branches: Mapping[str, Branch], starts: Mapping[str, torch.Tensor] | None = None
    ) -> tuple[SlowWeights, dict[str, dict[str, torch.Tensor]]]:
        """Return the state with what these branches take out of it, and the values of their parameters as they start.

        There are none where the factors start as in LoRA, or no stage runs; magnitudes always start from the weight.

        Args:
            plan: of the stage that starts.
            branches: by weight name.
            starts: lora_A by weight name, as LoRA starts it; by default as it is.
        """
        spec = plan.spec
        if not spec.starts_from_weights(running=not self.idle):
            return self, {}
        states, factors = dict(self.states), {}
        for name, branch in branches.items():
            a = starts[name] if starts is not None else branch.lora_A.detach()
            site = plan.by_weight[name]
            states[name], started = begin_stage(states[name], branch, site, spec, plan.stage, a, not self.idle)
            held = dict(branch.named_parameters())
            factors[name] = {key: local_like(value.detach(), held[key]) for key, value in started.named_parameters()}
        return replace(self, states=states), factors

    def faults(self) -> list[str]:
        """Return a sentence for each weight whose slow state holds inf or nan, or what does not belong together."""
        sentences = [
            f"the slow state of {name} {fault}" for name, state in self.states.items() for fault in state.faults()
        ]
        for name, entry in self.trained.items():
            values = [value for value in (entry.slow, entry.start, entry.average) if value is not None]
            if any(_broken(value, entry.base) for value in values):
                sentences.append(f"{name}, which is trained in full, holds inf or nan")
        return sentences

    def _as_run(self, state: WeightState) -> WeightState:
        """Return the state from which the running stage started: when idle, the slow weights."""
        return replace(state, views={**state.views, "start": state.slow}) if self.idle else state


@dataclass(frozen=True)
class Part:
    """One run of a sum.

    Args:
        name: for messages.
        plan: of its running stage.
        slow: its slow weights as a release would have them; its bases are without numbers, they are those of the sum.
        buffers: of its model, and the parameters that its forward writes.
    """

    name: str
    plan: Plan
    slow: SlowWeights
    buffers: Mapping[str, torch.Tensor]


def _broken(fast: torch.Tensor, base: torch.Tensor) -> bool:
    """Whether a parameter trained in full has an inf or nan where it had none before it was adapted."""
    return bool((~torch.isfinite(fast) & torch.isfinite(base)).any())


def _left_out(name: str, broken: bool, plan: Plan) -> bool:
    """Return it, after a warning where it is so.

    Raises:
        NonFiniteBranch: it is so, and spec.on_nonfinite is "raise".
    """
    if not broken:
        return False
    fault = f"{name}, which is trained in full, holds inf or nan at the end of stage {plan.stage}"
    if plan.spec.on_nonfinite == "raise":
        raise NonFiniteBranch(
            f"{fault}; nothing was folded. Lower the learning rate or clip gradients, or set on_nonfinite='skip' to go "
            "on from what the stage started from"
        )
    warn(f"{fault}: it goes on from what the stage started from", "non-finite-left-out")
    return True


def host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in host memory, off the training device, of what is here; of a quantized weight, which nothing
    writes to, itself, and so of one without numbers.
    """
    if is_quantized(tensor) or tensor.is_meta:
        return tensor.detach()
    return local(tensor).detach().to("cpu", copy=True)


def base_of(weight: torch.Tensor) -> torch.Tensor:
    """Return W0 of a weight: a copy in host memory; or the memory of the weight itself, of a plain parameter on the
    host, until something is written to it.
    """
    on_host = type(weight) is nn.Parameter and weight.device.type == "cpu" and not weight.is_inference()
    return weight.data if on_host and not is_quantized(weight) else host(weight)


def keep_base(base: torch.Tensor, weight: torch.Tensor) -> None:
    """Copy W0 if it is the weight's own memory. Call this before each write to the weight.

    The copy replaces the data of `base`, so every state that holds this tensor reads the copy.
    """
    if is_quantized(base) or base.is_meta:
        return
    if base.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr():
        base.data = base.clone()
