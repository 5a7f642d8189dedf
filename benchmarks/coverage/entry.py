"""What the zoo knows of an architecture: how to build it small, and how to call it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tests.kit.compare import seed

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """One architecture, small by configuration.

    Args:
        name: unique in the zoo.
        source: file of the library that holds it, without folder and suffix.
        build: makes the model anew, with random weights from torch's generator.
        inputs: makes the arguments of a call in train (True) or eval mode (False), anew from torch's generator; fp64.
        unused: globs on weights whose branch the outputs provably do not move, with the reason.
        tolerance: of a branch beside its merged weight, over the scale of the output; above 1e-12 only `because` the
            model computes in fp32 inside, whatever its dtype, or amplifies rounding.
    """

    name: str
    source: str
    build: Callable[[], nn.Module]
    inputs: Callable[[bool], Call]
    unused: Mapping[str, str] = field(default_factory=dict)
    tolerance: float = 1e-12
    because: str = ""


def images(*shape: int) -> Callable[[bool], Call]:
    """Return a maker of one batch of images [batch, channels, ...]."""
    return lambda training: ((torch.randn(*shape, dtype=torch.float64),), {})


def built(entry: Entry) -> nn.Module:
    """Return the model in fp64, without the zeros and ones that a library starts gains and biases with."""
    seed(0)
    model = entry.build().double()
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() < 2 or not value.any():
                value.add_(0.1 * torch.randn_like(value))
    return model
