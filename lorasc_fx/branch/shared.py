"""One product for the branches that read one input: with their lora_A stacked the input is read once, not per branch.

`A x` of all of them is made together, forward and backward; each branch then adds its own `s B (A x)` (algorithm.md,
row "training"): the same numbers as apart, up to the order of a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from lorasc_fx.branch.skinny import apply, by_hand, computes_in, down, factor_gradient, folded, in_own_dtype, owned, up

__all__ = ["SharedUp", "shared_down"]


def shared_down(x: torch.Tensor, factors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return `x A^T` [..., rank] for each lora_A [rank, in] of the factors, of x [..., in]."""
    ranks = [each.shape[0] for each in factors]
    if by_hand(x):
        x = x.to(computes_in(x))
        low = apply(_SharedDown, x, *(each.to(x.dtype) for each in factors))
    else:
        low = F.linear(x, torch.cat([each.to(x.dtype) for each in factors]))
    return tuple(torch.split(low, ranks, -1))


class _SharedDown(torch.autograd.Function):
    """`apply(x [..., in], *lora_A [rank, in])` of one dtype: `x A^T` [..., sum of ranks]."""

    @staticmethod
    @in_own_dtype
    def forward(ctx: Any, x: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        """Return the stacked product."""
        ctx.shape = x.shape
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1:]) else None, *factors)
        low = down(torch.cat(factors), folded(x.reshape(-1, x.shape[-1])))
        return owned(low.transpose(1, 2).reshape(*x.shape[:-1], -1))

    @staticmethod
    @in_own_dtype
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x and of each lora_A."""
        x, *factors = ctx.saved_tensors
        stacked, slopes = torch.cat(factors), gradient.reshape(-1, gradient.shape[-1])
        dx = (slopes @ stacked).view(ctx.shape) if ctx.needs_input_grad[0] else None
        if x is None:
            return dx, *(None for _ in factors)
        total = factor_gradient(folded(slopes).transpose(1, 2), folded(x.reshape(-1, x.shape[-1])))
        return dx, *total.split([len(each) for each in factors])


class SharedUp(torch.autograd.Function):
    """`apply(base [..., out], low [..., rank], lora_B [out, rank], scale)` of one dtype: `base + scale * low B^T`."""

    @staticmethod
    @in_own_dtype
    def forward(ctx: Any, base: torch.Tensor, low: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
        """Return base plus the branch's term."""
        ctx.scale = scale
        ctx.save_for_backward(low, b)
        rows, thin = base.reshape(-1, base.shape[-1]), low.reshape(-1, low.shape[-1])
        term = up(folded(rows), folded(thin).transpose(1, 2), b.t().contiguous(), scale)
        return owned(term.view(base.shape))

    @staticmethod
    @in_own_dtype
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        """Return the gradients of base, low and lora_B."""
        low, b = ctx.saved_tensors
        thin, slopes = low.reshape(-1, low.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        far = folded(slopes)
        back = db = None
        if ctx.needs_input_grad[1]:
            back = (down(b.t().contiguous(), far).transpose(1, 2) * ctx.scale).reshape(low.shape)
        if ctx.needs_input_grad[2]:
            db = factor_gradient(folded(thin).transpose(1, 2), far, ctx.scale).t()
        return gradient, back, db, None
