"""`lorasc_fx.adapt` and `lorasc_fx.load`, and the steps that start a cascade, which `merge` uses too."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Self, get_args
from weakref import WeakSet, ref

import torch
from torch import fx, nn
from torch.utils.weak import WeakIdKeyDictionary

from lorasc_fx.branch import Decided
from lorasc_fx.capture import FRONTENDS, open_model
from lorasc_fx.cascade import Flags, Graphs, flags_of, graphs_of, run_of, watch_model
from lorasc_fx.cascade.cascade import Joined
from lorasc_fx.cascade.run import Run
from lorasc_fx.check.isolation import written_by
from lorasc_fx.checkpoint import Checkpoint, check_base, check_ties, read
from lorasc_fx.compile import Compiler
from lorasc_fx.errors import CaptureError, CheckpointError, PassError, SpecError, StateError, named, warn
from lorasc_fx.facade import Cascade, cascade_class, load_into
from lorasc_fx.graph import matches, named_weights, shared_memory, trained_by
from lorasc_fx.graph.forms import forms_missing
from lorasc_fx.graph.patterns import check_patterns
from lorasc_fx.graph.weights import Memory, Weights
from lorasc_fx.parameters import exchange, holders
from lorasc_fx.peft.spec_from_peft import is_config, spec_of
from lorasc_fx.plan import Plan, Reason
from lorasc_fx.quantized import LIBRARIES, quantized_in, wrap_layers
from lorasc_fx.signature import Calls, bind_inputs, signature_of
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.state import BaseMemory
from lorasc_fx.util.undo import PROCESS, AllOrNothing, Undo

__all__ = ["adapt", "load"]

log = logging.getLogger("lorasc_fx")


def adapt(
    model: nn.Module | torch.export.ExportedProgram,
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    spec: CascadeSpec | object = None,
    frontend: str = "auto",
    base_memory: BaseMemory = "memory",
) -> Cascade:
    """Add low-rank branches to a model and train them in stages, without changing its source code.

    Args:
        model: an nn.Module, a GraphModule or an ExportedProgram, with all its values.
        args, kwargs: example inputs, of the types of later calls. Their sizes decide where branches compute, and are
            constants of the first graph. The model runs on them at least once, and is compared with its graph. These
            runs do not change it.
        spec: a `CascadeSpec`, or a configuration of peft (`peft.LoraConfig`, `peft.HiraConfig`, ...). For a peft
            configuration, the other options have the defaults of `CascadeSpec`, such as pace 0.5.
        frontend: `export` for a graph of torch.export, `eager` to run the model itself, or `auto` for the first one
            that works.
        base_memory: where the original values W0 of the adapted weights are stored:

            - `memory`: a copy on the host. A weight on the host is copied just before it is first written (by noise, at
              the end of a stage, or by `weights`).
            - `pinned`: like `memory`, but in page-locked memory, from which copies to an accelerator are faster.
            - `device`: a copy on the device of the weight, made just before it is first written. Transitions and
              `weights` then copy nothing from the host.

    Returns:
        The cascade. The model's parameters have the values of the start of stage 1 (with noise, if any). They are
        frozen, except the parameters in `spec.train`. `cascade.release()` restores the model.

    Raises:
        UnknownTarget: a pattern of the spec matches nothing.
        SpecError: the spec leaves no weight to adapt, is not a CascadeSpec, or unties a parameter that has no tie; or
            `base_memory` is unknown, or is `pinned` on a machine without an accelerator.
        StateError: the model is already adapted, or its parameters are already sharded.
        CaptureError: the model has tensors on the meta device, or raises on the inputs, or no front end works.
    """
    if (from_peft := is_config(spec)) or spec is None:
        plan = Plan(CascadeSpec())
    elif isinstance(spec, CascadeSpec):
        plan = Plan(spec)
    else:
        raise SpecError(
            f"spec is a {type(spec).__name__}. Pass a lorasc_fx.CascadeSpec, or a configuration of peft such as "
            "peft.LoraConfig."
        )
    opened = open_model(model)
    if from_peft:
        plan = Plan(spec_of(spec, opened))
    check_new(opened)
    with torch.inference_mode(False), AllOrNothing() as undo:
        cascade = Setup.of(opened, plan, frontend, (args, kwargs), base_memory, undo).cascade(undo)
        _warn_about_frozen_sites(cascade)
        _warn_about_quantized_weights(cascade)
        return cascade


def load(
    folder: str | PathLike[str] | Checkpoint,
    model: nn.Module | torch.export.ExportedProgram,
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    base_memory: BaseMemory = "memory",
) -> Cascade:
    """Load the newest checkpoint of a folder into a base model, and return the cascade at that point of the run.

    Call `cascade.resume(optimizer, scheduler)` afterwards to restore the optimizer, the scheduler and the random
    generators. The number of ranks may differ from the run that wrote the checkpoint: each rank loads the full cascade,
    which can be wrapped or sharded like a cascade from `adapt`.

    If args and kwargs are left out, nothing is captured. The checkpoint tells which weights have branches. The first
    call captures the graph, and raises the errors of `adapt`. Functions that need no graph (resume, weights, save,
    release, export.peft, export.safetensors) work before that call. With several processes, pass inputs.

    Args:
        folder: a folder written by `lorasc_fx.save`, or a checkpoint that was read from one. For the folder of a run of
            `lorasc-fx train`, use `lorasc_fx.cli.load`.
        model, args, kwargs, base_memory: as for `adapt`. The model must have the weights that were adapted. Parameters
            that are trained in full, such as a new head, may have any values, because the checkpoint overwrites them.

    Raises:
        CheckpointError: the folder has no checkpoint, the checkpoint is damaged, or the base model differs. The model
            is left unchanged.
    """
    checkpoint = folder if isinstance(folder, Checkpoint) else read(folder)
    if checkpoint.frontend not in ("auto", *FRONTENDS):
        raise CheckpointError(
            f"{checkpoint.path}: the checkpoint was written with the front end {checkpoint.frontend!r:.40}, which does "
            f"not exist here; known: {', '.join(('auto', *FRONTENDS))}",
            code="unknown-name",
        )
    opened = open_model(model)
    check_new(opened)
    with torch.inference_mode(False), AllOrNothing() as undo:
        plan, inputs = checkpoint.plan, (args, kwargs)
        start = Setup.of(opened, plan, checkpoint.frontend, inputs, base_memory, undo, checkpoint, loads=True)
        weights = named_weights(opened)
        check_base(checkpoint, weights.parameters)
        check_ties(checkpoint, weights.matrices)
        sites = {site.form: site.weight for site in reversed(checkpoint.plan.sites)}
        for form, hint in forms_missing(sites).items():
            raise CheckpointError(
                f"{checkpoint.path}: {sites[form]} was adapted with the form {form!r}, which is not registered{hint}. "
                "Call lorasc_fx.graph.register_form with this form before load.",
                code="unknown-name",
            )
        try:
            cascade = start.cascade(undo)
        except (PassError, SpecError) as fault:
            raise CheckpointError(
                f"{checkpoint.path}: its plan does not fit this model: {fault}", code="sites-differ"
            ) from fault
        load_into(cascade, checkpoint, undo)
        check_loaded(cascade, checkpoint.path)
        return cascade


def _warn_about_frozen_sites(cascade: Cascade) -> None:
    """Warn about adapted weights that were frozen before `adapt`, because they may be constants of the model.

    No warning is given for a weight that a target names in full. Nor is one given if at least half of the adapted
    weights were frozen, by number or by entries: then the user has frozen a backbone to adapt it.
    """
    trainable, sites = flags_of(cascade).requires_grad, cascade.sites
    frozen = [site for site in sites if not trainable.get(site.weight, True)]
    few = 2 * len(frozen) < len(sites)
    few = few and 2 * sum(math.prod(site.shape) for site in frozen) < sum(math.prod(site.shape) for site in sites)
    names = [site.weight for site in frozen if site.weight not in cascade.plan.spec.targets]
    if few and names:
        warn(
            f"{named(names)}: requires_grad was False, although it was True for most weights. This may be a constant "
            "of the model, but it gets a branch. To leave it unchanged, set "
            f"exclude=({', '.join(map(repr, names[:3]))},{' ...' if len(names) > 3 else ''}). To adapt it without this "
            "warning, name it in targets.",
            "constant-adapted",
        )


def _warn_about_quantized_weights(cascade: Cascade) -> None:
    """Warn about quantized weights that match the targets but have no branch.

    Either the library of their layer is not supported, or the layer does not use them in a matrix product.
    """
    spec, parameters = cascade.plan.spec, dict(cascade.model.named_parameters())
    complex_weights = {name for name, value in parameters.items() if value.is_complex()}
    refused = {
        refusal.weight: refusal
        for refusal in cascade.refusals
        if refusal.reason in (Reason.QUANTIZED, Reason.NOT_FLOATING) and refusal.weight not in complex_weights
    }
    left_out = [*refused, *quantized_in({name: parameters[name] for name in cascade.unreached})]
    # Layers of other libraries, such as GPTQ, hold packed integers in buffers whose names contain `weight`.
    packed = {
        name: buffer
        for name, buffer in cascade.model.named_buffers()
        if "weight" in name.rpartition(".")[2] and buffer.dim() > 1
        if not buffer.is_complex() and not (buffer.is_floating_point() and buffer.dtype.itemsize > 1)
    }
    left_out += [name for name in packed if not any(matches(pattern, (name,)) for pattern in spec.exclude)]
    if left_out:
        owner = cascade.model.get_submodule(left_out[0].rpartition(".")[0])
        kinds = ", ".join(sorted({name.rpartition(".")[2] for name in LIBRARIES}))
        why = refused[left_out[0]].sentence if left_out[0] in refused else "this layer is not supported"
        warn(
            f"{named(left_out)}: these quantized weights get no branches. The first belongs to a "
            f"{type(owner).__name__}: {why}. Supported are linear layers quantized by torchao, and layers of the "
            f"classes {kinds}. Exclude the weights to turn this warning off.",
            "quantized-left-out",
        )


# ---- the start of a cascade

_ADAPTED: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""For each adapted parameter, a weak reference to its cascade. It is used to reject a model that is already adapted."""


@dataclass(frozen=True)
class Setup:
    """The prepared model and the settings from which a cascade starts.

    Args:
        model: the user's model, after `wrap_layers` and `settle_ties`.
        plan: an empty plan with a spec, or a saved plan.
        frontend: name of a front end, or `auto`.
        args, kwargs: example inputs.
        memory: kind of memory for W0.
        joined: the places whose parameters were tied, see `settle_ties`.
        loads: whether values of a checkpoint or of a sum are loaded afterwards. Inputs may then be left out, and the
            first call captures the graph.
        written: names of the parameters that forward writes into, from a checkpoint. They are used until a capture
            finds these parameters.
    """

    model: nn.Module
    plan: Plan
    frontend: str
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] | None = None
    memory: BaseMemory = "memory"
    joined: Joined = ()
    loads: bool = False
    written: Collection[str] = ()

    @classmethod
    def of(
        cls,
        model: nn.Module,
        plan: Plan,
        frontend: str,
        inputs: tuple[Sequence[object], Mapping[str, object] | None],
        base_memory: object,
        undo: Undo,
        checkpoint: Checkpoint | None = None,
        loads: bool = False,
    ) -> Self:
        """Prepare the layers and ties of a model, which must have passed `check_new`.

        Raises:
            SpecError: `base_memory` is unknown, or is `pinned` on a machine without an accelerator.
        """
        memory: BaseMemory | None = next((name for name in get_args(BaseMemory) if name == base_memory), None)
        if memory is None:
            raise SpecError(f"base_memory is {base_memory!r}. Give 'memory', 'pinned' or 'device'")
        if memory == "pinned" and not torch.accelerator.is_available():
            raise SpecError(
                "base_memory='pinned' needs an accelerator, and this machine has none. Pinned memory only makes copies "
                "to an accelerator faster: give base_memory='memory'"
            )
        wrap_layers(model, undo)
        if not loads:
            weights = named_weights(model)
            check_patterns(plan.spec, weights.matrices, weights.names)
        joined = settle_ties(model, plan.spec.untie, undo, strict=not loads)
        written = checkpoint.written if checkpoint is not None else ()
        return cls(model, plan, frontend, *inputs, memory, joined, loads, written)

    def cascade(self, undo: Undo) -> Cascade:
        """Capture a graph for the example inputs, start the run, and return the cascade."""
        model, plan, weights = self.model, self.plan, named_weights(self.model)
        no_inputs = self.loads and not self.args and self.kwargs is None
        bound = None if no_inputs else bind_inputs(model, self.args, self.kwargs if self.kwargs is not None else {})
        compiler = Compiler(self.frontend, Calls(signature_of(model), one_key=isinstance(model, fx.GraphModule)))
        # Freeze the model, except the parameters that are trained in full.
        trained = _trained(plan, weights)
        _check_memory(model, plan, trained, weights)
        flags = Flags.of(model)
        undo(partial(flags.restore, model))
        for name, parameter in weights.parameters.items():
            parameter.requires_grad_(name in trained)
        # Capture, and decide which weights become sites.
        decided: Decided
        if bound is None:
            decided, example = compiler.decide(model, plan), None
        else:
            start = time.monotonic()
            with PROCESS:
                decided = new = compiler.make(model, Decided(plan, {}, (), ()), *bound)
            sites, seconds = len(new.plan.sites), time.monotonic() - start
            log.info("adapted: variant 1 by %s, %d sites, in %.2f s", new.variant.frontend.name, sites, seconds)
            example = (tuple(self.args), dict(self.kwargs or {}))
        # Start the run.
        written = partial(written_by, model, frozenset(self.written).intersection(weights.parameters))
        run = Run(model, decided, self.frontend, memory=self.memory, written=written)
        graphs = Graphs(run, compiler, decided, example)
        cascade = cascade_class(model, compiler.calls.signature)(run, graphs, flags, self.joined)
        watch_model(cascade, undo)
        run.begin(trained, undo, self.loads)
        for parameter in weights.parameters.values():
            undo(partial(_ADAPTED.pop, parameter, None))
            _ADAPTED[parameter] = ref(cascade)
        return cascade


def check_loaded(cascade: Cascade, path: Path) -> None:
    """Raise CheckpointError if the loaded values or graphs do not agree with the plan, or contain inf or nan."""
    disagreements = run_of(cascade).faults()
    variant = graphs_of(cascade).variants.oldest
    if variant is not None:
        disagreements += graphs_of(cascade).compiler.faults(variant)
    if disagreements:
        raise CheckpointError(
            f"{path}: the checkpoint does not agree with its own plan:\n  " + "\n  ".join(dict.fromkeys(disagreements)),
            code="sites-differ",
        )


def _is_adapted(parameter: nn.Parameter) -> bool:
    """Whether the parameter belongs to a cascade that still exists and was not released."""
    reference = _ADAPTED.get(parameter)
    cascade = reference() if reference is not None else None
    return cascade is not None and not run_of(cascade).released


def _trained(plan: Plan, weights: Weights) -> dict[str, nn.Parameter]:
    """Return the parameters that the spec trains in full, by name. Raise SpecError for a dtype without gradients."""
    trained = {name: weights.parameters[name] for name in trained_by(plan.spec, weights.names)}
    for name, parameter in trained.items():
        if not parameter.is_floating_point() and not parameter.is_complex():
            raise SpecError(
                f"train: {_pattern_of(plan, weights, name)!r} matches {name}, whose dtype {parameter.dtype} has no "
                "gradients. Exclude it.",
                code="not-trainable",
            )
    return trained


def _pattern_of(plan: Plan, weights: Weights, name: str) -> str:
    """Return the pattern of `train` that a parameter matches."""
    return next(pattern for pattern in plan.spec.train if matches(pattern, weights.names[name]))


def _check_memory(model: nn.Module, plan: Plan, trained: Iterable[str], weights: Weights) -> None:
    """Check that no trained or adapted parameter overlaps in memory with another tensor. Ties are allowed."""
    shared = shared_memory(model)
    for name in (weight for weight in trained if weight in shared):
        raise SpecError(
            f"train: {_pattern_of(plan, weights, name)!r} matches {name}, which {shared[name]}. Leave it out, or give "
            "it separate memory (parameter.data = parameter.data.clone()).",
            code="not-trainable",
        )
    for name in (weight for weight in plan.by_weight if weight in shared):
        raise PassError(
            f"{name} is a site of the plan, but {shared[name]}. Give it separate memory "
            "(parameter.data = parameter.data.clone()).",
            code="not-trainable",
        )


def check_new(model: nn.Module, in_bank: bool = False) -> None:
    """Raise an error if a model cannot be adapted, because it is adapted, sharded, offloaded or has no values.

    With `in_bank` it may be in use by a bank.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise CaptureError(
                f"{name} has no shape yet, because its module is lazy. Call the model once before adapt.",
                code="meta-model",
            )
        if tensor.is_meta:
            raise CaptureError(
                f"{name} is on the meta device and has no values. Load the weights of the model before adapt. If "
                "accelerate has offloaded them, remove 'cpu' and 'disk' from device_map, or keep the full model on the "
                "host with device_map={'': 'cpu'}.",
                code="meta-model",
            )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "to_local") or hasattr(parameter, "ds_id"):
            raise StateError(
                f"{name} is already sharded (by FSDP, tensor parallelism or DeepSpeed ZeRO-3). Adapt the unsharded "
                "model first, and then call lorasc_fx.parallel.fsdp.shard on the cascade.",
                code="sharded",
            )
    for name, module in model.named_modules():
        bases = [(base.__module__.partition(".")[0], base.__name__) for base in type(module).__mro__]
        if ("peft", "BaseTunerLayer") in bases:  # without importing peft
            raise StateError(
                f"{name} is a layer of peft ({type(module).__name__}), and its factors would be adapted too. Pass the "
                "base model instead: call peft's merge_and_unload() or unload() (delete_adapter after load_adapter), "
                "or load it again. To continue from the adapter, save it:\n\n"
                "    peft_model.save_pretrained(folder)\n"
                "    cascade = lorasc_fx.from_peft(folder, base_model)",
                code="already-adapted",
            )
    if any(isinstance(module, Cascade) for module in model.modules()):
        raise StateError(
            "This model is a cascade, or contains one. Release it first:\n\n"
            "    model = cascade.release()\n"
            "    cascade = lorasc_fx.adapt(model, ...)",
            code="already-adapted",
        )
    if any(_is_adapted(parameter) or is_served(parameter) for parameter in model.parameters()):
        gc.collect()  # a dropped cascade or bank may be part of a reference cycle
    for name, parameter in model.named_parameters():
        if _is_adapted(parameter):
            raise StateError(
                f"This model is already adapted: its parameter {name} belongs to another cascade. Call release() on "
                "that cascade first.",
                code="already-adapted",
            )
        if is_served(parameter) and not in_bank:
            raise StateError(
                f"A bank uses this model: its parameter {name} is the base of adapters, and a cascade would change it. "
                "Call release() on the bank first, or adapt a copy of the model (copy.deepcopy).",
                code="already-adapted",
            )


def settle_ties(model: nn.Module, patterns: Sequence[str], undo: Undo, strict: bool = False) -> Joined:
    """Tie parameters that are equal views of one memory, and untie the parameters that match a pattern.

    Two parameters with the same memory (`b.weight.data = a.weight.data`) are one weight: it gets one branch, and is
    written once. So both modules get the Parameter object of the first one. With `strict`, raise SpecError for a
    pattern that matches no tied parameter.

    Returns:
        Module, attribute name and original parameter of each place that was tied. `release` restores them.
    """
    by_memory: dict[Memory, nn.Parameter] = {}
    shared: dict[int, nn.Parameter] = {}
    for parameter in model.parameters():
        memory = Memory.of(parameter)
        if memory is not None:
            shared[id(parameter)] = by_memory.setdefault(memory, parameter)
    joined = exchange(model, lambda holder: shared.get(id(holder.value)), undo)
    ties = _ties(model) if patterns else []
    for pattern in patterns if strict else ():
        if not any(matches(pattern, names) for tie in ties for names in tie.places.values()):
            tied = ", ".join("=".join(names[0] for names in tie.places.values()) for tie in ties[:5])
            raise SpecError(
                f"untie: {pattern!r} matches no tied parameter. "
                f"{f'Tied are: {tied}' if ties else 'The model has no tied parameters: leave untie out'}",
                code="unknown-target",
            )
    untied = _untie(model, ties, patterns, undo)
    return tuple(
        (holder.module, holder.leaf, holder.value)
        for holder in joined
        if isinstance(holder.value, nn.Parameter) and holder.store is holder.module._parameters
        if (id(holder.module), holder.leaf) not in untied
    )


def _untie(model: nn.Module, ties: Sequence[_Tie], patterns: Sequence[str], undo: Undo) -> set[_Place]:
    """Give each place that matches a pattern a separate copy of the parameter. Return the places that changed.

    Places that match no pattern stay tied to each other. The first place of a tie always keeps the original object.
    """
    new: dict[_Place, nn.Parameter] = {}
    for tie in ties:
        shared = tie.parameter
        untie = [key for key, names in tie.places.items() if any(matches(pattern, names) for pattern in patterns)]
        tied = [key for key in tie.places if key not in untie]
        for group in [tied, *([key] for key in untie)]:
            if next(iter(tie.places)) not in group:  # the group with the first place keeps the object
                untied = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
                new |= dict.fromkeys(group, untied)
    exchange(model, lambda holder: new.get((id(holder.module), holder.leaf)), undo)
    return set(new)


_Place = tuple[int, str]
"""Id of a module, and the attribute name of its parameter."""


@dataclass(frozen=True)
class _Tie:
    """A parameter with several places in a model."""

    parameter: nn.Parameter
    places: dict[_Place, tuple[str, ...]]  # the full names of each place: several if its module is registered twice


def _ties(model: nn.Module) -> list[_Tie]:
    """Return the parameters that have several places."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    ties: dict[int, _Tie] = {}
    for holder in holders(model):
        if isinstance(holder.value, nn.Parameter) and holder.store is holder.module._parameters:
            names = tuple(f"{path}.{holder.leaf}".lstrip(".") for path in paths[id(holder.module)])
            tie = ties.setdefault(id(holder.value), _Tie(holder.value, {}))
            tie.places[id(holder.module), holder.leaf] = names
    return [tie for tie in ties.values() if len(tie.places) > 1]


@dataclass
class _Served:
    """The banks that use a parameter, and its requires_grad flag before the first of them."""

    flag: bool
    banks: WeakSet[object] = field(default_factory=WeakSet)


_SERVED: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The `_Served` of each parameter in a bank."""


def serve(parameters: Iterable[nn.Parameter], bank: object) -> None:
    """Register a bank that uses these parameters, and disable their gradients."""
    for parameter in parameters:
        served = _SERVED.setdefault(parameter, _Served(parameter.requires_grad))
        served.flag |= parameter.requires_grad  # it may have been set since a bank was dropped without `release`
        served.banks.add(bank)
        parameter.requires_grad_(False)


def stop_serving(parameters: Iterable[nn.Parameter], bank: object) -> None:
    """Remove a bank. The flags of parameters that no other bank uses are restored. A second call has no effect."""
    for parameter in parameters:
        served = _SERVED.get(parameter)
        if served is None or bank not in served.banks:
            continue
        served.banks.discard(bank)
        if not served.banks:
            del _SERVED[parameter]
            parameter.requires_grad_(served.flag)


def is_served(parameter: nn.Parameter) -> bool:
    """Whether a bank that still exists and was not released uses the parameter."""
    served = _SERVED.get(parameter)
    return served is not None and bool(served.banks)
