"""What every comparison repeats: seeded inputs and calls, and how far two outputs are apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def normal(*shape: int, seed: int = 2) -> torch.Tensor:
    """Inputs in fp64, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(model: Callable[..., Any], args: Sequence[Any]) -> torch.Tensor:
    """Call with the same dropout masks each time; of transformers' outputs the logits."""
    torch.manual_seed(7)
    output = model(*args)
    return getattr(output, "logits", output)


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference of two outputs of one shape."""
    assert one.shape == other.shape
    return (one.double() - other.double()).abs().max().item()
