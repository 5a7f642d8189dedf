"""The state of a run, queries of it, and the commit that writes the next state, all or nothing.

Stages begin, checkpoints are restored and folds end through `write_planned`. It computes weights while it writes them.
`weights` writes weights for the time of a block, and moves, folds and `guards` move or replace tensors of the model.
All of them do so inside a transaction (`util.undo`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from lorasc_fx.branch import Branch, Decided, fill
from lorasc_fx.branch.noise import PIECE, WORKSPACE
from lorasc_fx.cascade.training import PendingWatch, Replicas, Warned, put_state
from lorasc_fx.errors import StateError
from lorasc_fx.parameters import Holder, exchange
from lorasc_fx.plan import Plan
from lorasc_fx.quantized import writable
from lorasc_fx.shards import dtensor_like, local
from lorasc_fx.state import BaseMemory, Learner, Scratch, SlowWeights, ViewName, arithmetic
from lorasc_fx.util.environment import source_digest, version
from lorasc_fx.util.fingerprint import checksum, checksums, fingerprints
from lorasc_fx.util.undo import PROCESS, Lock, Undo

Description = dict[str, Any]
"""One of `{"tensor": shape, "dtype": name, "fill": number}`, `{"list": [...]}`, `{"tuple": [...]}`, `{"dict": {...}}`
and `{"value": plain value}`. `fill` is absent for floating-point tensors."""


def describe(args: Sequence[object], kwargs: Mapping[str, object]) -> Description | None:
    """Return a description of the arguments of a call, or None if they cannot be described as JSON.

    Of an integer or boolean tensor, the largest value is stored, because it is a valid index or class.
    """
    try:
        return _described((tuple(args), dict(kwargs)))
    except TypeError:
        return None


def stand_ins(description: Description, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments that fit a description, as (args, kwargs).

    Floating-point tensors are drawn from N(0, 1) with a fixed seed. All others have the stored value in every entry.
    """
    source = torch.Generator().manual_seed(0)
    args, kwargs = _built(description, source, device)
    return args, kwargs


def _described(value: Any) -> Description:
    """Return the description of a value. Raise TypeError if it has none."""
    if type(value) is torch.Tensor or isinstance(value, torch.nn.Parameter):
        if value.layout is not torch.strided or value.is_nested or value.is_complex():
            raise TypeError("only dense real tensors can be described")
        result: Description = {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        if not value.is_floating_point():
            result["fill"] = int(value.max()) if value.numel() else 0
        return result
    if type(value) in (list, tuple):
        return {type(value).__name__: [_described(part) for part in value]}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: _described(part) for key, part in value.items()}}
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return {"value": value}
    raise TypeError(f"a {type(value).__name__} cannot be described")


def _built(description: Any, source: torch.Generator, device: torch.device) -> Any:
    """Return a value that fits a description. `source` draws floating-point tensors, in order."""
    if "tensor" in description:
        shape, dtype = description["tensor"], getattr(torch, description["dtype"])
        if "fill" in description:
            return torch.full(shape, description["fill"], dtype=dtype, device=device)
        return torch.randn(shape, generator=source).to(device, dtype)
    if "dict" in description:
        return {key: _built(part, source, device) for key, part in description["dict"].items()}
    if "value" in description:
        return description["value"]
    ((kind, parts),) = description.items()
    return {"tuple": tuple, "list": list}[kind](_built(part, source, device) for part in parts)


class RunBase:
    """The user's model, the branches, the plan of the running stage, and the slow weights."""

    def __init__(
        self,
        model: nn.Module,
        decided: Decided,
        frontend: str,
        *,
        memory: BaseMemory = "memory",
        written: Callable[[], frozenset[str]] = frozenset,
    ) -> None:
        self.model, self.frontend = model, frontend
        self.branches = nn.ModuleDict(dict(decided.branches)).train(model.training)  # by key; the child of the cascade
        self.plan, self.refusals, self.unreached = decided.plan, decided.refusals, decided.unreached
        self.inputs: Description | None = None  # of the example inputs, for the checkpoint
        self.lock = Lock()  # held while weights are read or written, but not while the user's model runs
        self.slow = SlowWeights()
        self.pending = PendingWatch()
        self.replicas = Replicas()
        self.warned = Warned()
        self.placed: str | int | None = None  # inside `weights(...)`: the view or the stage that is in place
        self.released = False
        self.placed_checksums: dict[str, int] = {}  # checksums of the weights that `weights` has put in place
        self.memory, self.written = memory, written
        self.grouped = False  # whether param_groups was called, so that an optimizer has the current branches
        self.looped = False  # whether stages was called
        self._buffers: dict[str, int] = {}  # checksums of the base's buffers, see `note_buffers`
        self._kept: int | None = None  # sum of the branches' version counters when they were started, saved or folded
        self.digests: dict[str, str] = {}  # fingerprints of base parameters, cached once computed
        self._frozen: dict[str, int] = {}  # checksums of untrained parameters when their fingerprint was computed
        self._checksums: dict[str, int] = {}  # checksums of the weights after the last write by this package
        self._objects: dict[str, int] = {}  # ids of the weights' Parameter objects at that time

    @property
    def by_key(self) -> dict[str, Branch]:
        """The branches by key, which is their name in `branches`. Other modules in `branches` are left out."""
        return {key: branch for key, branch in self.branches.items() if isinstance(branch, Branch)}

    def branches_by_weight(self) -> dict[str, Branch]:
        """Return the branches by weight name."""
        return {branch.weight_name: branch for branch in self.branches.values() if isinstance(branch, Branch)}

    def learners(self) -> dict[str, Learner]:
        """Return the branches and the parameters trained in full, by weight name."""
        return {**self.branches_by_weight(), **self.present(self.slow.trained)}

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the user's model by name. A tied parameter has its first name."""
        return dict(self.model.named_parameters())

    def present(self, names: Iterable[str]) -> dict[str, nn.Parameter]:
        """Return the current parameters of the model with these names. Names that it does not have are left out."""
        # Look each name up. A walk over all modules would take longer than writing the smaller weights.
        parameters: dict[str, nn.Parameter] = {}
        for name in names:
            *path, leaf = name.split(".")
            module: nn.Module | None = self.model
            for part in path:  # the dictionaries of a torch.jit.ScriptModule have no `get`
                module = module._modules[part] if module is not None and part in module._modules else None
            parameter = module._parameters[leaf] if module is not None and leaf in module._parameters else None
            if parameter is not None:
                parameters[name] = parameter
        return parameters

    def weights_by_name(self) -> dict[str, nn.Parameter]:
        """Return the parameters with experts or noise, by name. Parameters trained in full are left out."""
        return self.present(name for name, state in self.slow.states.items() if not state.full)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return every parameter that an optimizer should hold, by its name in the cascade."""
        parameters = {
            f"branches.{key}.{name}": parameter
            for key, branch in self.branches.items()
            if isinstance(branch, Branch)
            for name, parameter in branch.trainable().items()
        }
        return parameters | {f"model.{name}": parameter for name, parameter in self.present(self.slow.trained).items()}

    @property
    def trained_entries(self) -> int:
        """Number of trainable parameters, counted as entries."""
        return sum(parameter.numel() for parameter in self.trainable().values())

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are sharded over processes by FSDP."""
        return self.slow.group.handle is not None

    @property
    def is_noisy(self) -> bool:
        """Whether the weights of the model have noise now."""
        return self.plan.spec.noise.is_on and not self.slow.idle and self.placed is None

    def faults(self) -> list[str]:
        """Return a sentence for each branch and each slow state with inf or nan."""
        broken = [name for name, branch in self.branches_by_weight().items() if not branch.finite()]
        return [f"the branch of {name} holds inf or nan" for name in broken] + self.slow.faults()

    def note_buffers(self, changed: Collection[str] = ()) -> None:
        """Record the checksums of the base's buffers, and of the parameters that forward writes.

        Args:
            changed: after a move or a cast, the names of tensors that training has changed. Their records are kept.
        """
        self._buffers = {**_state_checksums(self.model_state()), **{name: self._buffers[name] for name in changed}}

    def changed_buffers(self) -> list[str]:
        """Return the names of recorded buffers, and of parameters that forward writes, that differ from the base."""
        current = _state_checksums(self.model_state())
        return [name for name, value in current.items() if self._buffers.get(name, value) != value]

    def branches_add(self) -> bool:
        """Whether a branch changes the output: it has trained, or it computes the deltas of a quantized weight."""
        quantized = any(self.slow.states[name].experts for name in self.slow.quantized)
        return quantized or self.slow.moved(self.branches_by_weight())

    def note_weights(self, written: Mapping[str, nn.Parameter] | None = None) -> None:
        """Record the checksums of weights after a write by this package.

        Args:
            written: the parameters that were written, by name. One that the model no longer has is skipped, unless the
                weights are sharded, because FSDP replaces parameters. None for all weights.
        """
        weights = self.weights_by_name()
        if written is not None:
            weights = {
                name: weight
                for name, weight in weights.items()
                if name in written and (self.is_sharded or weight is written[name])
            }
        self._checksums = {**self._checksums, **checksums(weights)}
        self._objects = {**self._objects, **{name: id(weight) for name, weight in weights.items()}}

    def recorded(self, names: Iterable[str]) -> dict[str, int]:
        """Return the recorded checksums of weights, by name."""
        return {name: self._checksums[name] for name in names}

    def exchanged(self) -> bool:
        """Whether the model has other Parameter objects than recorded, as inside torch.func.functional_call."""
        return any(id(parameter) != self._objects.get(name) for name, parameter in self.weights_by_name().items())

    def changed(self, recorded: Mapping[str, int]) -> str | None:
        """Return the name of the first parameter that is missing or has another checksum than recorded, or None."""
        current = checksums(self.present(recorded))
        return next((name for name in recorded if current.get(name) != recorded[name]), None)

    def check_weights(self, call: str) -> None:
        """Raise StateError if a weight is missing or was written by something other than this package.

        Values are compared by checksums, because a write through `.data`, numpy or another Parameter does not increment
        the version counter. All-reduced if the weights are sharded: every rank must call this at the same point.
        """
        with PROCESS:  # a capture in another thread would show other parameters
            parameters = self.weights_by_name()
            changed = self.changed(self._checksums)
            if changed is None and not self.is_sharded:  # parameters trained in full change, but must keep their shapes
                trained = self.slow.trained
                current = self.present(trained)
                intact = {name for name in current if current[name].shape == trained[name].base.shape}
                changed = next((name for name in trained if name not in intact), None)
        if self.slow.group.any(changed is not None):
            raise StateError(
                f"{call}: {changed or 'a weight on another process'} was changed from outside the cascade "
                "(load_state_dict, an optimizer, an average of weights, .data), and a fold would overwrite the change. "
                "Restore the weight. Load weights into the model before you call adapt. To resume a run, use "
                "lorasc_fx.save and lorasc_fx.load",
                code="weights-changed-outside",
            )
        for site in () if self.is_sharded else self.plan.sites:
            for alias, parameter in self.present(site.aliases).items():
                if parameter is not parameters.get(site.weight):
                    raise StateError(
                        f"{call}: {alias} was tied to {site.weight} when the model was adapted. It is a separate "
                        "parameter now, which a fold would not change. Tie them again, or call adapt with untie=...",
                        code="tied-weights-differ",
                    )
        self._objects = {name: id(parameter) for name, parameter in parameters.items()}

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprints of all parameters of the base, by name. Parameters that forward writes are left out.

        A checkpoint stores fingerprints to check onto which base it is loaded. Each is computed once. If a parameter
        that is neither adapted nor trained was written since, its fingerprint is computed again.
        """
        slow, written = self.slow, self.written_parameters()
        if self.is_sharded and (name := self.changed(self._frozen)) is not None:
            raise StateError(
                f"save: {name} was changed after the weights were sharded. It is neither adapted nor trained, so a "
                "checkpoint would not contain it. Restore it, or change it before you call shard",
                code="weights-changed-outside",
            )
        bases: dict[str, torch.Tensor] = {name: state.base for name, state in slow.states.items()}
        parameters = {name: value for name, value in self.parameters_by_name().items() if name not in written}
        others = {} if self.is_sharded else {name: value for name, value in parameters.items() if name not in bases}
        frozen = checksums(others)
        for name in [name for name in frozen if name in self.digests and frozen[name] != self._frozen[name]]:
            del self.digests[name]
            self.warned.once(
                "frozen-parameter-changed",
                f"{name} was changed after an earlier save. It is neither adapted nor trained, so checkpoints do not "
                "contain it, and new ones can be loaded only onto a model with its new values. To store it in "
                "checkpoints, add it to train=(...) of the spec",
            )
        self._frozen |= frozen
        new = {name: bases.get(name, value) for name, value in parameters.items() if name not in self.digests}
        self.digests |= fingerprints(new)
        return {name: digest for name, digest in self.digests.items() if name not in written}

    def facts(self, weights: Mapping[str, object]) -> dict[str, str]:
        """Return descriptions of everything that must be equal on all ranks of a run (`ProcessGroup.check_equal`)."""
        plan = json.loads(self.plan.to_json())
        code = {"torch": str(torch.__version__), "lorasc-fx": f"{version()}, source {source_digest()[:12]}"}
        spec = {f"spec.{name}": json.dumps(value) for name, value in self.plan.spec.to_dict().items()}
        sites = {f"site {site['weight']}": json.dumps(site) for site in plan["sites"]}
        digests = {f"weight {name}": str(digest)[:12] for name, digest in weights.items()}
        digests |= {f"factor {name}": str(checksum(value)) for name, value in self.branches.named_parameters()}
        return {**code, **spec, "stage": str(self.plan.stage), **sites, **digests}

    def note_frozen(self) -> None:
        """Record new checksums of untrained parameters after a move or a cast. Their fingerprints are not changed."""
        parameters = self.parameters_by_name()
        self._frozen = checksums({name: parameters[name] for name in self._frozen})

    def written_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that forward itself writes (a momentum teacher). They are state, like buffers."""
        names = self.written() - self.slow.states.keys()
        parameters = self.parameters_by_name() if names else {}
        return {name: parameters[name] for name in sorted(names) if name in parameters}

    def model_state(self) -> dict[str, torch.Tensor]:
        """Return the model's buffers, and the parameters that forward writes."""
        return {**dict(self.model.named_buffers()), **self.written_parameters()}

    def note_kept(self) -> None:
        """Record that the current training is saved or folded, so that no warning is needed if the run is dropped."""
        self._kept = self._branch_versions()

    @property
    def has_unsaved_training(self) -> bool:
        """Whether the branches were written since they were started, saved or folded, as by an optimizer step."""
        return self._kept is not None and self._kept != self._branch_versions()

    def _branch_versions(self) -> int:
        return sum(parameter._version for parameter in self.branches.parameters())

    def restorer(self) -> Callable[[], None]:
        """Return a function that restores the fields of this run. `commit` restores the values of tensors."""
        fields, branches, unsaved = dict(vars(self)), set(self.branches), self.has_unsaved_training
        restore_pending = self.pending.restorer()

        def restore() -> None:
            vars(self).update(fields)
            for key in self.branches.keys() - branches:
                del self.branches[key]
            restore_pending()
            self.set_unmerged()
            if not unsaved and self._kept is not None:  # the rollback has written the branches
                self.note_kept()

        return restore

    def set_unmerged(self) -> None:
        """Give the branches of quantized weights the experts of earlier stages, which their weights cannot hold."""
        slow, branches = self.slow, self.branches_by_weight() if self.slow.quantized else {}
        for name in slow.quantized:
            if name in branches:  # a rollback may have removed the branch
                state = slow.states[name]
                branches[name].set_unmerged(state.unmerged("slow") if slow.idle else state.unmerged_in_stage)


def _state_checksums(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Return the checksums of dense tensors. They do not depend on the device."""
    dense = {
        name: local(value.detach())
        for name, value in tensors.items()
        if not value.is_nested and value.layout is torch.strided
    }
    return checksums({name: value.cpu() for name, value in dense.items()})


SPARE = 1 << 12
"""Bytes reserved on each device for the small tensors that restoring a weight allocates, in case memory runs out."""


@dataclass(frozen=True)
class WeightValues:
    """Values of the model's weights. Each is computed when it is written, because all of them would need much memory.

    Args:
        slow: the slow state.
        view: the view of the state. None for the weights that train in the running stage (W_t).
        learners: branches, and current values of parameters trained in full, by weight name, if the view includes the
            running stage.
        plan: plan of the running stage. Then parameters that do not follow the slow rule have their current values.
            None for an earlier stage.
        known: values that need not be computed, by name.
    """

    slow: SlowWeights
    view: ViewName | None = "slow"
    learners: Mapping[str, Learner] = field(default_factory=dict)
    plan: Plan | None = None
    known: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def write(self, name: str, out: torch.Tensor, scratch: Scratch | None = None) -> None:
        """Write the weight of this name into a local tensor of its shape."""
        if name in self.known:
            out.copy_(self.known[name])
        elif self.view is not None:
            self.slow.write_value(name, self.view, out, self.learners.get(name), self.plan)
        else:
            assert self.plan is not None, "the weights of a stage depend on its plan"
            self.slow.write_resting(name, self.plan, out, scratch)

    def matches(self, name: str, weight: torch.Tensor, noisy: bool) -> bool:
        """Whether the weight in the model has this value already. Without noise, slow weights usually do."""
        state = self.slow.started(name)
        is_slow = self.plan is not None and self.view is not None and self.slow.is_slow(name, self.view)
        same_dtype = weight.dtype == state.base.dtype
        return is_slow and same_dtype and not state.full and not state.differs_from_slow(noisy)

    def dense(self, names: Iterable[str], parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the values of quantized weights as dense tensors, by name."""
        return {name: self.value(name, parameters[name]) for name in names}

    def value(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Return the weight of this name in the dtype of `like`, on its device."""
        value = torch.empty(self.slow.states[name].base.shape, dtype=like.dtype, device=like.device)
        with torch.no_grad():
            self.write(name, value)
        return value


@dataclass(frozen=True)
class Planned:
    """The next state of a cascade: which tensors get which values.

    Args:
        plan: the next plan.
        slow: the next slow weights.
        parameters: parameters of the model to write, by name. Quantized parameters are skipped.
        values: their values. By default the weights of the stage that the plan and the slow weights describe.
        dense: dense values that replace quantized weights, by name.
        factors: local values of the branches' parameters, by weight name and parameter name.
        tensors: pairs of a tensor to write and its value, for example buffers.
        buffers: pairs of a buffer's place in the model and the tensor to put there.
        gradients: full gradients of trained parameters, by the names of `Run.trainable`. All other trained parameters
            get `grad = None`. None to keep the current gradients.
        pending: names of the gradients that no optimizer step has consumed.
        optimizers: the optimizers that get `states`.
        states: the next optimizer state of some parameters. An empty state resets the parameter.
        current: copies of the current values of parameters trained in full, if the caller has them, for a rollback.
            Otherwise copies are made.
    """

    plan: Plan
    slow: SlowWeights
    parameters: Mapping[str, nn.Parameter] = field(default_factory=dict)
    values: WeightValues | None = None
    dense: Mapping[str, torch.Tensor] = field(default_factory=dict)
    factors: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    tensors: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()
    buffers: Sequence[tuple[Holder, torch.Tensor | None]] = ()
    gradients: Mapping[str, torch.Tensor] | None = None
    pending: Collection[str] = ()
    optimizers: Sequence[torch.optim.Optimizer] = ()
    states: Mapping[nn.Parameter, Any] = field(default_factory=dict)
    current: Mapping[str, torch.Tensor] = field(default_factory=dict)


def write_planned(run: RunBase, planned: Planned, undo: Undo) -> None:
    """Write the planned state into the model, the branches, the optimizer and the run. `undo` collects undo steps."""
    branches = run.branches_by_weight()
    if planned.dense:
        quantized = run.present(planned.dense)
        dense = {id(quantized[name]): nn.Parameter(value, False) for name, value in planned.dense.items()}
        exchange(run.model, lambda holder: dense.get(id(holder.value)), undo)
    # Undo steps run in reverse order, so the fields of the run are restored after all values.
    undo(run.restorer())
    undo(_values_restorer(run, planned))
    with torch.no_grad():
        for weight, values in planned.factors.items():
            branches[weight].resize(planned.plan.by_weight[weight])
            for name, factor in branches[weight].named_parameters():
                if name in values:
                    local(factor).copy_(values[name])
        for tensor, value in planned.tensors:
            tensor.copy_(value)
        for holder, buffer in planned.buffers:
            undo(partial(holder.put, holder.value) if holder.exists else partial(holder.store.pop, holder.key, 0))
            holder.put(buffer)
        put_state(planned.optimizers, planned.states, undo)
        _write_parameters(run, planned, undo)
    if planned.gradients is not None:
        # Frozen factors may have a gradient from the stage before too.
        for parameter in run.branches.parameters():
            parameter.grad = None
        for name, parameter in run.trainable().items():
            gradient = planned.gradients.get(name)
            if gradient is not None:
                gradient = dtensor_like(gradient.to(parameter.device, copy=True), parameter)
            parameter.grad = gradient
            if name in planned.pending:
                run.pending.note(parameter)
    run.plan, run.slow = planned.plan, planned.slow
    run.note_weights(planned.parameters)
    run.set_unmerged()


def _write_parameters(run: RunBase, planned: Planned, undo: Undo) -> None:
    """Write the planned parameters one after another. A rollback writes the weights of the stage before.

    A rollback computes each weight again. Copies of all weights would double the memory.
    """
    scratch, spare = Scratch(), reserve(planned.parameters, planned.plan.spec.noise.is_on)
    values = planned.values or WeightValues(planned.slow, None, plan=planned.plan)
    before = WeightValues(run.slow, None, plan=run.plan, known=planned.current)
    new = WeightValues(planned.slow, "base")  # before this commit, a new weight had the value that is W0 now
    for name, out in weights_to_write(run, planned.parameters, planned.slow):
        known = name in run.slow.states or name in planned.current
        undo(partial(_restore, before if known else new, name, out, out._version, spare))
        values.write(name, out, scratch)


def _restore(values: WeightValues, name: str, out: torch.Tensor, version: int, spare: list[torch.Tensor]) -> None:
    """Write the value of before a commit, with the memory of `spare`. Raise only if the weight was written since."""
    spare.clear()
    with torch.no_grad():
        try:
            values.write(name, out)
        except (MemoryError, RuntimeError):  # out of memory
            if out._version != version:
                raise


def reserve(parameters: Mapping[str, nn.Parameter], noisy: bool, narrow: bool = False) -> list[torch.Tensor]:
    """Allocate memory on the host and on each device with a weight. The caller frees it to restore weights.

    Without this reserve, a rollback after running out of memory could fail as well, and leave some weights changed.

    Args:
        parameters: parameters of the model, by name.
        noisy: whether restored weights have noise. An accelerator draws it in a workspace.
        narrow: whether restoring a weight narrower than fp32 needs a buffer for its exact values as well.
    """
    sizes = {torch.device("cpu"): SPARE} | {local(parameter).device: SPARE for parameter in parameters.values()}
    for parameter in writable(parameters).values() if noisy else ():
        if (weight := local(parameter)).device.type != "cpu":
            exact = 4 * weight.numel() if narrow and weight.dtype != arithmetic(weight.dtype) else 0
            workspace = WORKSPACE * min(weight.numel(), PIECE)
            sizes[weight.device] = max(sizes[weight.device], exact + workspace + 2 * SPARE)
    return [torch.empty(size, dtype=torch.uint8, device=device) for device, size in sizes.items()]


def weights_to_write(
    run: RunBase, parameters: Mapping[str, nn.Parameter], after: SlowWeights | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and the local tensor of each parameter. The caller writes into the tensor.

    W0 is copied first if it shares the memory of the tensor. Quantized weights are skipped, because their branches
    compute the deltas (`RunBase.set_unmerged`).

    Args:
        run: the run, whose W0 must survive the write.
        parameters: parameters of the model, by name.
        after: the next slow weights, if they are other ones than the run has now. Their W0 must survive as well.
    """
    for name, parameter in writable(parameters).items():
        out = local(parameter)
        for slow in (run.slow, after):
            if slow is not None and name in slow.states:
                slow.states[name].keep_base(out)
        yield name, out


def _values_restorer(run: RunBase, planned: Planned) -> Callable[[], None]:
    """Return a function that restores the branches, tensors and gradients that a commit changes, from copies.

    Weights of the slow state are left out, because `_write_parameters` computes them again. Of parameters trained in
    full, only those without a copy in `current` are copied.
    """
    branches, trained = run.branches_by_weight(), run.slow.trained
    written = [branches[weight] for weight in planned.factors]
    sites = [run.plan.by_weight[weight] for weight in planned.factors]
    copied = [factor for branch in written for factor in branch.parameters()]
    copied += [
        parameter for name, parameter in planned.parameters.items() if name in trained and name not in planned.current
    ]
    values = [(parameter, parameter.detach().clone()) for parameter in copied]
    tensors = [(tensor, tensor.detach().clone()) for tensor, _ in planned.tensors]
    if planned.gradients is not None:
        copied += [*run.branches.parameters(), *run.trainable().values()]
    gradients = [(parameter, parameter.grad) for parameter in copied]

    def restore() -> None:
        for parameter, value in values:
            fill(parameter, value)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for branch, site in zip(written, sites, strict=True):
            branch.resize(site)  # the values have this rank already
        with torch.no_grad():
            for tensor, value in tensors:
                tensor.copy_(value)

    return restore
