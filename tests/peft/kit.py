"""Helpers for comparisons: seeded inputs and calls, and the difference of two outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def normal(*shape: int, seed: int = 2) -> torch.Tensor:
    """Return random inputs in fp64, which depend only on the seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(model: Callable[..., Any], args: Sequence[Any]) -> torch.Tensor:
    """Call a model with fixed dropout masks. For an output of transformers, return the logits."""
    torch.manual_seed(7)
    output = model(*args)
    return getattr(output, "logits", output)


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest absolute difference of two outputs with the same shape."""
    assert one.shape == other.shape
    return (one.double() - other.double()).abs().max().item()
