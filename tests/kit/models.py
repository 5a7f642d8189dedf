"""Small models in fp64 with weights that are not square, and the steps that every trajectory test repeats."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

import lorasc_fx as lx
from tests.kit import oracle
from tests.kit.compare import seed

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.05),
    "sgd": partial(torch.optim.SGD, lr=5e-2, momentum=0.9),
}

PLAIN = {"rank": 3, "lora_alpha": 4.5, "pace": 1.0}
"""Keywords of a spec that is plain LoRA; its scale is SCALE."""
SCALE = 1.5


def mlp() -> nn.Module:
    """Three linears, [7, 5], [6, 7] and [2, 6], the second without bias."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6, bias=False), nn.GELU(), nn.Linear(6, 2)).double()


def build(make: Callable[[], nn.Module]) -> Any:
    """A model in fp64, the same each time."""
    torch.manual_seed(3)
    return make().double()


def seeded(call: Callable[..., Any], *args: Any) -> Any:
    """What a call returns, with all generators where they were for any other."""
    seed(7)
    return call(*args)


def batches(count: int, *shape: int, seed: int = 2) -> list[torch.Tensor]:
    """Inputs [*shape], the same for the same seed."""
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=source, dtype=torch.float64) for _ in range(count)]


def loss_of(output: Any) -> torch.Tensor:
    """A loss with a gradient at every output, in which outputs of one batch differ."""
    value = output if isinstance(output, torch.Tensor) else output[0]
    target = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view(value.shape)
    return (value - target).square().mean()


def train(model: Callable[..., Any], optimizer: torch.optim.Optimizer, calls: Iterable[Any]) -> torch.Tensor:
    """One step per call (positional inputs, or a dictionary of keywords); returns the losses."""
    losses = []
    for call in calls:
        loss = loss_of(model(**call) if isinstance(call, dict) else model(call))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def optimizer_of(cascade: lx.Cascade, name: str = "adamw") -> torch.optim.Optimizer:
    """One of OPTIMIZERS over the groups that the cascade offers."""
    make: Any = OPTIMIZERS[name]
    return make(cascade.param_groups(**make.keywords))


def branches(cascade: lx.Cascade) -> dict[str, Any]:
    """The branches by the names of their weights, in the order of the sites."""
    return {site.weight: cascade.branches[site.key] for site in cascade.sites}


def factors(cascade: lx.Cascade) -> dict[str, torch.Tensor]:
    """Copies of lora_A by weight name."""
    return {name: branch.lora_A.detach().clone() for name, branch in branches(cascade).items()}


def by_hand(model: nn.Module, cascade: lx.Cascade, **options: Any) -> oracle.Cascade:
    """The reference for an untouched copy of the cascade's model, from the same A."""
    return oracle.Cascade(model, factors(cascade), cascade.sites[0].scale, **options)


def randomize(cascade: lx.Cascade, seed: int = 5, size: float = 0.3) -> None:
    """Give every lora_B values, as training would."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for branch in branches(cascade).values():
            draw = torch.randn(branch.lora_B.shape, generator=source, dtype=torch.float64)
            branch.lora_B.copy_(draw * size)
