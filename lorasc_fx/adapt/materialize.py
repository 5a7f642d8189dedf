"""`lorasc_fx.materialize`: numbers for a model that was adapted on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch.utils import _pytree as pytree

from lorasc_fx.adapt import _adapt
from lorasc_fx.capture import device_of
from lorasc_fx.errors import SpecError, StateError, path_of
from lorasc_fx.plan import Plan
from lorasc_fx.runtime import Cascade
from lorasc_fx.runtime.base_file import open_base
from lorasc_fx.runtime.materialize import find_numbers, put_numbers
from lorasc_fx.undo import AllOrNothing, no_inference_mode

__all__ = ["materialize"]


def materialize(
    cascade: Cascade,
    files: str | PathLike[str],
    *,
    device: torch.device | str | None = None,
    buffers: Mapping[str, torch.Tensor] | None = None,
) -> Cascade:
    """Give the model of a cascade its numbers, one tensor at a time, where it was adapted on the meta device.

    The model then runs on the example inputs, and branches, noise and placements start, as if it had been loaded before
    `adapt`. Numbers are cast to the model's dtypes. All or nothing.

    Args:
        cascade: of a model with parameters on the meta device; without numbers it only shows its plan.
        files: a safetensors file, or a folder with `model.safetensors`, or with its shards and their index. They have
            to hold all parameters and persistent buffers of the model, one name of tied ones, and nothing else. A
            prefix that all names have more, or less, is found.
        device: of the model; without, that of the example inputs. Those are moved there, and become ones if they are on
            the meta device themselves.
        buffers: numbers of buffers that no file keeps, by name, where the model was built with them on the meta device
            (tables of rotary positions, say).

    Returns:
        The cascade itself.

    Raises:
        CheckpointError: the files lack a tensor, hold another or one of another shape, or cannot be read; or, with
            base="file" at `adapt`, a site has another dtype there.
        SpecError: `device` is none, or `buffers` names none of the model's, or one of another shape.
        CaptureError: the model refuses the example inputs, or its graph does something else than the model.
        StateError: the model has its numbers.
    """
    run = cascade._run
    meta = run.meta
    if meta is None:
        raise StateError(
            "materialize: the model has its numbers already; adapt one that was built on the meta device",
            code="already-materialized",
        )
    path, model = path_of(files), cascade.model
    args, kwargs = cascade.example
    place = _device(device) if device is not None else device_of(args, kwargs)
    found = find_numbers(model, path, meta.groups, buffers or {})

    def real(leaf: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(leaf, device=place) if leaf.is_meta else leaf.to(place)

    args, kwargs = pytree.tree_map_only(torch.Tensor, real, (args, kwargs))
    with no_inference_mode(), AllOrNothing() as undo:
        undo(partial(_put_back, cascade, dict(vars(cascade))))
        put_numbers(found, model, place, undo)
        flags, source = cascade._flags, open_base(path if meta.base == "file" else meta.base, model)
        _adapt(model, args, kwargs, Plan(run.plan.spec), run.frontend, source, undo, into=cascade)
        cascade._flags = flags
        return cascade


def _device(asked: torch.device | str) -> torch.device:
    try:
        device = torch.device(asked)
    except (RuntimeError, TypeError) as fault:
        raise SpecError(
            f"materialize: device is {asked!r}, which torch does not know; give 'cpu' or 'cuda:0'"
        ) from fault
    if device.type == "meta":
        raise SpecError("materialize: device is meta, which holds no numbers; give 'cpu' or 'cuda:0'")
    return device


def _put_back(cascade: Cascade, held: dict[str, Any]) -> None:
    vars(cascade).clear()
    vars(cascade).update(held)
