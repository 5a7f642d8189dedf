"""Random small models: linear, conv, shared, tied, several inputs. Plain torch; no weight is square."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS, LENGTH, WORDS = 4, 6, 7


@dataclass(frozen=True)
class Build:
    """Options of a model.

    Args:
        groups: of a conv before the rest, 0 is none. norm: with a batch norm behind it.
        again: `mix` is called twice, with `back` between. tied: `twin` holds `mix`'s own weight.
        words: an embedding of a third input, whose table is the head of a second output.
        seed: of the weights.
    """

    groups: int
    norm: bool
    again: bool
    tied: bool
    words: bool
    seed: int


class Net(nn.Module):
    """`forward(x, y=None, ids=None)`, x [batch, CHANNELS, LENGTH], y [batch, 2], ids [batch]; `other` is used with a y
    alone.
    """

    def __init__(self, build: Build) -> None:
        super().__init__()
        torch.manual_seed(build.seed)
        self.build = build
        width = 6 if build.groups else CHANNELS
        self.conv = nn.Conv1d(CHANNELS, 6, 3, padding=1, groups=build.groups) if build.groups else nn.Identity()
        self.norm = nn.BatchNorm1d(6) if build.groups and build.norm else nn.Identity()
        self.first = nn.Linear(width, 5)
        self.other = nn.Linear(2, 5)
        self.mix = nn.Linear(5, 3)
        if build.again:
            self.back = nn.Linear(3, 5, bias=False)
        if build.tied:
            self.twin = nn.Linear(5, 3)
            self.twin.weight = self.mix.weight
        if build.words:
            self.words = nn.Embedding(WORDS, 5)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor, y: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        h = torch.tanh(self.norm(self.conv(x)))
        h = torch.tanh(self.first(h.movedim(1, -1)))
        if y is not None:
            h = h + self.other(y).unsqueeze(1)
        if ids is not None:
            h = h + self.words(ids).unsqueeze(1)
        z = self.mix(h)
        if self.build.again:
            z = self.mix(torch.tanh(self.back(torch.tanh(z))))
        if self.build.tied:
            z = z + self.twin(torch.tanh(h))
        out = self.head(torch.tanh(z))
        return torch.cat([out, F.linear(h, self.words.weight)], -1) if ids is not None else out

    def matrices(self, with_y: bool) -> list[str]:
        """Names of the weight matrices that a call uses; of a tied pair its first name."""
        names = ["conv"] if self.build.groups else []
        names += ["first"] + (["other"] if with_y else []) + ["mix"]
        names += (["back"] if self.build.again else []) + (["words"] if self.build.words else []) + ["head"]
        return [f"{name}.weight" for name in names]


def inputs(build: Build, batch: int, seed: int, with_y: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments of a call."""
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, CHANNELS, LENGTH, generator=source, dtype=torch.float64).to(dtype)
    y = torch.randn(batch, 2, generator=source, dtype=torch.float64).to(dtype) if with_y else None
    ids = torch.randint(0, WORDS, (batch,), generator=source) if build.words else None
    return (x, y, ids) if ids is not None else (x, y) if y is not None else (x,)


def loss_of(output: Tensor) -> Tensor:
    """A loss with another gradient at every output."""
    target = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return (output - target.to(output.device)).square().mean()
