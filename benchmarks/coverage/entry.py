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
        source: file of the library that defines it, without folder and suffix.
        build: makes the model, with random weights from torch's generator.
        inputs: makes the arguments of a call in train (True) or eval mode (False), from torch's generator; fp64.
        unused: patterns of weights whose branch provably gets no gradient, with the reason.
        tolerance: of the output with branches, over its scale. It is above 1e-12 only if the model computes in fp32
            inside, whatever its dtype, or amplifies rounding.
    """

    name: str
    source: str
    build: Callable[[], nn.Module]
    inputs: Callable[[bool], Call]
    unused: Mapping[str, str] = field(default_factory=dict)
    tolerance: float = 1e-12


def images(*shape: int) -> Callable[[bool], Call]:
    """Return a maker of one batch of images [batch, channels, ...]."""
    return lambda training: ((torch.randn(*shape, dtype=torch.float64),), {})


def built(entry: Entry) -> nn.Module:
    """Return the model in fp64, with other gains and biases than the zeros and ones of its library."""
    seed(0)
    model = entry.build().double()
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() < 2 or not value.any():
                value.add_(0.1 * torch.randn_like(value))
    return model
