"""The noise of a stage: `N = strength * std(W) * U(-1/2, 1/2)`, or a normal of the same variance.

Source: NoisyTune (2202.12024) for the form; algorithm.md, row "noise".
"""

from __future__ import annotations

import math

import torch

from lorasc_fx.branch.address import generator
from lorasc_fx.branch.part import Part
from lorasc_fx.spec import Noise

__all__ = ["amplitude", "draw"]


def amplitude(noise: Noise, weight: torch.Tensor, part: Part | None = None) -> float:
    """Return `strength * std(W)`, of the whole W where `weight` is a part; that of one value, or of none, is 0."""
    if noise.strength == 0 or (weight.numel() if part is None else math.prod(part.whole)) < 2:
        return 0.0
    size = _std(weight, part)
    if not 0 < size < math.inf:  # of numbers whose squares leave the dtype, or of equal ones
        top = weight.abs().max().item() if part is None else part.largest(weight)
        size = top * _std(weight / top, part) if 0 < top < math.inf else top
    return noise.strength * size


def _std(weight: torch.Tensor, part: Part | None) -> float:
    return weight.std().item() if part is None else part.std(weight)


def draw(noise: Noise, seed: int, stage: int, name: str, shape: torch.Size, part: Part | None = None) -> torch.Tensor:
    """Return the unscaled noise of this address, in fp32 on the CPU: U(-1/2, 1/2), or N(0, 1/12); of the whole weight,
    cut where `part` says so, whatever the number of processes.
    """
    if part is not None:
        return part.cut(draw(noise, seed, stage, name, torch.Size(part.whole)))
    source = generator(seed, stage, "noise", name)
    if noise.distribution == "uniform":
        return torch.rand(shape, generator=source, dtype=torch.float32).sub_(0.5)
    return torch.randn(shape, generator=source, dtype=torch.float32).mul_(12**-0.5)
