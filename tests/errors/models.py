"""Small models and steps that the tests of errors and of checkpoints share; no weight is square."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import lorasc_fx as lx
from tests.kit.models import train

SPEC = lx.CascadeSpec(rank=2, lora_alpha=3.0, pace=0.5, noise=lx.Noise(0.1))


def mlp() -> nn.Module:
    """Weights `0.weight` [7, 5], `2.weight` [6, 7], `3.weight` [2, 6]."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6, bias=False), nn.Linear(6, 2))


class Net(nn.Module):
    """Conv, batch norm, dropout, a body and a head: [6, 3, 3, 3], [6, 6/3, 1, 1], [7, 6], [4, 7]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.mix = nn.Conv2d(6, 6, 1, groups=3)
        self.drop = nn.Dropout(0.3)
        self.body = nn.Linear(6, 7)
        self.head = nn.Linear(7, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.norm(self.conv(x)))
        x = self.drop(torch.tanh(self.mix(x)).mean((2, 3)))
        return self.head(torch.tanh(self.body(x)))


def inputs(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapted(
    spec: lx.CascadeSpec = SPEC, model: nn.Module | None = None, frontend: str = "auto"
) -> tuple[lx.Cascade, torch.optim.Optimizer]:
    """A cascade of the mlp (or of a model for [2, 5]) and an AdamW that holds its branches."""
    cascade = lx.adapt(mlp() if model is None else model, args=(inputs(2, 5),), spec=spec, frontend=frontend)
    return cascade, torch.optim.AdamW(cascade.param_groups(lr=0.05))


def step(cascade: Any, optimizer: torch.optim.Optimizer, x: torch.Tensor | None = None) -> torch.Tensor:
    """One training step; returns the loss."""
    return train(cascade, optimizer, [inputs(4, 5, seed=3) if x is None else x])[0]


class Late(nn.Module):
    """`second` is used in train mode only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        return self.second(x) if self.training else x
