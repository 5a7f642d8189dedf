"""`lorasc_fx.adapt` and `lorasc_fx.load`."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import nn

from lorasc_fx.adapt.start import Start, check_loaded, check_new
from lorasc_fx.capture import FRONTENDS, open_model
from lorasc_fx.checkpoint.reader import Checkpoint, check_base, check_plan, read
from lorasc_fx.errors import CheckpointError, PassError, SpecError, named, warn
from lorasc_fx.facade import Cascade
from lorasc_fx.graph import matches, named_weights
from lorasc_fx.graph.forms import forms_missing
from lorasc_fx.peft.spec import is_config, spec_of
from lorasc_fx.plan import Plan, Reason
from lorasc_fx.quantized import LIBRARIES, quantized_in
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.util.undo import AllOrNothing

__all__ = ["adapt", "load"]

log = logging.getLogger("lorasc_fx")


def adapt(
    model: nn.Module | torch.export.ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    spec: CascadeSpec | Any = None,
    frontend: str = "auto",
    base: str | PathLike[str] = "memory",
) -> Cascade:
    """Adapt a model by cascaded low-rank branches, without changing its source.

    Args:
        model: an nn.Module, a GraphModule or an ExportedProgram. A model on the meta device is adapted without memory.
            Until `materialize` gives it its values, the cascade only shows its plan.
        args, kwargs: example inputs. Their sizes do not matter, their types do. The model runs on them a few times,
            without side effects, so that its graph can be compared with it.
        spec: a `CascadeSpec`, or a configuration of peft (`peft.LoraConfig`, `peft.HiraConfig`, ...) with the defaults
            of `CascadeSpec` for all other options.
        frontend: `export`, `dynamo`, `symbolic`, `graph-breaks`, or `auto`: the first that works.
        base: what keeps W0 of the sites. `memory`: a copy on the host; for a weight on the host it is made before the
            first write (noise, the end of a stage, `weights`). `pinned`: the same in page-locked memory, from which
            copies to an accelerator are faster. `device`: a copy beside the weight, made before the first write; then
            transitions and `weights` copy nothing from the host. A path: a safetensors file, or a folder with
            `model.safetensors` or its shards, which is mapped and not read. `file`: the folder that a model of
            transformers was loaded from. Files have to hold the model's values, and must not change.

    Returns:
        The cascade. The model's parameters hold the start of stage 1 (with noise, if any) and require no gradients,
        except those under `spec.train`. `cascade.release()` restores the model.

    Raises:
        UnknownTarget: a pattern of the spec matches nothing.
        SpecError: the spec leaves no site, is not a CascadeSpec, or unties what is not tied; or base is `file` and the
            model names no folder.
        CheckpointError: base is a path, and a site differs there. The model is left unchanged.
        StateError: the model is adapted already.
        CaptureError: the model raises on the inputs, or no front end works.
    """
    if (from_peft := is_config(spec)) or spec is None:
        plan = Plan(CascadeSpec())
    elif isinstance(spec, CascadeSpec):
        plan = Plan(spec)
    else:
        raise SpecError(
            f"spec is {type(spec).__name__}; give a lorasc_fx.CascadeSpec, or a configuration of peft "
            "such as peft.LoraConfig"
        )
    opened = open_model(model)
    if from_peft:
        plan = Plan(spec_of(spec, opened))
    check_new(opened, on_meta=True)
    with torch.inference_mode(False), AllOrNothing() as undo:
        cascade = Start.of(opened, plan, frontend, (args, kwargs), base, undo).cascade(undo)
        _tell_of_wide_branches(cascade.plan)
        _warn_of_frozen_sites(cascade)
        _warn_of_quantized_weights(cascade)
        return cascade


def load(
    folder: str | PathLike[str] | Checkpoint,
    model: nn.Module | torch.export.ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    base: str | PathLike[str] = "memory",
) -> Cascade:
    """Adapt a base model as in the newest checkpoint of a folder, and continue with the same values.

    `cascade.resume(optimizer, scheduler)` then restores these two and the random generators. The number of ranks that
    wrote the checkpoint does not matter: each rank that loads it has the full cascade, to be wrapped or sharded as one
    from `adapt`.

    Without args and kwargs nothing is captured. The checkpoint says which weights have branches, and the first call
    makes the graph, or raises what `adapt` would raise. What needs no graph (resume, weights, save, release,
    export.peft, export.safetensors) works before that call. On several processes give inputs.

    Args:
        folder: written by `lorasc_fx.save`, or a checkpoint that was read from it. For the folder of a run of
            `lorasc-fx train` there is `lorasc_fx.cli.load`.
        model, args, kwargs, base: as for `adapt`. The model holds the weights that were adapted, or is on the meta
            device and gets them by `materialize`. Parameters that are trained in full, such as a new head, may have
            other values: they get the values of the checkpoint.

    Raises:
        CheckpointError: nothing to load, damage, or another base. The model is left unchanged.
        SpecError: base is `file`, and the model names no folder.
    """
    checkpoint = folder if isinstance(folder, Checkpoint) else read(folder)
    if checkpoint.frontend not in ("auto", *FRONTENDS):
        known = ", ".join(("auto", *FRONTENDS))
        raise CheckpointError(
            f"{checkpoint.path}: was made by the front end {checkpoint.frontend!r:.40}; known: {known}",
            code="unknown-name",
        )
    opened = open_model(model)
    check_new(opened, on_meta=True)
    with torch.inference_mode(False), AllOrNothing() as undo:
        inputs = (args, kwargs)
        start = Start.of(opened, checkpoint.plan, checkpoint.frontend, inputs, base, undo, checkpoint, loads=True)
        weights = named_weights(opened)
        check_base(checkpoint, weights.parameters)
        check_plan(checkpoint, weights.matrices, weights.parameters)
        sites = {site.form: site.weight for site in reversed(checkpoint.plan.sites)}
        for form, hint in forms_missing(sites).items():
            raise CheckpointError(
                f"{checkpoint.path}: {sites[form]} was adapted through the form {form!r}, which is not registered "
                f"here{hint}; call lorasc_fx.graph.register_form with it before load",
                code="unknown-name",
            )
        try:
            cascade = start.cascade(undo)
        except (PassError, SpecError) as fault:
            raise CheckpointError(
                f"{checkpoint.path}: its plan does not fit this model: {fault}", code="sites-differ"
            ) from fault
        if start.meta is None:
            cascade._take_over(checkpoint, undo)
            check_loaded(cascade, checkpoint.path)
        return cascade


def _tell_of_wide_branches(plan: Plan) -> None:
    """Log ranks that are larger than a matrix of the site's shape can have."""
    too_large = [
        (site, most)
        for site in plan.sites
        if max((site.rank, *site.options.ranks)) > (most := min(*site.matrix_shape, *site.slices))
    ]
    if too_large:
        site, most = too_large[0]
        log.info(
            "rank %d is more than %s can have: a matrix of %s has a rank of %d at most. The branch computes what a "
            "smaller one would, at more cost; give such weights a rank of their own (rules=...)",
            max((site.rank, *site.options.ranks)),
            named([site.weight for site, _ in too_large], 1),
            tuple(site.matrix_shape),
            most,
        )


def _warn_of_frozen_sites(cascade: Cascade) -> None:
    """Warn of sites that the model's author had frozen, unless a target names them in full.

    If half of the sites or more were frozen, in number or in entries, the user froze a backbone to adapt it.
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
    """Warn of quantized weights that the spec targets and that are not sites.

    They belong to layers of an unknown library, or are not used in a product.
    """
    spec, parameters = cascade.plan.spec, dict(cascade.model.named_parameters())
    complex_ones = {name for name, value in parameters.items() if value.is_complex()}
    refused = {
        refusal.weight: refusal
        for refusal in cascade.refusals
        if refusal.reason in (Reason.QUANTIZED, Reason.NOT_FLOATING) and refusal.weight not in complex_ones
    }
    left_out = [*refused, *quantized_in({name: parameters[name] for name in cascade.unreached})]
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
        why = refused[left_out[0]].sentence if left_out[0] in refused else "no form of its layer is known"
        warn(
            f"{named(left_out)}: quantized, and without branches; the first is of {type(owner).__name__}: {why}. "
            "Quantized weights are adapted where torchao has quantized the weight of a linear layer, and in layers of "
            f"the classes {kinds}; exclude these to leave them as they are",
            "quantized-left-out",
        )
