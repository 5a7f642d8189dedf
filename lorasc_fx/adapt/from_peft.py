"""`lorasc_fx.from_peft`: an adapter of peft as the first expert of a cascade. Its slow weights are what peft merges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import nn

from lorasc_fx.adapt import adapt
from lorasc_fx.capture import open_model
from lorasc_fx.cascade.experts import install_experts
from lorasc_fx.errors import CheckpointError, path_of
from lorasc_fx.facade import Cascade
from lorasc_fx.graph import named_weights
from lorasc_fx.peft.reader import Adapter, Pair, read_adapter, spec_of
from lorasc_fx.spec import CascadeSpec


def from_peft(
    folder: str | PathLike[str],
    model: nn.Module | torch.export.ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    spec: CascadeSpec | None = None,
    frontend: str = "auto",
    base: str | PathLike[str] = "memory",
) -> Cascade:
    """Adapt a model, with a LoRA adapter trained by peft as the first expert, with coefficient 1.

    Supports LoRA, rsLoRA, DoRA, patterns of ranks and alphas, linears, transformers' Conv1D, convolutions, embeddings,
    parameters (`target_parameters`), `modules_to_save` and biases. Only JSON and safetensors are read.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        model, args, kwargs, frontend, base: as for `adapt`; the model is the adapter's base.
        spec: of the training that follows; by default `export.peft_spec(folder, model)`. It has to adapt every weight
            of the adapter, and to train in full every parameter that the adapter holds in full.

    Returns:
        The cascade at stage 1. Its slow weights are the base with the adapter merged, exactly; its branches are new.

    Raises:
        CheckpointError: the adapter is damaged, of another model, or not LoRA; or the spec leaves out a part of it.
            Besides, whatever `adapt` raises. The model is left unchanged.
    """
    opened = open_model(model)
    adapter = read_adapter(path_of(folder), opened)
    spec = spec if spec is not None else spec_of(adapter, opened)
    changes = adapter.by_weight(opened, spec.untie)
    cascade = adapt(opened, args, kwargs, spec=spec, frontend=frontend, base=base)
    try:
        _install(cascade, adapter, changes)
    except BaseException:
        cascade.release()
        raise
    return cascade


def _install(cascade: Cascade, adapter: Adapter, changes: Mapping[str, Pair]) -> None:
    """Install an adapter in a cascade before its first stage."""
    run, canonical = cascade._run, named_weights(cascade.model).canonical
    reasons = {refusal.weight: f"{refusal.reason.value} ({refusal.sentence})" for refusal in cascade.refusals}
    experts, left_out = {}, []
    for name, pair in changes.items():
        weight = canonical[name]
        site = run.plan.site(weight)
        if site is None:
            left_out.append(f"{weight} is not adapted here: {reasons.get(weight, 'no call has used it yet')}")
        elif pair.expert.row_scale is not None and not site.options.method.scales_rows:
            left_out.append(f"{weight} has DoRA's magnitudes; give adapter='dora'")
        else:
            experts[weight] = [(1.0, pair.expert)]
    trained, buffers = {}, {}
    for name, value in adapter.full.items():
        if name not in canonical:
            buffers[name] = value
        elif canonical[name] in run.slow.trained:
            trained[canonical[name]] = value
        else:
            left_out.append(f"{name} was trained in full; add it to spec.train")
    if left_out:
        raise CheckpointError(
            f"{adapter.folder}: the spec leaves out what the adapter holds: {'; '.join(left_out)}",
            code="conflicting-options",
        )
    install_experts(run, experts, trained, buffers)
