"""Checkpoints written in November 2026, which every version that reads format 1 has to read bit for bit.

`python -m tests.checkpoint.golden` writes those that are missing. It never overwrites one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

import lorasc_fx as lx

__all__ = ["FOLDER", "SPECS", "base", "inputs"]

FOLDER = Path(__file__).parent

SPECS = {
    "plain": lx.CascadeSpec(rank=1, pace=0.5),
    "dora": lx.CascadeSpec(rank=1, pace=0.5, adapter="dora"),
    "dora_dense": lx.CascadeSpec(targets=("body",), rank=3, adapter="dora"),
    "pissa": lx.CascadeSpec(rank=1, start="pissa", restart="fast", pace=0.5),
    "average": lx.CascadeSpec(rank=1, average="ema", average_decay=0.5),
    "noise": lx.CascadeSpec(rank=1, noise=lx.Noise(0.2, keep=True)),
    "dense": lx.CascadeSpec(targets=("body",), rank=3, pace=0.5, restart="fast"),
    "trained": lx.CascadeSpec(
        targets=("body",),
        train=("head.*",),
        train_rules=(lx.TrainRule("head.bias", slow=False),),
        rank=1,
        pace=0.7,
        average="swa",
    ),
}


class Net(nn.Module):
    """A convolution, a linear layer whose weight is no square, a norm with buffers, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Linear(16, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.conv(x))).flatten(1)
        result: torch.Tensor = self.head(torch.tanh(self.body(y)))
        return result


def base() -> nn.Module:
    """The model that every one of them was adapted from."""
    model = Net()
    model.load_state_dict(load_file(FOLDER / "base.safetensors"))
    return model.train()


def inputs() -> torch.Tensor:
    """A batch of [5, 2, 2, 2]."""
    return torch.linspace(-1, 1, 40).view(5, 2, 2, 2)
