"""Sharded tensors: the process group, and which slice of a tensor this rank holds.

A row shard of `S = sum c b a` needs the same rows of `b` and all of `a`, so each rank folds its rows alone. A column
shard needs all of `b` and the same columns of `a`. Shared decisions (whether a branch is finite) and statistics of a
full weight (its standard deviation) are all-reduced.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lorasc_fx.errors import StateError, named


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the local tensor of a DTensor. A plain tensor is returned unchanged. Does not copy."""
    if not hasattr(tensor, "to_local"):
        return tensor
    with torch.no_grad():
        found: torch.Tensor = tensor.to_local()
    return found


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the full tensor of a DTensor; every rank must call this. A plain tensor is returned unchanged."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    with torch.no_grad():
        found: torch.Tensor = tensor.full_tensor()
    return found


def shard_axis(tensor: Any) -> int | None:
    """Return the axis along which a tensor is sharded. None if it is not."""
    placements = tensor.placements if hasattr(tensor, "to_local") else ()
    return next((placement.dim for placement in placements if hasattr(placement, "dim")), None)


def shard_of(tensor: Any) -> ShardSpec:
    """Return which slice of a tensor this rank holds."""
    return WHOLE if shard_axis(tensor) is None else ShardSpec.of(tensor)


def dtensor_like(tensor: torch.Tensor, like: Any) -> torch.Tensor:
    """Return a full tensor sharded like a DTensor, on its device. For a plain tensor it is returned unchanged."""
    if not hasattr(like, "to_local") or hasattr(tensor, "to_local"):
        return tensor
    spec = ShardSpec.of(like)
    return spec.dtensor(spec.take(tensor).to(like.device, copy=True), like)


def local_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return this rank's slice of a tensor that is sharded like another one. Without shards it is the tensor itself."""
    if hasattr(tensor, "to_local"):
        return local(tensor)
    return shard_of(like).take(tensor) if hasattr(like, "to_local") else tensor


def zeros_like(tensor: Any, shape: tuple[int, ...]) -> torch.Tensor:
    """Return zeros of another shape, placed like a DTensor if it is one. The sharded axis must have the same length."""
    if not hasattr(tensor, "to_local"):
        zeros: torch.Tensor = tensor.new_zeros(shape)
        return zeros
    axis, here, stride = shard_axis(tensor), list(shape), torch.empty(shape, device="meta").stride()
    if axis is not None:
        here[axis] = tensor.to_local().shape[axis]
    made: torch.Tensor = type(tensor.data).from_local(
        local(tensor).new_zeros(here),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=stride,
    )
    return made


@dataclass(frozen=True)
class ProcessGroup:
    """The ranks that work on one cascade, and their collectives. The default is a single process.

    Every rank must call a method at the same point, as for the collectives of torch.distributed.

    Args:
        handle: a process group of torch.distributed; None for one process.
        device: device for the exchanged tensors.
        replicas: number of copies of the weights on the ranks: for HSDP the size of the first axis of the mesh.
    """

    handle: Any = None
    device: torch.device | str = "cpu"
    replicas: int = 1

    @classmethod
    def of(cls, handle: Any = None) -> ProcessGroup:
        """Wrap a process group of torch.distributed, by default all ranks, or one process if it is not initialized."""
        if not dist.is_available() or not dist.is_initialized():
            return cls()
        handle = dist.group.WORLD if handle is None else handle
        kinds = dist.Backend.backend_capability.get(dist.get_backend(handle), ["cpu"])
        if "cpu" in kinds:
            return cls(handle, torch.device("cpu"))
        return cls(handle, torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device()))

    @property
    def is_alone(self) -> bool:
        """Whether there is a single process, so that no collective is needed."""
        return self.handle is None

    def or_else(self, handle: Any) -> ProcessGroup:
        """Return this group, or that of a handle if this is the null object of a single process."""
        return ProcessGroup.of(handle) if self.handle is None else self

    @property
    def rank(self) -> int:
        """Number of this process."""
        return dist.get_rank(self.handle) if self.handle is not None else 0

    @property
    def size(self) -> int:
        """Number of processes."""
        return dist.get_world_size(self.handle) if self.handle is not None else 1

    @property
    def order(self) -> list[int]:
        """The first ranks of the group that hold all weights together, in the order of their shards.

        The other ranks are replicas of these.
        """
        return list(range(self.size // self.replicas))

    def all(self, flag: bool) -> bool:
        """Whether a flag is set on every rank."""
        return flag if self.handle is None else self.sum(float(not flag)) == 0

    def any(self, flag: bool) -> bool:
        """Whether a flag is set on some rank."""
        return flag if self.handle is None else self.sum(float(flag)) > 0

    def sum(self, number: float, operation: str = "SUM") -> float:
        """Return the sum of a number over the ranks, in fp64. `operation` names another reduction of torch."""
        if self.handle is None:
            return number
        held = torch.tensor([number], dtype=torch.float64, device=self.device)
        with _together():
            dist.all_reduce(held, getattr(dist.ReduceOp, operation), group=self.handle)
        return held.item()

    def sum_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over the ranks, on its device. Its shape must be the same on all ranks."""
        if self.handle is None:
            return tensor
        held = tensor.to(self.device, copy=True)
        with _together():
            dist.all_reduce(held, group=self.handle)
        return held.to(tensor.device)

    def of_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor of the first rank, on its device. Its shape must be the same on all ranks."""
        if self.handle is None:
            return tensor
        held = tensor.to(self.device, copy=True).contiguous()
        with _together():
            dist.broadcast(held, dist.get_global_rank(self.handle, 0), group=self.handle)
        return held.to(tensor.device)

    def max(self, number: float) -> float:
        """Return the maximum of a number over the ranks. nan if it is nan on a rank."""
        missing = math.isnan(number)
        top = self.sum(-math.inf if missing else number, "MAX")
        return math.nan if self.any(missing) else top

    def gather(self, data: torch.Tensor, call: str) -> list[torch.Tensor]:
        """Return the bytes of every rank, by rank.

        Raises:
            StateError: a process has ended, or did not call this within the group's timeout.
        """
        if self.handle is None:
            return [data]
        data = data.to(self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        with _together(f"{call}: "):
            dist.all_gather(sizes, torch.tensor([data.numel()], device=self.device), group=self.handle)
            padded = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8, device=self.device)
            padded[: data.numel()] = data
            gathered = [torch.zeros_like(padded) for _ in sizes]
            if len(padded):
                dist.all_gather(gathered, padded, group=self.handle)
        return [row[: int(size)].cpu() for row, size in zip(gathered, sizes, strict=True)]

    def gather_text(self, text: str, call: str) -> list[str]:
        """Return the text of every rank, by rank. Raises like `gather`."""
        if self.handle is None:
            return [text]
        data = torch.tensor(list(text.encode()), dtype=torch.uint8)
        return [bytes(row.tolist()).decode() for row in self.gather(data, call)]

    def check_alike(self, call: str, facts: Mapping[str, str]) -> None:
        """Check that all ranks have the same facts.

        Args:
            call: for messages.
            facts: values that must be equal on all ranks, by what they are. They are only sent if digests differ.

        Raises:
            StateError: a rank differs from the others. Names the ranks and the facts.
        """
        digests = self.gather_text(hashlib.sha256(json.dumps(sorted(facts.items())).encode()).hexdigest(), call)
        if len(set(digests)) == 1:
            return
        tables: list[dict[str, str]] = [json.loads(text) for text in self.gather_text(json.dumps(dict(facts)), call)]
        usual, _ = Counter(digests).most_common(1)[0]  # the first of as many
        first = digests.index(usual)
        lines = []
        for rank, table in enumerate(tables):
            odd = [name for name in {**tables[first], **table} if table.get(name) != tables[first].get(name)]
            if odd:
                here, there = (each.get(odd[0], "missing") for each in (table, tables[first]))
                lines.append(f"  rank {rank} differs in {named(odd)}: {odd[0]} is {here}, on rank {first} {there}")
        raise StateError(
            f"{call}: the ranks are not alike and would train different models. Start all of them from the same "
            "weights, spec and code:\n" + "\n".join(lines),
            code="ranks-differ",
        )

    @contextlib.contextmanager
    def agreed(self, call: str) -> Iterator[None]:
        """Wait for all ranks at the end of the block, and raise on all of them if it has raised on one.

        A collective inside the block must be called on every rank or on none.

        Raises:
            StateError: the block has raised on another rank.
        """
        fault: Exception | None = None
        try:
            yield
        except Exception as raised:
            fault = raised
        faults = self.gather_text("" if fault is None else f"{type(fault).__name__}: {fault}", call)
        if fault is not None:
            raise fault
        for rank, text in enumerate(faults):
            if text:
                raise StateError(f"{call}: rank {rank} has failed, so all ranks stop: {text}", code="rank-failed")


@contextlib.contextmanager
def _together(call: str = "") -> Iterator[None]:
    """Explain a collective that fails, instead of the backend's error.

    Raises:
        StateError: a process has ended, or did not call this within the group's timeout.
    """
    try:
        yield
    except RuntimeError as fault:
        raise StateError(
            f"{call}another process has ended, or did not make this call within the timeout of the process group: "
            f"{fault}. Every rank has to make this call (transition, save, weights, ...). Start the run again from its "
            "last checkpoint, on any number of processes",
            code="rank-failed",
        ) from fault


ONE_PROCESS = ProcessGroup()


@dataclass(frozen=True)
class ShardSpec:
    """The slice of a weight on this rank: `first` to `first + count` of `total` along an axis.

    Args:
        first, count, total: the slice, and the length of the axis.
        group: the ranks that hold the full weight together.
        axis: the sharded axis. None if the weight is not sharded (`WHOLE`).
    """

    first: int = 0
    count: int = 0
    total: int = 0
    group: ProcessGroup = ONE_PROCESS
    axis: int | None = None

    @classmethod
    def of(cls, tensor: Any) -> ShardSpec:
        """Return the shard spec of a DTensor that FSDP has sharded along one axis, or of a replicated one."""
        mesh, axis = tensor.device_mesh, shard_axis(tensor)
        across = next((place for place, each in enumerate(tensor.placements) if hasattr(each, "dim")), 0)
        handle = mesh.get_group(across)
        group = ProcessGroup.of(handle) if tensor.is_meta else ProcessGroup(handle, tensor.device)
        if axis is None:
            return cls(0, tensor.shape[0], tensor.shape[0], group, 0)
        total = tensor.shape[axis]
        return cls(*chunk_of(total, mesh.size(across), mesh.get_local_rank(across)), total, group, axis)

    def dtensor(self, shard: torch.Tensor, like: Any) -> torch.Tensor:
        """Return a DTensor with this local slice, sharded like the DTensor `like`."""
        shape = self.full_shape(shard.shape)
        stride = torch.empty(shape, device="meta").stride()
        mesh, placements = like.device_mesh, like.placements
        made: torch.Tensor = type(like.data).from_local(
            shard, mesh, placements, run_check=False, shape=shape, stride=stride
        )
        return made

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this rank's slice of a full tensor."""
        return tensor if self.axis is None else tensor.narrow(self.axis, self.first, self.count)

    def whole(self, shard: torch.Tensor) -> torch.Tensor:
        """Return the full tensor of a local slice, on its device. Every rank must call this at the same point."""
        if self.group.handle is None or self.axis is None:
            return shard
        rows = shard.movedim(self.axis, 0)
        size = self.group.size
        padded = rows.new_zeros((-(-self.total // size), *rows.shape[1:]), device=self.group.device)
        padded[: self.count] = rows
        parts = [torch.empty_like(padded) for _ in range(size)]
        with _together():
            dist.all_gather(parts, padded, group=self.group.handle)
        gathered = torch.cat([part[: chunk_of(self.total, size, rank)[1]] for rank, part in enumerate(parts)])
        return gathered.movedim(0, self.axis).contiguous().to(shard.device)

    def full_shape(self, shard: torch.Size) -> torch.Size:
        """Return the shape of the full tensor for the shape of a local slice."""
        return shard if self.axis is None else torch.Size((*shard[: self.axis], self.total, *shard[self.axis + 1 :]))

    def std(self, shard: torch.Tensor) -> float:
        """Return the standard deviation of the full tensor of a local slice, like `torch.std`. All-reduced."""
        count = self.group.sum(shard.numel())
        if count < 2:
            return 0.0
        exact = shard.double()
        mean = self.group.sum(exact.sum().item()) / count
        return math.sqrt(self.group.sum((exact - mean).square_().sum().item()) / (count - 1))


WHOLE = ShardSpec()
"""The shard spec of a weight that is not sharded."""


def chunk_of(total: int, size: int, rank: int) -> tuple[int, int]:
    """Return the first index and the length of a rank's chunk, like `torch.chunk`."""
    chunk = -(-total // size)
    first = min(rank * chunk, total)
    return first, min(chunk, total - first)
