"""The branch merged into its op: the forward computes with `W + s B A`, the backward of the factors stays low-rank.

The sum is made where it is needed, in the forward and again in the backward, so that nothing of the weight's size is
kept and no copy can grow stale when the factors change. Algorithm.md, row "training"; equal to the branch beside up to
rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from lorasc_fx.branch.skinny import down, factor_gradient, folded, in_own_dtype, owned, up

__all__ = ["PRODUCTS", "MergedProduct", "merge"]

PRODUCTS: dict[str, Callable[..., torch.Tensor]] = {
    "linear": F.linear,
    "addmm": lambda x, w, bias: torch.addmm(bias, x, w),
    "mm": lambda x, w, bias: torch.mm(x, w),
    "matmul": lambda x, w, bias: torch.matmul(x, w),
}
"""The base op itself, by the name in which a node calls it, of x, weight and bias."""


def merge(
    weight: torch.Tensor, b: torch.Tensor, a: torch.Tensor, scale: float, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return `weight + scale * b @ a` of a matrix, computed in the factors' dtype and rounded once to `dtype`, by
    default the weight's.
    """
    return torch.addmm(weight.to(a.dtype), b, a, alpha=scale).to(weight.dtype if dtype is None else dtype)


class MergedProduct(torch.autograd.Function):
    """`apply(x [..., in], weight, bias, lora_A [rank, in], lora_B [out, rank], scale, op)`, in place of the op.

    The weight is [out, in] for `linear` and [in, out] for the others. x and bias have the dtype of the result; weight
    and factors may be wider, as they are under autocast.
    """

    @staticmethod
    @in_own_dtype
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        op: str,
    ) -> torch.Tensor:
        """Return what the op computes with the merged weight."""
        ctx.scale, ctx.op = scale, op
        ctx.bias_shape = bias.shape if bias is not None else ()
        ctx.save_for_backward(x, weight, a, b)
        left, right = (b, a) if op == "linear" else (a.t(), b.t())
        return owned(PRODUCTS[op](x, merge(weight, left, right, scale, x.dtype), bias))

    @staticmethod
    @in_own_dtype
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        """Return the gradients of x, lora_A and lora_B, and of weight and bias where they want one."""
        x, weight, a, b = ctx.saved_tensors
        turned, wants = ctx.op != "linear", ctx.needs_input_grad
        rows, slopes = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        dw = dbias = None
        if wants[1]:
            dw = (rows.t() @ slopes if turned else slopes.t() @ rows).to(weight.dtype)
        if wants[2]:
            dbias = slopes.sum_to_size(ctx.bias_shape)
        dx, da, db = _gradients(ctx, rows, slopes, weight.t() if turned else weight, a, b)
        return dx if dx is None else dx.view(x.shape), dw, dbias, da, db, None, None


Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def _gradients(
    ctx: Any, rows: torch.Tensor, slopes: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> Gradients:
    """Return the gradients of rows, lora_A and lora_B: with many rows the merged weight is made anew, with few the term
    is added to dx. All of it can be differentiated again: what is saved are inputs alone.
    """
    near, far = folded(rows), folded(slopes)
    thin = a.to(rows.dtype)
    dx = da = db = None
    back = down(b.t().contiguous().to(rows.dtype), far)
    if ctx.needs_input_grad[4]:  # the factors come first, while slopes and rows are in the cache
        db = factor_gradient(down(thin, near), far, ctx.scale).t().to(b.dtype)
    if ctx.needs_input_grad[3]:
        da = factor_gradient(back, near, ctx.scale).to(a.dtype)
    if ctx.needs_input_grad[0]:
        if rows.shape[0] >= weight.shape[0]:
            dx = slopes @ merge(weight, b, a, ctx.scale, slopes.dtype)
        else:
            dx = up(folded(slopes @ weight.to(slopes.dtype)), back, thin, ctx.scale)
    return dx, da, db
