"""`lorasc_fx.materialize`: load the values of a model that was adapted on the meta device."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path

import torch
from torch.utils import _pytree as pytree

from lorasc_fx.adapt.start import Setup, check_loaded
from lorasc_fx.cascade import graphs_of, run_of
from lorasc_fx.check.isolation import device_of
from lorasc_fx.checkpoint.base import DeferredValues, open_base, with_values
from lorasc_fx.checkpoint.reader import check_base
from lorasc_fx.checkpoint.saved import load_into
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
