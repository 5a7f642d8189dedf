"""Autograd functions of the branches: beside an op, and merged into an op.

They compute the formulas of docs/algorithm.md (rows "training" and "Conv") in faster memory layouts (see `products`).
One fused product adds the term of the branch to the output of the op. They save only A x, and x if lora_A needs a
gradient. Dropout saves no mask: the backward draws it again from a seed.

Names: `low` is A x, and `back` the gradient of `low` without the scale. `grad_rows` is the gradient of the output as
rows [tokens, features]. da, db, dx, dw are gradients of lora_A, lora_B, x and the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from lorasc_fx.branch.products import (
    ConvGeometry,
    chunked,
    conv_down,
    conv_factor_gradient,
    conv_input_gradient,
    conv_kernel_gradient,
    conv_up,
    detached,
    down,
    factor_gradient,
    low_rank_product,
    merged_matrix,
    product,
    up,
    with_strides,
    without_autocast,
)
from lorasc_fx.errors import StateError


def dropout_mask(like: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """Return the dropout mask of a seed: 0 with probability p, otherwise 1 / (1 - p)."""
    source = torch.Generator(like.device).manual_seed(seed)
    mask = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    return mask.bernoulli_(1 - p, generator=source).div_(1 - p)


def drop(x: torch.Tensor, p: float, seed: int | None) -> torch.Tensor:
    """Apply the dropout mask of a seed. Without a seed, return x unchanged."""
    return x if seed is None else dropout_mask(x, p, seed).mul_(x)


class Beside(torch.autograd.Function):
    """`base + scale * x A^T B^T`: the output of an op plus the term of its branch.

    Arguments: base [..., out], x [..., in], lora_A [rank, in], lora_B [out, rank], scale, dropout probability p, seed
    of the dropout mask or None. All tensors have the same dtype.
    """

    @staticmethod
    @without_autocast
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
        """Return the sum [..., out]."""
        ctx.scale, ctx.p, ctx.seed = scale, p, seed
        rows = chunked(drop(x, p, seed).reshape(-1, x.shape[-1]))
        low = down(a, rows)
        ctx.shape = x.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, a, b, low)
        term = up(chunked(base.reshape(-1, base.shape[-1])), low, b.t().contiguous(), scale)
        return detached(term.view(base.shape))

    @staticmethod
    @without_autocast
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        """Return the gradients of base, x, lora_A and lora_B."""
        x, a, b, low = ctx.saved_tensors
        no_gradients = (None, None, None)
        if torch.is_grad_enabled():  # create_graph=True

            def term(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
                return F.linear(F.linear(drop(x, ctx.p, ctx.seed), a), b).mul(ctx.scale)

            return gradient, *differentiable_gradients(term, gradient, x, a, b), *no_gradients
        grad_rows = chunked(gradient.reshape(-1, gradient.shape[-1]))
        back = down(b.t().contiguous(), grad_rows)
        dx = da = db = None
        if ctx.needs_input_grad[3]:  # first, while grad_rows is in the CPU cache
            db = factor_gradient(low, grad_rows, ctx.scale).t()
        if ctx.needs_input_grad[2]:
            rows = chunked(drop(x, ctx.p, ctx.seed).reshape(-1, x.shape[-1]))
            da = factor_gradient(back, rows, ctx.scale)
        if ctx.needs_input_grad[1]:
            dx = up(None, back, a, ctx.scale).view(ctx.shape)
            dx = dx if ctx.seed is None else dx.mul_(dropout_mask(dx, ctx.p, ctx.seed))
        return gradient, dx, da, db, *no_gradients


def differentiable_gradients(
    term: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    gradient: torch.Tensor,
    x: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of x, lora_A and lora_B with an autograd graph, for a double backward.

    `term` computes the term of the branch from them. Raises StateError if forward did not save x, because lora_A is
    frozen.
    """
    if x is None:
        raise StateError(
            "a double backward needs the input of a branch, which is not saved with train_A=False. Set train_A=True "
            "in the spec",
            code="backward-not-supported",
        )
    needed = [value for value in (x, a, b) if value.requires_grad]
    gradients = iter(torch.autograd.grad(term(x, a, b), needed, gradient, create_graph=True))
    return tuple([next(gradients) if value.requires_grad else None for value in (x, a, b)])


def merge(weight: torch.Tensor, b: torch.Tensor, a: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Return `weight + scale * b @ a` [rows, columns], computed in the dtype of the factors and rounded to `dtype`."""
    return merged_matrix(weight.to(a.dtype), b, a, scale).to(dtype)


class MergedProduct(torch.autograd.Function):
    """`op(x, weight + scale * B A, bias)`: replaces a product by the product with the merged weight.

    Arguments: x [..., in], weight, bias [out] or None, lora_A [rank, in], lora_B [out, rank], scale, op. The weight is
    [out, in] for the op `linear` and [in, out] for the others. x and bias have the dtype of the result. Under autocast,
    weight and factors may have a wider dtype.
    """

    @staticmethod
    @without_autocast
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
        """Return the output [..., out] of the op with the merged weight."""
        ctx.scale, ctx.op = scale, op
        ctx.bias_shape = bias.shape if bias is not None else ()
        ctx.save_for_backward(x, weight, a, b)
        factors = (b, a) if op == "linear" else (a.t(), b.t())
        return detached(product(op, x, merge(weight, *factors, scale, x.dtype), bias))

    @staticmethod
    @without_autocast
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        """Return the gradients of all tensors. None for a weight or bias that does not need one."""
        x, weight, a, b = ctx.saved_tensors
        transposed, needs = ctx.op != "linear", ctx.needs_input_grad
        rows, grad_rows = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        dw = dbias = None
        if needs[1]:
            dw = (rows.t() @ grad_rows if transposed else grad_rows.t() @ rows).to(weight.dtype)
        if needs[2]:
            dbias = grad_rows.sum_to_size(ctx.bias_shape)
        dx, da, db = _merged_gradients(ctx, rows, grad_rows, weight.t() if transposed else weight, a, b)
        return dx if dx is None else dx.view(x.shape), dw, dbias, da, db, None, None


Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def _merged_gradients(
    ctx: Any, rows: torch.Tensor, grad_rows: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> Gradients:
    """Return the gradients of rows, lora_A and lora_B.

    dx needs the merged weight. With many rows it is computed again, which costs less than saving it; with few rows, the
    low-rank term is added to dx instead. Forward saves only its inputs, so a double backward works.
    """
    x_chunks, grad_chunks = chunked(rows), chunked(grad_rows)
    factor = a.to(rows.dtype)
    dx = da = db = None
    back = down(b.t().contiguous().to(rows.dtype), grad_chunks)
    if ctx.needs_input_grad[4]:  # gradients of factors first, while grad_rows and rows are in the CPU cache
        db = factor_gradient(down(factor, x_chunks), grad_chunks, ctx.scale).t().to(b.dtype)
    if ctx.needs_input_grad[3]:
        da = factor_gradient(back, x_chunks, ctx.scale).to(a.dtype)
    if ctx.needs_input_grad[0]:
        if rows.shape[0] >= weight.shape[0]:
            dx = product("mm", grad_rows, merge(weight, b, a, ctx.scale, grad_rows.dtype), None)
        else:
            dx = up(chunked(product("mm", grad_rows, weight.to(grad_rows.dtype), None)), back, factor, ctx.scale)
    return dx, da, db


class DenseGradient(torch.autograd.Function):
    """Identity whose backward converts a sparse gradient to a dense one.

    A lookup with sparse=True has a sparse gradient, which the backward of a product cannot reshape.
    """

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight unchanged."""
        return detached(weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Return the dense gradient."""
        return gradient.to_dense() if gradient.is_sparse else gradient


def merged_kernel(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """Return `weight + scale * B A` [out, in/groups, *kernel], in `dtype` and with the strides of the weight."""
    if weight.is_contiguous():
        return with_strides(merge(weight.flatten(1), b, a.flatten(1), scale, dtype).view(weight.shape), weight)
    return torch.add(weight.to(a.dtype), (b @ a.flatten(1)).view(weight.shape), alpha=scale).to(dtype)


class BesideConv(torch.autograd.Function):
    """`base + scale * B (A * x)`: the output of a convolution plus the term of its branch.

    Arguments: base [batch, out, *space], x [batch, in, *space], lora_A [rank, in, *kernel], lora_B [out, rank],
    geometry, scale, dropout probability p, seed of the dropout mask or None.
    """

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        base: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        geometry: ConvGeometry,
        scale: float,
        p: float,
        seed: int | None,
    ) -> torch.Tensor:
        """Return the sum [batch, out, *space]."""
        ctx.geometry, ctx.scale, ctx.p, ctx.seed = geometry, scale, p, seed
        low = conv_down(a, *geometry.dense(drop(x, p, seed), a.shape[2:]))
        saves_x = ctx.needs_input_grad[2]
        # The gradient of x needs the shape and memory format of x, but not its values.
        ctx.like = None if saves_x else torch.empty_like(x, device="meta")
        ctx.save_for_backward(x if saves_x else None, a, b, low)
        return detached(conv_up(base, low, b, scale))

    @staticmethod
    @without_autocast
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        """Return the gradients of base, x, lora_A and lora_B."""
        x, a, b, low = ctx.saved_tensors
        no_gradients = (None, None, None, None)
        if torch.is_grad_enabled():  # create_graph=True

            def term(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
                kernel = (b @ a.flatten(1)).view(len(b), *a.shape[1:]) * ctx.scale
                output: torch.Tensor = ctx.geometry.conv(drop(x, ctx.p, ctx.seed), kernel)
                return output

            return gradient, *differentiable_gradients(term, gradient, x, a, b), *no_gradients
        dx = da = db = None
        back = low_rank_product(b.t().contiguous(), gradient)
        if ctx.needs_input_grad[1]:
            image = torch.empty_like(ctx.like, device=gradient.device) if x is None else x
            used, geometry = ctx.geometry.dense(image, a.shape[2:])
            dx = ctx.geometry.spread(conv_input_gradient(back, used, a, geometry, ctx.scale), image)
            dx = dx if ctx.seed is None else dx.mul_(dropout_mask(dx, ctx.p, ctx.seed))
        if ctx.needs_input_grad[2]:
            used, geometry = ctx.geometry.dense(drop(x, ctx.p, ctx.seed), a.shape[2:])
            da = conv_kernel_gradient(back, used, a, geometry, ctx.scale)
        if ctx.needs_input_grad[3]:
            db = conv_factor_gradient(low, gradient, ctx.scale).t()
        return gradient, dx, da, db, *no_gradients


class MergedConv(torch.autograd.Function):
    """`conv(x, weight + scale * B A, bias)`: replaces a convolution by the one with the merged kernel.

    Arguments: x [batch, in, *space], weight [out, in/groups, *kernel], bias [out] or None, lora_A
    [rank, in/groups, *kernel], lora_B [out, rank], geometry, scale. With groups, the backward computes the dense
    gradient of the kernel and projects it onto the factors. This is exact, and the kernel is small if the op is
    depthwise.
    """

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        geometry: ConvGeometry,
        scale: float,
    ) -> torch.Tensor:
        """Return the convolution with the merged kernel."""
        ctx.geometry, ctx.scale = geometry, scale
        ctx.save_for_backward(x, weight, a, b)
        # Not with `dense`: the convolution of fewer pixels may be rounded in another way.
        return geometry.conv(x, merged_kernel(weight, a, b, scale, x.dtype), bias)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        """Return the gradients of all tensors. None for a weight or bias that does not need one."""
        x, weight, a, b = ctx.saved_tensors
        (image, geometry), needs = ctx.geometry.dense(x, weight.shape[2:]), ctx.needs_input_grad
        projects = geometry.groups > 1 or needs[1]
        merged = merged_kernel(weight, a, b, ctx.scale, x.dtype)
        da = db = None
        if not projects:  # first, while the gradient is in the CPU cache
            kernel, columns = a.to(x.dtype), b.to(x.dtype)
            back = low_rank_product(columns.t().contiguous(), gradient)
            if needs[4]:
                db = conv_factor_gradient(conv_down(kernel, image, geometry), gradient, ctx.scale).t().to(b.dtype)
            if needs[3]:
                da = conv_kernel_gradient(back, image, kernel, geometry, ctx.scale).to(a.dtype)
        dx, dw, dbias = geometry.gradients(gradient, image, merged, (needs[0], projects, needs[2]))
        dx = dx if dx is None else ctx.geometry.spread(dx, x)
        if projects:
            assert dw is not None
            dense_gradient = dw.flatten(1).to(a.dtype) * ctx.scale
            da, db = (b.t() @ dense_gradient).view(a.shape), dense_gradient @ a.flatten(1).t()
        return dx, dw.to(weight.dtype) if dw is not None and needs[1] else None, dbias, da, db, None, None
