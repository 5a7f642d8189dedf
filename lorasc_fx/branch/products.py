"""Large fp32 products on the CPU with oneDNN instead of torch's BLAS, in forward and backward.

torch computes them with MKL, which uses AVX-512 only on processors of Intel. oneDNN, which torch uses for convolutions
and other dtypes, uses AVX-512 on all processors. The results are equal up to rounding. So cascades use it only if
gradients are enabled: without gradients, they compute the same bits as the ops of the model. Banks always use it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from lorasc_fx.branch.low_rank import allows_custom_backward, apply, detached, without_autocast

MIN_WORK = 1 << 24
"""Minimum number of multiply-adds. For smaller products, the overhead of the call exceeds the gain."""

PRODUCTS: dict[str, Callable[..., torch.Tensor]] = {
    "linear": F.linear,
    "addmm": lambda x, w, bias: torch.addmm(bias, x, w),
    "mm": lambda x, w, bias: torch.mm(x, w),
    "matmul": lambda x, w, bias: torch.matmul(x, w),
}
"""The ops whose weight can be merged, as functions of (x, weight, bias), by name."""


@cache
def onednn_is_faster() -> bool:
    """Whether the processor has AVX-512 but MKL does not use it."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        return False
    try:
        cpu_info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return False
    return "AuthenticAMD" in cpu_info and torch.backends.mkldnn.is_available()


def product(op: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `op(x, weight, bias)` [..., out], with oneDNN if it is faster. For use inside an autograd.Function.

    Args:
        op: key of PRODUCTS.
        x: [..., in].
        weight: [out, in] for the op `linear`, [in, out] for the others.
        bias: [out] or None.
    """
    rows = weight if op == "linear" else weight.t()
    return _onednn(x, rows, bias) if _uses_onednn(x, rows, bias) else PRODUCTS[op](x, weight, bias)


def grouped(op: Callable[..., torch.Tensor], x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """Return the grouped product of experts [rows, out], with oneDNN if it is faster. For use in an autograd.Function.

    Args:
        op: the op for grouped products.
        x: [rows, in], sorted by expert.
        weight: [experts, in, out].
        offs: [experts], the end of the rows of each expert. The output is zero for rows after the last end.
    """
    if not len(weight) or not _uses_onednn(x, weight[0].t(), None):
        return op(x, weight, offs)
    ends = offs.tolist()
    rows = zip([0, *ends[:-1]], ends, weight, strict=True)
    parts = [product("mm", x[start:end], matrix, None) for start, end, matrix in rows]
    return torch.cat([*parts, x.new_zeros(len(x) - ends[-1], weight.shape[2])])


def _is_large(x: torch.Tensor, rows: torch.Tensor) -> bool:
    """Whether `x rows^T` is an fp32 product on the CPU that is large enough for oneDNN."""
    large = x.numel() * rows.shape[0] >= MIN_WORK and x.dtype == rows.dtype == torch.float32
    return large and x.is_cpu and rows.is_cpu and x.dim() > 1 and rows.dim() == 2


def _uses_onednn(x: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether to compute `x rows^T + bias` with oneDNN: large plain tensors, without autograd, transforms or modes."""
    return (
        _is_large(x, rows)
        and onednn_is_faster()
        and not torch.is_grad_enabled()
        and torch._C._get_mkldnn_enabled()
        and all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in (x, rows))
        and (bias is None or (bias.dim() == 1 and bias.dtype == x.dtype))
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
    )


def _onednn(x: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `x rows^T + bias`."""
    output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, rows, bias, "none", [], "")
    return output


class FrozenProduct(torch.autograd.Function):
    """`op(x, weight, bias)` for x [..., in] and a frozen weight and bias."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, op: str) -> torch.Tensor:
        """Return the output [..., out]."""
        ctx.op, ctx.shape = op, x.shape
        ctx.save_for_backward(weight)
        return detached(product(op, x, weight, bias))

    @staticmethod
    @without_autocast
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        """Return the gradient of x."""
        (weight,) = ctx.saved_tensors
        grad_rows = gradient.reshape(-1, gradient.shape[-1])
        matrix = weight if ctx.op == "linear" else weight.t()
        return product("mm", grad_rows, matrix, None).view(ctx.shape), None, None, None


def _frozen(
    op: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, same_bits: bool = True
) -> torch.Tensor:
    """Return `op(x, weight, bias)`, with oneDNN in forward and backward if weight and bias are frozen and large."""
    if not (same_bits or torch.is_grad_enabled()):
        return product(op, x, weight, bias)
    large = _is_large(x, weight if op == "linear" else weight.t())
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if not large or trained or torch.is_autocast_enabled("cpu") or not allows_custom_backward(x, weight):
        return PRODUCTS[op](x, weight, bias)
    return apply(FrozenProduct, x, weight, bias, op)


class FrozenGrouped(torch.autograd.Function):
    """Identity on `base`, the grouped product of x and a frozen weight, with a backward for x only.

    The backward of the op itself would compute the gradient of the frozen weight too.
    """

    @staticmethod
    def forward(
        ctx: Any, base: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor, op: Any
    ) -> torch.Tensor:
        """Return base [rows, out]. x is [rows, in], and weight [experts, in, out]."""
        ctx.save_for_backward(weight, offs)
        ctx.op = op
        return detached(base)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        """Return the gradient of x [rows, in], given the gradient of the output [rows, out]."""
        weight, offs = ctx.saved_tensors
        return None, grouped(ctx.op, gradients[0], weight.transpose(-2, -1), offs), None, None, None


def _addmm(bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, same_bits: bool = True) -> torch.Tensor:
    return _frozen("addmm", x, weight, bias, same_bits)


def _grouped(x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor, same_bits: bool = True) -> torch.Tensor:
    op: Callable[..., torch.Tensor] = torch.ops.transformers.grouped_mm_fallback
    if not (same_bits or torch.is_grad_enabled()):
        return grouped(op, x, weight, offs)
    if weight.requires_grad or torch.is_autocast_enabled("cpu") or not allows_custom_backward(x, weight):
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


def for_frozen(target: Any, same_bits: bool = True) -> Callable[..., torch.Tensor] | None:
    """Return a faster function for nodes with this target, whose weights are usually frozen, or None.

    Args:
        target: the target of a node. The function has its arguments. Only graphs that run eagerly use it.
        same_bits: whether the function computes the same bits as the target if gradients are disabled.
    """
    is_op = isinstance(target, torch._ops.OpOverload) or target is F.linear
    if not is_op or not onednn_is_faster():
        return None
    function = _FROZEN.get("aten.linear.default" if target is F.linear else str(target))
    return function if same_bits or function is None else partial(function, same_bits=False)
