"""Hand-written backwards of the branches: beside their op, merged into it, and after a shared product.

Algorithm.md, rows "training" and "Conv". They compute the plain formulas with faster memory layouts (see `low_rank`)
and one fused accumulate. Only x and A x are saved, and x only for the gradient of lora_A. Adapter dropout saves no
mask: its backward draws the mask again from a seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from lorasc_fx.branch.low_rank import (
    Grid,
    apply,
    by_hand,
    computes_in,
    conv_down,
    conv_down_back,
    conv_factor_gradient,
    conv_input_gradient,
    conv_kernel_gradient,
    conv_up,
    down,
    factor_gradient,
    folded,
    in_own_dtype,
    owned,
    up,
)
from lorasc_fx.branch.products import product, times
from lorasc_fx.errors import StateError


def draw_seed() -> int:
    """Return a seed from torch's generator, so that manual_seed and activation checkpointing apply to the dropout."""
    return int(torch.randint(2**62, ()).item())


def dropout_mask(like: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """Return the mask of this seed: 0 with probability p, else 1 / (1 - p)."""
    source = torch.Generator(like.device).manual_seed(seed)
    mask = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    return mask.bernoulli_(1 - p, generator=source).div_(1 - p)


def drop(x: torch.Tensor, p: float, seed: int | None) -> torch.Tensor:
    """Return x with the mask of this seed on it; without a seed x itself."""
    return x if seed is None else dropout_mask(x, p, seed).mul_(x)


class Beside(torch.autograd.Function):
    """`apply(base [..., out], x [..., in], lora_A [rank, in], lora_B [out, rank], scale, p, seed)`.

    All tensors have one dtype. `seed` is None without dropout.
    """

    @staticmethod
    @in_own_dtype
    def forward(
        ctx: Any,
        base: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        p: float,
        seed: int | None,
    ) -> torch.Tensor:
        """Return base plus the branch's term."""
        ctx.scale, ctx.p, ctx.seed = scale, p, seed
        rows = folded(drop(x, p, seed).reshape(-1, x.shape[-1]))
        low = down(a, rows)
        ctx.shape = x.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, a, b, low)
        term = up(folded(base.reshape(-1, base.shape[-1])), low, b.t().contiguous(), scale)
        return owned(term.view(base.shape))

    @staticmethod
    @in_own_dtype
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        """Return the gradients of base, x, lora_A and lora_B."""
        x, a, b, low = ctx.saved_tensors
        nothing = (None, None, None)
        if torch.is_grad_enabled():  # the backward is itself differentiated
            check_kept(x)
            return gradient, *plain_gradients(ctx, gradient, x, a, b), *nothing
        slopes = folded(gradient.reshape(-1, gradient.shape[-1]))
        back = down(b.t().contiguous(), slopes)
        dx = da = db = None
        if ctx.needs_input_grad[3]:  # first, while the slopes are in the cache
            db = factor_gradient(low, slopes, ctx.scale).t()
        if ctx.needs_input_grad[2]:
            rows = folded(drop(x, ctx.p, ctx.seed).reshape(-1, x.shape[-1]))
            da = factor_gradient(back, rows, ctx.scale)
        if ctx.needs_input_grad[1]:
            dx = up(None, back, a, ctx.scale).view(ctx.shape)
            dx = dx if ctx.seed is None else dx.mul_(dropout_mask(dx, ctx.p, ctx.seed))
        return gradient, dx, da, db, *nothing


def check_kept(x: torch.Tensor | None) -> None:
    """Raise StateError where a gradient of a gradient needs an input that a lora_A without a gradient did not keep."""
    if x is None:
        raise StateError(
            "a gradient of a gradient needs the input of a branch, which train_A=False does not keep; "
            "adapt with train_A=True",
            code="backward-not-supported",
        )


def plain_gradients(
    ctx: Any, gradient: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of x, lora_A and lora_B by operations that can be differentiated again."""
    mask = None if ctx.seed is None else dropout_mask(x, ctx.p, ctx.seed)
    rows = (x if mask is None else x * mask).reshape(-1, x.shape[-1])
    slopes = gradient.reshape(-1, gradient.shape[-1]) * ctx.scale
    back = slopes @ b
    dx = (back @ a).view(x.shape)
    return (dx if mask is None else dx * mask), back.t() @ rows, slopes.t() @ (rows @ a.t())


def merge(
    weight: torch.Tensor, b: torch.Tensor, a: torch.Tensor, scale: float, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return `weight + scale * b @ a` of a matrix, computed in the factors' dtype and rounded once to `dtype`, by
    default the weight's.
    """
    return torch.addmm(weight.to(a.dtype), b, a, alpha=scale).to(weight.dtype if dtype is None else dtype)


class MergedProduct(torch.autograd.Function):
    """`apply(x [..., in], weight, bias, lora_A [rank, in], lora_B [out, rank], scale, op)`, in place of the op.

    The weight is [out, in] for `linear` and [in, out] for the others. x and bias have the dtype of the result. Under
    autocast weight and factors may be wider.
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
        return owned(product(op, x, merge(weight, left, right, scale, x.dtype), bias))

    @staticmethod
    @in_own_dtype
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        """Return the gradients of x, lora_A and lora_B, and of weight and bias where they want one."""
        x, weight, a, b = ctx.saved_tensors
        transposed, wants = ctx.op != "linear", ctx.needs_input_grad
        rows, slopes = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        dw = dbias = None
        if wants[1]:
            dw = (rows.t() @ slopes if transposed else slopes.t() @ rows).to(weight.dtype)
        if wants[2]:
            dbias = slopes.sum_to_size(ctx.bias_shape)
        dx, da, db = _merged_gradients(ctx, rows, slopes, weight.t() if transposed else weight, a, b)
        return dx if dx is None else dx.view(x.shape), dw, dbias, da, db, None, None


Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def _merged_gradients(
    ctx: Any, rows: torch.Tensor, slopes: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> Gradients:
    """Return the gradients of rows, lora_A and lora_B.

    With many rows the merged weight is computed again, with few the low-rank term is added to dx. Only inputs are
    saved, so the result can be differentiated again.
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
            dx = times(slopes, merge(weight, b, a, ctx.scale, slopes.dtype))
        else:
            dx = up(folded(times(slopes, weight.to(slopes.dtype))), back, thin, ctx.scale)
    return dx, da, db


def shared_down(x: torch.Tensor, factors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return `x A^T` [..., rank] for each lora_A [rank, in] of the factors, of x [..., in]."""
    ranks = [a.shape[0] for a in factors]
    if by_hand(x):
        x = x.to(computes_in(x))
        low = apply(_SharedDown, x, *(a.to(x.dtype) for a in factors))
    else:
        low = F.linear(x, torch.cat([a.to(x.dtype) for a in factors]))
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
        return dx, *total.split([len(a) for a in factors])


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


class DenseGradient(torch.autograd.Function):
    """Returns its input, and makes the gradient dense: lookups with sparse=True give a sparse one, without views."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
        """Return the tensor itself."""
        return owned(weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Return the dense gradient."""
        return gradient.to_dense() if gradient.is_sparse else gradient


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
        low = conv_down(a, drop(x, p, seed), grid)
        keeps = ctx.needs_input_grad[2]
        ctx.like = None if keeps else torch.empty_like(x, device="meta")
        ctx.save_for_backward(x if keeps else None, a, b, low)
        return owned(conv_up(base, low, b, scale))

    @staticmethod
    @in_own_dtype
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        """Return the gradients of base, x, lora_A and lora_B."""
        x, a, b, low = ctx.saved_tensors
        nothing = (None, None, None, None)
        if torch.is_grad_enabled():  # the backward is itself differentiated
            check_kept(x)
            return gradient, *_plain_conv_gradients(ctx, gradient, x, a, b), *nothing
        dx = da = db = None
        back = conv_down_back(b, gradient)
        if ctx.needs_input_grad[1]:
            image = torch.empty_like(ctx.like, device=gradient.device) if x is None else x
            dx = conv_input_gradient(back, image, a, ctx.grid, ctx.scale)
            dx = dx if ctx.seed is None else dx.mul_(dropout_mask(dx, ctx.p, ctx.seed))
        if ctx.needs_input_grad[2]:
            da = conv_kernel_gradient(back, drop(x, ctx.p, ctx.seed), a, ctx.grid, ctx.scale)
        if ctx.needs_input_grad[3]:
            db = conv_factor_gradient(low, gradient, ctx.scale).t()
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
            back = conv_down_back(tall, gradient)
            if wants[4]:
                db = conv_factor_gradient(conv_down(thin, x, grid), gradient, ctx.scale).t().to(b.dtype)
            if wants[3]:
                da = conv_kernel_gradient(back, x, thin, grid, ctx.scale).to(a.dtype)
        dx, dw, dbias = grid.gradients(gradient, x, whole, (wants[0], projects, wants[2]))
        if projects:
            assert dw is not None
            steep = dw.flatten(1).to(a.dtype) * ctx.scale
            da, db = (b.t() @ steep).view(a.shape), steep @ a.flatten(1).t()
        return dx, dw.to(weight.dtype) if dw is not None and wants[1] else None, dbias, da, db, None, None


def _plain_conv_gradients(
    ctx: Any, gradient: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """Return the gradients of x, lora_A and lora_B by operations that can be differentiated again."""
    mask = None if ctx.seed is None else dropout_mask(x, ctx.p, ctx.seed)
    inner = x if mask is None else x * mask
    kernel = (b @ a.flatten(1)).view(len(b), *a.shape[1:]) * ctx.scale
    dx, steep, _ = ctx.grid.gradients(gradient, inner, kernel, (True, True, False))
    assert dx is not None
    assert steep is not None
    steep = steep.flatten(1) * ctx.scale
    return (dx if mask is None else dx * mask), (b.t() @ steep).view(a.shape), steep @ a.flatten(1).t()
