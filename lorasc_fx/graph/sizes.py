"""Sizes of what nodes compute, as front ends note them: numbers, with a hint where a size is symbolic."""

from __future__ import annotations

import math

import torch
from torch import fx

__all__ = ["entries", "shape_of"]


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Return the sizes of a node's tensor in the call that was captured; None where nothing is known of it."""
    for name in ("val", "example_value", "tensor_meta"):
        found = node.meta.get(name)
        shape = getattr(found, "shape", None)
        if isinstance(shape, (tuple, list, torch.Size)):
            sizes = [_number(size) for size in shape]
            return None if None in sizes else tuple(size for size in sizes if size is not None)
    return None


def entries(node: fx.Node) -> int:
    """Return how many entries a node's tensor has; 0 where nothing is known of it."""
    shape = shape_of(node)
    return math.prod(shape) if shape is not None else 0


def _number(size: int | torch.SymInt) -> int | None:
    """Return a size as it was in that call; None for one that follows from values, or differs within a tensor."""
    hint = size if isinstance(size, int) else getattr(size.node, "hint", None)
    return hint if isinstance(hint, int) else None
