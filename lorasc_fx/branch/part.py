"""Tensors of which each process holds a part (torch's DTensor): what lies here, and what all processes say together.

The slow state of such a weight is that of its part: rows of W0 and B, or columns of W0 and A. What a part alone cannot
know comes from its `Part`: the noise is drawn whole and cut, a standard deviation is that of the whole, and whether to
fold or to raise is decided by all processes alike.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Part", "anywhere", "here", "is_spread", "part_of"]


@dataclass(frozen=True)
class Part:
    """The part of a tensor that lies on this process.

    Args:
        whole: shape of the tensor.
        start: first index of the part along each axis.
        shape: of the part.
        groups: the processes along each axis of the mesh over which the tensor is split.
        peers: the same, of all axes of the mesh.
    """

    whole: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...]
    groups: tuple[Any, ...]
    peers: tuple[Any, ...]

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the part of a whole tensor, as a view."""
        for axis, (start, size) in enumerate(zip(self.start, self.shape, strict=True)):
            tensor = tensor.narrow(axis, start, size)
        return tensor

    def std(self, own: torch.Tensor) -> float:
        """Return the standard deviation of the whole, of which `own` is the part; summed in fp64."""
        count, exact = math.prod(self.whole), own.double()
        mean = self._sum(exact.sum()) / count
        return float((self._sum((exact - mean).square().sum()) / (count - 1)).sqrt())

    def largest(self, own: torch.Tensor) -> float:
        """Return the largest absolute value of the whole."""
        top = own.abs().amax().double() if own.numel() else torch.zeros((), dtype=torch.float64, device=own.device)
        for group in self.groups:
            dist.all_reduce(top, dist.ReduceOp.MAX, group)
        return float(top)

    def _sum(self, own: torch.Tensor) -> torch.Tensor:
        for group in self.groups:
            dist.all_reduce(own, group=group)
        return own


def is_spread(tensor: torch.Tensor) -> bool:
    """Whether several processes share a tensor: a DTensor, of which each holds a part, or a copy."""
    known = sys.modules.get("torch.distributed.tensor")  # nobody has made one before that is imported
    return known is not None and isinstance(tensor, known.DTensor)


def here(tensor: torch.Tensor) -> torch.Tensor:
    """Return what lies on this process of a tensor, sharing its memory: of any that is not spread, itself."""
    return tensor._local_tensor if is_spread(tensor) else tensor  # type: ignore[attr-defined]


def part_of(tensor: torch.Tensor) -> Part | None:
    """Return which part of a tensor lies here; None for one that is not spread."""
    if not is_spread(tensor):
        return None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # noqa: PLC0415 - known by now

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    shape, start = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    peers = tuple(mesh.get_all_groups())
    groups = tuple(group for group, each in zip(peers, placements, strict=True) if each.is_shard())
    return Part(tuple(tensor.shape), tuple(start), tuple(shape), groups, peers)


def anywhere(flags: Sequence[bool], tensors: Sequence[torch.Tensor]) -> list[bool]:
    """Return each flag, set where any process that shares these tensors has set it; all of them have to ask."""
    spread = next((each for each in tensors if is_spread(each)), None)
    if spread is None or not flags:
        return list(flags)
    found = torch.tensor(flags, dtype=torch.int32, device=here(spread).device)
    for group in spread.device_mesh.get_all_groups():  # type: ignore[attr-defined]
        dist.all_reduce(found, dist.ReduceOp.MAX, group)
    return [bool(each) for each in found.tolist()]
