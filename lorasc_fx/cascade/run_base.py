"""The state of a run, and queries of it. Nothing in this file writes to the user's model."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from lorasc_fx.branch import Branch, Decided
from lorasc_fx.cascade.inputs import Description
from lorasc_fx.cascade.watches import PendingWatch, Replicas, StepWatch, Warned
from lorasc_fx.errors import StateError
from lorasc_fx.shards import local
from lorasc_fx.state import Learner, Memory, SlowWeights, sums_are_finite
from lorasc_fx.util.environment import source_digest, version
from lorasc_fx.util.fingerprint import checksum, checksums, fingerprints
from lorasc_fx.util.undo import PROCESS, Lock


class BaseValues(Protocol):
    """Files with the values of W0, if it is not kept in memory. Implemented by `checkpoint.base.BaseFile`."""

    def mapped(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        """Return W0 of these parameters as memory-mapped tensors, by name."""

    def check(self, call: str) -> None:
        """Raise StateError if a file was changed since it was opened."""


@dataclass(frozen=True)
class MetaModel:
    """Data for `materialize`, kept while the model of a cascade is on the meta device.

    Args:
        base: the argument `base` of `adapt`.
        groups: all names of each tensor of the model, before any was untied.
        checkpoint: the checkpoint to load after the values, if the cascade was loaded from one.
    """

    base: Any
    groups: tuple[tuple[str, ...], ...]
    checkpoint: Any = None


class RunBase:
    """The user's model, the branches, the plan of the running stage, and the slow weights.

    Args:
        model: the user's model.
        decided: the plan of the running stage, the branches, and the weights without a branch.
        frontend: the requested front end.
        base_file: the files with W0, if W0 is not kept in memory.
        memory: the kind of memory for W0 otherwise.
        meta: data for `materialize`, while the model is on the meta device.
        written: returns the names of the parameters that forward itself writes.
    """

    def __init__(
        self,
        model: nn.Module,
        decided: Decided,
        frontend: str,
        *,
        base_file: BaseValues | None = None,
        memory: Memory = "memory",
        meta: MetaModel | None = None,
        written: Callable[[], frozenset[str]] = frozenset,
    ) -> None:
        self.model, self.frontend = model, frontend
        self.branches = nn.ModuleDict(dict(decided.branches)).train(model.training)  # by key; the child of the cascade
        self.plan, self.refusals, self.unreached = decided.plan, decided.refusals, decided.unreached
        self.inputs: Description | None = None  # of the example inputs, for the checkpoint
        self.lock = Lock()  # held while weights are read or written, but not while the user's model runs
        self.slow = SlowWeights()
        self.pending = PendingWatch()
        self.steps = StepWatch()
        self.replicas = Replicas()
        self.warned = Warned()
        self.placed: str | int | None = None  # inside `weights(...)`: the view or the stage that is in place
        self.released = False
        self.placed_checksums: dict[str, int] = {}  # checksums of the weights that `weights` has put in place
        self.base_file, self.memory, self.meta, self.written = base_file, memory, meta, written
        self.grouped = False  # whether param_groups was called, so that an optimizer has the current branches
        self.looped = False  # whether stages was called
        self._finite: dict[str, torch.Size] = {}  # shapes of the buffers that were finite when the model was adapted
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
        """Return a sentence for each slow state with inf or nan.

        The same for branches, unless on_nonfinite="skip", which leaves such branches out of the fold.
        """
        if self.plan.spec.on_nonfinite == "skip":
            return self.slow.faults()
        broken = [name for name, branch in self.branches_by_weight().items() if not branch.finite()]
        return [f"the branch of {name} holds inf or nan" for name in broken] + self.slow.faults()

    def note_finite(self) -> None:
        """Record which buffers are finite now, and their shapes. Only the first call has an effect."""
        if not self._finite:
            buffers = _floating_buffers(self.model)
            all_finite = sums_are_finite(list(buffers.values()))
            self._finite = {name: value.shape for name, value in buffers.items() if all_finite or _is_finite(value)}

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

    def started_finite(self, name: str, shape: torch.Size) -> bool:
        """Whether the buffer `name` had this shape, and neither inf nor nan, when the model was adapted."""
        return self._finite.get(name) == shape

    def check_buffers(self, call: str) -> None:
        """Raise StateError if a buffer has become inf or nan since the model was adapted.

        A mask that always had -inf is allowed, and so is a buffer that forward has created again in another size.
        All-reduced if the weights are sharded.
        """
        buffers = _floating_buffers(self.model)
        checked = {name: value for name, value in buffers.items() if self.started_finite(name, value.shape)}
        broken = None
        if not sums_are_finite(list(checked.values())):
            broken = next((name for name, value in checked.items() if not _is_finite(value)), None)
        if self.slow.group.any(broken is not None):
            raise StateError(
                f"{call}: the buffer {broken or 'of another process'} holds inf or nan, and was finite when the model "
                "was adapted; nothing was changed or written. Find the batch that caused it and resume from the last "
                "checkpoint. To estimate running statistics again, use torch.optim.swa_utils.update_bn(batches, model)",
                code="non-finite",
            )

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

        Raises:
            StateError: such a parameter was written after the weights were sharded, so that no process has all values.
        """
        slow, moved = self.slow, self.moved_parameters()
        if self.is_sharded and (name := self.changed(self._frozen)) is not None:
            raise StateError(
                f"save: {name} was changed after the weights were sharded. It is neither adapted nor trained, so a "
                "checkpoint would not contain it. Restore it, or change it before you call shard",
                code="weights-changed-outside",
            )
        bases: dict[str, torch.Tensor] = {name: state.base for name, state in slow.states.items()}
        parameters = {name: value for name, value in self.parameters_by_name().items() if name not in moved}
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
        return {name: digest for name, digest in self.digests.items() if name not in moved}

    def facts(self, weights: Mapping[str, object]) -> dict[str, str]:
        """Return descriptions of everything that must be equal on all ranks of a run (`ProcessGroup.check_equal`).

        Args:
            weights: fingerprints or checksums of the weights, by name.
        """
        plan = json.loads(self.plan.to_json())
        code = {"torch": str(torch.__version__), "lorasc-fx": f"{version()}, source {source_digest()[:12]}"}
        spec = {f"spec.{name}": json.dumps(value) for name, value in self.plan.spec.to_dict().items()}
        sites = {f"site {site['weight']}": json.dumps(site) for site in plan["sites"]}
        digests = {f"weight {name}": str(digest)[:12] for name, digest in weights.items()}
        digests |= {f"factor {name}": str(checksum(value)) for name, value in self.branches.named_parameters()}
        return {**code, **spec, "stage": f"{self.plan.stage}, step {self.plan.step}", **sites, **digests}

    def note_frozen(self) -> None:
        """Record new checksums of untrained parameters after a move or a cast. Their fingerprints are not changed."""
        parameters = self.parameters_by_name()
        self._frozen = checksums({name: parameters[name] for name in self._frozen})

    def moved_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that forward itself writes (a momentum teacher). They are state, like buffers."""
        names = self.written() - self.slow.states.keys()
        parameters = self.parameters_by_name() if names else {}
        return {name: parameters[name] for name in sorted(names) if name in parameters}

    def model_state(self) -> dict[str, torch.Tensor]:
        """Return the model's buffers, and the parameters that forward writes."""
        return {**dict(self.model.named_buffers()), **self.moved_parameters()}

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


def _floating_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the local part of each buffer whose dtype and layout can be checked for inf and nan, by name."""
    return {
        name: local(buffer)
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point() and buffer.dtype.itemsize > 1 and buffer.layout is torch.strided
        if not (buffer.is_meta or buffer.is_nested)
    }


def _state_checksums(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Return the checksums of dense tensors that have values. They do not depend on the device."""
    dense = {
        name: local(value.detach())
        for name, value in tensors.items()
        if not (value.is_meta or value.is_nested) and value.layout is torch.strided
    }
    return checksums({name: value.cpu() for name, value in dense.items()})


def _is_finite(value: torch.Tensor) -> bool:
    return bool(torch.isfinite(value).all())
