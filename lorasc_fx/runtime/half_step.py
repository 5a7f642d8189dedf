"""Gradients that a checkpoint finds: a run that is saved between backward and step, or accumulates, loses none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from lorasc_fx.errors import CheckpointError

if TYPE_CHECKING:
    from lorasc_fx.runtime.core import Core

__all__ = ["pack", "unpack"]

_PREFIX = "gradient/"


def pack(core: Core) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the gradients that are there, by the names of their parameters, and which of them no step has used."""
    trainable = core.trainable()
    tensors = {
        f"{_PREFIX}{name}": parameter.grad.detach().clone()
        for name, parameter in trainable.items()
        if parameter.grad is not None
    }
    tensors |= {f"{_PREFIX}model.{name}": each.clone() for name, each in core.turning.gathered.items()}
    return tensors, core.pending.waiting(trainable)


def unpack(core: Core, tensors: Mapping[str, torch.Tensor], pending: Sequence[str], where: str) -> None:
    """Put the gradients back; those that no step has used still wait for one.

    Raises:
        CheckpointError: a gradient of no parameter that is trained here, or of another shape or dtype than its own.
    """
    holders, found = _holders(core), {}
    for name, tensor in tensors.items():
        if name.startswith(_PREFIX):
            holder = holders.get(name.removeprefix(_PREFIX))
            if holder is None:
                raise CheckpointError(f"{where}: {name!r} is of no parameter that is trained")
            if holder.shape != tensor.shape or holder.dtype != tensor.dtype:
                raise CheckpointError(
                    f"{where}: {name!r} is {tuple(tensor.shape)} {tensor.dtype}, its parameter {tuple(holder.shape)} "
                    f"{holder.dtype}; it is not of this run"
                )
            found[name.removeprefix(_PREFIX)] = tensor
    gathering = {f"model.{name}": name for name in core.turning.gathering}
    for name, tensor in found.items():
        own = tensor.to(holders[name].device, copy=True)
        if name in gathering:
            core.turning.put(gathering[name], own)
            continue
        holders[name].grad = own
        if name in pending:
            core.pending.note(holders[name])


def _holders(core: Core) -> dict[str, nn.Parameter]:
    """Return the parameters whose gradients count: those that are trained, and weights that look for a first step."""
    return core.trainable() | {f"model.{name}": weight for name, weight in core.turning.gathering.items()}
