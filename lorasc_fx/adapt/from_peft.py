"""`lorasc_fx.from_peft`: start a cascade from an adapter of peft."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import nn

from lorasc_fx.adapt import adapt
from lorasc_fx.capture import open_model
from lorasc_fx.cascade import run_of
from lorasc_fx.cascade.transition import install_slow
from lorasc_fx.errors import CheckpointError, path_of
from lorasc_fx.facade import Cascade
from lorasc_fx.graph import named_weights
from lorasc_fx.parameters import buffer_holders
from lorasc_fx.peft.adapter_reader import Adapter, read_adapter, spec_of
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.state import Expert


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
    """Adapt a model that already has a LoRA adapter trained by peft. The adapter becomes the first expert.

    Supports LoRA, rsLoRA, DoRA, `rank_pattern` and `alpha_pattern`, linears, transformers' Conv1D, convolutions,
    embeddings, `target_parameters`, `modules_to_save` and biases. Reads only JSON and safetensors. Needs peft
    (`pip install 'lorasc-fx[peft]'`).

    Args:
        folder: a folder with `adapter_config.json` and `adapter_model.safetensors`.
        model: the base model of the adapter, without the adapter.
        args, kwargs, frontend, base: as for `adapt`.
        spec: the spec of the training that follows. The default is `export.peft_spec(folder, model)`. It must adapt
            every weight that the adapter has factors for, and train in full every parameter that the adapter stores in
            full.

    Returns:
        The cascade at stage 1, with new branches. Its slow weights are exactly the base with the adapter merged.

    Raises:
        CheckpointError: the adapter is damaged, belongs to another model, or is not LoRA; or the spec leaves out a part
            of it. All errors of `adapt` are raised too. The model is left unchanged.
        MissingExtra: peft is not installed.
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


def _install(cascade: Cascade, adapter: Adapter, changes: Mapping[str, Expert]) -> None:
    """Make an adapter the first expert of a new cascade. `changes` has an expert for each weight, by name.

    Raises:
        CheckpointError: the spec leaves out a part of the adapter.
    """
    run, canonical = run_of(cascade), named_weights(cascade.model).canonical
    reasons = {refusal.weight: f"{refusal.reason.value} ({refusal.sentence})" for refusal in cascade.refusals}
    states, installed, left_out = dict(run.slow.states), [], []
    for name, expert in changes.items():
        weight = canonical[name]
        site = run.plan.site(weight)
        if site is None:
            left_out.append(f"{weight} is not adapted: {reasons.get(weight, 'no call has used it yet')}")
        elif expert.row_scale is not None and not site.options.method.magnitude:
            left_out.append(f"{weight} has magnitudes of DoRA: set adapter='dora'")
        else:
            states[weight] = run.slow.states[weight].added(expert)
            installed.append(weight)
    # Values that the adapter stores in full: buffers of `modules_to_save`, and parameters.
    buffers, own_buffers = {}, buffer_holders(cascade.model)
    for name, value in adapter.full.items():
        weight = canonical.get(name, "")
        if name in own_buffers:
            buffers[name] = value
        elif weight in run.slow.trained:
            states[weight] = states[weight].holding(value)
            installed.append(weight)
        elif weight:  # otherwise it is another name of a buffer
            left_out.append(f"{name} was trained in full: add it to spec.train")
    if left_out:
        raise CheckpointError(
            f"{adapter.folder}: the spec leaves out parts of the adapter: {'; '.join(left_out)}",
            code="conflicting-options",
        )
    with run.exclusive("from_peft"):
        install_slow(run, replace(run.slow, states=states), installed, buffers)
