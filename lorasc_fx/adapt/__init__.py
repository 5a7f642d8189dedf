"""Adapt a model, or load a run: wires models, compiler and cascade together."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from torch import fx, nn
from torch.utils.weak import WeakIdKeyDictionary

from lorasc_fx.adapt.untie import settle_ties
from lorasc_fx.branch import Decided
from lorasc_fx.capture import (
    FRONTENDS,
    Calls,
    check_binds,
    first_checksums,
    is_on_meta,
    open_model,
    signature_of,
    written_by,
)
from lorasc_fx.cascade import Flags
from lorasc_fx.cascade.dropped import Joined
from lorasc_fx.cascade.run import Run
from lorasc_fx.cascade.run_base import MetaModel
from lorasc_fx.checkpoint.base_file import BaseFile, open_base
from lorasc_fx.checkpoint.base_model import BaseModel
from lorasc_fx.checkpoint.deferred import check_attributes, groups_of
from lorasc_fx.checkpoint.layout import MANIFEST, way_back
from lorasc_fx.checkpoint.reader import Checkpoint, check_base, check_plan, read
from lorasc_fx.compile import Compiler
from lorasc_fx.errors import CaptureError, CheckpointError, PassError, SpecError, StateError, named, warn
from lorasc_fx.facade import Cascade, cascade_class
from lorasc_fx.graph import (
    check_patterns,
    forms_missing,
    matches,
    named_weights,
    rules_of,
    shared_memory,
    trained_by,
)
from lorasc_fx.peft.spec import spec_of
from lorasc_fx.plan import Plan, Reason
from lorasc_fx.quantized import LIBRARIES, is_quantized, place_layers
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.util.finalizers import run_postponed
from lorasc_fx.util.undo import PROCESS, AllOrNothing, Undo

__all__ = ["adapt", "load"]

log = logging.getLogger("lorasc_fx")

_ADAPTED: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Parameters that a living cascade has adapted, with a weak reference to it."""


def adapt(
    model: nn.Module | torch.export.ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    spec: CascadeSpec | Any = None,
    frontend: str = "auto",
    base: str | PathLike[str] = "memory",
) -> Cascade:
    """Adapt a model by cascaded low-rank branches, without touching its source.

    Args:
        model: an nn.Module, a GraphModule or an ExportedProgram. One on the meta device is
            adapted without memory, and gets its numbers by `materialize`; until then the cascade only shows its plan.
        args, kwargs: example inputs; their sizes do not matter, their types do. The model runs a few times on them,
            leaving no trace, to see what it does and that its graph does the same.
        spec: what is asked, see `CascadeSpec`; or a `peft.LoraConfig`, where the rest is as in `CascadeSpec()`.
        frontend: `export`, `dynamo`, `symbolic`, `graph-breaks`, or `auto`, the first that takes the model.
        base: what keeps W0 of the sites: `memory`, a copy on the host, which of weights that lie there is made before
            something is first written to them (noise, the end of a stage, `weights`); the path of a safetensors file,
            or of a folder with `model.safetensors` or its shards, which is mapped and not read; or `file`, the folder
            that a model of transformers was loaded from. These files have to hold the model's numbers, and to stay as
            they are.

    Returns:
        The cascade. The model's parameters now hold the start of stage 1 (with noise, if asked for) and need no
        gradient, but for those under `spec.train`; `cascade.release()` gives the model back.

    Raises:
        UnknownTarget: a pattern of the spec matches nothing.
        SpecError: the spec leaves no site at all, is no CascadeSpec, or unties what is not tied; or base is `file` and
            the model names no folder.
        CheckpointError: base is a path, and a site is not there as the model has it; names both. Nothing was changed.
        StateError: the model is adapted already.
        CaptureError: the model refuses the inputs, or no front end takes the model.
    """
    if (from_peft := getattr(spec, "peft_type", None) == "LORA") or spec is None:
        plan = Plan(CascadeSpec())
    elif isinstance(spec, CascadeSpec):
        plan = Plan(spec)
    else:
        raise SpecError(f"spec is {type(spec).__name__}; give a lorasc_fx.CascadeSpec, or a peft.LoraConfig")
    opened = open_model(model)
    if from_peft:
        plan = Plan(spec_of(spec, opened))
    _check_new(opened, on_meta=True)
    meta = MetaModel(base, groups_of(opened)) if is_on_meta(opened) else None
    if meta is not None:
        check_attributes(opened)
    with torch.inference_mode(False), AllOrNothing() as undo:
        place_layers(opened, undo)
        weights = named_weights(opened)
        check_patterns(plan.spec, weights.matrices, weights.names)
        source = open_base(base, opened) if meta is None else None
        joined = settle_ties(opened, plan.spec.untie, undo, strict=True)
        cascade = _adapt(opened, args, kwargs, plan, frontend, source, undo, meta=meta, joined=joined)
        _tell_of_wide_branches(cascade.plan)
        _warn_of_frozen_sites(cascade)
        _warn_of_quantized_weights(cascade)
        return cascade


def load(
    folder: str | PathLike[str] | Checkpoint,
    model: nn.Module | torch.export.ExportedProgram | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    base: str | PathLike[str] = "memory",
) -> Cascade:
    """Adapt a base model as the newest checkpoint in a folder has it, and go on with the same numbers.

    `cascade.resume(optimizer, scheduler)` then gives these two and the random generators their state. It does not
    matter how many ranks wrote the checkpoint: each rank that loads it has the whole cascade, to be wrapped or sharded
    as one from `adapt`.

    Without args and kwargs nothing is captured: the checkpoint says which weights have branches, and the first call
    makes the graph, or raises what `adapt` would raise for it. All that needs no graph (resume, weights, save, release)
    works before that call. On several processes give inputs.

    Args:
        folder: that `lorasc_fx.save` or `Cascade.save_pretrained` wrote to, or what was read from it. For the folder
            of a run of `lorasc-fx train` there is `lorasc_fx.cli.load`.
        model, args, kwargs, base: as for `adapt`; the model holds the weights that were adapted, or is on the meta
            device and gets them by `materialize`, which then takes the checkpoint's state. What is trained in full may
            hold other values, such as a new head: it gets those of the checkpoint. Without a model, the base
            that `save_pretrained` has named is built, in eval mode. Only local files are read for it, unless
            HF_HUB_OFFLINE is 0 in the environment.

    Raises:
        CheckpointError: nothing to load, damage, or another base; the model is as it was. Without a model: the folder
            names no base, or that cannot be built here.
        SpecError: base is `file`, and the model names no folder.
        MissingExtra: the library of the base is not installed.
    """
    checkpoint = folder if isinstance(folder, Checkpoint) else read(folder)
    if checkpoint.frontend not in ("auto", *FRONTENDS):
        known = ", ".join(("auto", *FRONTENDS))
        raise CheckpointError(
            f"{checkpoint.path}: was made by the front end {checkpoint.frontend!r:.40}; known: {known}",
            code="unknown-name",
        )
    if model is None:
        model = _named_base(checkpoint)
    opened = open_model(model)
    _check_new(opened, on_meta=True)
    meta = MetaModel(base, groups_of(opened), checkpoint) if is_on_meta(opened) else None
    if meta is not None:
        check_attributes(opened)
    with torch.inference_mode(False), AllOrNothing() as undo:
        place_layers(opened, undo)
        source = open_base(base, opened) if meta is None else None
        joined = settle_ties(opened, checkpoint.plan.spec.untie, undo)
        weights = named_weights(opened)
        check_base(checkpoint, weights.parameters)
        check_plan(checkpoint, weights.matrices, weights.parameters)
        _check_forms(checkpoint)
        try:
            options: Any = {"empty": True, "joined": joined, "moved": checkpoint.moved, "meta": meta}
            cascade = _adapt(opened, args, kwargs, checkpoint.plan, checkpoint.frontend, source, undo, **options)
        except (PassError, SpecError) as fault:
            raise CheckpointError(
                f"{checkpoint.path}: its plan does not fit this model: {fault}", code="sites-differ"
            ) from fault
        if meta is None:
            cascade._take_over(checkpoint, undo)
            _check_loaded(cascade, checkpoint.path)
        return cascade


def _named_base(checkpoint: Checkpoint) -> nn.Module:
    """Build the base that a checkpoint names."""
    where = str(checkpoint.path)
    if "model" not in checkpoint.manifest:
        raise CheckpointError(
            f"{where}: names no base; give the model: lorasc_fx.load(folder, model). Folders of "
            "cascade.save_pretrained name theirs; a run of lorasc-fx train is read by lorasc_fx.cli.load",
            code="no-base",
        )
    try:
        named = BaseModel.from_dict(checkpoint.manifest["model"])
    except ValueError as fault:
        raise CheckpointError(f"{checkpoint.path / MANIFEST}: {fault}; {way_back(checkpoint.path)}") from fault
    beside = sum(value.numel() for key, value in checkpoint.tensors.items() if key.startswith("base/"))
    model = named.build(where, len(checkpoint.manifest["base"]), beside)
    parameters = dict(model.named_parameters())
    for key, value in checkpoint.tensors.items():
        parameter = parameters.get(key.removeprefix("base/")) if key.startswith("base/") else None
        if parameter is not None and parameter.shape == value.shape and parameter.dtype == value.dtype:
            parameter.data.copy_(value)  # of another shape or name: check_base says that the base differs
    return model


def _check_forms(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose sites were found through forms that are not registered here."""
    sites = {site.form: site.weight for site in reversed(checkpoint.plan.sites)}
    for form, hint in forms_missing(sites).items():
        raise CheckpointError(
            f"{checkpoint.path}: {sites[form]} was adapted through the form {form!r}, which is not registered "
            f"here{hint}; call lorasc_fx.graph.register_form with it before load",
            code="form-not-registered",
        )


def _adapt(
    opened: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    plan: Plan,
    frontend: str,
    source: BaseFile | None,
    undo: Undo,
    empty: bool = False,
    moved: Collection[str] = (),
    meta: MetaModel | None = None,
    into: Cascade | None = None,
    joined: Joined = (),
) -> Cascade:
    """Adapt by a plan: an empty one that has only a spec, or one that was saved, whose numbers are still to come.

    With `into` that cascade begins anew. An `empty` one without inputs is captured by its first call; until then
    `moved` are the parameters that forward writes.
    """
    weights = named_weights(opened)
    waits = empty and not args and kwargs is None
    bound = check_binds(opened, args, kwargs if kwargs is not None else {}) if not waits else ((), {})
    compiler = Compiler(frontend, Calls(signature_of(opened), alike=isinstance(opened, fx.GraphModule)))
    flags = Flags.of(opened)
    trained = _trained(plan.spec, weights.parameters, weights.names)
    _check_memory(opened, plan, trained, weights.names)
    undo(partial(flags.restore, opened))
    for name, parameter in weights.parameters.items():
        parameter.requires_grad_(name in trained)
    decided: Decided
    summed: Mapping[str, int] = {}
    if waits:
        decided = compiler.decide(opened, plan)
    else:
        begun = time.monotonic()
        with PROCESS, first_checksums(opened) as summed:
            decided = made = compiler.make(opened, plan, {}, (), *bound, wide=False)
        sites, seconds = len(made.plan.sites), time.monotonic() - begun
        log.info("adapted: variant 1 by %s, %d sites, in %.2f s", made.variant.frontend, sites, seconds)
    example = (tuple(args), dict(kwargs or {})) if not waits else None
    written = partial(written_by, opened, frozenset(moved).intersection(weights.parameters))
    run = Run(opened, decided, frontend, base_file=source, meta=meta, written=written)
    if into is None:
        kind = cascade_class(opened, compiler.calls.signature)
        cascade = kind(run, compiler, decided, example, flags, joined)
    else:
        undo(into._guard.arm)
        into._guard.disarm()  # of the run without numbers
        Cascade.__init__(cascade := into, run, compiler, decided, example, flags, joined)
    undo(cascade._usage.disarm)
    cascade._usage.arm(run, cascade)
    undo(cascade._guard.disarm)
    cascade._guard.arm()
    run.start(trained, undo, rules_of(plan.spec, trained, weights.names), empty, summed)
    undo(partial(_forget, weights.parameters.values()))
    for parameter in weights.parameters.values():
        _ADAPTED[parameter] = ref(cascade)
    return cascade


def _is_adapted(parameter: nn.Parameter) -> bool:
    """Whether a living cascade has adapted the model of a parameter."""
    found = _ADAPTED.get(parameter)
    cascade = found() if found is not None else None
    return cascade is not None and not cascade._run.released


def _forget(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        _ADAPTED.pop(parameter, None)


def _check_loaded(cascade: Cascade, path: Path) -> None:
    """Check the graphs against their plan, with the values that were loaded.

    Raises:
        CheckpointError: they do not agree, or values are not finite.
    """
    disagreements = cascade._run.faults()
    variant = cascade._graphs.variants.oldest
    if variant is not None:
        disagreements += cascade._graphs.compiler.faults(variant)
    if disagreements:
        raise CheckpointError(
            f"{path}: what it holds does not agree with its plan:\n  " + "\n  ".join(dict.fromkeys(disagreements)),
            code="sites-differ",
        )


def _tell_of_wide_branches(plan: Plan) -> None:
    """Log ranks that no matrix of such a shape can have."""
    wide = [
        (site, most)
        for site in plan.sites
        if max((site.rank, *site.options.ranks)) > (most := min(*site.matrix_shape, *site.slices))
    ]
    if wide:
        site, most = wide[0]
        log.info(
            "rank %d is more than %s can have: a matrix of %s has a rank of %d at most. The branch computes what a "
            "smaller one would, at more cost; give such weights a rank of their own (rules=...)",
            max((site.rank, *site.options.ranks)),
            named([site.weight for site, _ in wide], 1),
            tuple(site.matrix_shape),
            most,
        )


def _warn_of_frozen_sites(cascade: Cascade) -> None:
    """Warn of sites that the model's author had frozen, where they are fewer than half of all sites, in number and in
    entries; a weight that a target names in full is meant.

    Where most sites were frozen, the user froze a backbone to adapt it.
    """
    trainable, sites = cascade._guard.flags.requires_grad, cascade.sites
    frozen = [site for site in sites if not trainable.get(site.weight, True)]
    few = 2 * len(frozen) < len(sites)
    few = few and 2 * sum(math.prod(site.shape) for site in frozen) < sum(math.prod(site.shape) for site in sites)
    names = [site.weight for site in frozen if site.weight not in cascade.plan.spec.targets]
    if few and names:
        warn(
            f"{named(names)}: requires_grad was False while that of most weights was True, and now a branch trains "
            "what may be a constant. To leave it as it is give "
            f"exclude=({', '.join(map(repr, names[:3]))},{' ...' if len(names) > 3 else ''}); to adapt it, name it in "
            "targets",
            "constant-adapted",
        )


def _warn_of_quantized_weights(cascade: Cascade) -> None:
    """Warn of quantized weights that are no sites, though the spec would have them: of layers of a library that is not
    known here, and those that are used in another way than in a product.
    """
    spec, parameters = cascade.plan.spec, dict(cascade.model.named_parameters())
    complex_ones = {name for name, value in parameters.items() if value.is_complex()}
    refused = {
        refusal.weight: refusal
        for refusal in cascade.refusals
        if refusal.reason in (Reason.QUANTIZED, Reason.NOT_FLOATING) and refusal.weight not in complex_ones
    }
    left = list(refused) + [name for name in cascade.unreached if is_quantized(parameters[name])]
    packed = {
        name: buffer
        for name, buffer in cascade.model.named_buffers()
        if "weight" in name.rpartition(".")[2] and buffer.dim() > 1
        if not buffer.is_complex() and not (buffer.is_floating_point() and buffer.dtype.itemsize > 1)
    }
    left += [name for name in packed if not any(matches(pattern, (name,)) for pattern in spec.exclude)]
    if left:
        owner = cascade.model.get_submodule(left[0].rpartition(".")[0])
        kinds = ", ".join(sorted({name.rpartition(".")[2] for name in LIBRARIES}))
        why = refused[left[0]].sentence if left[0] in refused else "no form of its layer is known"
        warn(
            f"{named(left)}: quantized, and without branches; the first is of {type(owner).__name__}: {why}. Quantized "
            f"weights are adapted where torchao has quantized the weight of a linear layer, and in layers of the "
            f"classes {kinds}; exclude these to leave them as they are",
            "quantized-left-out",
        )


def _trained(
    spec: CascadeSpec, parameters: Mapping[str, nn.Parameter], names: Mapping[str, tuple[str, ...]]
) -> dict[str, nn.Parameter]:
    """Return the parameters that the spec trains in full.

    Raises:
        SpecError: one of them holds numbers that cannot be trained.
    """
    trained = {name: parameters[name] for name in trained_by(spec, names) if name in parameters}
    for name, parameter in trained.items():
        if not parameter.is_floating_point() and not parameter.is_complex():
            pattern = next(pattern for pattern in spec.train if matches(pattern, names[name]))
            raise SpecError(
                f"train: {pattern!r} means {name}, which holds {parameter.dtype} and has no gradient; exclude it",
                code="not-trainable",
            )
    return trained


def _check_memory(model: nn.Module, plan: Plan, trained: Iterable[str], names: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse to write to a parameter whose memory is that of others too, as a part or in another order.

    Raises:
        SpecError: the spec trains it in full. PassError: the plan, which was saved, has it as a site.
    """
    shared = shared_memory(model)
    for name in (weight for weight in trained if weight in shared):
        pattern = next(pattern for pattern in plan.spec.train if matches(pattern, names[name]))
        raise SpecError(
            f"train: {pattern!r} means {name}, which {shared[name]}; exclude it, or give it memory of its own "
            "(parameter.data = parameter.data.clone())",
            code="not-trainable",
        )
    for name in (weight for weight in plan.by_weight if weight in shared):
        raise PassError(
            f"{name} is a site of the plan, and {shared[name]}; give it memory of its own", code="not-trainable"
        )


def _is_offloaded(module: nn.Module) -> bool:
    """Whether a hook of accelerate keeps the module's own weights on the meta device between calls."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(each, "offload", False) is True for each in (hook, *getattr(hook, "hooks", ())))


def _check_new(model: nn.Module, on_meta: bool = False) -> None:
    run_postponed()  # an earlier cascade of the model may have been dropped inside a trace
    if offloaded := [name for name, module in model.named_modules() if _is_offloaded(module)]:
        raise CaptureError(
            f"accelerate offloads the weights of {named(offloaded)} to the host or to disk, and puts them on the "
            "device for a call only: a branch cannot train beside them. Load the model without offloading: leave "
            "'cpu' and 'disk' out of device_map, or put the whole model on the host with device_map={'': 'cpu'}",
            code="meta-model",
        )
    for name, held in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(held):
            raise CaptureError(
                f"{name} has no shape yet (a lazy module): call the model once on the inputs, and adapt it then",
                code="meta-model",
            )
    for name, parameter in model.named_parameters():
        if parameter.is_meta and not on_meta:
            raise CaptureError(
                f"{name} is on the meta device, without numbers: give the model its weights first", code="meta-model"
            )
        if hasattr(parameter, "to_local") or hasattr(parameter, "ds_id"):
            raise StateError(
                f"{name} is cut over processes already (FSDP, tensor parallelism, DeepSpeed's ZeRO-3): adapt the whole "
                "model, perhaps on the meta device, and then cut the cascade by lorasc_fx.parallel.fsdp.shard",
                code="sharded",
            )
        if parameter.is_inference():
            raise CaptureError(
                f"{name} was made in torch.inference_mode, and nothing can train it: make it outside",
                code="not-trainable",
            )
    for name, module in model.named_modules():
        bases = [(base.__module__.partition(".")[0], base.__name__) for base in type(module).__mro__]
        if ("peft", "BaseTunerLayer") in bases:  # without importing peft
            raise StateError(
                f"{name} is a layer of peft ({type(module).__name__}), whose own lora_A and lora_B would be adapted. "
                "Give the base model: after peft's merge_and_unload() or unload() (delete_adapter for an adapter of "
                "load_adapter), or a fresh one. To go on from the adapter, save it by save_pretrained and call "
                "lorasc_fx.from_peft(folder, base_model)",
                code="already-adapted",
            )
    if any(isinstance(module, Cascade) for module in model.modules()):
        raise StateError(
            "this model is a cascade, or holds one: call release() on it, and adapt the model that it returns",
            code="already-adapted",
        )
    if any(_is_adapted(parameter) for parameter in model.parameters()):
        gc.collect()  # a cascade that was dropped may be a part of a reference cycle
    for name, parameter in model.named_parameters():
        if _is_adapted(parameter):
            raise StateError(
                f"this model is adapted already (its {name} belongs to a living cascade): "
                "call release() on that one first",
                code="already-adapted",
            )
