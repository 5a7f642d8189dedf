"""`lorasc_fx.adapt` and `lorasc_fx.load`."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from os import PathLike

import torch
from torch import nn

from lorasc_fx.adapt.start import Setup, check_loaded, check_new
from lorasc_fx.capture import FRONTENDS, open_model
from lorasc_fx.cascade import flags_of
from lorasc_fx.checkpoint.versions import Checkpoint, check_base, check_ties, read
from lorasc_fx.errors import CheckpointError, PassError, SpecError, named, warn
from lorasc_fx.facade import Cascade, load_into
from lorasc_fx.graph import matches, named_weights
from lorasc_fx.graph.forms import forms_missing
from lorasc_fx.peft.spec_from_peft import is_config, spec_of
from lorasc_fx.plan import Plan, Reason
from lorasc_fx.quantized import LIBRARIES, quantized_in
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.state import BaseMemory
from lorasc_fx.util.undo import AllOrNothing

__all__ = ["adapt", "load"]

log = logging.getLogger("lorasc_fx")


def adapt(
    model: nn.Module | torch.export.ExportedProgram,
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    spec: CascadeSpec | object = None,
    frontend: str = "auto",
    base: BaseMemory = "memory",
) -> Cascade:
    """Add low-rank branches to a model and train them in stages, without changing its source code.

    Args:
        model: an nn.Module, a GraphModule or an ExportedProgram, with all its values.
        args, kwargs: example inputs. Their types matter, their sizes do not. The model runs on them at least once, and
            is compared with its graph. These runs have no side effects.
        spec: a `CascadeSpec`, or a configuration of peft (`peft.LoraConfig`, `peft.HiraConfig`, ...). For a peft
            configuration, the other options have the defaults of `CascadeSpec`.
        frontend: `export` for a graph of torch.export, `eager` to run the model itself, or `auto` for the first one
            that works.
        base: where the original values W0 of the adapted weights are stored:

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
            `base` is unknown, or is `pinned` on a machine without an accelerator.
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
        cascade = Setup.of(opened, plan, frontend, (args, kwargs), base, undo).cascade(undo)
        _warn_about_frozen_sites(cascade)
        _warn_about_quantized_weights(cascade)
        return cascade


def load(
    folder: str | PathLike[str] | Checkpoint,
    model: nn.Module | torch.export.ExportedProgram,
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    base: BaseMemory = "memory",
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
        model, args, kwargs, base: as for `adapt`. The model must have the weights that were adapted. Parameters that
            are trained in full, such as a new head, may have any values, because the checkpoint overwrites them.

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
        inputs = (args, kwargs)
        start = Setup.of(opened, checkpoint.plan, checkpoint.frontend, inputs, base, undo, checkpoint, loads=True)
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
