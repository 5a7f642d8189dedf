"""Start a cascade. These steps are common to `adapt`, `load`, `merge` and `materialize`."""

from __future__ import annotations

import gc
import json
import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Self
from weakref import WeakSet, ref

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from lorasc_fx.branch import Decided
from lorasc_fx.cascade import Flags, Graphs, graphs_of, replace_run, run_of, watch_model
from lorasc_fx.cascade.guards import Joined
from lorasc_fx.cascade.run import Run
from lorasc_fx.cascade.run_base import MetaModel
from lorasc_fx.check.isolation import device_of, is_on_meta, written_by
from lorasc_fx.checkpoint.base import (
    MEMORIES,
    BaseFile,
    DeferredValues,
    check_attributes,
    groups_of,
    open_base,
    with_values,
)
from lorasc_fx.checkpoint.reader import Checkpoint, check_base
from lorasc_fx.checkpoint.saved import load_into
from lorasc_fx.compile import Compiler
from lorasc_fx.errors import CaptureError, CheckpointError, PassError, SpecError, StateError, named, path_of
from lorasc_fx.facade import Cascade, cascade_class
from lorasc_fx.graph import matches, named_weights, shared_memory, trained_by
from lorasc_fx.graph.patterns import check_patterns, rules_of
from lorasc_fx.graph.weights import Memory, Weights
from lorasc_fx.parameters import exchange, holders
from lorasc_fx.plan import Plan
from lorasc_fx.quantized import wrap_layers
from lorasc_fx.shards import local_like
from lorasc_fx.signature import Calls, bind_inputs, signature_of
from lorasc_fx.state import BaseMemory
from lorasc_fx.util.undo import PROCESS, AllOrNothing, Undo

log = logging.getLogger("lorasc_fx")

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
        source: the file that stores W0, or None to store it in memory.
        memory: kind of memory for W0, if there is no file.
        joined: the places whose parameters were tied, see `settle_ties`.
        loads: whether values of a checkpoint or of a sum are loaded afterwards. Inputs may then be left out, and the
            first call captures the graph.
        written: names of the parameters that forward writes into, from a checkpoint. They are used until a capture
            finds these parameters.
        meta: state of a model on the meta device that `materialize` needs.
    """

    model: nn.Module
    plan: Plan
    frontend: str
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] | None = None
    source: BaseFile | None = None
    memory: BaseMemory = "memory"
    joined: Joined = ()
    loads: bool = False
    written: Collection[str] = ()
    meta: MetaModel | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        plan: Plan,
        frontend: str,
        inputs: tuple[Sequence[object], Mapping[str, object] | None],
        base: str | PathLike[str],
        undo: Undo,
        checkpoint: Checkpoint | None = None,
        loads: bool = False,
    ) -> Self:
        """Prepare the layers, ties and W0 of a model, which must have passed `check_new`.

        Args:
            model, plan, frontend, loads: see `Setup`.
            inputs: args and kwargs.
            base: the argument of `adapt`.
            checkpoint: the checkpoint to load, if any.
        """
        meta = MetaModel(base, groups_of(model), checkpoint) if is_on_meta(model) else None
        if meta is not None:
            check_attributes(model)
        wrap_layers(model, undo)
        if not loads:
            weights = named_weights(model)
            check_patterns(plan.spec, weights.matrices, weights.names)
        source = open_base(base, model) if meta is None else None
        joined = settle_ties(model, plan.spec.untie, undo, strict=not loads)
        written = checkpoint.written if checkpoint is not None else ()
        memory: BaseMemory = next((name for name in MEMORIES if name == base), "memory")
        return cls(model, plan, frontend, *inputs, source, memory, joined, loads, written, meta)

    def cascade(self, undo: Undo, into: Cascade | None = None) -> Cascade:
        """Capture a graph for the example inputs, start the run, and return the cascade.

        Args:
            into: a cascade that gets a new run, instead of a new cascade.
        """
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
        run = Run(
            model,
            decided,
            self.frontend,
            base_file=self.source,
            memory=self.memory,
            meta=self.meta,
            written=written,
        )
        graphs = Graphs(run, compiler, decided, example)
        if into is None:
            cascade = cascade_class(model, compiler.calls.signature)(run, graphs, flags, self.joined)
        else:
            replace_run(cascade := into, run, graphs, undo)
        watch_model(cascade, undo)
        run.begin(trained, undo, rules_of(plan.spec, trained, weights.names), self.loads)
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
    """Return the parameters that the spec trains in full, by name.

    Raises:
        SpecError: a parameter has a dtype without gradients.
    """
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
    """Check that no trained or adapted parameter overlaps in memory with another tensor. Tied parameters are allowed.

    Raises:
        SpecError: the spec trains such a parameter in full.
        PassError: such a parameter is a site of a saved plan.
    """
    shared = shared_memory(model)
    for name in (weight for weight in trained if weight in shared):
        raise SpecError(
            f"train: {_pattern_of(plan, weights, name)!r} matches {name}, which {shared[name]}. Exclude it, or give it "
            "separate memory (parameter.data = parameter.data.clone()).",
            code="not-trainable",
        )
    for name in (weight for weight in plan.by_weight if weight in shared):
        raise PassError(
            f"{name} is a site of the plan, but {shared[name]}. Give it separate memory "
            "(parameter.data = parameter.data.clone()).",
            code="not-trainable",
        )


def check_new(model: nn.Module, on_meta: bool = False, in_bank: bool = False) -> None:
    """Check that a model can be adapted: it must not be adapted, sharded, offloaded, or without values.

    Args:
        on_meta: whether it may be on the meta device.
        in_bank: whether it may be in use by a bank.

    Raises:
        CaptureError: a tensor has no values, or cannot be trained.
        StateError: the model is sharded, is a cascade, is already adapted, or is in use by a bank.
    """
    # accelerate's offload hooks keep the weights of a module on the meta device between calls.
    hooks = {name: getattr(module, "_hf_hook", None) for name, module in model.named_modules()}
    offloaded = [
        name
        for name, hook in hooks.items()
        if any(getattr(part, "offload", False) is True for part in (hook, *getattr(hook, "hooks", ())))
    ]
    if offloaded:
        raise CaptureError(
            f"accelerate has offloaded the weights of {named(offloaded)} to the host or to disk, and loads them only "
            "during a call, so they cannot be adapted. Load the model without offloading: remove 'cpu' and 'disk' from "
            "device_map, or keep the full model on the host with device_map={'': 'cpu'}.",
            code="meta-model",
        )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise CaptureError(
                f"{name} has no shape yet, because its module is lazy. Call the model once before adapt.",
                code="meta-model",
            )
    for name, parameter in model.named_parameters():
        if parameter.is_meta and not on_meta:
            raise CaptureError(
                f"{name} is on the meta device and has no values. Load the weights of the model first.",
                code="meta-model",
            )
        if hasattr(parameter, "to_local") or hasattr(parameter, "ds_id"):
            raise StateError(
                f"{name} is already sharded (by FSDP, tensor parallelism or DeepSpeed ZeRO-3). Adapt the unsharded "
                "model, which may be on the meta device, and then call lorasc_fx.parallel.fsdp.shard on the cascade.",
                code="sharded",
            )
        if parameter.is_inference():
            raise CaptureError(
                f"{name} was created in torch.inference_mode, so it cannot be trained. Create the model outside of it.",
                code="not-trainable",
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
    written once. So both modules get the Parameter object of the first one.

    Args:
        model: the model to change.
        patterns: patterns of the places to untie.
        strict: whether each pattern must match a tied parameter.

    Returns:
        Module, attribute name and original parameter of each place that was tied. `release` restores them.

    Raises:
        SpecError: a pattern matches no tied parameter, and `strict` is set.
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

    Places that match no pattern stay tied to each other. The first place keeps the original object.
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


def materialize(
    cascade: Cascade,
    files: str | PathLike[str],
    *,
    device: torch.device | str | None = None,
    buffers: Mapping[str, torch.Tensor] | None = None,
) -> Cascade:
    """Load the values of a model that was adapted on the meta device, one tensor at a time.

    Afterwards the model runs on the example inputs. Branches, noise and placements are the same as if the values had
    been loaded before `adapt`. Values are cast to the model's dtypes. A cascade from `lorasc_fx.load` continues from
    its checkpoint. After an error, the cascade is unchanged.

    If `parallel.fsdp.shard` has sharded the cascade, every rank must call this function, and gets its local shards. A
    rank reads its part of each tensor. For fingerprints, it also reads some of the full tensors, block by block. The
    model does not run, because its graph was captured from shapes.

    Args:
        cascade: the cascade of a model with parameters on the meta device.
        files: a safetensors file, or a folder with `model.safetensors`, or with its shards and their index. They must
            contain all parameters and persistent buffers of the model, and nothing else. Tied parameters are stored
            under one of their names. All names may have an additional prefix, or lack a common one.
        device: device of the model. The default is the device of the example inputs, or of the shards. The inputs are
            moved to it. Inputs on the meta device are replaced by ones.
        buffers: values of buffers that the files do not contain, such as tables of rotary positions, by name.

    Returns:
        The cascade itself.

    Raises:
        CheckpointError: the files lack a tensor, contain an unknown one or a wrong shape, or cannot be read; a site has
            another dtype in them, with `base="file"` in `adapt`; or they are not the base of the checkpoint.
        SpecError: `device` is unknown or is not the device of the shards, or `buffers` has a wrong name or shape.
        CaptureError: the model raises on the example inputs, or its graph computes something else than the model.
        StateError: the model already has values; or another rank has failed, or reads different files.
    """
    run = run_of(cascade)
    meta = run.meta
    if meta is None:
        raise StateError(
            "materialize: the model already has its values. Use materialize only for a model that was adapted on the "
            "meta device.",
            code="not-available",
        )
    path, model = path_of(files), cascade.model
    args, kwargs = graphs_of(cascade).example or ((), None)
    if run.is_sharded:
        target = torch.device(run.slow.group.device)
        if device is not None and _device(device).type != target.type:
            raise SpecError(f"materialize: device={device!r}, but the shards are on {target}. Leave device out.")
    else:
        target = _device(device) if device is not None else device_of(args, kwargs or {})

    def real(leaf: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(leaf, device=target) if leaf.is_meta else leaf.to(target)

    args, kwargs = pytree.tree_map_only(torch.Tensor, real, (args, kwargs))
    with torch.inference_mode(False), AllOrNothing() as undo:
        if run.is_sharded:
            _into_shards(cascade, path, target, buffers or {}, undo)
        else:
            # Load the values, and start a new run of the cascade, as `adapt` or `load` would have done.
            DeferredValues(model, path, meta.groups, buffers or {}).put(target, undo)
            checkpoint = meta.checkpoint
            source = open_base(path if meta.base == "file" else meta.base, model)
            start = Setup(model, Plan(run.plan.spec), run.frontend, args, kwargs, source, run.memory)
            if checkpoint is not None:
                check_base(checkpoint, named_weights(model).parameters)
                start = replace(start, plan=checkpoint.plan, loads=True, written=checkpoint.written)
            start.cascade(undo, into=cascade)
        if meta.checkpoint is not None:
            load_into(cascade, meta.checkpoint, undo)
            check_loaded(cascade, meta.checkpoint.path)
        graphs_of(cascade).example = (args, kwargs) if kwargs is not None else None
        return cascade


def _into_shards(
    cascade: Cascade, path: Path, device: torch.device, buffers: Mapping[str, torch.Tensor], undo: Undo
) -> None:
    """Load the local shards of this rank, and start the run on them."""
    run, model, meta, group = run_of(cascade), cascade.model, run_of(cascade).meta, run_of(cascade).slow.group
    assert meta is not None
    # Each rank fingerprints some of the full tensors, and all ranks exchange the results.
    with group.agreed("materialize"):
        values = DeferredValues(model, path, meta.groups, buffers)
        names = {id(value): name for name, value in run.parameters_by_name().items()}
        digests = values.fingerprints(names, group.rank, group.size)
    sizes = {f"file {file.name}": f"{file.stat().st_size} bytes" for file in values.files}
    group.check_equal("materialize", sizes)
    fingerprints: dict[str, str] = {}
    for text in group.gather_text(json.dumps(digests), "materialize"):
        fingerprints |= json.loads(text)
    with group.agreed("materialize"):
        if meta.checkpoint is not None:
            check_base(meta.checkpoint, run.parameters_by_name(), fingerprints)
        values.put(device, undo)
        # Initialize the branches: every rank computes the full initial values, and keeps its slice.
        spec, stage = run.plan.spec, run.plan.stage
        new = {}
        for site in run.plan.sites:
            initial = site.options.method.initial_values(site, spec.seed, stage)
            for name, parameter in cascade.branches[site.key].named_parameters(recurse=False):
                new[id(parameter)] = with_values(parameter, local_like(initial[name], parameter), device)
        exchange(cascade.branches, lambda holder: new.get(id(holder.value)), undo)
        source = open_base(path if meta.base == "file" else meta.base, model)
    run.begin_sharded(source, fingerprints, undo, empty=meta.checkpoint is not None)


def _device(requested: torch.device | str) -> torch.device:
    try:
        device = torch.device(requested)
    except (RuntimeError, TypeError) as fault:
        raise SpecError(
            f"materialize: device={requested!r} is not a device of torch. Use for example 'cpu' or 'cuda:0'."
        ) from fault
    if device.type == "meta":
        raise SpecError("materialize: the meta device holds no values. Use for example device='cpu' or 'cuda:0'.")
    return device
