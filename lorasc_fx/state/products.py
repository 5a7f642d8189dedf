"""The arithmetic of a fold, `out = base + delta + b @ a`, rounded once, and the dtypes in which it is computed.

It works on blocks of rows. On the CPU a block stays in the cache between the copy, the product and the rounding. On an
accelerator blocks are large enough for the bus, and W0 is copied there in its own dtype. A weight narrower than the
arithmetic needs a temporary of one block. Every step is in place, and autocast does not change ops in place.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from lorasc_fx.util.accelerator import has_fp64
from lorasc_fx.util.undo import Block, isolated

BLOCK = 1 << 21
"""Bytes of a block per thread. From 1 to 4 MiB measure the same; smaller ones cost calls, whole weights the cache."""
DEVICE_BLOCK = 1 << 26
"""Bytes of a block on an accelerator: of bf16 weights 32 MiB are copied at a time."""


class Scratch:
    """A scratch buffer in the dtype of the arithmetic, for one weight at a time.

    It is reused, because the page faults of a new buffer take longer than the arithmetic.
    """

    _buffer: torch.Tensor | None = None

    def like(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return `torch.empty_like(weight, dtype=dtype)`. It may share memory with what was returned before."""
        buffer, entries = self._buffer, weight.numel()
        if buffer is None or buffer.numel() < entries or (buffer.dtype, buffer.device) != (dtype, weight.device):
            self._buffer = buffer = None  # free the old buffer before the new one is allocated
            self._buffer = buffer = torch.empty(entries, dtype=dtype, device=weight.device)
        return buffer.as_strided(weight.shape, torch.empty_like(weight, device="meta").stride())


def accumulate(
    out: torch.Tensor,
    base: torch.Tensor,
    dtype: torch.dtype,
    delta: torch.Tensor | None = None,
    pair: tuple[torch.Tensor, torch.Tensor] | None = None,
    stacked: bool = False,
) -> None:
    """Write `base + delta + b @ a` into `out`, computed in `dtype` and rounded once to the dtype of `out`.

    Args:
        out: a weight [out, ...], stacked [experts, out, ...], on any device, in any memory format.
        base, delta: of the same shape, on any device and in any dtype.
        dtype: of the arithmetic.
        pair: `b` [out, r] and `a` [r, columns] in `dtype` on the device of `out`; both stacked if the weight is.
        stacked: the first axis counts experts.
    """
    lead = 2 if stacked else 1
    order = [*range(lead), *sorted(range(lead, out.dim()), key=out.stride, reverse=True)]
    if not out.permute(order).is_contiguous():  # its rows are not the rows of a matrix in memory
        contiguous = torch.empty(out.shape, dtype=dtype, device=out.device)
        accumulate(contiguous, base, dtype, delta, pair, stacked)
        out.copy_(contiguous)
        return
    if order != sorted(order):  # channels last: permute base, delta and the columns of `a` like the weight
        base, delta = base.permute(order), None if delta is None else delta.permute(order)
        if pair is not None:
            columns = pair[1].view(*pair[1].shape[:lead], *out.shape[lead:])
            pair = pair[0], columns.permute(order).reshape(pair[1].shape)
        out = out.permute(order)
    size = (BLOCK * torch.get_num_threads() if out.device.type == "cpu" else DEVICE_BLOCK) // dtype.itemsize
    entries = math.prod(out.shape[1:])
    if stacked and entries > size:
        for index, (one, start) in enumerate(zip(out, base, strict=True)):
            factors = None if pair is None else (pair[0][index], pair[1][index])
            accumulate(one, start, dtype, None if delta is None else delta[index], factors)
        return
    rows = max(1, size // max(1, entries))
    narrow = None if out.dtype == dtype else torch.empty_like(out[:rows], dtype=dtype)
    with exact_products(out):
        for first in range(0, out.shape[0], rows):
            block = slice(first, first + rows)
            target, source, more = out[block], base[block], None if delta is None else delta[block]
            total = target if narrow is None else narrow[: len(target)]
            if more is not None and more.dtype == torch.float64 and not has_fp64(target.device):
                source, more = source.cpu().to(total.dtype, copy=True).add_(more.cpu()), None
            # `copy_` between devices casts first: right for fp64, but a narrow weight is copied before it is cast.
            total.copy_(source.to(target.device) if source.dtype.itemsize < total.dtype.itemsize else source)
            if more is not None:
                total.add_(more.to(total.device))  # a wider delta is added as it is, and the sum is rounded
            if pair is not None and stacked:
                total.view(*total.shape[:2], math.prod(total.shape[2:])).baddbmm_(pair[0][block], pair[1][block])
            elif pair is not None:
                total.view(len(total), math.prod(total.shape[1:])).addmm_(pair[0][block], pair[1])
            if narrow is not None:
                target.copy_(total)


def exact_products(like: torch.Tensor) -> AbstractContextManager[None]:
    """Compute fp32 products on an accelerator in fp32, even if the process has chosen TF32 for its training."""
    return _ieee() if like.is_cuda else nullcontext()


@isolated
def _ieee(undo: Block) -> None:
    matmul = torch.backends.cuda.matmul
    undo(partial(setattr, matmul, "fp32_precision", matmul.fp32_precision))
    matmul.fp32_precision = "ieee"


def cast(tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the tensor in a dtype on a device.

    If it comes from the host or goes there, it is cast on the host, because some accelerators (MPS) have no fp64.
    """
    return tensor.to(dtype).to(device) if tensor.device.type == "cpu" else tensor.to(device).to(dtype)


def summing(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a dense delta, to which every stage adds.

    It is wider than the weight, so that the sum of all stages is rounded once: fp64, or fp32 for narrow weights.
    """
    return torch.float64 if dtype.itemsize >= 4 else torch.float32


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which weights of this dtype are computed: fp64 and complex dtypes themselves, else fp32."""
    return dtype if dtype == torch.float64 or dtype.is_complex else torch.float32
