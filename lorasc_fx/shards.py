"""Cascades on several ranks: the process group, and the shard of a tensor that is here.

A row shard of `S = sum c b a` is made of the same rows of `b` and of all of `a`, so that each rank folds its rows by
itself; and a shard of columns, of all of `b` and of the same columns of `a`. Decisions that all ranks share (a branch
that is not finite) and numbers of a whole weight (its standard deviation) are all-reduced.
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
    """Return what this process holds of a tensor, with the same memory: of a plain one all of it."""
    if not hasattr(tensor, "to_local"):
        return tensor
    with torch.no_grad():
        found: torch.Tensor = tensor.to_local()
    return found


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of a tensor; of a sharded one every process asks at the same time."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    with torch.no_grad():
        found: torch.Tensor = tensor.full_tensor()
    return found


def shard_axis(tensor: Any) -> int | None:
    """Return the axis along which a tensor lies in shards on several ranks; None for one that is whole here."""
    placements = tensor.placements if hasattr(tensor, "to_local") else ()
    return next((placement.dim for placement in placements if hasattr(placement, "dim")), None)


def shard_of(tensor: Any) -> ShardSpec:
    """Return which shard of a tensor is here."""
    return WHOLE if shard_axis(tensor) is None else ShardSpec.of(tensor)


def dtensor_like(tensor: torch.Tensor, like: Any) -> torch.Tensor:
    """Return a whole tensor as another one is: for a DTensor a DTensor of the shard that is here, on its device."""
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
    """Return zeros of another shape; for a DTensor one that is placed as it is, where the cut axis is as long."""
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
    """The ranks that work on one cascade, and what they exchange besides gradients. By default it is one process alone.

    Every rank must call a method at the same point, as it must a collective of torch.distributed.

    Args:
        handle: a process group of torch.distributed; None for one process.
        device: of the tensors that are exchanged.
        replicas: how often the ranks hold all of the weights: on a mesh of two axes (HSDP) the size of the first one.
    """

    handle: Any = None
    device: torch.device | str = "cpu"
    replicas: int = 1

    @classmethod
    def of(cls, handle: Any = None) -> ProcessGroup:
        """Return that of a process group of torch.distributed; by default all ranks, or one process without any."""
        if not dist.is_available() or not dist.is_initialized():
            return cls()
        handle = dist.group.WORLD if handle is None else handle
        kinds = dist.Backend.backend_capability.get(dist.get_backend(handle), ["cpu"])
        if "cpu" in kinds:
            return cls(handle, torch.device("cpu"))
        return cls(handle, torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device()))

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
        """The ranks that hold all of the weights together, in the order of their shards.

        They are the first ones of the group; the others are replicas of these.
        """
        return list(range(self.size // self.replicas))

    def all(self, flag: bool) -> bool:
        """Whether a flag is set on every rank."""
        return flag if self.handle is None else self.sum(float(not flag)) == 0

    def any(self, flag: bool) -> bool:
        """Whether a flag is set on some rank."""
        return flag if self.handle is None else self.sum(float(flag)) > 0

    def sum(self, number: float) -> float:
        """Return the sum of a number over the ranks, in fp64."""
        return self._reduced(number, "SUM")

    def sum_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over the ranks, on its device; it has the same shape on each."""
        if self.handle is None:
            return tensor
        held = tensor.to(self.device, copy=True)
        with _together():
            dist.all_reduce(held, group=self.handle)
        return held.to(tensor.device)

    def of_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor of the first rank, on its device; it has the same shape on each."""
        if self.handle is None:
            return tensor
        held = tensor.to(self.device, copy=True).contiguous()
        with _together():
            dist.broadcast(held, dist.get_global_rank(self.handle, 0), group=self.handle)
        return held.to(tensor.device)

    def max(self, number: float) -> float:
        """Return the largest of a number over the ranks; nan where it is nan on one."""
        missing = math.isnan(number)
        top = self._reduced(-math.inf if missing else number, "MAX")
        return math.nan if self.any(missing) else top

    def _reduced(self, number: float, operation: str) -> float:
        if self.handle is None:
            return number
        held = torch.tensor([number], dtype=torch.float64, device=self.device)
        with _together():
            dist.all_reduce(held, getattr(dist.ReduceOp, operation), group=self.handle)
        return held.item()

    def gather(self, data: torch.Tensor, call: str) -> list[torch.Tensor]:
        """Return the bytes of every rank, by rank.

        Raises:
            StateError: a process is gone, or has not come within the group's timeout.
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
        """Return the text of every rank, by rank; raises as `gather`."""
        if self.handle is None:
            return [text]
        data = torch.tensor(list(text.encode()), dtype=torch.uint8)
        return [bytes(row.tolist()).decode() for row in self.gather(data, call)]

    def check_alike(self, call: str, facts: Mapping[str, str]) -> None:
        """Refuse ranks that are not alike.

        Args:
            call: for messages.
            facts: what each rank must have as the others do, by what it is. They are sent only where digests differ.

        Raises:
            StateError: some rank has other facts than most; names the ranks and the facts.
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
            f"{call}: the ranks are not alike, and would train different models; start all of them from the same "
            "weights, spec and code:\n" + "\n".join(lines),
            code="ranks-differ",
        )

    @contextlib.contextmanager
    def agreed(self, call: str) -> Iterator[None]:
        """Let a block succeed on all ranks, or raise on all of them, when all have left it. What it asks other ranks
        for inside is asked for on every rank, or on none.

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
                raise StateError(f"{call}: rank {rank} has failed, and with it the others: {text}", code="rank-failed")


@contextlib.contextmanager
def _together(call: str = "") -> Iterator[None]:
    """Name what a collective that does not end means, in the place of the backend's own error.

    Raises:
        StateError: a process is gone, or has not come within the group's timeout.
    """
    try:
        yield
    except RuntimeError as fault:
        raise StateError(
            f"{call}another process is gone, or has not come within the timeout of the process group: {fault}; every "
            "rank has to make this call (transition, save, weights, ...). Start the run anew from its last checkpoint, "
            "on any number of processes",
            code="rank-failed",
        ) from fault


ONE_PROCESS = ProcessGroup()


@dataclass(frozen=True)
class ShardSpec:
    """Which shard of a weight is here: `first` to `first + count` of `total` on an axis, and who holds the others.

    Args:
        first, count, total: of the axis.
        group: the ranks that hold all of the weight together.
        axis: that is cut; None if the weight is whole here (`WHOLE`).
    """

    first: int = 0
    count: int = 0
    total: int = 0
    group: ProcessGroup = ONE_PROCESS
    axis: int | None = None

    @classmethod
    def of(cls, tensor: Any) -> ShardSpec:
        """Return the shard spec of a DTensor that FSDP sharded along one axis, or of a replicated one."""
        mesh, axis = tensor.device_mesh, shard_axis(tensor)
        across = next((place for place, each in enumerate(tensor.placements) if hasattr(each, "dim")), 0)
        handle = mesh.get_group(across)
        group = ProcessGroup.of(handle) if tensor.is_meta else ProcessGroup(handle, tensor.device)
        if axis is None:
            return cls(0, tensor.shape[0], tensor.shape[0], group, 0)
        total = tensor.shape[axis]
        return cls(*chunk_of(total, mesh.size(across), mesh.get_local_rank(across)), total, group, axis)

    def dtensor(self, shard: torch.Tensor, like: Any) -> torch.Tensor:
        """Return the DTensor of which this shard is here, cut as the DTensor `like` is."""
        shape = self.full_shape(shard.shape)
        stride = torch.empty(shape, device="meta").stride()
        mesh, placements = like.device_mesh, like.placements
        made: torch.Tensor = type(like.data).from_local(
            shard, mesh, placements, run_check=False, shape=shape, stride=stride
        )
        return made

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this shard of a whole tensor."""
        return tensor if self.axis is None else tensor.narrow(self.axis, self.first, self.count)

    def whole(self, shard: torch.Tensor) -> torch.Tensor:
        """Return the whole tensor whose shard is here, on its device. Every rank must call this at the same point."""
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
        """Return the shape of a whole tensor whose shard has this one."""
        return shard if self.axis is None else torch.Size((*shard[: self.axis], self.total, *shard[self.axis + 1 :]))

    def std(self, shard: torch.Tensor) -> float:
        """Return the standard deviation of a whole tensor whose shard is here, as `torch.std` does it. All-reduced."""
        count = self.group.sum(shard.numel())
        if count < 2:
            return 0.0
        exact = shard.double()
        mean = self.group.sum(exact.sum().item()) / count
        return math.sqrt(self.group.sum((exact - mean).square_().sum().item()) / (count - 1))


WHOLE = ShardSpec()
"""The shard spec of a weight on one process: its methods return the weight, and its group is one process."""


def chunk_of(total: int, size: int, rank: int) -> tuple[int, int]:
    """Return the first index and the number of entries of a rank's chunk, as `torch.chunk` divides an axis."""
    chunk = -(-total // size)
    first = min(rank * chunk, total)
    return first, min(chunk, total - first)
