"""Sharded weights: which slice of a tensor this rank holds, and collectives over the ranks of a cascade.

Each rank folds its own slice of the slow delta `S = sum c B A` without gathering a weight. If a weight is sharded along
its rows, a rank needs the same rows of B and all of A. If it is sharded along its columns, a rank needs all of B and
the same columns of A. Decisions that all ranks share (whether a branch is finite) and statistics of a full weight (its
standard deviation) are all-reduced.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
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
        shard: torch.Tensor = tensor.to_local()
    return shard


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a DTensor. Every rank must call this. A plain tensor is returned unchanged."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    with torch.no_grad():
        full: torch.Tensor = tensor.full_tensor()
    return full


def shard_axis(tensor: Any) -> int | None:
    """Return the axis along which a tensor is sharded, or None if it is replicated or a plain tensor."""
    placements = tensor.placements if hasattr(tensor, "to_local") else ()
    return next((placement.dim for placement in placements if hasattr(placement, "dim")), None)


def shard_of(tensor: object) -> ShardSpec:
    """Return which slice of a tensor this rank holds. `UNSHARDED` for a replicated or a plain tensor."""
    return UNSHARDED if shard_axis(tensor) is None else ShardSpec.of(tensor)


def dtensor_like(tensor: torch.Tensor, like: Any) -> torch.Tensor:
    """Shard a full tensor like the DTensor `like`, on the device of `like`.

    Every rank has the full tensor and copies its own slice, so this does not communicate. `tensor` is returned
    unchanged if it is a DTensor already, or if `like` is a plain tensor.
    """
    if not hasattr(like, "to_local") or hasattr(tensor, "to_local"):
        return tensor
    spec = ShardSpec.of(like)
    return spec.dtensor(spec.take(tensor).to(like.device, copy=True), like)


def local_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return this rank's slice of a tensor: of a DTensor its own, of a full tensor the slice that `like` would have.

    If neither is a DTensor, return the tensor unchanged. Does not copy.
    """
    if hasattr(tensor, "to_local"):
        return local(tensor)
    return shard_of(like).take(tensor) if hasattr(like, "to_local") else tensor


def _from_local(shard: torch.Tensor, like: Any, shape: tuple[int, ...]) -> torch.Tensor:
    """Wrap a local shard as a DTensor with the mesh and placements of the DTensor `like`, and the given full shape."""
    # torch cannot infer shape and stride if the shards of the ranks are not equal.
    stride = torch.empty(shape, device="meta").stride()
    sharded: torch.Tensor = type(like.data).from_local(
        shard, like.device_mesh, like.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
    return sharded


@dataclass(frozen=True)
class ProcessGroup:
    """The ranks that train one cascade, and their collectives. The default is a single process.

    With a single process, methods return their arguments. With several, a method is a collective: every rank must call
    it at the same point of the program.

    Args:
        handle: a process group of torch.distributed, or None for a single process.
        device: device for the tensors that are exchanged. It must suit the backend of the group.
    """

    handle: Any = None
    device: torch.device | str = "cpu"

    @classmethod
    def of(cls, handle: Any = None) -> ProcessGroup:
        """Wrap a process group. Default: all ranks, or a single process if torch.distributed is not initialized."""
        if not dist.is_available() or not dist.is_initialized():
            return cls()
        handle = dist.group.WORLD if handle is None else handle
        # The gloo backend takes host tensors. NCCL takes only tensors of its accelerator.
        kinds = dist.Backend.backend_capability.get(dist.get_backend(handle), ["cpu"])
        if "cpu" in kinds:
            return cls(handle, torch.device("cpu"))
        return cls(handle, torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device()))

    @property
    def is_alone(self) -> bool:
        """Whether there is a single process. Collectives are then no-ops."""
        return self.handle is None

    @property
    def rank(self) -> int:
        """Rank of this process in the group."""
        return dist.get_rank(self.handle) if self.handle is not None else 0

    @property
    def size(self) -> int:
        """Number of ranks in the group."""
        return dist.get_world_size(self.handle) if self.handle is not None else 1

    def all(self, flag: bool) -> bool:
        """Whether a flag is set on every rank."""
        return flag if self.handle is None else self.sum(float(not flag)) == 0

    def any(self, flag: bool) -> bool:
        """Whether a flag is set on some rank."""
        return flag if self.handle is None else self.sum(float(flag)) > 0

    def sum(self, number: float, operation: str = "SUM") -> float:
        """All-reduce a number in fp64. `operation` is a member of `torch.distributed.ReduceOp`."""
        if self.handle is None:
            return number
        buffer = torch.tensor([number], dtype=torch.float64, device=self.device)
        with _explained():
            dist.all_reduce(buffer, getattr(dist.ReduceOp, operation), group=self.handle)
        return buffer.item()

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over the ranks, on its device. The shape must be the same on all ranks."""
        if self.handle is None:
            return tensor
        buffer = tensor.to(self.device, copy=True)
        with _explained():
            dist.all_reduce(buffer, group=self.handle)
        return buffer.to(tensor.device)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor of rank 0, on the device of `tensor`. The shape must be the same on all ranks."""
        if self.handle is None:
            return tensor
        buffer = tensor.to(self.device, copy=True).contiguous()
        with _explained():
            dist.broadcast(buffer, dist.get_global_rank(self.handle, 0), group=self.handle)
        return buffer.to(tensor.device)

    def max(self, number: float) -> float:
        """Return the maximum of a number over the ranks, or nan if it is nan on any rank."""
        # Backends do not propagate nan reliably in MAX, so reduce this separately.
        is_nan = math.isnan(number)
        maximum = self.sum(-math.inf if is_nan else number, "MAX")
        return math.nan if self.any(is_nan) else maximum

    def gather(self, data: torch.Tensor, call: str) -> list[torch.Tensor]:
        """Gather a uint8 vector from all ranks, in the order of ranks, in host memory. Lengths may differ.

        Raises:
            StateError: a process has ended, or did not call this within the timeout of the group.
        """
        if self.handle is None:
            return [data]
        data = data.to(self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        with _explained(f"{call}: "):
            # all_gather needs equal shapes: exchange the sizes first, then pad to the largest.
            dist.all_gather(sizes, torch.tensor([data.numel()], device=self.device), group=self.handle)
            padded = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8, device=self.device)
            padded[: data.numel()] = data
            gathered = [torch.zeros_like(padded) for _ in sizes]
            if len(padded):
                dist.all_gather(gathered, padded, group=self.handle)
        return [row[: int(size)].cpu() for row, size in zip(gathered, sizes, strict=True)]

    def gather_text(self, text: str, call: str) -> list[str]:
        """Gather a text from all ranks, in the order of ranks. Raises like `gather`."""
        if self.handle is None:
            return [text]
        data = torch.tensor(list(text.encode()), dtype=torch.uint8)
        return [bytes(row.tolist()).decode() for row in self.gather(data, call)]

    def check_equal(self, call: str, facts: Mapping[str, str]) -> None:
        """Check that all ranks have equal `facts`: {description for error messages: value}.

        Raises:
            StateError: ranks differ. The message names these ranks and values.
        """
        digests = self.gather_text(hashlib.sha256(json.dumps(sorted(facts.items())).encode()).hexdigest(), call)
        if len(set(digests)) == 1:
            return
        tables: list[dict[str, str]] = [json.loads(text) for text in self.gather_text(json.dumps(dict(facts)), call)]
        expected, lines = tables[0], []
        for rank, table in enumerate(tables):
            different = [name for name in {**expected, **table} if table.get(name) != expected.get(name)]
            if different:
                name = different[0]
                lines.append(
                    f"  rank {rank} differs in {named(different)}: {name} is {table.get(name, 'missing')}, on rank 0 "
                    f"it is {expected.get(name, 'missing')}"
                )
        raise StateError(
            f"{call}: the ranks differ and would train different models. Start all of them with the same "
            "weights, spec and code:\n" + "\n".join(lines),
            code="ranks-differ",
        )

    @contextlib.contextmanager
    def agreed(self, call: str) -> Iterator[None]:
        """Context manager: wait for all ranks at the end of the block, and raise on all ranks if one raised.

        A collective inside the block must be called by every rank or by none.

        Raises:
            StateError: the block raised on another rank.
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
                raise StateError(f"{call}: rank {rank} failed, so all ranks stop: {text}", code="rank-failed")


@contextlib.contextmanager
def _explained(call: str = "") -> Iterator[None]:
    """Context manager around a collective: replace an error of the backend by one that says what to do.

    Raises:
        StateError: a process has ended, or did not make this call within the timeout of the group.
    """
    try:
        yield
    except RuntimeError as fault:
        raise StateError(
            f"{call}another process has ended, or did not make this call within the timeout of the process group: "
            f"{fault}. Every rank must make this call (transition, save, weights, ...). Start the run again from its "
            "last checkpoint, on any number of processes",
            code="rank-failed",
        ) from fault


ONE_PROCESS = ProcessGroup()


@dataclass(frozen=True)
class ShardSpec:
    """The slice of a weight that this rank holds: `count` indices along one axis, from `start` on.

    Args:
        start: first index of the slice.
        count: length of the slice. 0 if there are more ranks than indices.
        total: length of the axis in the full weight.
        group: the ranks whose slices make up the full weight.
        axis: the sharded axis, or None if the weight is not sharded (`UNSHARDED`).
    """

    start: int = 0
    count: int = 0
    total: int = 0
    group: ProcessGroup = ONE_PROCESS
    axis: int | None = None

    @classmethod
    def of(cls, tensor: Any) -> ShardSpec:
        """Return the slice of a DTensor that is sharded along one axis, as by FSDP."""
        mesh, axis = tensor.device_mesh, shard_axis(tensor)
        group = ProcessGroup(mesh.get_group(), tensor.device)
        assert axis is not None
        total = tensor.shape[axis]
        return cls(*chunk_of(total, mesh.size(), mesh.get_local_rank()), total, group, axis)

    def dtensor(self, shard: torch.Tensor, like: object) -> torch.Tensor:
        """Wrap a local slice as a DTensor with the mesh and placements of the DTensor `like`."""
        return _from_local(shard, like, self.full_shape(shard.shape))

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this rank's slice of a full tensor, as a view."""
        return tensor if self.axis is None else tensor.narrow(self.axis, self.start, self.count)

    def gather(self, shard: torch.Tensor) -> torch.Tensor:
        """Gather the full tensor from local slices, on the device of `shard`. Every rank must call this."""
        if self.group.handle is None or self.axis is None:
            return shard
        rows = shard.movedim(self.axis, 0)
        size = self.group.size
        # all_gather needs equal shapes, but the last chunks may be shorter.
        padded = rows.new_zeros((-(-self.total // size), *rows.shape[1:]), device=self.group.device)
        padded[: self.count] = rows
        parts = [torch.empty_like(padded) for _ in range(size)]
        with _explained():
            dist.all_gather(parts, padded, group=self.group.handle)
        gathered = torch.cat([part[: chunk_of(self.total, size, rank)[1]] for rank, part in enumerate(parts)])
        return gathered.movedim(0, self.axis).contiguous().to(shard.device)

    def full_shape(self, shard: torch.Size) -> torch.Size:
        """Return the shape of the full tensor, given the shape of a local slice."""
        return shard if self.axis is None else torch.Size((*shard[: self.axis], self.total, *shard[self.axis + 1 :]))

    def std(self, shard: torch.Tensor) -> float:
        """Return the standard deviation of the full tensor, like `torch.std`, or 0 if it has fewer than two entries.

        For a sharded tensor, this all-reduces sums and gathers nothing.
        """
        if self.axis is None:
            return shard.std().item() if shard.numel() > 1 else 0.0
        count = self.group.sum(shard.numel())
        if count < 2:
            return 0.0
        exact = shard.double()
        mean = self.group.sum(exact.sum().item()) / count
        return math.sqrt(self.group.sum((exact - mean).square_().sum().item()) / (count - 1))


UNSHARDED = ShardSpec()
"""The `ShardSpec` of an unsharded weight: this rank holds the full weight."""


def chunk_of(total: int, size: int, rank: int) -> tuple[int, int]:
    """Return (start, length) of a rank's chunk of an axis, which is split into `size` chunks as by `torch.chunk`."""
    chunk = -(-total // size)
    start = min(rank * chunk, total)
    return start, min(chunk, total - start)
