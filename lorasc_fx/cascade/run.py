"""The state of a run: what a cascade holds, what may be done with it now, and the one commit that writes to it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lorasc_fx.branch import Branch, Decided, fill_factor
from lorasc_fx.cascade.deferred import MetaModel
from lorasc_fx.cascade.optim import check_holds, check_rates, groups, put_state, stepping
from lorasc_fx.cascade.watches import PendingWatch, Replicas, StepWatch, Warned, check_attention, check_wrappers
from lorasc_fx.checkpoint.base_file import BaseFile, MappedPages
from lorasc_fx.checkpoint.layout import version
from lorasc_fx.errors import CheckpointError, SpecError, StateError, named, warn
from lorasc_fx.parameters import Holder, exchange
from lorasc_fx.plan import Plan, Reason
from lorasc_fx.quantized import dense, is_quantized
from lorasc_fx.shards import ProcessGroup, dtensor_like, local
from lorasc_fx.spec import TrainRule
from lorasc_fx.state import Expert, Part, Scratch, SlowWeights, keep_base, sums_are_finite
from lorasc_fx.util.fingerprint import checksum, checksums, fingerprints, source_digest
from lorasc_fx.util.undo import Block, Commit, Lock, Undo, no_grad, run_postponed

log = logging.getLogger("lorasc_fx")


@dataclass(frozen=True)
class Gradients:
    """Gradients of the running stage; a trained parameter without one has none.

    Args:
        values: by the names of `Run.trainable`.
        pending: names of those that no optimizer step has used.
    """

    values: Mapping[str, torch.Tensor] = field(default_factory=dict)
    pending: Collection[str] = ()


@dataclass(frozen=True)
class Planned:
    """Values that a cascade is to hold next; all of them are known before the first is written.

    Args:
        plan: of the stage that runs then.
        slow: the slow weights then.
        parameters: of the model, that get other numbers, by name; a quantized one keeps its own.
        write: writes the numbers of one of them, by name; by default those that it holds between two steps, and the
            `live` ones of what is trained in full.
        dense: values of quantized weights, by name: dense parameters take their places.
        factors: values of branches' parameters, by weight and by name, as far as they are here.
        tensors: other tensors, each with its value.
        buffers: places of buffers, each with the tensor that it holds then.
        gradients: of what is trained; by default they stay.
        optimizer, states: that gets these states.
        placed: the weights are in place for a while, and plan and slow weights stay.
        live: copies of parameters trained in full, as they are now, that the caller has; of the others one is made.
    """

    plan: Plan
    slow: SlowWeights
    parameters: Mapping[str, nn.Parameter] = field(default_factory=dict)
    write: Callable[[str, torch.Tensor], object] | None = None
    dense: Mapping[str, torch.Tensor] = field(default_factory=dict)
    factors: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    tensors: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()
    buffers: Sequence[tuple[Holder, torch.Tensor | None]] = ()
    gradients: Gradients | None = None
    optimizer: torch.optim.Optimizer | None = None
    states: Mapping[nn.Parameter, Any] = field(default_factory=dict)
    placed: str | int | None = None
    live: Mapping[str, torch.Tensor] = field(default_factory=dict)


_GRADIENT = "gradient/"


class Run:
    """The user's model, the branches, the plan of the running stage, and the slow weights.

    Args:
        model: the user's own.
        decided: the plan of the running stage, the branches, and the weights without one.
        frontend: the front end that was asked for.
        base_file: where W0 lies, if not in memory.
        meta: what is known of a model on the meta device, until it has its numbers.
        written: returns the names of the parameters that forward writes.
    """

    def __init__(
        self,
        model: nn.Module,
        decided: Decided,
        frontend: str,
        *,
        base_file: BaseFile | None = None,
        meta: MetaModel | None = None,
        written: Callable[[], frozenset[str]] = frozenset,
    ) -> None:
        self.model, self.frontend = model, frontend
        self.branches = nn.ModuleDict(dict(decided.branches)).train(model.training)  # by key; the child of the cascade
        self.plan, self.refusals, self.unreached = decided.plan, decided.refusals, decided.unreached
        self.lock = Lock()  # held while weights are read or written; never while the user's model runs
        self.slow = SlowWeights()
        self.pending = PendingWatch()
        self.steps = StepWatch()
        self.replicas = Replicas()
        self.warned = Warned()
        self.placed: str | int | None = None  # a number is that of a stage
        self.released = False
        self.placed_checksums: dict[str, int] = {}  # of the weights that weights() has put in place
        self.base_file, self.meta, self.written = base_file, meta, written
        self.grouped = False  # param_groups was called: an optimizer holds the present branches
        self.looped = False  # stages was called
        self.added: Mapping[str, Part] = {}  # other runs on this base, by name (`experts.add`)
        self.statistics: list[tuple[torch.Tensor, torch.Tensor]] = []  # buffers, as they were before weights()
        self._finite: dict[str, torch.Size] = {}  # shapes of the buffers that were finite at the start
        self._kept: int | None = None  # versions of the branches, as they were last folded or written
        self._fingerprints: dict[str, str] = {}
        self._frozen: dict[str, int] = {}  # checksums of the parameters that no training moves, as they had theirs
        self._checksums: dict[str, int] = {}  # of the weights, as they were last written here or first seen
        self._objects: dict[str, int] = {}  # ids of their parameters, as they were last seen

    @property
    def by_key(self) -> dict[str, Branch]:
        """The branches by key."""
        return {key: branch for key, branch in self.branches.items() if isinstance(branch, Branch)}

    def branches_by_weight(self) -> dict[str, Branch]:
        """Return the branches by the names of their weights."""
        return {branch.weight_name: branch for branch in self.by_key.values()}

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """Return the user's parameters by their first names."""
        return dict(self.model.named_parameters())

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained in full."""
        if not self.slow.trained:
            return {}
        parameters = self.parameters_by_name()
        return {name: parameters[name] for name in self.slow.trained}

    def present(self, names: Iterable[str]) -> dict[str, nn.Parameter]:
        """Return the parameters of these names, as the model has them now; one that is gone is left out.

        Looked up by name: a walk over all modules takes longer than the smaller weights take to write.
        """
        parameters = {name: _parameter(self.model, name) for name in names}
        return {name: parameter for name, parameter in parameters.items() if parameter is not None}

    def weights_by_name(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the slow weights know, as the model has them now; one that is gone is left out."""
        return self.present(self.slow.states)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return every parameter that an optimizer should hold, by its name here."""
        parameters = {f"branches.{name}": parameter for name, parameter in self.branches.named_parameters()}
        if not self.plan.spec.train_A:
            parameters = {name: parameter for name, parameter in parameters.items() if not name.endswith(".lora_A")}
        return parameters | {f"model.{name}": parameter for name, parameter in self.trained_parameters().items()}

    @property
    def trained_entries(self) -> int:
        """Number of entries that an optimizer trains."""
        return sum(parameter.numel() for parameter in self.trainable().values())

    def start(
        self,
        trained: Mapping[str, nn.Parameter],
        undo: Undo,
        rules: Mapping[str, TrainRule] | None = None,
        empty: bool = False,
        summed: Mapping[str, int] | None = None,
    ) -> None:
        """Begin: what is trained in full is known, the sites' W0 is kept, and the first stage's noise is drawn.

        `rules` are those of the spec's train_rules that mean some of the parameters. An `empty` one waits for a slow
        state and branches from elsewhere: no factors are taken out of its weights. `summed` are known checksums of
        parameters.
        """
        self.slow = self.slow.with_trained(trained, rules or {})
        if self.holds_numbers:
            self.know_sites(undo, empty, summed)

    def grow(self, decided: Decided, undo: Undo | None = None) -> None:
        """Take over sites, refusals and branches that came with a new graph, all or nothing, or as a part of more."""
        if undo is None:
            with Commit(self.lock) as block:
                self.grow(decided, block)
            return
        undo(self.restorer())
        new = {name: branch for name, branch in decided.branches.items() if name not in self.branches}
        self.branches.update(new)
        self.branches.train(self.branches.training)  # a new module is in train mode
        self.plan, self.refusals = decided.plan, decided.refusals
        known = decided.plan.by_weight.keys() | {refusal.weight for refusal in decided.refusals}
        self.unreached = tuple(name for name in self.unreached if name in decided.unreached and name not in known)
        self.know_sites(undo)
        weights = [branch.weight_name for branch in new.values()]
        if new and not self.grouped and not self.pending.accumulated:
            log.info("%d sites came with a new variant: %s", len(new), weights)
        elif new:
            warn(
                f"{len(new)} sites came with a call that no earlier one was like: {named(weights)}. The optimizer does "
                "not hold their branches: add_param_group them, or call the cascade once in each mode and with each "
                "kind of arguments before you make the optimizer",
                "late-sites",
            )

    def know_sites(self, undo: Undo, empty: bool = False, summed: Mapping[str, int] | None = None) -> None:
        """Keep W0 of the sites, and start their stage: what `adapt` and a new variant end with."""
        undo(self.pending.restorer())
        if not self._finite:
            buffers = _floating_buffers(self.model)
            all_finite = sums_are_finite(list(buffers.values()))
            self._finite = {name: value.shape for name, value in buffers.items() if all_finite or _is_finite(value)}
        parameters = self.parameters_by_name()
        noise, start, factor_start = self.plan.spec.noise, self.plan.spec.start, self.plan.spec.factor_start
        takes_residual = factor_start.from_weight and not factor_start.of_delta
        names = [site.weight for site in self.plan.sites]
        reasons = (Reason.EXCLUDED, Reason.SHARED_MEMORY)
        without = {*self.slow.trained, *names, *(one.weight for one in self.refusals if one.reason in reasons)}
        matrices = (name for name, value in parameters.items() if value.dim() > 1 and value.is_floating_point())
        names += [name for name in noise.on_others(matrices) if name not in without]
        new = [name for name in names if name not in self.slow.states]
        quantized = next((name for name in new if is_quantized(parameters[name])), None)
        for asked, option, what, instead in (
            (noise.is_on, f"noise.strength is {noise.strength}", "noise", "0"),
            (takes_residual, f"start is {start!r}", "the residual", "start='lora' or 'loftq'"),
        ):
            if asked and quantized is not None:
                raise SpecError(
                    f"{option}, and {quantized} is quantized: {what} cannot be written into it. "
                    f"Give {instead}, or exclude it (exclude=({quantized!r},))",
                    code="quantized-not-supported",
                )
        known = {name: parameters[name] for name in new}
        hooked = [name for name in new if name in self.plan.by_weight and _has_hooks(known[name])]
        if hooked:
            warn(
                f"{named(hooked)}: a hook on this parameter (register_hook, register_post_accumulate_grad_hook) is not "
                "called while the weight is adapted: the gradient goes to lora_A and lora_B, and the weight gets none. "
                "Exclude the weight, train it in full (train=...), or put the hook on the branch's parameters",
                "hook-not-called",
            )
        mapped = self.base_file.mapped(known) if self.base_file is not None else {}
        slow, branches = self.slow.with_weights(known, self.plan, mapped), self.branches_by_weight()
        if factor_start.of_delta and not empty:
            if not any(is_quantized(state.base) for state in slow.states.values()):
                raise SpecError(
                    f"start is {start!r}, which is for quantized weights, and none of the sites' is: give start='lora'",
                    code="conflicting-options",
                )
            slow = self._with_corrections(slow, known)
        starting = {name: branches[name] for name in new if name in branches and not empty}
        slow, factors = slow.begin_stage(self.plan, starting)
        written = known if (noise.is_on or factors) and not slow.idle else {}
        self.commit(Planned(self.plan, slow, written, factors=factors), undo)
        if not empty:  # else they are written next
            self.note_weights((name for name in known if name not in written), summed)
        self._watch()
        self.replicas.see(len(self.branches), self.trainable)

    def _watch(self) -> None:
        """Watch for gradients of what is trained, and for optimizer steps after which noise is drawn."""
        if not self.is_sharded:  # FSDP has other hooks
            self.pending.arm(self.trainable().values())
        if self.plan.spec.noise.follows_steps:
            self.steps.arm(self._redraw)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin as a deep copy, whose watches are new and know nothing of its parameters yet."""
        vars(self).update(state)
        if self.holds_numbers and not self.released:
            self._watch()

    def _with_corrections(self, slow: SlowWeights, known: Mapping[str, nn.Parameter]) -> SlowWeights:
        """Return slow weights that begin with the nearest delta of a site's rank to what quantization took (LoftQ).

        Raises:
            SpecError: no file has the numbers of before.
            CheckpointError: it does not have one of them.
        """
        states = dict(slow.states)
        for name, value in known.items():
            if not is_quantized(value):
                continue
            if self.base_file is None:
                raise SpecError(
                    f"start is 'loftq', which needs the numbers of {name} before it was quantized: give base, the "
                    "safetensors file or folder of the model that was quantized",
                    code="no-base-file",
                )
            before, state = self.base_file.read(name, value.shape), states[name]
            left, values, right = torch.linalg.svd(before.double() - dense(value).cpu().double(), full_matrices=False)
            rank = self.plan.by_weight[name].rank
            b, a = (left[:, :rank] * values[:rank]).float(), right[:rank].float()
            states[name] = state.added([Expert(b.to(value.device), a.to(value.device))], [1.0])
        return replace(slow, states=states)

    def commit(self, planned: Planned, undo: Undo | None = None) -> None:
        """Write planned values and take them over, all or nothing: the one place that writes to model and branches.

        With `undo` the writes are steps of a larger block.
        """
        if undo is None:
            with Commit(self.lock) as block:
                self.commit(planned, block)
            return
        plan, slow, branches = self.plan, self.slow, self.branches_by_weight()
        if planned.dense:
            now = self.present(planned.dense)
            dense = {id(now[name]): nn.Parameter(value, False) for name, value in planned.dense.items()}
            exchange(self.model, lambda holder: dense.get(id(holder.value)), undo)
        undo(self.restorer())
        undo(self._values_restorer(planned))

        scratch = Scratch()

        def put_back(name: str, out: torch.Tensor) -> None:
            if name in slow.states:
                slow.write_resting(name, plan, out, scratch)
            elif name in planned.live:
                out.copy_(planned.live[name])
            elif name not in slow.trained:  # whose value is put back from a copy
                planned.slow.write_value(name, "base", out)

        def write_resting(name: str, out: torch.Tensor) -> None:
            if name in planned.live:
                out.copy_(planned.live[name])
            else:
                planned.slow.write_resting(name, planned.plan, out, scratch)

        pages = self.base_file.pages() if self.base_file is not None else MappedPages()

        def write(name: str, out: torch.Tensor) -> None:
            for states in (slow.states, planned.slow.states):  # the first to put W0 back, also after a release
                if name in states:
                    keep_base(states[name].base, out)
            (planned.write or write_resting)(name, out)
            if name in planned.slow.states:
                pages.release(planned.slow.states[name].base)

        with no_grad():
            for weight, values in planned.factors.items():
                branches[weight].to_rank(planned.plan.by_weight[weight])
                for name, factor in branches[weight].named_parameters():
                    if name in values:
                        local(factor).copy_(values[name])
            for tensor, value in planned.tensors:
                tensor.copy_(value)
            for holder, buffer in planned.buffers:
                undo(partial(holder.put, holder.value) if holder.is_there else partial(holder.store.pop, holder.key, 0))
                holder.put(buffer)
            if (optimizer := planned.optimizer) is not None:
                table = stepping(optimizer).state
                before = {parameter: table[parameter] for parameter in planned.states}
                undo(partial(put_state, optimizer, before))
                put_state(optimizer, planned.states)
            fill(planned.parameters, write, put_back, undo)
        self._put_gradients(planned)
        if planned.placed is not None:
            self.placed = planned.placed
            now = self.present(planned.parameters)
            self.placed_checksums = checksums(now)
            return
        self.plan, self.slow = planned.plan, planned.slow
        now = self.present(planned.parameters)  # FSDP exchanges parameters itself
        written = [name for name in now if self.is_sharded or now[name] is planned.parameters[name]]
        self.note_weights(written)
        self._set_unmerged()

    def _put_gradients(self, planned: Planned) -> None:
        """Write the gradients of planned values."""
        if planned.gradients is None:
            return
        for parameter in self.branches.parameters():
            parameter.grad = None
        for name, parameter in self.trainable().items():
            gradient = planned.gradients.values.get(name)
            if gradient is not None:
                gradient = dtensor_like(gradient.to(parameter.device, copy=True), parameter)
            parameter.grad = gradient
            if name in planned.gradients.pending:
                self.pending.note(parameter)

    def _redraw(self, optimizer: torch.optim.Optimizer) -> None:
        """Write the next noise after a step of the optimizer that trains the branches (`noise.redraw = "step"`).

        W_t is written anew from W0, S and the noise of (seed, stage, step, weight), rounded once: nothing accumulates,
        and nothing is kept on the training device.
        """
        first = next((branch.lora_B for branch in self.by_key.values()), None)
        trains = any(parameter is first for group in optimizer.param_groups for parameter in group["params"])
        if self.slow.idle or not trains:
            return
        after = replace(self.plan, step=self.plan.step + 1)
        if self.inside_weights:  # the new noise comes with the way back
            self.plan = after
            return
        with Commit(self.lock) as undo:
            if self.base_file is not None:
                self.base_file.check("noise.redraw")
            self.check_weights("noise.redraw")
            self.commit(Planned(after, self.slow, self.weights_by_name()), undo)

    def restorer(self) -> Callable[[], None]:
        """Return what brings back what was decided, slow weights and flags, which weights are in place, their
        checksums, and which gradients wait for a step. Values are not among it (`commit`).
        """
        decided = (self.plan, self.slow, self.base_file, self.released, self.added)
        noted, branches = (self._checksums, self._objects, self._frozen), set(self.branches)
        meta, fingerprints, left = self.meta, self._fingerprints, (self.refusals, self.unreached)
        placed = (self.placed, self.placed_checksums)
        restore_pending = self.pending.restorer()

        def restore() -> None:
            self.plan, self.slow, self.base_file, self.released, self.added = decided
            self.refusals, self.unreached = left
            for key in self.branches.keys() - branches:
                del self.branches[key]
            self.meta, self._fingerprints = meta, fingerprints
            self._checksums, self._objects, self._frozen = noted
            self.placed, self.placed_checksums = placed
            restore_pending()
            self._set_unmerged()

        return restore

    def _values_restorer(self, planned: Planned) -> Callable[[], None]:
        """Return what brings back the values and gradients that a commit changes, but for weights of the slow state,
        which are computed anew, and parameters that the caller has copies of.
        """
        branches, trained = self.branches_by_weight(), self.slow.trained
        written = [branches[weight] for weight in planned.factors]
        scales = [(branch, branch.scale) for branch in written]
        copied = [factor for branch in written for factor in branch.parameters()]
        copied += [
            parameter for name, parameter in planned.parameters.items() if name in trained and name not in planned.live
        ]
        values = [(parameter, parameter.detach().clone()) for parameter in copied]
        tensors = [(tensor, tensor.detach().clone()) for tensor, _ in planned.tensors]
        if planned.gradients is not None:
            copied += [*self.branches.parameters(), *self.trainable().values()]
        gradients = [(parameter, parameter.grad) for parameter in copied]

        def restore() -> None:
            for parameter, value in values:
                fill_factor(parameter, value)
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for branch, scale in scales:
                branch.scale = scale
            with no_grad():
                for tensor, value in tensors:
                    tensor.copy_(value)

        return restore

    def _set_unmerged(self) -> None:
        """Give the branches of quantized weights their unmerged deltas."""
        slow = self.slow
        for name, branch in self.branches_by_weight().items():
            state = slow.states.get(name)
            if state is not None and is_quantized(state.base):
                pair = state.unmerged("slow") if slow.idle else state.beside
                branch.set_unmerged(*((pair.b, pair.a) if pair is not None else (None, None)))

    def let_go(self) -> None:
        """Remove all hooks."""
        self.released, self.base_file, self.added = True, None, {}
        self.pending.disarm()
        self.steps.disarm()

    def take_shards(self, slow: SlowWeights) -> None:
        """Replace the slow weights by those of this rank's shards, after FSDP has sharded the parameters.

        Hooks on parameters are removed, because FSDP does not call them.
        """
        self.slow = slow
        self.pending.disarm()
        self.note_weights()

    def take_numbers(
        self, base_file: BaseFile | None, fingerprints: Mapping[str, str], undo: Undo, empty: bool
    ) -> None:
        """Begin on shards whose parameters have got their numbers: what `start` does on one process.

        Args:
            base_file: where W0 lies, if not in memory.
            fingerprints: of all parameters, whole.
            undo: takes all back.
            empty: as of `start`.
        """
        undo(self.restorer())
        rules = {name: entry.rule for name, entry in self.slow.trained.items() if entry.rule is not None}
        trained = self.trained_parameters()
        self.meta, self.base_file, self._fingerprints = None, base_file, dict(fingerprints)
        self.slow = replace(self.slow, states={}, trained={}).with_trained(trained, rules)
        self.know_sites(undo, empty)
        known, parameters = {*self.slow.states, *self.slow.trained}, self.parameters_by_name()
        self._frozen = checksums({name: value for name, value in parameters.items() if name not in known})

    def add(self, name: str, part: Part) -> None:
        """Keep another run on this base by a name; one of the same name is replaced."""
        self.added = {**self.added, name: part}

    def keep_buffers(self, buffers: Iterable[torch.Tensor]) -> None:
        """Keep buffers, as they are, for the end of `weights`; those that are kept already stay as they were."""
        held = {id(buffer) for buffer, _ in self.statistics}
        new = [(buffer, buffer.detach().clone()) for buffer in buffers if id(buffer) not in held]
        self.statistics = [*self.statistics, *new]

    def unplace(self) -> None:
        """Note that the weights between two steps are in place again."""
        self.placed, self.placed_checksums, self.statistics = None, {}, []

    def param_groups(self, lr: float, options: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the groups of an optimizer, which holds the present branches; see `Cascade.param_groups`."""
        self.check_alive("param_groups")
        self.grouped = True
        return self._groups(lr, options)

    def _groups(self, lr: float, options: Mapping[str, Any]) -> list[dict[str, Any]]:
        trained = [(parameter, self.slow.trained[name].rule) for name, parameter in self.trained_parameters().items()]
        return groups(self.plan.spec, self.by_key.values(), trained, lr, options)

    def begin_loop(self, optimizer: torch.optim.Optimizer, call: str = "stages") -> None:
        """Check that a loop over stages can begin, and note that there is one; `call` is its name in messages."""
        self.check_ready(call, sharded=True)
        check_holds(optimizer, self.trainable())
        check_rates(optimizer, lambda lr: self._groups(lr, {}))
        self.looped = True

    # ---- gradients that a checkpoint finds: a run that is saved between backward and step, or accumulates, loses none

    def gradients(self) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Return the gradients that are there, by the names of their parameters, and which of them no step has used."""
        trainable = self.trainable()
        tensors = {
            f"{_GRADIENT}{name}": parameter.grad.detach().clone()
            for name, parameter in trainable.items()
            if parameter.grad is not None
        }
        return tensors, self.pending.waiting(trainable)

    def gradients_in(self, tensors: Mapping[str, torch.Tensor], pending: Sequence[str], where: str) -> Gradients:
        """Return the gradients that a checkpoint holds, as `gradients` returned them.

        Args:
            tensors, pending: of the checkpoint.
            where: they come from, for messages.

        Raises:
            CheckpointError: a gradient of no parameter that is trained here, or of another shape or dtype than its own.
        """
        holders, values = self.trainable(), {}
        for name, tensor in tensors.items():
            if not name.startswith(_GRADIENT):
                continue
            holder, parameter = holders.get(name.removeprefix(_GRADIENT)), name.removeprefix(_GRADIENT)
            if holder is None:
                raise CheckpointError(f"{where}: {name!r} is of no parameter that is trained")
            if holder.shape != tensor.shape or holder.dtype != tensor.dtype:
                raise CheckpointError(
                    f"{where}: {name!r} is {tuple(tensor.shape)} {tensor.dtype}, its parameter "
                    f"{tuple(holder.shape)} {holder.dtype}; it is not of this run"
                )
            values[parameter] = tensor
        return Gradients(values, pending)

    @property
    def is_sharded(self) -> bool:
        """Whether a process holds only its share of the weights, as under FSDP."""
        return self.slow.group is not None

    @property
    def holds_numbers(self) -> bool:
        """Whether the model is not on the meta device."""
        return self.meta is None

    @property
    def inside_weights(self) -> bool:
        """Whether `weights` has put other weights in place."""
        return self.placed is not None

    def faults(self) -> list[str]:
        """Return a sentence for each slow state with inf or nan, and each branch unless such ones are left out."""
        if self.plan.spec.on_nonfinite == "skip":
            return self.slow.faults()
        broken = [name for name, branch in self.branches_by_weight().items() if not branch.finite()]
        return [f"the branch of {name} holds inf or nan" for name in broken] + self.slow.faults()

    def started_finite(self, name: str, shape: torch.Size) -> bool:
        """Whether the buffer `name` had this shape, and neither inf nor nan, when the model was adapted."""
        return self._finite.get(name) == shape

    def check_buffers(self, call: str) -> None:
        """Raise StateError if a buffer holds inf or nan, and was finite when the model was adapted.

        A mask with -inf may stay, and so may a buffer that forward has made anew in another size. All-reduced where
        weights are sharded.
        """
        buffers = _floating_buffers(self.model)
        known = {name: value for name, value in buffers.items() if self.started_finite(name, value.shape)}
        broken = None
        if not sums_are_finite(list(known.values())):
            broken = next((name for name, value in known.items() if not _is_finite(value)), None)
        if self.slow.some(broken is not None):
            raise StateError(
                f"{call}: the buffer {broken or 'of another process'} holds inf or nan, and was finite when the model "
                "was adapted; nothing was changed or written. Find the batch that did it, and go on from the last "
                "checkpoint, or estimate running statistics anew by cascade.recalibrate(batches)",
                code="non-finite-state",
            )

    @property
    def quantized(self) -> tuple[str, ...]:
        """Names of the sites whose weights are quantized."""
        return tuple(name for name, state in self.slow.states.items() if is_quantized(state.base))

    def note_weights(self, written: Iterable[str] | None = None, summed: Mapping[str, int] | None = None) -> None:
        """Take the checksums of weights that were written here, by default of all, but for those that are given; those
        of others stay.
        """
        parameters, given = self.weights_by_name(), summed or {}
        names = parameters if written is None else [name for name in written if name in parameters]
        taken = {name: given[name] for name in names if name in given}
        new = checksums({name: parameters[name] for name in names if name not in taken})
        self._checksums = {**self._checksums, **taken, **new}
        self._objects = {**self._objects, **{name: id(parameters[name]) for name in names}}

    def exchanged(self) -> bool:
        """Whether other objects are in the places of the weights, as inside torch.func.functional_call."""
        return any(id(parameter) != self._objects.get(name) for name, parameter in self.weights_by_name().items())

    def changed_weights(self, parameters: Mapping[str, nn.Parameter]) -> list[str]:
        """Return the names of the weights, among these, that hold other numbers than were written here."""
        return [name for name, value in checksums(dict(parameters)).items() if value != self._checksums.get(name)]

    def changed(self, known: Mapping[str, int]) -> str | None:
        """Return the first parameter that is gone, or no longer has the checksum that it has here."""
        held = {name: parameter for name in known if (parameter := _parameter(self.model, name)) is not None}
        now = checksums(held)
        return next((name for name in known if now.get(name) != known[name]), None)

    def check_weights(self, call: str) -> None:
        """Raise StateError where a weight holds other numbers than were written here, or is gone.

        By value, as a write through `.data`, numpy or another Parameter leaves no trace. All-reduced where weights are
        sharded. Every rank must call this at the same point.
        """
        parameters = self.weights_by_name()
        changed = self.changed(self._checksums)
        if changed is None and self.slow.group is None:  # what is trained in full may have other numbers
            bases = {name: entry.base for name, entry in self.slow.trained.items()}
            now = {name: _parameter(self.model, name) for name in bases}
            changed = next(
                (name for name, base in bases.items() if getattr(now[name], "shape", None) != base.shape), None
            )
        if self.slow.some(changed is not None):
            raise StateError(
                f"{call}: {changed or 'a weight on another process'} was changed from outside while the cascade lives "
                "(load_state_dict, an optimizer, an average of weights, .data), and a fold would overwrite that. Put "
                "the weight back; write weights before adapt; to go on with a run, use lorasc_fx.save and load",
                code="weights-changed-outside",
            )
        for site in self.plan.sites if self.slow.group is None else ():
            for alias in site.aliases:
                other = _parameter(self.model, alias)
                if other is not None and other is not parameters.get(site.weight):
                    raise StateError(
                        f"{call}: {alias} was tied to {site.weight} when the model was adapted, and is another "
                        "parameter now, which a fold would not reach. Tie them again, or adapt with untie",
                        code="tie-broken",
                    )
        self._objects = {name: id(parameter) for name, parameter in parameters.items()}

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of every base parameter that only training moves.

        Each is computed once, and anew where a parameter that no training moves was written since: a checkpoint does
        not hold it, and has to say onto which numbers it loads.

        Raises:
            StateError: such a one was written since the weights were sharded: no process has the whole of it.
        """
        slow, moved, whole = self.slow, self.moved_parameters(), self.slow.group is None
        if slow.group is not None and (name := self.changed(self._frozen)) is not None:
            raise StateError(
                f"save: {name} was changed since the weights were sharded. It is neither adapted nor trained, and no "
                "checkpoint holds it: put it back, or change it before shard",
                code="weights-changed-outside",
            )
        bases: dict[str, torch.Tensor] = {name: state.base for name, state in slow.states.items()}
        bases |= {name: entry.base for name, entry in slow.trained.items()}
        parameters = {name: value for name, value in self.parameters_by_name().items() if name not in moved}
        frozen = checksums({name: value for name, value in parameters.items() if whole and name not in bases})
        for name in [name for name in frozen if name in self._fingerprints and frozen[name] != self._frozen[name]]:
            del self._fingerprints[name]
            self.warned.once(
                "frozen-parameter-changed",
                f"{name} was changed after an earlier save. It is neither adapted nor trained, and checkpoints "
                "do not hold it: from now on they load onto a model that has its new numbers only. To have it "
                "in them, give train=(...) to the spec",
            )
        self._frozen |= frozen
        new = {name: bases.get(name, value) for name, value in parameters.items() if name not in self._fingerprints}
        self._fingerprints |= fingerprints(new)
        return {name: digest for name, digest in self._fingerprints.items() if name not in moved}

    def facts(self, weights: Mapping[str, object]) -> dict[str, str]:
        """Return what all ranks of a run must have alike (`ProcessGroup.check_alike`).

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

    def check_replicas(self, kind: type[nn.Module]) -> None:
        """Refuse context parallelism and wrappers that cut parameters, and compare ranks before the first training call
        through a DistributedDataParallel, which has given all of them the first one's parameters, but not its W0.

        Args:
            kind: the class of the cascade.

        Raises:
            StateError: there is such a wrapper, or the ranks are not alike.
        """
        self.replicas.see(len(self.branches), self.trainable)
        check_attention()
        if torch.is_grad_enabled() and not self.is_sharded:
            check_wrappers(kind)
        group = self.replicas.to_compare()
        if group is not None:
            ProcessGroup.of(group).check_alike("DistributedDataParallel", self.facts(self._checksums))

    def note_fingerprints(self, digests: Mapping[str, str]) -> None:
        """Take over the fingerprints of W0 that came with a checkpoint, if those of before are known."""
        if self._fingerprints:
            self._fingerprints = {**self._fingerprints, **digests}

    @property
    def fingerprinted(self) -> bool:
        """Whether fingerprints were taken."""
        return bool(self._fingerprints)

    def note_frozen(self) -> None:
        """Take the checksums of what no training moves again: it was moved or cast here, and its fingerprint stays."""
        parameters = self.parameters_by_name()
        self._frozen = checksums({name: parameters[name] for name in self._frozen})

    def moved_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that forward itself writes (a momentum teacher); they are state, as buffers are."""
        names = self.written() - self.slow.states.keys() - self.slow.trained.keys()
        parameters = self.parameters_by_name() if names else {}
        return {name: parameters[name] for name in sorted(names) if name in parameters}

    def model_state(self) -> dict[str, torch.Tensor]:
        """Return the model's buffers, and the parameters that forward writes."""
        return {**dict(self.model.named_buffers()), **self.moved_parameters()}

    def check_alive(self, call: str, *, on_meta: bool = False) -> None:
        """Raise StateError after `release`, and before the model has its numbers, unless the call needs none."""
        run_postponed()
        if self.released:
            raise StateError(
                f"{call}: this cascade was released; the model is yours again. Adapt it anew to go on", code="released"
            )
        if not self.holds_numbers and not on_meta:
            raise StateError(
                f"{call}: the model is on the meta device, without numbers; "
                "call lorasc_fx.materialize(cascade, folder) with its safetensors first",
                code="meta-model",
            )

    def exclusive(self, call: str, **allowed: bool) -> Block[None]:
        """Hold the lock for the time of a `with`, in which weights may change; arguments and errors: `check_ready`."""
        return _Exclusive(self, partial(self.check_ready, call, **allowed))

    def check_ready(
        self,
        call: str,
        *,
        sharded: bool = False,
        ends_stage: bool = False,
        on_meta: bool = False,
    ) -> None:
        """Raise StateError where weights must not change: after release, inside `weights`, inside a backward.

        Args:
            call: name of the method, for messages.
            sharded: the call works where FSDP holds the weights.
            ends_stage: it ends the running stage, which no gradient may outlive.
            on_meta: it needs no numbers.
        """
        self.check_alive(call, on_meta=on_meta)
        if self.is_sharded and not sharded:
            raise StateError(
                f"{call}: the weights are sharded over processes, where there is transition, stages, rewind, weights, "
                "lorasc_fx.save and resume; lorasc_fx.parallel.fsdp has folded_state_dict for them",
                code="sharded",
            )
        if self.inside_weights:
            what = f"stage={self.placed}" if isinstance(self.placed, int) else repr(self.placed)
            raise StateError(f"{call}: inside weights({what}); leave the with block first", code="inside-weights")
        if torch._C._current_graph_task_id() != -1:
            raise StateError(
                f"{call}: inside a backward, which still needs the weights; call it after the backward",
                code="inside-backward",
            )
        if self.base_file is not None:
            self.base_file.check(call)
        self.check_weights(call)
        waiting = self.pending.waiting(self.trainable())
        if self.slow.some(bool(waiting)) and ends_stage:
            waiting = waiting or ["what another process holds"]
            raise StateError(
                f"{call}: gradients are pending on {named(waiting, 1)}: they belong to the stage that ends. "
                "Call optimizer.step() or optimizer.zero_grad() first. If you did, the optimizer holds other Parameter "
                "objects (a move to some devices makes new ones): build it from cascade.param_groups(lr=...), after "
                "any move. cascade.zero_grad() drops the gradients",
                code="gradients-pending",
            )
        self.warned.accept("training-not-kept")  # the user folds, saves or looks at the weights
        if call not in _KEEPS_NOTHING:
            self.note_kept()

    def note_kept(self) -> None:
        """Note that what is trained now is in a file, a state dict or another run."""
        self._kept = sum(parameter._version for parameter in self.branches.parameters())

    def loses_training(self) -> bool:
        """Whether something was trained that is nowhere else, and goes with the run. On shards this is a guess."""
        if not self.holds_numbers:
            return False
        if self.is_sharded:
            return self.grouped and self._kept is None
        if self._kept == sum(parameter._version for parameter in self.branches.parameters()):
            return False
        unmerged = any(self.slow.states[name].experts for name in self.quantized)
        return unmerged or self.slow.moved(self.branches_by_weight())


def _has_hooks(parameter: nn.Parameter) -> bool:
    """Whether the user has put hooks on the gradient of a parameter."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


class _Exclusive(Block[None]):
    def __init__(self, run: Run, check: Callable[[], None]) -> None:
        super().__init__(run.lock)
        self._check = check

    def _begin(self) -> None:
        self._check()


def _floating_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the local values of the buffers that can hold inf or nan, by name."""
    return {
        name: local(buffer)
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point() and buffer.dtype.itemsize > 1 and buffer.layout is torch.strided
        if not (buffer.is_meta or buffer.is_nested)
    }


def _is_finite(value: torch.Tensor) -> bool:
    return bool(torch.isfinite(value).all())


def _parameter(model: nn.Module, name: str) -> nn.Parameter | None:
    *path, leaf = name.split(".")
    module: nn.Module | None = model
    for part in path:  # the dictionaries of a script module have no `get`
        module = module._modules[part] if module is not None and part in module._modules else None
    return module._parameters[leaf] if module is not None and leaf in module._parameters else None


_KEEPS_NOTHING = {
    "add", "load_state_dict", "resume", "rewind", "shard", "stages", "to", "transition", "weights",
}  # fmt: skip
"""Calls that look at the weights or change them, and leave what the running stage has trained in the cascade only."""

SPARE = 1 << 12
"""Bytes that are kept free for putting weights back where memory is short: for what is small. A block of noise goes
where the one before it was."""


def fill(
    parameters: Mapping[str, nn.Parameter],
    new: Callable[[str, torch.Tensor], object],
    old: Callable[[str, torch.Tensor], object],
    undo: Undo,
) -> None:
    """Let `new(name, parameter)` write into each parameter in turn; `old` does so again when the block is undone.

    A quantized weight is not written to: its branch computes the unmerged delta (`Run.commit`).
    """
    # Memory for restoring the weights if no more can be had, on the host and wherever a weight is.
    devices = {torch.device("cpu")} | {local(each).device for each in parameters.values()}
    spare = [torch.empty(SPARE, dtype=torch.uint8, device=device) for device in devices]
    with torch.no_grad():
        for name, parameter in parameters.items():
            if not is_quantized(parameter):
                out = local(parameter)
                undo(partial(_again, old, name, out, out._version, spare))
                new(name, out)


def _again(
    old: Callable[[str, torch.Tensor], object], name: str, out: torch.Tensor, version: int, spare: list[torch.Tensor]
) -> None:
    spare.clear()
    with torch.no_grad():
        try:
            old(name, out)
        except (MemoryError, RuntimeError):  # no memory for what the weight needs, old or new
            if out._version != version:
                raise
