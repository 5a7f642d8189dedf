"""An architecture of the zoo: how to build it with small sizes, and how to call it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from tests.kit.compare import Call, seed


@dataclass(frozen=True)
class Entry:
    """One architecture, with small sizes.

    Args:
        name: unique in the zoo.
        source: the file of the library that defines the architecture, without folder and suffix.
        build: makes the model, with random weights from torch's generator.
        inputs: makes fp64 arguments of a call in train (True) or eval mode (False), from torch's generator.
        unused: {pattern of weight names: reason why their branches get no gradient}.
        tolerance: maximum error of the output with branches, relative to its scale. It is above 1e-12 only if the model
            always computes a part in fp32, or amplifies rounding errors.
    """

    name: str
    source: str
    build: Callable[[], nn.Module]
    inputs: Callable[[bool], Call]
    unused: Mapping[str, str] = field(default_factory=dict)
    tolerance: float = 1e-12


def images(*shape: int) -> Callable[[bool], Call]:
    """Return a maker of random images of shape [batch, channels, ...]."""
    return lambda training: ((torch.randn(*shape, dtype=torch.float64),), {})


def built(entry: Entry) -> nn.Module:
    """Return the model in fp64, with noise on vectors and on zero tensors, whose initial values would hide errors."""
    seed(0)
    model = entry.build().double()
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() < 2 or not value.any():
                value.add_(0.1 * torch.randn_like(value))
    return model
