"""Weights that several processes hold together, each some of the rows: what is here of a tensor, and what all say.

A row shard of `S = sum c b a` is made of the same rows of `b` and of all of `a`, so that each process folds its rows by
itself; and a shard of columns, of all of `b` and of the same columns of `a`. What has to be one decision of all (a
branch that is not finite) or one number of all (the standard deviation of a weight) is told by `Together`; every
process asks for it at the same place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Rows", "Together", "local", "part_of", "whole"]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this process holds of a tensor, with the same memory: of a plain one all of it."""
    if not hasattr(tensor, "to_local"):
        return tensor
    with torch.no_grad():
        found: torch.Tensor = tensor.to_local()
    return found


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of a tensor; of a sharded one every process asks at the same time."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    with torch.no_grad():
        found: torch.Tensor = tensor.full_tensor()
    return found


def part_of(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the rows of a tensor that a process holds of one like it; of a plain one all."""
    if hasattr(tensor, "to_local"):
        return local(tensor)
    return Rows.of(like).of_whole(tensor) if hasattr(like, "to_local") else tensor


@dataclass(frozen=True)
class Together:
    """The processes that hold the weights together.

    Args:
        group: a process group of torch.distributed.
        device: where its tensors lie.
    """

    group: Any
    device: torch.device

    def every(self, flag: bool) -> bool:
        """Whether it holds on every process."""
        return self.total(float(not flag)) == 0

    def some(self, flag: bool) -> bool:
        """Whether it holds on some process."""
        return self.total(float(flag)) > 0

    def total(self, number: float) -> float:
        """Return the sum of a number over the processes, in fp64."""
        return self._reduced(number, torch.distributed.ReduceOp.SUM)

    def largest(self, number: float) -> float:
        """Return the largest of a number over the processes; nan where it is nan on one."""
        missing = math.isnan(number)
        top = self._reduced(-math.inf if missing else number, torch.distributed.ReduceOp.MAX)
        return math.nan if self.some(missing) else top

    def _reduced(self, number: float, by: Any) -> float:
        held = torch.tensor([number], dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(held, by, group=self.group)
        return held.item()


@dataclass(frozen=True)
class Rows:
    """The rows of a weight that are here, `first` to `first + count` of `total`, and who holds the others.

    With axis 1 it is the columns.
    """

    first: int
    count: int
    total: int
    together: Together
    axis: int = 0

    @classmethod
    def of(cls, tensor: Any) -> Rows:
        """Return the rows of a DTensor that is sharded over a mesh of one axis, as FSDP does it on the first axis of a
        tensor; of one that each process has a copy of all rows.
        """
        mesh, (place,) = tensor.device_mesh, tensor.placements
        together = Together(mesh.get_group(), tensor.device)
        if not place.is_shard():
            return cls(0, tensor.shape[0], tensor.shape[0], together)
        total = tensor.shape[place.dim]
        chunk = -(-total // mesh.size())
        first = min(mesh.get_local_rank() * chunk, total)
        return cls(first, min(chunk, total - first), total, together, place.dim)

    def sharded(self, part: torch.Tensor, like: Any) -> torch.Tensor:
        """Return the DTensor of which these rows are `part`, cut as the DTensor `like` is."""
        shape = self.shape_of_whole(part.shape)
        stride = torch.empty(shape, device="meta").stride()
        mesh, placements = like.device_mesh, like.placements
        made: torch.Tensor = type(like.data).from_local(
            part, mesh, placements, run_check=False, shape=shape, stride=stride
        )
        return made

    def of_whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return these rows of a whole tensor."""
        return tensor.narrow(self.axis, self.first, self.count)

    def shape_of_whole(self, part: torch.Size) -> torch.Size:
        """Return the shape of the whole tensor of which these rows have that of a part."""
        return torch.Size((*part[: self.axis], self.total, *part[self.axis + 1 :]))

    def spread(self, part: torch.Tensor) -> float:
        """Return the standard deviation of the whole weight, of which `part` is here; as `torch.std` does it."""
        count = self.together.total(part.numel())
        if count < 2:
            return 0.0
        exact = part.double()
        mean = self.together.total(exact.sum().item()) / count
        return math.sqrt(self.together.total((exact - mean).square_().sum().item()) / (count - 1))
