"""A small training in fp64 with the same global batch on any number of processes."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lorasc_fx as lx
from tests.kit.data import batches_from

SPECS: dict[str, dict[str, Any]] = {
    "fresh": {"noise": {"strength": 0.1, "keep": True}},
    "fast": {"restart": "fast", "noise": {"strength": 0.1, "distribution": "normal"}},
}
STAGES, STEPS, ROWS = 3, 2, 8


class Net(nn.Module):
    """A model with an embedding, a convolution, a norm and linear layers. No weight is square."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 9, 3)
        self.norm = nn.LayerNorm(9)
        self.up, self.down = nn.Linear(9, 10), nn.Linear(10, 7)
        self.head = nn.Linear(7, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.conv(self.table(tokens).transpose(1, 2)).transpose(1, 2)
        return self.head(torch.tanh(self.down(F.gelu(self.up(self.norm(hidden))))).mean(1))


def net() -> Net:
    torch.manual_seed(1)
    return Net().double()


def spec_of(name: str) -> lx.CascadeSpec:
    return lx.CascadeSpec.from_dict({"rank": 2, "pace": 0.6, "train": ("norm.*",), "seed": 5, **SPECS[name]})


def data() -> list[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(2)
    count = 4 * ROWS
    tokens = torch.randint(11, (count, 5), generator=source)
    return list(zip(tokens, torch.randint(4, (count,), generator=source), strict=True))


def adapted(name: str) -> lx.Cascade:
    return lx.adapt(net(), args=(data()[0][0][None],), spec=spec_of(name))


def optimizer_of(cascade: lx.Cascade) -> torch.optim.Optimizer:
    return torch.optim.AdamW(cascade.param_groups(lr=0.02))


def batches(start: int, rank: int, count: int) -> Iterator[Any]:
    return batches_from(start, data(), ROWS, rank, count)  # type: ignore[arg-type]


def step(model: nn.Module, optimizer: Any, done: int, share: tuple[int, int]) -> None:
    """Run the optimizer step after `done` steps, over two batches with one all-reduce."""
    source = batches(2 * done, *share)
    for index in range(2):
        tokens, labels = next(source)
        wait = model.no_sync() if isinstance(model, DistributedDataParallel) and not index else contextlib.nullcontext()
        with wait:
            (F.cross_entropy(model(tokens), labels) / 2).backward()
    optimizer.step()
    optimizer.zero_grad()


def ends_stage(done: int) -> bool:
    return done % STEPS == 0 and done < STAGES * STEPS


def run(model: nn.Module, optimizer: Any, done: int, until: int, share: tuple[int, int]) -> None:
    """Continue after `done` steps, with a cascade or a wrapper around it, and a transition after every STEPS steps."""
    cascade: Any = model.module if isinstance(model, DistributedDataParallel) else model
    while done < until:
        step(model, optimizer, done, share)
        done += 1
        if ends_stage(done):
            cascade.transition(optimizer)


def values(cascade: lx.Cascade) -> dict[str, Tensor]:
    """Return slow and fast weights, and the factors of the running stage."""
    tensors = {name: value.detach().clone() for name, value in cascade.branches.named_parameters()}
    for view in ("slow", "fast"):
        with cascade.weights(view):  # type: ignore[arg-type]
            tensors |= {f"{view}/{name}": value.detach().clone() for name, value in cascade.model.named_parameters()}
    return tensors


def alone(name: str, until: int = STAGES * STEPS) -> dict[str, Tensor]:
    cascade = adapted(name)
    run(cascade, optimizer_of(cascade), 0, until, (0, 1))
    return values(cascade)


def under_ddp(rank: int, count: int, names: Iterable[str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in names:
        torch.manual_seed(100 + rank)  # no process owes its numbers to a common generator
        cascade = adapted(name)
        wrapper = DistributedDataParallel(cascade, find_unused_parameters=False)
        run(wrapper, optimizer_of(cascade), 0, STAGES * STEPS, (rank, count))
        tensors |= {f"{name}/{key}": value for key, value in values(cascade).items()}
    return tensors


# ---- a run that is saved, killed and resumed


def saved_then_killed(rank: int, count: int, name: str, folder: str, at: int) -> None:
    """Save after `at` steps. Then the last process dies during a step of the others."""
    cascade = adapted(name)
    wrapper, optimizer = DistributedDataParallel(cascade), optimizer_of(cascade)
    run(wrapper, optimizer, 0, at, (rank, count))
    torch.manual_seed(rank)
    path = lx.save(wrapper, folder, optimizer=optimizer, extra={"steps": at}, keep=2)
    assert path.parent == Path(folder)
    if rank == count - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    run(wrapper, optimizer, at, at + 2, (rank, count))


def resumed(rank: int, count: int, name: str, folder: str, until: int, part: int = 0) -> dict[str, Tensor]:
    """Continue on all processes, or on the first `count` ones as a separate group."""
    group = dist.new_group(range(part)) if part else None
    if rank >= (part or count):
        return {}
    count = part or count
    cascade = lx.load(folder, net(), args=(data()[0][0][None],))
    wrapper, optimizer = DistributedDataParallel(cascade, process_group=group), optimizer_of(cascade)
    extra = cascade.resume(optimizer, group=group)
    assert list(extra) == ["steps"]
    run(wrapper, optimizer, extra["steps"], until, (rank, count))
    return {**values(cascade), "drawn": torch.rand(3)}
