"""The branch of a convolution without groups, beside its op or merged into it, by hand-written backwards.

Algorithm.md, "Conv": lora_A is a kernel to `rank` channels, lora_B a 1x1 convolution. As `beside` and `merged` do for
products; the operations are those of `grid`.
"""

from __future__ import annotations

from typing import Any

import torch

from lorasc_fx.branch.beside import check_kept
from lorasc_fx.branch.dropout import dropped, kept
from lorasc_fx.branch.grid import Grid, down, down_back, factor_gradient, up, up_gradient, whole_gradient
from lorasc_fx.branch.merged import merge
from lorasc_fx.branch.skinny import in_own_dtype, owned

__all__ = ["BesideConv", "MergedConv", "merged_kernel"]


def merged_kernel(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """Return `weight + scale * B A` of a kernel [out, in/groups, *kernel], in this dtype and the weight's format."""
    if weight.is_contiguous():
        return merge(weight.flatten(1), b, a.flatten(1), scale, dtype).view(weight.shape)
    return torch.add(weight.to(a.dtype), (b @ a.flatten(1)).view(weight.shape), alpha=scale).to(dtype)


class BesideConv(torch.autograd.Function):
    """`apply(base [batch, out, *space], x, lora_A [rank, in, *kernel], lora_B [out, rank], grid, scale, p, seed)`."""

    @staticmethod
    @in_own_dtype
    def forward(
        ctx: Any,
        base: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        grid: Grid,
        scale: float,
        p: float,
        seed: int | None,
    ) -> torch.Tensor:
        """Return base plus the branch's term."""
        ctx.grid, ctx.scale, ctx.p, ctx.seed = grid, scale, p, seed
        low = down(a, dropped(x, p, seed), grid)
        keeps = ctx.needs_input_grad[2]
        ctx.like = None if keeps else torch.empty_like(x, device="meta")
        ctx.save_for_backward(x if keeps else None, a, b, low)
        return owned(up(base, low, b, scale))

    @staticmethod
    @in_own_dtype
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        """Return the gradients of base, x, lora_A and lora_B."""
        x, a, b, low = ctx.saved_tensors
        nothing = (None, None, None, None)
        if torch.is_grad_enabled():  # the backward is itself differentiated
            check_kept(x)
            return gradient, *_plainly(ctx, gradient, x, a, b), *nothing
        dx = da = db = None
        back = down_back(b, gradient)
        if ctx.needs_input_grad[1]:
            image = torch.empty_like(ctx.like, device=gradient.device) if x is None else x
            dx = whole_gradient(back, image, a, ctx.grid, ctx.scale)
            dx = dx if ctx.seed is None else dx.mul_(kept(dx, ctx.p, ctx.seed))
        if ctx.needs_input_grad[2]:
            da = up_gradient(back, dropped(x, ctx.p, ctx.seed), a, ctx.grid, ctx.scale)
        if ctx.needs_input_grad[3]:
            db = factor_gradient(low, gradient, ctx.scale).t()
        return gradient, dx, da, db, *nothing


class MergedConv(torch.autograd.Function):
    """`apply(x [batch, in, *space], weight, bias, lora_A [rank, in/groups, *kernel], lora_B, grid, scale)`, for the op.

    With groups the gradient of the kernel is made whole and then projected onto the factors: exact, and for depthwise
    kernels small.
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
        grid: Grid,
        scale: float,
    ) -> torch.Tensor:
        """Return the convolution with the merged kernel."""
        ctx.grid, ctx.scale = grid, scale
        ctx.save_for_backward(x, weight, a, b)
        return grid.conv(x, merged_kernel(weight, a, b, scale, x.dtype), bias)

    @staticmethod
    @in_own_dtype
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        """Return the gradients of x, lora_A and lora_B, and of weight and bias where they want one."""
        x, weight, a, b = ctx.saved_tensors
        grid, wants = ctx.grid, ctx.needs_input_grad
        projects = grid.groups > 1 or wants[1]
        whole = merged_kernel(weight, a, b, ctx.scale, x.dtype)
        da = db = None
        if not projects:  # first, while the slopes are in the cache
            thin, tall = a.to(x.dtype), b.to(x.dtype)
            back = down_back(tall, gradient)
            if wants[4]:
                db = factor_gradient(down(thin, x, grid), gradient, ctx.scale).t().to(b.dtype)
            if wants[3]:
                da = up_gradient(back, x, thin, grid, ctx.scale).to(a.dtype)
        dx, dw, dbias = grid.gradients(gradient, x, whole, (wants[0], projects, wants[2]))
        if projects:
            assert dw is not None
            steep = dw.flatten(1).to(a.dtype) * ctx.scale
            da, db = (b.t() @ steep).view(a.shape), steep @ a.flatten(1).t()
        return dx, dw.to(weight.dtype) if dw is not None and wants[1] else None, dbias, da, db, None, None


def _plainly(
    ctx: Any, gradient: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """Return the gradients of x, lora_A and lora_B by operations that can be differentiated again."""
    mask = None if ctx.seed is None else kept(x, ctx.p, ctx.seed)
    inner = x if mask is None else x * mask
    kernel = (b @ a.flatten(1)).view(len(b), *a.shape[1:]) * ctx.scale
    dx, steep, _ = ctx.grid.gradients(gradient, inner, kernel, (True, True, False))
    assert dx is not None
    assert steep is not None
    steep = steep.flatten(1) * ctx.scale
    return (dx if mask is None else dx * mask), (b.t() @ steep).view(a.shape), steep @ a.flatten(1).t()
