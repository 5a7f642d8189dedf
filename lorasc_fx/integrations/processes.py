"""What the processes of a run say to each other besides gradients: errors, names, and their random generators."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import torch
import torch.distributed as dist

from lorasc_fx.branch import generator
from lorasc_fx.errors import StateError
from lorasc_fx.runtime.training_state import random_state, set_random_state

__all__ = ["RANKS", "agreed", "gathered", "reseed", "streams", "text_of_rank_0", "texts"]

RANKS = "lorasc_fx.ranks"
"""Where a checkpoint keeps the random generators of all processes."""


def reseed(streams: list[torch.Tensor], rank: int, count: int, stage: int) -> None:
    """Give this process the generators that it had, or on another number of processes ones of its own."""
    if len(streams) == count:
        held = json.loads(_text(streams[rank]))
        tensors = {name: torch.tensor(state, dtype=torch.uint8) for name, state in held["tensors"].items()}
        set_random_state(tensors, held["meta"])
        return
    drawn = torch.randint(2**62, ()).item()
    torch.manual_seed(generator(int(drawn), stage, "rank", f"{rank} of {count}").initial_seed())


def streams() -> torch.Tensor:
    """Return the random generators of this process, as bytes."""
    tensors, meta = random_state()
    return _bytes(json.dumps({"tensors": {name: each.tolist() for name, each in tensors.items()}, "meta": meta}))


@contextlib.contextmanager
def agreed(call: str, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Let the block succeed on all processes or raise on all of them; ends when every process has come to its end."""
    fault: BaseException | None = None
    try:
        yield
    except Exception as raised:
        fault = raised
    told = texts("" if fault is None else f"{type(fault).__name__}: {fault}", group, call)
    if fault is not None:
        raise fault
    for rank, each in enumerate(told):
        if each:
            raise StateError(f"{call}: rank {rank} has failed, and with it the others: {each}", code="rank-failed")


def gathered(own: torch.Tensor, group: dist.ProcessGroup | None, call: str) -> list[torch.Tensor]:
    """Return the bytes of every process, by rank.

    Raises:
        StateError: a process is gone, or has not come within the group's timeout.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else "cpu"
    own, count = own.to(device), dist.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(count)]
    try:
        dist.all_gather(sizes, torch.tensor([own.numel()], device=device), group=group)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8, device=device)
        padded[: own.numel()] = own
        found = [torch.zeros_like(padded) for _ in range(count)]
        if longest:
            dist.all_gather(found, padded, group=group)
    except RuntimeError as fault:
        raise StateError(
            f"{call}: another process is gone, or has not come within the timeout of the process group: {fault}; start "
            "the run anew from its last checkpoint, on any number of processes",
            code="process-lost",
        ) from fault
    return [each[: int(size)].cpu() for each, size in zip(found, sizes, strict=True)]


def _bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _text(data: torch.Tensor) -> str:
    return bytes(data.tolist()).decode()


def texts(text: str, group: dist.ProcessGroup | None, call: str) -> list[str]:
    """Return what every process says, by rank."""
    return [_text(each) for each in gathered(_bytes(text), group, call)]


def text_of_rank_0(text: str, group: dist.ProcessGroup | None, call: str) -> str:
    """Return what rank 0 says."""
    return texts(text, group, call)[0]
