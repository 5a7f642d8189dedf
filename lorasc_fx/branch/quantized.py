"""Weights of a quantized base: tensor subclasses that compute in their own way and give back a dense tensor.

Nothing of a library is imported: a quantized weight is a wrapper subclass with a `dequantize` of its own (torchao's
int8, int4 and float8 weights are). It is never written to; what the stages added is carried by its branch.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["dense", "is_quantized"]


def is_quantized(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one of a quantized base."""
    return is_traceable_wrapper_subclass(tensor) and type(tensor).dequantize is not torch.Tensor.dequantize


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Return the numbers of a weight as a plain tensor, in its own dtype."""
    plain: torch.Tensor = tensor.detach().dequantize() if is_quantized(tensor) else tensor
    return plain
