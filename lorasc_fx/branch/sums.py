"""Sums of pairs of factors, and the dtypes in which weights and deltas are computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorasc_fx.branch.kept import Factors

__all__ = ["arithmetic", "joined", "summing"]


def joined(
    pairs: Sequence[tuple[float, Factors]], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `b` and `a` of all pairs side by side, the coefficients in `b`; of one pair that fits, its own tensors.

    Both are row-major: BLAS rounds the product of a transposed factor differently, and a checkpoint keeps no strides.
    """
    one = pairs[0][1] if len(pairs) == 1 else None
    b = one.b if one is not None else torch.cat([factors.b for _, factors in pairs], dim=-1)
    a = one.a if one is not None else torch.cat([factors.a for _, factors in pairs], dim=-2)
    b, a = b.to(device=device, dtype=dtype), a.to(device=device, dtype=dtype)
    if any(c != pairs[0][0] for c, _ in pairs):
        columns = [c for c, factors in pairs for _ in range(factors.b.shape[-1])]
        b = b * torch.tensor(columns, dtype=dtype, device=device)
    elif pairs[0][0] != 1:
        b = b * pairs[0][0]
    return _row_major(b), _row_major(a)


def _row_major(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor with the strides of a new one; `contiguous` leaves those of axes of length 1 as they are."""
    strides = torch.empty(tensor.shape, device="meta").stride()
    return tensor if tensor.stride() == strides else tensor.clone(memory_format=torch.contiguous_format)


def summing(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a dense delta, to which every stage adds: fp64, so that its sum is rounded once however many
    there were; fp32 is fine enough for weights that are narrower.
    """
    return torch.float64 if dtype.itemsize >= 4 else torch.float32


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which weights of this dtype are computed: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
