"""State of a run, and queries about it. Nothing in this file writes to the user's model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from lorasc_fx.branch import Branch, Decided
from lorasc_fx.cascade.inputs import Description
from lorasc_fx.cascade.watches import PendingWatch, Replicas, StepWatch, Warned
from lorasc_fx.errors import StateError
from lorasc_fx.shards import local
from lorasc_fx.state import Learner, Memory, Part, SlowWeights, sums_are_finite
from lorasc_fx.util.fingerprint import checksum, checksums, fingerprints
from lorasc_fx.util.undo import Lock
from lorasc_fx.util.version import source_digest, version


class BaseValues(Protocol):
    """Files that hold W0 if it is not kept in memory (`checkpoint.base_file.BaseFile`)."""

    def mapped(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        """Return W0 of these parameters as memory-mapped tensors, by name."""

    def read(self, name: str, shape: torch.Size) -> torch.Tensor:
        """Return the values of a weight before it was quantized."""

    def check(self, call: str) -> None:
        """Raise StateError if a file was changed."""


@dataclass(frozen=True)
class MetaModel:
    """What a cascade of a model on the meta device needs when the model gets its values.

    Args:
        base: the argument of `adapt`.
        groups: the names of each tensor of the model, before any was untied.
        checkpoint: the checkpoint to load then, if the cascade came from one.
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
        base_file: the files that hold W0 if it is not kept in memory.
        memory: that keeps W0 otherwise.
        meta: set while the model is on the meta device.
        written: returns the names of the parameters that forward writes.
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
        self.lock = Lock()  # held while weights are read or written; never while the user's model runs
        self.slow = SlowWeights()
        self.pending = PendingWatch()
        self.steps = StepWatch()
        self.replicas = Replicas()
        self.warned = Warned()
        self.placed: str | int | None = None  # the weights that weights() has put in place; a number is a stage
        self.released = False
        self.placed_checksums: dict[str, int] = {}
        self.base_file, self.memory, self.meta, self.written = base_file, memory, meta, written
        self.grouped = False  # param_groups was called: an optimizer holds the present branches
        self.looped = False  # stages was called
        self.added: Mapping[str, Part] = {}  # other runs on this base, by name (`experts.add`)
        self._finite: dict[str, torch.Size] = {}  # shapes of the buffers that were finite when the model was adapted
        self._kept: int | None = None  # sum of the branches' version counters when they were last saved or folded
        self.digests: dict[str, str] = {}  # fingerprints of the base, as far as they were computed
        self._frozen: dict[str, int] = {}  # checksums of the parameters that no training moves, at their fingerprints
        self._checksums: dict[str, int] = {}  # of the weights, when they were last written here or first seen
        self._objects: dict[str, int] = {}  # ids of the weights' Parameter objects, at the same time

    @property
    def by_key(self) -> dict[str, Branch]:
        """The branches by key."""
        return {key: branch for key, branch in self.branches.items() if isinstance(branch, Branch)}

    def branches_by_weight(self) -> dict[str, Branch]:
        """Return the branches by the names of their weights."""
        return {branch.weight_name: branch for branch in self.branches.values() if isinstance(branch, Branch)}

    def learners(self) -> dict[str, Learner]:
        """Return what trains in the running stage, by weight name: branches, and parameters trained in full."""
        return {**self.branches_by_weight(), **self.present(self.slow.trained)}

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """Return the user's parameters by their first names."""
        return dict(self.model.named_parameters())

    def present(self, names: Iterable[str]) -> dict[str, nn.Parameter]:
        """Return the parameters that the model has now under these names. Missing ones are left out."""
        # Looked up by name: a walk over all modules would take longer than writing the smaller weights.
        parameters: dict[str, nn.Parameter] = {}
        for name in names:
            *path, leaf = name.split(".")
            module: nn.Module | None = self.model
            for part in path:  # the dictionaries of a script module have no `get`
                module = module._modules[part] if module is not None and part in module._modules else None
            parameter = module._parameters[leaf] if module is not None and leaf in module._parameters else None
            if parameter is not None:
                parameters[name] = parameter
        return parameters

    def owned(self, names: Iterable[str]) -> dict[str, nn.Parameter]:
        """Return those of these parameters whose places and memory we may restore. FSDP exchanges sharded ones."""
        return {} if self.is_sharded else self.present(names)

    def weights_by_name(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the slow state, except those trained in full. Missing ones are left out."""
        return self.present(name for name, state in self.slow.states.items() if not state.full)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return every parameter that an optimizer should hold, by its name here."""
        parameters = {
            f"branches.{key}.{name}": parameter
            for key, branch in self.branches.items()
            if isinstance(branch, Branch)
            for name, parameter in branch.trainable().items()
        }
        return parameters | {f"model.{name}": parameter for name, parameter in self.present(self.slow.trained).items()}

    @property
    def trained_entries(self) -> int:
        """Number of entries that an optimizer trains."""
        return sum(parameter.numel() for parameter in self.trainable().values())

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are sharded over processes by FSDP."""
        return self.slow.group.handle is not None

    @property
    def is_noisy(self) -> bool:
        """Whether the weights that are in place hold noise."""
        return self.plan.spec.noise.is_on and not self.slow.idle and self.placed is None

    @property
    def inside_weights(self) -> bool:
        """Whether `weights` has put other weights in place."""
        return self.placed is not None

    def faults(self) -> list[str]:
        """Return a sentence for each slow state with inf or nan, and each such branch unless the spec skips them."""
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

    def started_finite(self, name: str, shape: torch.Size) -> bool:
        """Whether the buffer `name` had this shape, and neither inf nor nan, when the model was adapted."""
        return self._finite.get(name) == shape

    def check_buffers(self, call: str) -> None:
        """Raise StateError if a buffer holds inf or nan and was finite when the model was adapted.

        A mask with -inf is allowed, and so is a buffer that forward has created again in another size. All-reduced if
        the weights are sharded.
        """
        buffers = _floating_buffers(self.model)
        known = {name: value for name, value in buffers.items() if self.started_finite(name, value.shape)}
        broken = None
        if not sums_are_finite(list(known.values())):
            broken = next((name for name, value in known.items() if not _is_finite(value)), None)
        if self.slow.group.any(broken is not None):
            raise StateError(
                f"{call}: the buffer {broken or 'of another process'} holds inf or nan, and was finite when the model "
                "was adapted; nothing was changed or written. Find the batch that caused it and resume from the last "
                "checkpoint. Running statistics are estimated again by torch.optim.swa_utils.update_bn(batches, model)",
                code="non-finite",
            )

    def branches_add(self) -> bool:
        """Whether a branch adds something: it has trained, or it computes the deltas of a quantized weight."""
        quantized = any(self.slow.states[name].experts for name in self.slow.quantized)
        return quantized or self.slow.moved(self.branches_by_weight())

    def note_weights(self, written: Mapping[str, nn.Parameter] | None = None) -> None:
        """Record the checksums of weights that were written here, by default of all.

        A parameter that the user has replaced since is not recorded. FSDP replaces parameters itself.
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

    def exchanged(self) -> bool:
        """Whether the model holds other objects than its weights, as inside torch.func.functional_call."""
        return any(id(parameter) != self._objects.get(name) for name, parameter in self.weights_by_name().items())

    def not_written_here(self, parameters: Mapping[str, nn.Parameter]) -> list[str]:
        """Return the names of those of these weights whose values were not written here."""
        return [name for name, value in checksums(parameters).items() if value != self._checksums.get(name)]

    def changed(self, known: Mapping[str, int]) -> str | None:
        """Return the first parameter that is missing or does not have this checksum."""
        now = checksums(self.present(known))
        return next((name for name in known if now.get(name) != known[name]), None)

    def check_weights(self, call: str) -> None:
        """Raise StateError if a weight is missing or holds values that were not written here.

        Values are compared by checksums, because a write through `.data`, numpy or another Parameter leaves no other
        trace. All-reduced if the weights are sharded: every rank must call this at the same point.
        """
        parameters = self.weights_by_name()
        changed = self.changed(self._checksums)
        if changed is None and not self.is_sharded:  # parameters trained in full may have other values
            trained = self.slow.trained
            now = self.present(trained)
            same = {name for name in now if now[name].shape == trained[name].base.shape}
            changed = next((name for name in trained if name not in same), None)
        if self.slow.group.any(changed is not None):
            raise StateError(
                f"{call}: {changed or 'a weight on another process'} was changed from outside the cascade "
                "(load_state_dict, an optimizer, an average of weights, .data), and a fold would overwrite the change. "
                "Restore the weight. Write weights before adapt, and resume a run by lorasc_fx.save and load",
                code="weights-changed-outside",
            )
        for site in () if self.is_sharded else self.plan.sites:
            for alias, other in self.present(site.aliases).items():
                if other is not parameters.get(site.weight):
                    raise StateError(
                        f"{call}: {alias} was tied to {site.weight} when the model was adapted. It is another "
                        "parameter now, which a fold would not reach. Tie them again, or adapt with untie",
                        code="tied-weights-differ",
                    )
        self._objects = {name: id(parameter) for name, parameter in parameters.items()}

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of every parameter of the base, except those that forward writes.

        Each is computed once. It is computed again if a parameter that no training moves was written since: a
        checkpoint does not hold the parameter, and has to say onto which values it loads.

        Raises:
            StateError: such a parameter was written after the weights were sharded, so no process has all of it.
        """
        slow, moved = self.slow, self.moved_parameters()
        if self.is_sharded and (name := self.changed(self._frozen)) is not None:
            raise StateError(
                f"save: {name} was changed after the weights were sharded. It is neither adapted nor trained, so no "
                "checkpoint holds it. Restore it, or change it before shard",
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
                "hold it: new ones load only onto a model with its new values. To store it in them, give train=(...) "
                "to the spec",
            )
        self._frozen |= frozen
        new = {name: bases.get(name, value) for name, value in parameters.items() if name not in self.digests}
        self.digests |= fingerprints(new)
        return {name: digest for name, digest in self.digests.items() if name not in moved}

    def facts(self, weights: Mapping[str, object]) -> dict[str, str]:
        """Return what must be equal on all ranks of a run (`ProcessGroup.check_equal`).

        Args:
            weights: fingerprints or checksums, by name.
        """
        plan = json.loads(self.plan.to_json())
        code = {"torch": str(torch.__version__), "lorasc-fx": f"{version()}, source {source_digest()[:12]}"}
        spec = {f"spec.{name}": json.dumps(value) for name, value in self.plan.spec.to_dict().items()}
        sites = {f"site {site['weight']}": json.dumps(site) for site in plan["sites"]}
        digests = {f"weight {name}": str(digest)[:12] for name, digest in weights.items()}
        digests |= {f"factor {name}": str(checksum(value)) for name, value in self.branches.named_parameters()}
        return {**code, **spec, "stage": f"{self.plan.stage}, step {self.plan.step}", **sites, **digests}

    def note_frozen(self) -> None:
        """Record new checksums of parameters that no training moves, after a move or a cast. Fingerprints stay."""
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

    def restorer(self) -> Callable[[], None]:
        """Return a function that restores this state, except values of parameters and buffers (see `commit`)."""
        names = (
            *("plan", "slow", "base_file", "released", "added", "refusals", "unreached", "meta", "placed"),
            *("placed_checksums", "digests", "_frozen", "_checksums", "_objects"),
        )
        fields, branches = {name: getattr(self, name) for name in names}, set(self.branches)
        restore_pending = self.pending.restorer()

        def restore() -> None:
            vars(self).update(fields)
            for key in self.branches.keys() - branches:
                del self.branches[key]
            restore_pending()
            self.set_unmerged()

        return restore

    def set_unmerged(self) -> None:
        """Give the branches of quantized weights their unmerged deltas."""
        slow, branches = self.slow, self.branches_by_weight() if self.slow.quantized else {}
        for name in slow.quantized:
            if name in branches:  # a rollback may have removed it
                state = slow.states[name]
                branches[name].set_unmerged(state.unmerged("slow") if slow.idle else state.unmerged_in_stage)


def _floating_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the local part of the buffers that can hold inf or nan, by name."""
    return {
        name: local(buffer)
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point() and buffer.dtype.itemsize > 1 and buffer.layout is torch.strided
        if not (buffer.is_meta or buffer.is_nested)
    }


def _is_finite(value: torch.Tensor) -> bool:
    return bool(torch.isfinite(value).all())
