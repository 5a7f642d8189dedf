"""`out = base + delta + b @ a`, rounded once: what a fold computes of one weight, the factors that it sums, and
the dtypes in which weights and deltas are computed.

It goes by blocks of rows. On the CPU they stay in the cache between the copy, the product and the rounding; on an
accelerator they are large enough for the bus, and W0 is copied to it in its own dtype. A weight narrower than the
arithmetic needs a temporary of one block. Every step is in place, which autocast leaves alone.
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
    """A scratch buffer for one weight at a time, in the dtype of the arithmetic: page faults of a new one take longer
    than the arithmetic.
    """

    def __init__(self) -> None:
        self._held: torch.Tensor | None = None

    def like(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return `torch.empty_like(weight, dtype=dtype)`; what was returned before may lie in the same memory."""
        held, entries = self._held, weight.numel()
        if held is None or held.numel() < entries or (held.dtype, held.device) != (dtype, weight.device):
            self._held = held = None  # first
            self._held = held = torch.empty(entries, dtype=dtype, device=weight.device)
        return held.as_strided(weight.shape, torch.empty_like(weight, device="meta").stride())


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
    if not out.permute(order).is_contiguous():  # its rows are no matrix in memory
        whole = torch.empty(out.shape, dtype=dtype, device=out.device)
        accumulate(whole, base, dtype, delta, pair, stacked)
        out.copy_(whole)
        return
    if order != sorted(order):  # channels last: base, delta and the columns of `a` in the order of the weight
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
    room = None if out.dtype == dtype else torch.empty_like(out[:rows], dtype=dtype)
    with exact_products(out):
        for first in range(0, out.shape[0], rows):
            _block(out, base, delta, pair, slice(first, first + rows), room, stacked)


def _block(
    out: torch.Tensor,
    base: torch.Tensor,
    delta: torch.Tensor | None,
    pair: tuple[torch.Tensor, torch.Tensor] | None,
    part: slice,
    room: torch.Tensor | None,
    stacked: bool,
) -> None:
    target, source = out[part], base[part]
    held = target if room is None else room[: len(target)]
    if delta is not None and delta.dtype == torch.float64 and not has_fp64(target.device):
        source, delta = source.cpu().to(held.dtype, copy=True).add_(delta[part].cpu()), None
    # `copy_` between devices casts first: right for fp64, but a narrow weight is copied before it is cast.
    held.copy_(source.to(target.device) if source.dtype.itemsize < held.dtype.itemsize else source)
    if delta is not None:
        held.add_(delta[part].to(held.device))  # a wider delta is added as it is, and the sum is rounded
    if pair is not None and stacked:
        held.view(*held.shape[:2], math.prod(held.shape[2:])).baddbmm_(pair[0][part], pair[1][part])
    elif pair is not None:
        held.view(len(held), math.prod(held.shape[1:])).addmm_(pair[0][part], pair[1])
    if room is not None:
        target.copy_(held)


def exact_products(like: torch.Tensor) -> AbstractContextManager[None]:
    """Let fp32 products on an accelerator be fp32, whatever the process has chosen for its training (TF32, say)."""
    return _ieee() if like.is_cuda else nullcontext()


@isolated
def _ieee(undo: Block) -> None:
    matmul = torch.backends.cuda.matmul
    undo(partial(setattr, matmul, "fp32_precision", matmul.fp32_precision))
    matmul.fp32_precision = "ieee"


def cast(tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the tensor in a dtype on a device. It is cast on the host if it comes from there or goes there: some
    accelerators (MPS) have no fp64.
    """
    return tensor.to(dtype).to(device) if tensor.device.type == "cpu" else tensor.to(device).to(dtype)


def summing(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a dense delta, to which every stage adds: fp64, so that its sum is rounded once however many
    there were; fp32 is fine enough for weights that are narrower.
    """
    return torch.float64 if dtype.itemsize >= 4 else torch.float32


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which weights of this dtype are computed: fp64 and complex dtypes themselves, else fp32."""
    return dtype if dtype == torch.float64 or dtype.is_complex else torch.float32
