"""A network in fp64 whose layers are stages of torch's pipeline parallelism, each a cascade on a process of its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, SplitPoint, pipeline

import lorasc_fx as lx
from lorasc_fx.integrations import pipelining

SPEC = lx.CascadeSpec(rank=2, pace=0.6, noise=lx.Noise(0.1), train=("*norm*",), seed=5, restart="fast")
WIDTH, ROWS, MICROBATCHES, STEPS = 6, 8, 2, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """A part that is None, or a layer that was deleted, is on another process."""

    def __init__(self) -> None:
        super().__init__()
        self.embed: nn.Module | None = nn.Linear(5, WIDTH)
        self.layers = nn.ModuleDict({str(index): Block() for index in range(3)})
        self.head: nn.Module | None = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) if self.embed is not None else x
        for layer in self.layers.values():
            x = layer(x)
        return self.head(x) if self.head is not None else x


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def by_hand(rank: int, example: Tensor) -> nn.Module:
    model = net()
    if rank == 0:
        model.head = None
        del model.layers["1"], model.layers["2"]
    else:
        model.embed = None
        del model.layers["0"]
    return model


def by_torch(rank: int, example: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 copies what it has deprecated
        whole = pipeline(net(), (batch(0)[0][: len(example)],), split_spec={"layers.1": SplitPoint.BEGINNING})
    return torch.export.export(whole.get_stage_module(rank), (example,))


CUTS: dict[str, Callable[[int, Tensor], Any]] = {"by hand": by_hand, "by torch": by_torch}


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(ROWS, 5, generator=generator).double(), torch.randint(4, (ROWS,), generator=generator)


def alone() -> dict[str, Tensor]:
    cascade = lx.adapt(net(), args=(batch(0)[0],), spec=SPEC)
    optimizer, losses = torch.optim.AdamW(cascade.param_groups(lr=0.02)), []
    for stage in cascade.stages(2, optimizer):
        for step in range(STEPS):
            x, labels = batch(10 * stage.number + step)
            loss = F.cross_entropy(cascade(x), labels)
            loss.backward()
            losses.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
    return {**cascade.release().state_dict(), "losses": torch.stack(losses)}


def split(rank: int, count: int, folder: str) -> dict[str, Tensor]:
    """The graph of the whole cascade, split by torch where our pass has marked it: two stages of the cascade."""
    rows, device = ROWS // MICROBATCHES, torch.device("cpu")
    cascade = lx.adapt(net(), args=(batch(0)[0],), spec=SPEC)
    optimizer, means = torch.optim.AdamW(cascade.param_groups(lr=0.02)), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 copies what it has deprecated
        pipe = pipelining.split(cascade, ["layers.1"], args=(batch(0)[0][:rows],))
    assert pipe.num_stages == count
    own = {id(each): name for name, each in cascade.named_parameters()}
    held = [own[id(each)] for each in pipe.get_stage_module(rank).parameters()]
    here = [name for name in own.values() if is_first(name) == (rank == 0)]
    assert sorted(held) == sorted(here)
    schedule = Schedule1F1B(pipe.build_stage(rank, device), MICROBATCHES, loss_fn=F.cross_entropy)
    for part in cascade.stages(2, optimizer):
        for step in range(STEPS):
            x, labels = batch(10 * part.number + step)
            losses: list[Tensor] = []
            schedule.step(*[x][rank:], target=labels if rank else None, losses=losses)
            means += [torch.stack(losses).mean().detach()] if rank else []
            optimizer.step()
            optimizer.zero_grad()
    lx.save(cascade, f"{folder}/{rank}")
    found = {name: value for name, value in cascade.release().state_dict().items() if f"model.{name}" in held}
    return {**found, "losses": torch.stack(means)} if means else found


def is_first(name: str) -> bool:
    """Whether a parameter of the cascade belongs to the first stage."""
    return name.replace("/", ".").partition(".")[2].startswith(("embed", "layers.0"))


def staged(rank: int, count: int, base: str, folder: str) -> dict[str, Tensor]:
    """Two stages of the pipeline, two of the cascade; the base's file is folded by one process after the other."""
    found = {}
    rows = ROWS // MICROBATCHES
    example = batch(0)[0][:rows] if rank == 0 else torch.randn(rows, WIDTH).double().requires_grad_()
    for name, cut in CUTS.items():
        cascade = lx.adapt(cut(rank, example), args=(example.detach(),), spec=SPEC)
        with torch.no_grad():
            output = cascade(example)
        stage = PipelineStage(
            cascade, rank, count, torch.device("cpu"), input_args=(example,), output_args=(output.requires_grad_(),)
        )
        schedule = Schedule1F1B(stage, MICROBATCHES, loss_fn=F.cross_entropy)
        optimizer, means = torch.optim.AdamW(cascade.param_groups(lr=0.02)), []
        for part in cascade.stages(2, optimizer):
            for step in range(STEPS):
                x, labels = batch(10 * part.number + step)
                losses: list[Tensor] = []
                schedule.step(*[x][rank:], target=labels if rank else None, losses=losses)
                means += [torch.stack(losses).mean().detach()] if rank else []
                optimizer.step()
                optimizer.zero_grad()
        for turn in range(count):
            if turn == rank:
                before = Path(folder, f"{name} {rank - 1}.safetensors") if rank else base
                lx.export.safetensors(cascade, Path(folder, f"{name} {rank}.safetensors"), base=before)
            dist.barrier()
        found |= {f"{name}/{key}": value for key, value in cascade.release().state_dict().items()}
        found |= {f"{name}/losses": torch.stack(means)} if means else {}
    return found
