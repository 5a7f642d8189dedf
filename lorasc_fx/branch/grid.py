"""Training on a grid (`CascadeSpec.grid`): forward computes with the weights that a fold will store.

In each forward, a branch adds its delta to the weight. It rounds the sum to the dtype of the weight (`step`), and then
to the grid (`rounded`). The gradient passes through both roundings unchanged (straight-through estimator, 1308.3432). A
fold applies the deltas of all stages to W0 one after another, with the same function `step`, and rounds the result to
the grid. So the running model and the folded one have the same bits.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from lorasc_fx.errors import SpecError
from lorasc_fx.quantized import is_quantized, requantized
from lorasc_fx.spec import GRIDS, OWN_GRID
from lorasc_fx.util.undo import Block, isolated


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which weights of a dtype are computed: fp64 and complex dtypes unchanged, otherwise fp32."""
    return dtype if dtype == torch.float64 or dtype.is_complex else torch.float32


def exact_products(like: torch.Tensor) -> AbstractContextManager[None]:
    """Return a context manager that computes fp32 products on CUDA in fp32, even if the process has enabled TF32."""
    return _ieee() if like.is_cuda else nullcontext()


@isolated
def _ieee(undo: Block) -> None:
    matmul = torch.backends.cuda.matmul
    undo(partial(setattr, matmul, "fp32_precision", matmul.fp32_precision))
    matmul.fp32_precision = "ieee"


def scale_rows(scale: torch.Tensor, weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Return a weight [out, ...], or [in, out] if `transposed`, with output row i multiplied by `scale[i]`.

    The result has the dtype of the weight. Under DoRA the scale is [out] in fp64.
    """
    shape = (1, -1) if transposed else (-1, *(1 for _ in weight.shape[1:]))
    return weight * scale.to(device=weight.device, dtype=weight.dtype).view(shape)


def step(
    weight: torch.Tensor,
    pair: tuple[torch.Tensor, torch.Tensor] | None,
    dense: torch.Tensor | None = None,
    gain: torch.Tensor | None = None,
    transposed: bool = False,
) -> torch.Tensor:
    """Return `diag(gain) (W + dense) + b @ a`, computed in at least fp32 and rounded to the dtype of W.

    Args:
        weight: W [out, ...], or stacked [experts, out, ...].
        pair: `b` [rows, rank] and `a` [rank, columns]. For a stacked weight, both have the axis of experts first.
        dense: dense delta, with as many entries as the weight.
        gain: factor of each output row [out].
        transposed: whether the weight is stored as [in, out].
    """
    total = weight.to(arithmetic(weight.dtype), copy=True, memory_format=torch.contiguous_format)
    if dense is not None:
        total.add_(dense.to(total.device).reshape(total.shape))
    if gain is not None:
        total = scale_rows(gain, total, transposed)
    if pair is not None:
        # BLAS rounds the product of a transposed factor differently.
        b, a = (factor.to(total, copy=True, memory_format=torch.contiguous_format) for factor in pair)
        with exact_products(total):
            # Experts are multiplied one by one, so that one that is read alone has the same bits.
            parts = zip(total, b, a, strict=True) if b.dim() == 3 else [(total, b, a)]
            for part, up, down in parts:
                part.view(len(up), -1).addmm_(up, down)
    return _laid_out(total.to(weight.dtype), weight)


def rounded(grid: str, value: torch.Tensor, weight: torch.Tensor, stacked: bool = False) -> torch.Tensor:
    """Return a value on a grid, in its own shape and dtype.

    Args:
        grid: a name in `GRIDS`, or "own" for the grid of a quantized weight. "" for no grid.
        value: [out, ...], or [experts, out, ...] if `stacked`: each expert is rounded alone.
        weight: the weight whose grid is "own".

    Raises:
        SpecError: the function of the grid returns another shape or dtype.
    """
    if not grid or (grid == OWN_GRID and not is_quantized(weight)):
        return value
    if grid == OWN_GRID:
        return requantized(weight, value)
    if stacked:
        return torch.stack([rounded(grid, part, weight) for part in value])
    result = GRIDS[grid](value)
    if (result.shape, result.dtype) != (value.shape, value.dtype):
        raise SpecError(
            f"grid={grid!r} returns {list(result.shape)} {result.dtype} for a weight of {list(value.shape)} "
            f"{value.dtype}. Give a function that returns the rounded weight in the same shape and dtype"
        )
    return _laid_out(result, value)


def step_on_grid(
    value: torch.Tensor,
    pair: tuple[torch.Tensor, torch.Tensor] | None,
    dense: torch.Tensor | None,
    gain: torch.Tensor | None,
    transposed: bool,
    grid: str,
    weight: torch.Tensor,
    stacked: bool,
) -> torch.Tensor:
    """Return `rounded(step(...))`, with the arguments of both, as one op for compilers.

    The op takes no quantized weights. Exported programs have plain operations, because other tools lack the op.
    """
    if is_quantized(weight) or torch.compiler.is_exporting():
        return rounded(grid, step(value, pair, dense, gain, transposed), weight, stacked)
    b, a = pair or (None, None)
    on_grid: torch.Tensor = _opaque_step(value, b, a, dense, gain, transposed, grid, stacked)
    return on_grid


@torch.library.custom_op("lorasc_fx::step_on_grid", mutates_args=())
def _opaque_step(
    value: torch.Tensor,
    b: torch.Tensor | None,
    a: torch.Tensor | None,
    dense: torch.Tensor | None,
    gain: torch.Tensor | None,
    transposed: bool,
    grid: str,
    stacked: bool,
) -> torch.Tensor:
    """Compute `step_on_grid`. Inductor would skip casts to a narrow dtype and back, and so the rounding."""
    pair = None if b is None or a is None else (b, a)
    return rounded(grid, step(value, pair, dense, gain, transposed), value, stacked)


@_opaque_step.register_fake
def _(value: torch.Tensor, *others: object) -> torch.Tensor:
    return torch.empty_like(value)


def _laid_out(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the strides of another one, because kernels are chosen by them."""
    return value if value.stride() == like.stride() else torch.empty_like(like, dtype=value.dtype).copy_(value)


class Through(torch.autograd.Function):
    """Returns a value, and passes its gradient to the delta that the value was rounded from."""

    @staticmethod
    def forward(delta: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return the value."""
        return value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """Save nothing."""

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Pass the gradient through."""
        return gradient, None
