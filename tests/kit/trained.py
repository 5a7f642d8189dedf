"""Outputs that can be compared bit by bit between a graph with branches and the model that it was made from."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree


def with_all_gradients(module: nn.Module, *args: Any) -> Any:
    """Return the detached output of a call in which every floating-point parameter requires a gradient.

    torch chooses kernels, and so the order of sums, by `requires_grad`: matmul of a three-dimensional input, lstm and
    attention. A graph with branches has a frozen base, so both sides of a comparison have to be called like this.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
        return pytree.tree_map_only(Tensor, Tensor.detach, module(*args))
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
