"""Products of large fp32 matrices on the CPU, forward and backward, by oneDNN where it is faster than torch's BLAS.

torch computes them by MKL, which uses AVX-512 on Intel's processors only. oneDNN, which torch has for convolutions and
other dtypes, uses it on any. The results are the same up to rounding, and only a call for which a backward pass may
come is computed so: without gradients a graph has the bits of the model's own ops.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from lorasc_fx.branch.low_rank import apply, by_hand, in_own_dtype, owned

WORTH = 1 << 24
"""Multiply-adds from which on oneDNN is faster by more than it takes to call it."""

PRODUCTS: dict[str, Callable[..., torch.Tensor]] = {
    "linear": F.linear,
    "addmm": lambda x, w, bias: torch.addmm(bias, x, w),
    "mm": lambda x, w, bias: torch.mm(x, w),
    "matmul": lambda x, w, bias: torch.matmul(x, w),
}
"""The base op itself, by the name in which a node calls it, of x, weight and bias."""


@cache
def onednn_is_faster() -> bool:
    """Whether the processor has AVX-512, and is one on which MKL does not use it."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        return False
    try:
        described = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # no such file on this system
        return False
    return "AuthenticAMD" in described and torch.backends.mkldnn.is_available()


def product(op: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return what the op computes, inside an autograd Function: x [..., in], weight [out, in] for `linear` and
    [in, out] for the others.
    """
    rows = weight if op == "linear" else weight.t()
    return _onednn(x, rows, bias) if _takes(x, rows, bias) else PRODUCTS[op](x, weight, bias)


def grouped(op: Callable[..., torch.Tensor], x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """Return what a grouped product computes, inside an autograd Function: x [rows, in] sorted by expert, weight
    [experts, in, out], offs [experts] the end of each expert's rows. Rows of no expert are zero.
    """
    if not len(weight) or not _takes(x, weight[0].t(), None):
        return op(x, weight, offs)
    ends = offs.tolist()
    rows = zip([0, *ends[:-1]], ends, weight, strict=True)
    parts = [product("mm", x[start:end], matrix, None) for start, end, matrix in rows]
    return torch.cat([*parts, x.new_zeros(len(x) - ends[-1], weight.shape[2])])


def times(slopes: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Return `slopes @ matrix` of two matrices, in a backward; by a plain op where that is itself differentiated."""
    return product("mm", slopes, matrix, None)


def _is_large(x: torch.Tensor, rows: torch.Tensor) -> bool:
    """Whether `x rows^T` is a product that oneDNN may be faster at."""
    large = x.numel() * rows.shape[0] >= WORTH and x.dtype == rows.dtype == torch.float32
    return large and x.is_cpu and rows.is_cpu and x.dim() > 1 and rows.dim() == 2


def _takes(x: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether oneDNN computes `x rows^T + bias`: large plain tensors, which nobody differentiates, traces or counts."""
    return (
        _is_large(x, rows)
        and onednn_is_faster()
        and not torch.is_grad_enabled()
        and torch._C._get_mkldnn_enabled()
        and all(type(each) in (torch.Tensor, torch.nn.Parameter) for each in (x, rows))
        and (bias is None or (bias.dim() == 1 and bias.dtype == x.dtype))
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
    )


def _onednn(x: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    computed: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, rows, bias, "none", [], "")
    return computed


class _FrozenProduct(torch.autograd.Function):
    """`apply(x [..., in], weight, bias, op)`, of a weight and a bias that want no gradient."""

    @staticmethod
    @in_own_dtype
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, op: str) -> torch.Tensor:
        """Return what the op computes."""
        ctx.op, ctx.shape = op, x.shape
        ctx.save_for_backward(weight)
        return owned(product(op, x, weight, bias))

    @staticmethod
    @in_own_dtype
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        """Return the gradient of x."""
        (weight,) = ctx.saved_tensors
        slopes = gradient.reshape(-1, gradient.shape[-1])
        return times(slopes, weight if ctx.op == "linear" else weight.t()).view(ctx.shape), None, None, None


def _frozen(op: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return what the op computes; with a backward by oneDNN where weight and bias are frozen and it gains."""
    large = _is_large(x, weight if op == "linear" else weight.t())
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if not large or trained or torch.is_autocast_enabled("cpu") or not by_hand(x, weight):
        return PRODUCTS[op](x, weight, bias)
    return apply(_FrozenProduct, x, weight, bias, op)


class FrozenGrouped(torch.autograd.Function):
    """`base`, the grouped product of x and a frozen weight: the backward makes the gradient of x and no other, by the
    op that made the product.
    """

    @staticmethod
    def forward(
        ctx: Any, base: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor, op: Any
    ) -> torch.Tensor:
        """Return base [rows, out] of x [rows, in], weight [experts, in, out]."""
        ctx.save_for_backward(weight, offs)
        ctx.op = op
        return owned(base)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> tuple[Any, ...]:
        """Return the gradient of x [rows, in], of slope [rows, out]."""
        weight, offs = ctx.saved_tensors
        return None, grouped(ctx.op, slopes[0], weight.transpose(-2, -1), offs), None, None, None


def _addmm(bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return _frozen("addmm", x, weight, bias)


def _grouped(x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    op: Callable[..., torch.Tensor] = torch.ops.transformers.grouped_mm_fallback
    if weight.requires_grad or torch.is_autocast_enabled("cpu") or not by_hand(x, weight):
        return op(x, weight, offs)
    with torch.no_grad():
        base = grouped(op, x, weight, offs)
    return apply(FrozenGrouped, base, x, weight, offs, op)


_FROZEN: dict[str, Callable[..., torch.Tensor]] = {
    "aten.linear.default": partial(_frozen, "linear"),
    "aten.addmm.default": _addmm,
    "aten.mm.default": partial(_frozen, "mm"),
    "transformers.grouped_mm_fallback.default": _grouped,
}


def for_frozen(target: Any) -> Callable[..., torch.Tensor] | None:
    """Return what computes a node of this target, of the same arguments, for a weight that is most likely frozen; None
    where nothing is gained.
    """
    is_op = isinstance(target, torch._ops.OpOverload) or target is F.linear
    if not is_op or not onednn_is_faster():
        return None
    return _FROZEN.get("aten.linear.default" if target is F.linear else str(target))
