"""A small network of blocks trained in fp64, with the same global batch on any number of processes."""

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
from lorasc_fx.branch import METHODS
from tests.kit.data import batches_from

SPECS: dict[str, dict[str, Any]] = {
    "fresh": {"noise": {"strength": 0.1, "keep": True}},  # its experts outgrow their weights, and are summed
    "fast": {
        "rank": 1,
        "exclude": ("head.*", "table.*"),
        "restart": "fast",
        "restart_factors": "B",
        "noise": {"strength": 0.1, "distribution": "normal", "where": "all"},
    },
    "averaged": {
        "exclude": ("head.*",),
        "optimizer_state": 0.5,
        "average": True,
        "noise": {"strength": 0.1, "distribution": "normal"},
        "slow_train": False,
    },
    "dora": {"adapter": "dora", "exclude": ("table.*",), "noise": {"strength": 0.1}, "restart_factors": "B"},
    "pairs": {"rank": 4, "restart_factors": "none", "noise": {"strength": 0.1}},
    "tokens": {"rules": ({"pattern": "table.*", "tokens": (1, 4, 6)},), "noise": {"strength": 0.1}},
    "pissa": {"start": "pissa", "noise": {"strength": 0.1}, "restart": "fast"},
    "dora, pissa": {"adapter": "dora", "start": "pissa", "exclude": ("table.*",)},
    "frozen A": {"train_A": False, "average": True},
    "merged": {"placement": "merged", "pace": 1.0, "optimizer_state": "kept", "exclude": ("table.*",)},
    **{
        name: {"adapter": name, "noise": {"strength": 0.1}, "exclude": ("table.*",) if name == "lokr" else ()}
        for name in METHODS
        if name not in ("lora", "dora")
    },
    "delora": {"adapter": "delora", "adapter_options": [["bound", 1.0]], "noise": {"strength": 0.1}},
}
UNDER_DDP = ("fresh", "pissa")
STEPS, TOTAL, ROWS = 2, 6, 8
"""Steps of a stage, and of all three; rows of a batch."""


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.mix = nn.Parameter(torch.randn(width, width + 1) / 4)  # stored [in, out]
        self.back = nn.Conv1d(width + 1, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return x + self.back((x @ self.mix).transpose(1, 2)).transpose(1, 2)


class Blocks(nn.Module):
    """A model with an embedding that is tied to a part of the head, blocks, and a head."""

    def __init__(self, depth: int = 2, width: int = 6, inner: int = 9) -> None:
        super().__init__()
        self.table = nn.Embedding(11, width)
        self.start = nn.Parameter(torch.randn(1, 1, width))
        self.layers = nn.ModuleList(Block(width, inner) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = torch.cat([self.start.expand(x.shape[0], -1, -1), x], 1)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x).mean(1)
        return self.head(x) + F.linear(x, self.table.weight)[:, :4]


def blocks() -> Blocks:
    torch.manual_seed(1)
    return Blocks().double()


def data() -> list[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(2)
    count = 4 * ROWS
    tokens = torch.randint(11, (count, 5), generator=source)
    return list(zip(tokens, torch.randint(4, (count,), generator=source), strict=True))


def example() -> Tensor:
    return torch.stack([tokens for tokens, _ in data()[:3]])


def adapted(name: str) -> lx.Cascade:
    spec = lx.CascadeSpec.from_dict({"rank": 2, "pace": 0.6, "train": ("*norm*",), "seed": 5, **SPECS[name]})
    return lx.adapt(blocks(), args=(example(),), spec=spec)


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
    return done % STEPS == 0 and done < TOTAL


def run(model: nn.Module, optimizer: Any, done: int, until: int, share: tuple[int, int]) -> None:
    """Continue after `done` steps, with a cascade or a wrapper around it, and a transition after every STEPS steps."""
    cascade: Any = model.module if isinstance(model, DistributedDataParallel) else model
    while done < until:
        step(model, optimizer, done, share)
        done += 1
        if ends_stage(done):
            cascade.transition(optimizer)


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[no-any-return]


def full_parameters(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {f"{prefix}{name}": full(value.detach()).clone() for name, value in module.named_parameters()}


def values(cascade: lx.Cascade) -> dict[str, Tensor]:
    """Return factors, and parameters and outputs for each view of the weights, as full tensors."""
    tokens = example()
    tensors = full_parameters(cascade, "live/")
    cascade.eval()
    average = ("averaged",) if cascade.plan.spec.average else ()
    for view in ("slow", "fast", "base", *average):
        with cascade.weights(view), torch.no_grad():  # type: ignore[arg-type]
            tensors[f"{view}/output"] = cascade(tokens)
            tensors |= full_parameters(cascade.model, f"{view}/")
    with torch.no_grad():
        tensors["output"] = cascade(tokens)
    cascade.train()
    return tensors


def under_ddp(rank: int, count: int, names: Iterable[str] = UNDER_DDP) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in names:
        torch.manual_seed(100 + rank)  # no process owes its numbers to a common generator
        cascade = adapted(name)
        wrapper = DistributedDataParallel(cascade, find_unused_parameters=False)
        run(wrapper, optimizer_of(cascade), 0, TOTAL, (rank, count))
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


def resumed(rank: int, folder: str, part: int) -> dict[str, Tensor]:
    """Continue on the first `part` processes, as a separate group."""
    group = dist.new_group(range(part))
    if rank >= part:
        return {}
    cascade = lx.load(folder, blocks(), args=(example(),))
    wrapper, optimizer = DistributedDataParallel(cascade, process_group=group), optimizer_of(cascade)
    extra = cascade.resume(optimizer, group=group)
    assert list(extra) == ["steps"]
    run(wrapper, optimizer, extra["steps"], TOTAL, (rank, part))
    return {**values(cascade), "drawn": torch.rand(3)}
