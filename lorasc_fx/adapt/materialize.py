"""`lorasc_fx.materialize`: values for a model that was adapted on the meta device."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from lorasc_fx.adapt.start import Start, check_loaded
from lorasc_fx.branch import branch_class
from lorasc_fx.check.isolation import device_of
from lorasc_fx.checkpoint.base_file import open_base
from lorasc_fx.checkpoint.deferred import DeferredValues, with_values
from lorasc_fx.checkpoint.reader import check_base
from lorasc_fx.errors import SpecError, StateError, path_of
from lorasc_fx.facade import Cascade
from lorasc_fx.graph import named_weights
from lorasc_fx.parameters import exchange
from lorasc_fx.plan import Plan
from lorasc_fx.shards import local_like
from lorasc_fx.util.undo import AllOrNothing, Undo


def materialize(
    cascade: Cascade,
    files: str | PathLike[str],
    *,
    device: torch.device | str | None = None,
    buffers: Mapping[str, torch.Tensor] | None = None,
) -> Cascade:
    """Load the values of a model that was adapted on the meta device, one tensor at a time. All or nothing.

    The model then runs on the example inputs, and branches, noise and placements start as if it had been loaded before
    `adapt`. Values are cast to the model's dtypes. A cascade from `lorasc_fx.load` continues from its checkpoint.

    A cascade that `parallel.fsdp.shard` has sharded gets the shards of each rank. A rank reads its part of each tensor,
    and a share of the full tensors, block by block, for their fingerprints. Every rank must call this. The model does
    not run: the graph was captured from shapes.

    Args:
        cascade: of a model with parameters on the meta device; without numbers it only shows its plan.
        files: a safetensors file, or a folder with `model.safetensors`, or with its shards and their index. They have
            to hold all parameters and persistent buffers of the model, one name of tied ones, and nothing else. The
            names may have one more or one less common prefix.
        device: of the model; by default the device of the example inputs, or of the shards. The inputs are moved there.
            Inputs on the meta device become ones.
        buffers: values of buffers on the meta device that no file holds, such as tables of rotary positions, by name.

    Returns:
        The cascade itself.

    Raises:
        CheckpointError: the files lack a tensor, hold another one or another shape, or cannot be read; or, with
            base="file" at `adapt`, a site has another dtype; or they are not the base of the checkpoint.
        SpecError: `device` is unknown or differs from the shards', or `buffers` has a wrong name or shape.
        CaptureError: the model raises on the example inputs, or its graph computes something else than the model.
        StateError: the model has values already; or another rank has failed, or sees other files.
    """
    run = cascade._run
    meta = run.meta
    if meta is None:
        raise StateError(
            "materialize: the model has its numbers already; adapt one that was built on the meta device",
            code="not-available",
        )
    path, model = path_of(files), cascade.model
    args, kwargs = cascade._graphs.example if cascade._graphs.example is not None else ((), None)
    if run.is_sharded:
        target = torch.device(run.slow.group.device)
        if device is not None and _device(device).type != target.type:
            raise SpecError(f"materialize: device is {device!r}, and the shards are on {target}; leave it out")
    else:
        target = _device(device) if device is not None else device_of(args, kwargs or {})

    def real(leaf: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(leaf, device=target) if leaf.is_meta else leaf.to(target)

    args, kwargs = pytree.tree_map_only(torch.Tensor, real, (args, kwargs))
    with torch.inference_mode(False), AllOrNothing() as undo:
        undo(partial(_restore, cascade, dict(vars(cascade))))
        if run.is_sharded:
            _into_shards(cascade, path, target, buffers or {}, undo)
        else:
            DeferredValues(model, path, meta.groups, buffers or {}).put(target, undo)
            checkpoint, flags = meta.checkpoint, cascade._guard.flags
            source = open_base(path if meta.base == "file" else meta.base, model)
            start = Start(model, Plan(run.plan.spec), run.frontend, args, kwargs, source, run.memory)
            if checkpoint is not None:
                check_base(checkpoint, named_weights(model).parameters)
                start = replace(start, plan=checkpoint.plan, loads=True, written=checkpoint.moved)
            start.cascade(undo, into=cascade)
            cascade._guard.flags = flags
        if meta.checkpoint is not None:
            cascade._take_over(meta.checkpoint, undo)
            check_loaded(cascade, meta.checkpoint.path)
        cascade._graphs.example = (args, kwargs) if kwargs is not None else None
        return cascade


def _into_shards(
    cascade: Cascade, path: Path, device: torch.device, buffers: Mapping[str, torch.Tensor], undo: Undo
) -> None:
    """Read the shards of this rank, and start the run on them."""
    run, model, meta, group = cascade._run, cascade.model, cascade._run.meta, cascade._run.slow.group
    assert meta is not None
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
        spec, stage = run.plan.spec, run.plan.stage
        new = {}
        for site in run.plan.sites:
            initial = branch_class(site).initial_values(site, spec.seed, stage)
            for name, parameter in cascade.branches[site.key].named_parameters(recurse=False):
                new[id(parameter)] = with_values(parameter, local_like(initial[name], parameter), device)
        exchange(cascade.branches, lambda holder: new.get(id(holder.value)), undo)
        source = open_base(path if meta.base == "file" else meta.base, model)
    run.start_sharded(source, fingerprints, undo, empty=meta.checkpoint is not None)


def _device(requested: torch.device | str) -> torch.device:
    try:
        device = torch.device(requested)
    except (RuntimeError, TypeError) as fault:
        raise SpecError(
            f"materialize: device is {requested!r}, which torch does not know; give 'cpu' or 'cuda:0'"
        ) from fault
    if device.type == "meta":
        raise SpecError("materialize: device is meta, which holds no numbers; give 'cpu' or 'cuda:0'")
    return device


def _restore(cascade: Cascade, attributes: dict[str, Any]) -> None:
    vars(cascade).clear()
    vars(cascade).update(attributes)
