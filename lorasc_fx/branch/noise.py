"""The noise of a stage: `N = strength * std(W) * U(-1/2, 1/2)`, or a normal of the same variance.

Source: NoisyTune (2202.12024) for the form; algorithm.md, row "noise".
"""

from __future__ import annotations

import math

import torch

from lorasc_fx.branch.address import generator
from lorasc_fx.branch.rows import Rows
from lorasc_fx.spec import Noise

__all__ = ["amplitude", "draw"]


def amplitude(noise: Noise, weight: torch.Tensor, rows: Rows | None = None) -> float:
    """Return `strength * std(W)`; the standard deviation of one value, or of none, is 0.

    With rows the weight is a part of W, and every process asks at the same time.
    """
    if noise.strength and rows is not None:
        return noise.strength * _size_together(weight, rows)
    if noise.strength == 0 or weight.numel() < 2:
        return 0.0
    size = weight.std().item()
    if not 0 < size < math.inf:  # of numbers whose squares leave the dtype, or of equal ones
        top = weight.abs().max().item()
        size = top * (weight / top).std().item() if 0 < top < math.inf else top
    return noise.strength * size


def _size_together(weight: torch.Tensor, rows: Rows) -> float:
    """Return the standard deviation of a weight of which each process holds rows."""
    size = rows.spread(weight)
    if 0 < size < math.inf:
        return size
    top = rows.together.largest(weight.abs().max().item() if weight.numel() else 0.0)
    return top * rows.spread(weight / top) if 0 < top < math.inf else top


def draw(noise: Noise, seed: int, stage: int, name: str, shape: torch.Size, rows: Rows | None = None) -> torch.Tensor:
    """Return the unscaled noise of this address, in fp32 on the CPU: U(-1/2, 1/2), or N(0, 1/12).

    With rows it is that of those alone, of which the weight here has its shape; all of it is drawn for a moment.
    """
    if rows is not None:
        return rows.of_whole(draw(noise, seed, stage, name, rows.shape_of_whole(shape))).clone()
    source = generator(seed, stage, "noise", name)
    if noise.distribution == "uniform":
        return torch.rand(shape, generator=source, dtype=torch.float32).sub_(0.5)
    return torch.randn(shape, generator=source, dtype=torch.float32).mul_(12**-0.5)
