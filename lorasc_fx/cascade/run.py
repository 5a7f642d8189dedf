"""A run, which is one training of a model: its state, the checks before calls, and the commit of a new state.

`write_planned` writes the weights at the start of a stage, after a load and in a fold. It computes each weight while it
writes it. `weights` writes weights for the duration of a block. Moves and `release` also replace tensors of the model.
Each of these writes is inside a transaction (`util.undo`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lorasc_fx.branch import Branch, Decided
from lorasc_fx.branch.noise import PIECE, WORKSPACE
from lorasc_fx.cascade.training import PendingWatch, Warned, check_holds, check_rates, groups, put_state
from lorasc_fx.errors import SpecError, StateError, named, warn
from lorasc_fx.parameters import Holder, exchange
from lorasc_fx.plan import Plan, Reason
from lorasc_fx.quantized import is_quantized, quantized_in
from lorasc_fx.shards import ProcessGroup, dtensor_like, local
from lorasc_fx.spec import OWN_GRID
from lorasc_fx.state import BaseMemory, Kept, Learner, Scratch, SlowWeights, ViewName, arithmetic, write_start
from lorasc_fx.util.environment import source_digest, version
from lorasc_fx.util.fingerprint import checksum, checksums, fingerprints
from lorasc_fx.util.torch_private import current_backward
from lorasc_fx.util.undo import PROCESS, Lock, Undo, commit

log = logging.getLogger("lorasc_fx")


class Run:
    """One training of a model: the user's model, the branches, the plan of the running stage, and the slow weights."""

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
        self.branches = nn.ModuleDict(dict(decided.branches)).train(model.training)  # by key; a child of the cascade
        self.plan, self.refusals, self.unreached = decided.plan, decided.refusals, decided.unreached
        self.lock = Lock()  # held while weights are read or written, but not while the user's model runs
        self.slow = SlowWeights()
        self.pending = PendingWatch()
        self._wrapped = WeakKeyDictionary[nn.Module, set[int]]()  # ids of the parameters that each DDP wraps
        self.warned = Warned()
        self.placed: str | int | None = None  # inside `weights(...)`: the view or the stage that is in place
        self.released = False
        self.placed_checksums: dict[str, int] = {}  # checksums of the weights that `weights` has put in place
        self.memory, self.written = memory, written
        self.grouped = False  # whether param_groups was called, so that an optimizer probably exists
        self.looped = False  # whether stages was called
        self._buffers: dict[str, int] = {}  # recorded checksums of buffers, see `note_buffers`
        self.kept: dict[str, Kept] = {}  # what the last fold kept of the changes of weights (a sample), by name
        self._kept: int | None = None  # version counters of the branches, summed, at the last `note_kept`
        self.digests: dict[str, str] = {}  # fingerprints of base parameters, cached once computed
        self._frozen: dict[str, int] = {}  # checksums of untrained parameters when their fingerprint was computed
        self._checksums: dict[str, int] = {}  # checksums of the weights after the last write by this package
        self._objects: dict[str, nn.Parameter] = {}  # the Parameter objects of the weights at that time

    @property
    def by_key(self) -> dict[str, Branch]:
        """The branches by their name in the ModuleDict `branches`, without other modules in it."""
        return {key: branch for key, branch in self.branches.items() if isinstance(branch, Branch)}

    def branches_by_weight(self) -> dict[str, Branch]:
        """Return the branches by weight name."""
        branches = dict[str, Branch]()
        for branch in self.branches.values():
            if isinstance(branch, Branch):
                branches[branch.weight_name] = branch
        return branches

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
        weights = self.present(self.slow.states)
        for name in self.slow.trained:
            weights.pop(name, None)
        return weights

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return every parameter that an optimizer should hold, by its name in the cascade."""
        parameters: dict[str, nn.Parameter] = {}
        for key, branch in self.branches.items():
            if isinstance(branch, Branch):
                for name, parameter in branch.trainable().items():
                    parameters[f"branches.{key}.{name}"] = parameter
        for name, parameter in self.present(self.slow.trained).items():
            parameters[f"model.{name}"] = parameter
        return parameters

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
        return self.plan.spec.noise.strength > 0 and not self.slow.idle and self.placed is None

    def faults(self) -> list[str]:
        """Return a sentence for each branch and each slow state with inf or nan."""
        broken = [name for name, branch in self.branches_by_weight().items() if not branch.finite()]
        return [f"the branch of {name} holds inf or nan" for name in broken] + self.slow.faults()

    def note_buffers(self, changed: Collection[str] = ()) -> None:
        """Record the checksums of the model's buffers, and of the parameters that forward writes.

        Args:
            changed: names of the tensors that had changed before a move or a cast. Their old checksums are kept.
        """
        self._buffers = {**_state_checksums(self.model_state()), **{name: self._buffers[name] for name in changed}}

    def changed_buffers(self) -> list[str]:
        """Return the names of the tensors that differ from the checksums that `note_buffers` recorded."""
        current = _state_checksums(self.model_state())
        return [name for name, value in current.items() if self._buffers.get(name, value) != value]

    def note_weights(self, written: Mapping[str, nn.Parameter] | None = None) -> None:
        """Record the checksums of weights after a write by this package.

        Args:
            written: the parameters that were written, by name, or None for all weights. If unsharded, parameters that
                the model no longer has are skipped.
        """
        weights: dict[str, nn.Parameter] = {}
        for name, weight in self.weights_by_name().items():
            if written is None or (name in written and (self.is_sharded or weight is written[name])):
                weights[name] = weight
        self._checksums = {**self._checksums, **checksums(weights)}
        self._objects = {**self._objects, **weights}

    def note_placed(self, unchanged: Collection[str]) -> None:
        """Record the checksums of the weights in a `weights` block. For `unchanged` weights, reuse known ones."""
        written = self.present(self.slow.states)
        for name in unchanged:
            written.pop(name, None)
        self.placed_checksums = checksums(written)
        for name in unchanged:
            self.placed_checksums[name] = self._checksums[name]

    def exchanged(self) -> bool:
        """Whether the model has other Parameter objects than recorded. It has inside torch.func.functional_call."""
        return any(parameter is not self._objects.get(name) for name, parameter in self.weights_by_name().items())

    def changed(self, recorded: Mapping[str, int]) -> str | None:
        """Return the name of the first parameter that is missing or differs from its recorded checksum, or None."""
        current = checksums(self.present(recorded))
        for name, value in recorded.items():
            if current.get(name) != value:
                return name
        return None

    def check_weights(self, call: str) -> None:
        """Raise StateError if a weight is missing or was written by something other than this package.

        Values are compared by checksums, because a write through `.data`, numpy or another Parameter does not increment
        the version counter. All-reduces for sharded weights: every rank must call this at the same point.
        """
        with PROCESS:  # a capture in another thread temporarily replaces parameters
            parameters = self.weights_by_name()
            changed = self.changed(self._checksums)
            if changed is None and not self.is_sharded:  # parameters trained in full may change, but not their shapes
                current = self.present(self.slow.trained)
                for name, state in self.slow.trained.items():
                    if name not in current or current[name].shape != state.base.shape:
                        changed = changed or name
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
        self._objects = parameters

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprints of all base parameters by name, except parameters that forward writes.

        A checkpoint stores fingerprints, so that it is loaded only onto the same base. They are cached. If a parameter
        that is neither adapted nor trained was written, its fingerprint is computed again.
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
                "contain it. New checkpoints can be loaded only onto a model with the new values. To store the "
                "parameter in checkpoints, add it to train=(...) of the spec",
            )
        self._frozen |= frozen
        new = {name: bases.get(name, value) for name, value in parameters.items() if name not in self.digests}
        self.digests |= fingerprints(new)
        return {name: digest for name, digest in self.digests.items() if name not in written}

    def facts(self, weights: Mapping[str, object]) -> dict[str, str]:
        """Return {name: value as text} of everything that must be equal on all ranks (`ProcessGroup.check_equal`)."""
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
        """Return the parameters that forward itself writes, by name. They are saved like buffers."""
        names = self.written() - self.slow.states.keys()
        parameters = self.parameters_by_name() if names else {}
        return {name: parameters[name] for name in sorted(names) if name in parameters}

    def model_state(self) -> dict[str, torch.Tensor]:
        """Return the model's buffers, and the parameters that forward writes, by name."""
        return {**dict(self.model.named_buffers()), **self.written_parameters()}

    def note_kept(self) -> None:
        """Record that the current training is saved or folded. Then `has_unsaved_training` is False until a step."""
        self._kept = self._branch_versions()

    @property
    def has_unsaved_training(self) -> bool:
        """Whether the branches were written (by an optimizer step) since they were started, saved or folded."""
        return self._kept is not None and self._kept != self._branch_versions()

    def _branch_versions(self) -> int:
        total = 0
        for parameter in self.branches.parameters():
            total += parameter._version
        return total

    def restorer(self) -> Callable[[], None]:
        """Return a function that restores the fields of this run, but not the values of tensors."""
        fields, branches, versions = dict(vars(self)), set(self.branches), self._branch_versions()
        restore_pending = self.pending.restorer()

        def restore() -> None:
            vars(self).update(fields)
            for key in self.branches.keys() - branches:
                del self.branches[key]
            restore_pending()
            self.set_unmerged()
            if self._kept is not None:  # writes of the rollback do not count as training
                self._kept += self._branch_versions() - versions

        return restore

    def set_unmerged(self) -> None:
        """Give the branches of quantized weights the experts of earlier stages, which these weights cannot hold."""
        slow, branches = self.slow, self.branches_by_weight()
        for name in slow.quantized:
            if name in branches:  # a rollback may have removed the branch
                state = slow.states[name]
                pair = state.unmerged("slow") if slow.idle else state.unmerged_in_stage
                branches[name].set_unmerged(pair, state.unmerged_ranks("slow" if slow.idle else "fast"))

    # ---- changes. If a method raises, nothing is changed.

    def begin(
        self,
        trained: Mapping[str, nn.Parameter],
        undo: Undo,
        empty: bool = False,
    ) -> None:
        """Start the first stage: store W0 of the sites, and write the noise.

        Args:
            trained: the parameters trained in full, by name.
            empty: whether slow state and branches are loaded next, so that branches need no initial values.
        """
        self.slow = self.slow.with_trained(trained)
        self.register_sites(undo, empty)

    def grow(self, decided: Decided, undo: Undo | None = None) -> None:
        """Add the sites, refusals and branches of a new graph. With `undo` this is part of a larger transaction."""
        if undo is None:
            with self.lock, commit() as block:
                self.grow(decided, block)
            return
        undo(self.restorer())
        new = {name: branch for name, branch in decided.branches.items() if name not in self.branches}
        self.branches.update(new)
        self.branches.train(self.branches.training)  # new modules are in train mode
        self.plan, self.refusals = decided.plan, decided.refusals
        reached = decided.plan.by_weight.keys() | {refusal.weight for refusal in decided.refusals}
        self.unreached = tuple(name for name in self.unreached if name in decided.unreached and name not in reached)
        weights = [branch.weight_name for branch in new.values()]
        self.register_sites(undo, adapted=weights)
        if new and not self.grouped and not self.pending.accumulated:
            log.info("%d sites were added by a new graph: %s", len(new), weights)
        elif new:  # an optimizer probably exists already
            warn(
                f"{len(new)} sites were added by a call of a new kind: {named(weights)}. The optimizer does not hold "
                "their branches. Add them by optimizer.add_param_group, or call the cascade once in each mode and with "
                "each kind of arguments before you make the optimizer",
                "late-sites",
            )

    def register_sites(self, undo: Undo, empty: bool = False, adapted: Collection[str] = ()) -> None:
        """Store W0 of new sites and start their stage. The last step of `adapt` and of each new graph.

        Args:
            empty: as for `begin`.
            adapted: names of weights with a new branch. They may have a state already, because of noise.
        """
        unsaved = self.has_unsaved_training
        if not self._buffers:
            self.note_buffers()
        # Step 1: find the new weights: sites, and with noise.where="all" the other matrices as well.
        parameters, noise = self.parameters_by_name(), self.plan.spec.noise
        names = [site.weight for site in self.plan.sites]
        reasons = (Reason.EXCLUDED, Reason.SHARED_MEMORY)
        skipped = {*names, *(refusal.weight for refusal in self.refusals if refusal.reason in reasons)}
        matrices = (name for name, value in parameters.items() if value.dim() > 1 and value.is_floating_point())
        names += [name for name in noise.on_others(matrices) if name not in skipped]
        new = {name: parameters[name] for name in names if name not in self.slow.states}
        started = new | {name: parameters[name] for name in adapted}
        # Step 2: check them.
        self._check_quantized(new)
        # Step 3: compute the state of the stage, then write it.
        slow, branches = self.slow.with_weights(new, self.plan, self.memory), self.branches_by_weight()
        starting = {name: branches[name] for name in started if name in branches and not empty}
        slow, factors = slow.begin_stage(self.plan, starting)
        written = started if (noise.strength > 0 or factors) and not slow.idle else {}
        self.commit(Planned(self.plan, slow, written, factors=factors), undo)
        if not empty:  # a loader writes the weights next, and then records them
            self.note_weights({name: new[name] for name in new if name not in written})
        if not unsaved:
            self.note_kept()
        self._watch()

    def _check_quantized(self, new: Mapping[str, nn.Parameter]) -> None:
        """Raise SpecError if the spec writes noise or residuals into weights, and a new weight is quantized."""
        spec, quantized = self.plan.spec, next(iter(quantized_in(new)), None)
        for is_used, option, value, advice in (
            (spec.noise.strength > 0, f"noise.strength is {spec.noise.strength}", "noise", "noise.strength=0"),
            (spec.start == "pissa", f"start is {spec.start!r}", "the residual", "start='lora'"),
        ):
            if is_used and quantized is not None:
                raise SpecError(
                    f"{option}, but {quantized} is quantized, and {value} cannot be written into it. "
                    f"Give {advice}, or exclude the weight: exclude=({quantized!r},)",
                    code="quantized-not-supported",
                )

    def _watch(self) -> None:
        """Watch the gradients of all trained parameters."""
        if not self.is_sharded:  # FSDP does not call hooks on parameters
            self.pending.arm(self.trainable().values())

    def __setstate__(self, state: dict[str, object]) -> None:
        """Set the state of a deep copy. `pending` starts empty there, so arm it for the copied parameters."""
        vars(self).update(state)
        if not self.released:
            self._watch()

    def commit(self, planned: Planned, undo: Undo | None = None) -> None:
        """Write a planned state, all or nothing. With `undo` this is part of a larger transaction."""
        if undo is not None:
            write_planned(self, planned, undo)
            return
        with self.lock, commit() as block:
            write_planned(self, planned, block)

    def detach(self) -> None:
        """End the run: remove all hooks."""
        self.released = True
        self.pending.disarm()

    def take_shards(self, slow: SlowWeights) -> None:
        """Set the slow weights of this rank's shards, after FSDP has sharded the parameters.

        Hooks on parameters are removed, because FSDP does not call them.
        """
        self.slow = slow
        self.pending.disarm()
        self.note_weights()

    def param_groups(self, lr: float, options: Mapping[str, object]) -> list[dict[str, Any]]:
        """Return parameter groups for an optimizer; see `Cascade.param_groups`."""
        self.check_alive("param_groups")
        self.grouped = True
        return self._groups(lr, options)

    def _groups(self, lr: float, options: Mapping[str, object]) -> list[dict[str, Any]]:
        trained = self.present(self.slow.trained).values()
        return groups(self.plan.spec, self.by_key.values(), trained, lr, options)

    def begin_loop(self, optimizers: Sequence[torch.optim.Optimizer], call: str = "stages") -> None:
        """Check that a loop over stages can start, and record it. `call` is the name for messages."""
        self.check_ready(call, sharded=True)
        check_holds(optimizers, self.trainable())
        check_rates(optimizers, lambda lr: self._groups(lr, {}))
        self.looped = True

    # ---- checks before a call

    def check_call(self, training: bool) -> None:
        """Warn about noise in eval mode. Inside DistributedDataParallel, check that ranks and parameters agree."""
        if not torch.is_grad_enabled():
            if self.is_noisy and not training:
                self.warned.once(
                    "evaluated-with-noise",
                    f"the cascade was called in eval mode inside stage {self.plan.stage}, and its weights have noise. "
                    'Evaluate inside `with cascade.weights("slow"):` (or "fast"), or after `release`',
                )
            return
        wrapper: Any = DistributedDataParallel._active_ddp_module
        if wrapper is None:
            return
        if wrapper not in self._wrapped:
            # The wrapper has broadcast the parameters of rank 0, but not W0, so compare the runs of all ranks.
            ProcessGroup.of(wrapper.process_group).check_equal("DistributedDataParallel", self.facts(self._checksums))
            self._wrapped[wrapper] = {id(parameter) for parameter in wrapper._module_parameters}
        late = [name for name, value in self.trainable().items() if id(value) not in self._wrapped[wrapper]]
        if late:
            raise StateError(
                f"{named(late)} came with a new graph after DistributedDataParallel had wrapped the cascade, so its "
                "gradient would not be averaged over the processes. Wrap the cascade again, after a call in each mode "
                "and with each kind of arguments",
                code="wrapper-not-supported",
            )

    def check_alive(self, call: str) -> None:
        """Raise StateError after `release`."""
        if self.released:
            raise StateError(
                f"{call}: this cascade was released. Call lorasc_fx.adapt(model, ...) to train its model further",
                code="released",
            )

    @contextmanager
    def exclusive(self, call: str, **allowed: bool) -> Iterator[None]:
        """Context manager for changes of weights: take the lock and call `check_ready` with these arguments.

        First wait for a capture in another thread, because it replaces parameters by tensors without values.
        """
        with PROCESS, self.lock:
            self.check_ready(call, **allowed)
            yield

    def check_ready(
        self,
        call: str,
        *,
        sharded: bool = False,
        ends_stage: bool = False,
        keeps: bool = False,
    ) -> None:
        """Raise StateError if the call is not allowed now: after `release`, inside `weights` or inside a backward.

        Args:
            sharded: whether the call supports sharded weights.
            ends_stage: whether the call ends the running stage. Then no gradient may be pending.
            keeps: whether the call saves or folds the training of the running stage (`note_kept`).
        """
        self.check_alive(call)
        if self.is_sharded and not sharded:
            raise StateError(
                f"{call}: not supported for sharded weights. They support transition, stages, rewind, weights, "
                "lorasc_fx.save, resume, and lorasc_fx.parallel.fsdp.folded_state_dict",
                code="sharded",
            )
        if self.placed is not None:
            view = f"stage={self.placed}" if isinstance(self.placed, int) else repr(self.placed)
            raise StateError(
                f"{call}: not allowed inside `with cascade.weights({view})`. Call it after the block",
                code="inside-weights",
            )
        if current_backward() != -1:
            raise StateError(
                f"{call}: called inside a backward, which still needs the weights. Call it after the backward",
                code="inside-backward",
            )
        self.check_weights(call)
        waiting = self.pending.waiting(self.trainable()) if ends_stage else []
        if self.slow.group.any(bool(waiting)):
            waiting = waiting or ["a parameter on another process"]
            raise StateError(
                f"{call}: gradients are pending on {named(waiting, 1)}, and they belong to the stage that ends. "
                "Call optimizer.step() or optimizer.zero_grad() first. If you did, the optimizer holds other Parameter "
                "objects, because a move to some devices makes new ones: build it from cascade.param_groups(lr=...) "
                "after the move. To drop the gradients, call cascade.zero_grad()",
                code="gradients-pending",
            )
        if keeps:
            self.note_kept()

    def differs_from_model(self) -> bool:
        """Whether the outputs of model and cascade differ, because of branches, noise or a grid.

        False if the weights are sharded, because the answer would need communication.
        """
        if self.released or self.placed is not None or self.is_sharded:
            return False
        if self.exchanged():  # torch.func.functional_call runs the model with other tensors
            return False
        if self.is_noisy or any(state.grid or state.residual is not None for state in self.slow.states.values()):
            return True
        has_deltas = any(self.slow.states[name].experts for name in self.slow.quantized)  # only in branches
        return has_deltas or self.slow.moved(self.branches_by_weight())

    def loss_if_dropped(self) -> str | None:
        """Return a text that says what is lost if the cascade is garbage collected now, or None.

        The text contains the placeholder {model} for the class of the model. Reads only counters and flags, no tensors.
        """
        if self.released:
            return None
        losses = [f"the training of stage {self.plan.stage} is lost"] if self.has_unsaved_training else []
        if self.is_noisy:
            losses.append("the weights of {model} keep the noise of the stage")
        if any(state.residual is not None for state in self.slow.states.values()):
            losses.append("the weights of {model} lack the initial factors of their branches")
        return ", and ".join(losses) or None


def _state_checksums(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Return the checksums of the dense tensors by name. They do not depend on the device."""
    dense = {
        name: local(value.detach())
        for name, value in tensors.items()
        if not value.is_nested and value.layout is torch.strided
    }
    return checksums({name: value.cpu() for name, value in dense.items()})


SPARE = 1 << 12
"""Bytes reserved on each device for the small tensors that restoring a weight allocates."""


@dataclass(frozen=True)
class WeightValues:
    """Values of the model's weights, each computed when it is written, because together they would need much memory.

    Args:
        slow: the slow state.
        view: the view of the state. None for the value that the parameter holds in the running stage: W_t, the slow
            weight if no stage runs, or the value that a parameter trained in full started from.
        learners: {weight name: branch, or current value of a parameter trained in full}, if the view includes the
            running stage.
        plan: plan of the running stage, or None for an earlier stage. In the running stage, parameters that do not
            follow the slow rule have their current values.
        known: {weight name: value} of weights that need not be computed.
        own_grid: whether quantized weights are rounded to their own grid. False if the caller quantizes them later.
    """

    slow: SlowWeights
    view: ViewName | None = "slow"
    learners: Mapping[str, Learner] = field(default_factory=dict)
    plan: Plan | None = None
    known: Mapping[str, torch.Tensor] = field(default_factory=dict)
    own_grid: bool = True

    def write(self, name: str, out: torch.Tensor, scratch: Scratch | None = None) -> None:
        """Write the weight of this name into a local tensor of its shape."""
        if name in self.known:
            out.copy_(self.known[name])
        elif self.view is not None:
            on_grid = self.own_grid or self.slow.states[name].grid != OWN_GRID
            self.slow.write_value(name, self.view, out, self.learners.get(name), self.plan, on_grid)
        else:
            assert self.plan is not None, "the weights of a stage depend on its plan"
            if self.slow.idle:
                self.slow.write_value(name, "fast", out, on_grid=False)
            else:
                write_start(out, self.slow.states[name], self.plan.spec, self.plan.stage, True, scratch)

    def matches(self, name: str, weight: torch.Tensor, noisy: bool) -> bool:
        """Whether the weight already has the value that `write` writes. Without noise, slow weights usually have."""
        state = self.slow.started(name)
        is_slow = self.plan is not None and self.view is not None and self.slow.is_slow(name, self.view)
        same_dtype = weight.dtype == state.base.dtype
        return is_slow and same_dtype and not state.full and not state.grid and not state.differs_from_slow(noisy)

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
        values: values of `parameters`. By default the weights of the stage that the plan and the slow weights describe.
        dense: dense values that replace quantized weights, by name.
        factors: {weight name: {name of a branch's parameter: this rank's value}}.
        tensors: (tensor, value) pairs of other tensors to write in place, such as buffers.
        buffers: (place, tensor) pairs of buffers to replace. None as a tensor sets the buffer to None.
        gradients: full gradients of trained parameters, by the names of `Run.trainable`. Other trained parameters get
            `grad = None`. If None, current gradients are kept.
        pending: names of the gradients that no optimizer step has consumed.
        optimizers: the optimizers that get `states`.
        states: {parameter: next optimizer state}. An empty state resets the state of the parameter.
        current: copies of the current values of parameters trained in full, by name, for a rollback. Others are copied.
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


def write_planned(run: Run, planned: Planned, undo: Undo) -> None:
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
            for name, factor in branches[weight].named_parameters():
                if name in values:
                    local(factor).copy_(values[name])
        for tensor, value in planned.tensors:
            tensor.copy_(value)
        for holder, buffer in planned.buffers:
            undo(partial(holder.put, holder.value) if holder.exists else partial(holder.store.pop, holder.key, 0))
            holder.put(buffer)
        put_state(planned.optimizers, planned.states, undo)
        # A rollback computes each old weight again, because copies of all weights would double the memory.
        scratch, spare = Scratch(), reserve(planned.parameters, planned.plan.spec.noise.strength > 0)
        weights = planned.values or WeightValues(planned.slow, None, plan=planned.plan)
        before = WeightValues(run.slow, None, plan=run.plan, known=planned.current)
        new = WeightValues(planned.slow, "base")  # a weight without a state still has the value that becomes W0
        for name, out in weights_to_write(run, planned.parameters, planned.slow):
            known = name in run.slow.states or name in planned.current
            undo(partial(_restore, before if known else new, name, out, out._version, spare))
            weights.write(name, out, scratch)
    if planned.gradients is not None:
        # Frozen factors may have a gradient too, from the stage before.
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
    if run.slow.quantized:
        run.set_unmerged()


def _restore(values: WeightValues, name: str, out: torch.Tensor, version: int, spare: list[torch.Tensor]) -> None:
    """Write the old value of a weight in a rollback, with the memory of `spare`. Raise only if it was overwritten."""
    spare.clear()
    with torch.no_grad():
        try:
            values.write(name, out)
        except (MemoryError, RuntimeError):  # out of memory
            if out._version != version:
                raise


def reserve(parameters: Mapping[str, nn.Parameter], noisy: bool, narrow: bool = False) -> list[torch.Tensor]:
    """Return reserved memory on the host and each device with a weight, to free before weights are restored.

    Without this reserve, a rollback after running out of memory could fail as well, and leave some weights changed.

    Args:
        parameters: parameters of the model, by name.
        noisy: whether restored weights have noise, for which an accelerator needs a workspace.
        narrow: whether restoring a weight narrower than fp32 needs a buffer for its exact values as well.
    """
    sizes = {torch.device("cpu"): SPARE}
    for parameter in parameters.values():
        weight, size = local(parameter), SPARE
        if noisy and weight.device.type != "cpu" and not is_quantized(parameter):
            exact = 4 * weight.numel() if narrow and weight.dtype != arithmetic(weight.dtype) else 0
            size = exact + WORKSPACE * min(weight.numel(), PIECE) + 2 * SPARE
        sizes[weight.device] = max(size, sizes.get(weight.device, 0))
    memory = list[torch.Tensor]()
    for device, size in sizes.items():
        memory.append(torch.empty(size, dtype=torch.uint8, device=device))
    return memory


def weights_to_write(
    run: Run, parameters: Mapping[str, nn.Parameter], after: SlowWeights | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and the local tensor of each parameter. The caller writes into the tensor.

    W0 is copied first if it shares the memory of the tensor. Quantized weights are skipped, because their branches
    compute the deltas (`Run.set_unmerged`).

    Args:
        run: the run, whose W0 must survive the write.
        parameters: parameters of the model, by name.
        after: the next slow weights, if they differ from the current ones. Their W0 must survive too.
    """
    for name, parameter in parameters.items():
        if is_quantized(parameter):
            continue
        out = local(parameter)
        for slow in (run.slow, after):
            if slow is not None and name in slow.states:
                slow.states[name].keep_base(out)
        yield name, out


def _values_restorer(run: Run, planned: Planned) -> Callable[[], None]:
    """Copy the branches, tensors and gradients that a commit changes, and return a function that restores them.

    Other weights are not copied, because a rollback computes them again. Parameters trained in full are copied unless
    `current` has a copy.
    """
    branches, written = run.branches_by_weight(), list[torch.Tensor]()
    for weight in planned.factors:
        written += branches[weight].parameters()
    for name, parameter in planned.parameters.items():
        if name in run.slow.trained and name not in planned.current:
            written.append(parameter)
    graded = [*written]
    if planned.gradients is not None:
        graded += [*run.branches.parameters(), *run.trainable().values()]
    gradients, values = list[tuple[torch.Tensor, torch.Tensor | None]](), list[tuple[torch.Tensor, torch.Tensor]]()
    for tensor in graded:
        gradients.append((tensor, tensor.grad))
    for tensor in (*written, *dict(planned.tensors)):
        values.append((tensor, tensor.detach().clone()))

    def restore() -> None:
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient

    return restore
