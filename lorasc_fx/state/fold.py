"""The arithmetic of a fold: `out = base + delta + b @ a`, rounded once, and sums of low-rank factors.

A fold works on blocks of rows. On the CPU a block stays in the cache between the copy, the product and the rounding.
On an accelerator a block is large enough to use the bandwidth of the bus, and W0 is copied there in its own dtype. A
weight narrower than the arithmetic needs a temporary buffer of one block. Every step is in place, because autocast does
not change the dtype of in-place ops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lorasc_fx.branch.contract import Factors
from lorasc_fx.branch.grid import exact_products, scale_rows
from lorasc_fx.util.environment import has_fp64

BLOCK = 1 << 21
"""Bytes of a block per thread on the CPU. Sizes from 1 to 4 MiB are equally fast. Smaller blocks need more calls, and a
whole weight does not fit in the cache."""
DEVICE_BLOCK = 1 << 26
"""Bytes of a block on an accelerator, in the dtype of the arithmetic. Of a bf16 weight, 32 MiB are copied at a time."""


class Scratch:
    """A scratch buffer in the dtype of the arithmetic, reused from weight to weight.

    The page faults of a new buffer take longer than the arithmetic.
    """

    _buffer: torch.Tensor | None = None

    def like(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return `torch.empty_like(weight, dtype=dtype)`. It may share memory with tensors from earlier calls."""
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
        out: a weight [out, ...], or stacked [experts, out, ...], on any device, in any memory format.
        base, delta: tensors in the shape of `out`, on any device and in any dtype.
        dtype: dtype of the arithmetic.
        pair: `b` [out, r] and `a` [r, columns] in `dtype` on the device of `out`. If the weight is stacked, both have
            the axis of experts first.
        stacked: whether the first axis counts experts.
    """
    # Step 1: find an order of axes in which the weight is contiguous, so that its rows are rows of a matrix.
    lead = 2 if stacked else 1
    order = [*range(lead), *sorted(range(lead, out.dim()), key=out.stride, reverse=True)]
    if not out.permute(order).is_contiguous():
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
    # Step 2: choose the number of rows of a block. If one expert exceeds a block, fold each expert as a matrix.
    size = (BLOCK * torch.get_num_threads() if out.device.type == "cpu" else DEVICE_BLOCK) // dtype.itemsize
    entries = math.prod(out.shape[1:])
    if stacked and entries > size:
        for index, (matrix, base_matrix) in enumerate(zip(out, base, strict=True)):
            factors = None if pair is None else (pair[0][index], pair[1][index])
            accumulate(matrix, base_matrix, dtype, None if delta is None else delta[index], factors)
        return
    rows = max(1, size // max(1, entries))
    buffer = None if out.dtype == dtype else torch.empty_like(out[:rows], dtype=dtype)
    # Step 3: compute block by block.
    with exact_products(out):
        for start in range(0, out.shape[0], rows):
            block = slice(start, start + rows)
            target, source, dense = out[block], base[block], None if delta is None else delta[block]
            total = target if buffer is None else buffer[: len(target)]
            if dense is not None and dense.dtype == torch.float64 and not has_fp64(target.device):  # add on the host
                source, dense = source.cpu().to(total.dtype, copy=True).add_(dense.cpu()), None
            # `copy_` casts before it transfers. A narrow weight is transferred first, because it has fewer bytes.
            total.copy_(source.to(target.device) if source.dtype.itemsize < total.dtype.itemsize else source)
            if dense is not None:
                total.add_(dense.to(total.device))  # not cast first, so that only the sum is rounded
            if pair is not None and stacked:
                total.view(*total.shape[:2], math.prod(total.shape[2:])).baddbmm_(pair[0][block], pair[1][block])
            elif pair is not None:
                total.view(len(total), math.prod(total.shape[1:])).addmm_(pair[0][block], pair[1])
            if buffer is not None:
                target.copy_(total)


def cast(tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the tensor in a dtype on a device. A transfer from or to the host casts on the host.

    Some accelerators (MPS) have no fp64.
    """
    return tensor.to(dtype).to(device) if tensor.device.type == "cpu" else tensor.to(device).to(dtype)


def summing(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the dense delta of a weight: fp64, or fp32 for weights narrower than fp32.

    Every stage adds to the dense delta. It is wider than the weight, so that only the sum of all stages is rounded.
    """
    return torch.float64 if dtype.itemsize >= 4 else torch.float32


# ---- pairs of factors


def sum_of(pairs: Sequence[tuple[float, Factors]], dtype: torch.dtype, device: torch.device) -> Factors:
    """Return the sum of `c * b @ a` over (c, factors) pairs as one pair of the summed rank.

    Its `b` [rows, sum of r] has all `c b` as columns, its `a` [sum of r, columns] all `a` as rows. A single pair is not
    copied if possible. Both results are row-major: BLAS rounds the product of a transposed factor differently, and a
    checkpoint does not store strides.
    """
    if len(pairs) == 1:
        b, a = pairs[0][1].b, pairs[0][1].a
    else:
        # Experts are on the host, and the factors of a running branch may not be. Concatenate where the experts are.
        home = pairs[0][1].b.device
        b = torch.cat([factors.b.to(home) for _, factors in pairs], dim=-1)
        a = torch.cat([factors.a.to(home) for _, factors in pairs], dim=-2)
    b, a = cast(b, dtype, device), cast(a, dtype, device)
    if any(c != pairs[0][0] for c, _ in pairs):
        columns = [c for c, factors in pairs for _ in range(factors.b.shape[-1])]
        b = b * torch.tensor(columns, dtype=dtype, device=device)
    elif pairs[0][0] != 1:
        b = b * pairs[0][0]
    return Factors(_row_major(b), _row_major(a))


def shortest_pair(pair: Factors, floor: float = 0.0) -> Factors:
    """Return the pair of the smallest rank with the same product `b @ a`, up to rounding.

    Singular values up to `floor`, and those that are zero up to rounding, are dropped.
    """
    u, values, vh = svd_of(pair)
    smallest = max(floor, float(values.norm()) * torch.finfo(values.dtype).eps * max(len(u), vh.shape[-1]))
    return truncated(u, values, vh, int((values > smallest).sum()))


def svd_of(pair: Factors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the SVD of `b @ a`, or of a stack of products: U [rows, k], singular values [k] and V^H [k, columns].

    k is min(r, rows, columns). `b @ a` is never computed: with `b = Q_b R_b` and `a^T = Q_a R_a`, it is enough to
    decompose the core `R_b R_a^T`.
    """
    q_b, r_b = torch.linalg.qr(pair.b)
    q_a, r_a = torch.linalg.qr(pair.a.mT)
    u, values, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    return q_b @ u, values, vh @ q_a.mT


def truncated(u: torch.Tensor, values: torch.Tensor, vh: torch.Tensor, rank: int, scale: float = 1.0) -> Factors:
    """Return b and a such that `scale * b @ a` has the `rank` largest singular values of an SVD.

    Each factor gets the square root of values / scale.
    """
    root = (values[..., :rank] / scale).sqrt()
    return Factors(u[..., :rank] * root.unsqueeze(-2), root.unsqueeze(-1) * vh[..., :rank, :])


def _row_major(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor with the strides of a new tensor, copied if necessary.

    `contiguous` is not enough, because it keeps any strides of axes of length 1.
    """
    strides = torch.empty(tensor.shape, device="meta").stride()
    return tensor if tensor.stride() == strides else tensor.clone(memory_format=torch.contiguous_format)


def scaled(pair: Factors, scale: torch.Tensor | None, transposed: bool) -> Factors:
    """Return the factors of a delta whose output rows are multiplied by `scale` [out]. None returns the pair unchanged.

    The factor that is scaled is in fp64 on the host.
    """
    if scale is None:
        return pair
    if transposed:
        return Factors(pair.b, scale_rows(scale, pair.a.cpu().double(), True))
    return Factors(scale_rows(scale, pair.b.cpu().double(), False), pair.a)
