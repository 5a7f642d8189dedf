"""Low-rank branches whose factors are inputs of the graph: one pair for the whole batch, or one pair per row of it.

All functions use plain operations, so that torch.export, ONNX and torch.compile work. The scale is a tensor that
multiplies A x, the smallest operand. With zero factors or a scale of 0, the output equals `base`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from lorasc_fx.branch.contract import Placement
from lorasc_fx.branch.conv import ConvCall


class Pair(NamedTuple):
    """The factors of a site.

    Args:
        down: A [rank, in], or [experts, rank, in]. With a pair for each row of the batch, [rows, rank, in].
        up: B [out, rank], or [experts, out, rank]. With a pair for each row of the batch, [rows, out, rank].
        scale: scale of the delta, [], or [rows] with a pair for each row.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: torch.Tensor


class Rows(NamedTuple):
    """Position of the rows of the batch in the input of a site, where other axes may be flattened into their axis.

    Args:
        axis: axis that contains the rows. Its length is a multiple of their number.
        inner: whether the rows are the inner part of a flattened axis, so that an index is `i * rows + row`. Otherwise
            it is `row * size + i`.
    """

    axis: int
    inner: bool = False

    def first(self, value: torch.Tensor, count: int) -> torch.Tensor:
        """Return a view [count, ...] with the rows as the first axis. Axes flattened with them keep their place."""
        split = value.unflatten(self.axis, (-1, count) if self.inner else (count, -1))
        moved: torch.Tensor = split.movedim(self.axis + self.inner, 0)
        return moved

    def back(self, value: torch.Tensor) -> torch.Tensor:
        """Restore the order of axes, the inverse of `first`."""
        return value.movedim(0, self.axis + self.inner).flatten(self.axis, self.axis + 1)


FIRST_AXIS = Rows(0)


def beside(base: torch.Tensor, x: torch.Tensor, pair: Pair, rows: Rows) -> torch.Tensor:
    """Return `base + scale B A x` for base [..., out] and x [..., in]."""
    down = pair.down.to(x.dtype)
    if down.dim() == 2:
        low = F.linear(x, down) * pair.scale
        up = pair.up.to(low.dtype)
        if not base.is_contiguous():  # keep the strides of base, because later ops may sum in another order otherwise
            return base + F.linear(low, up)
        flat, low = base.view(-1, base.shape[-1]), low.reshape(-1, low.shape[-1])
        add = flat.addmm_ if _is_scratch(base, low) else partial(torch.addmm, flat)
        return add(low, up.t()).view(base.shape)
    x = rows.first(x, len(down)).flatten(1, -2)
    return _plus_rows(base, torch.bmm(x, down.transpose(1, 2)), pair.up, pair.scale, rows)


def at_lookup(base: torch.Tensor, indices: torch.Tensor, pair: Pair, rows: Rows, padding_idx: int = -1) -> torch.Tensor:
    """Return `base + scale B[indices] A` for base [..., out] and indices [...]. B is [entries, rank].

    Entries at padding_idx contribute no gradient. A negative padding_idx means none.
    """
    up, down = pair.up.to(base.dtype), pair.down.to(base.dtype)
    if up.dim() == 2:
        total = base + (F.embedding(indices, up) * pair.scale) @ down
    else:
        row_indices = rows.first(indices, len(up)).flatten(1).unsqueeze(-1)
        low = up.gather(1, row_indices.expand(-1, -1, up.shape[-1]))
        total = _plus_rows(base, low, down.transpose(1, 2), pair.scale, rows)
    return torch.where((indices == padding_idx).unsqueeze(-1), total.detach(), total) if padding_idx >= 0 else total


def grouped(
    base: torch.Tensor,
    x: torch.Tensor,
    pair: Pair,
    rows: Rows,
    offs: torch.Tensor,
    by: str,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `base + scale B_e (A_e x)` for the rows x of each expert e. See `MatrixOps.grouped` for the arguments."""
    space, _, name = by.partition("::")
    product: Any = getattr(getattr(torch.ops, space), name)
    a, b = pair.down.to(x.dtype), pair.up.to(x.dtype)
    padding = -a.shape[-2] % 8 if space == "aten" else 0  # torch's op needs strides of multiples of 16 bytes
    a, b = F.pad(a, (0, 0, 0, padding)), F.pad(b, (0, padding))
    low = product(x, a.transpose(-2, -1), offs) * pair.scale.to(x.dtype)
    term: torch.Tensor = product(low, b.transpose(-2, -1), offs)
    return base + term.to(base.dtype)


BESIDE: dict[Placement, Callable[..., torch.Tensor]] = {
    Placement.BESIDE: beside,
    Placement.MERGED: beside,
    Placement.LOOKUP: at_lookup,
    Placement.GROUPED: grouped,
}
"""Functions for the placements of matrices. Their arguments are (base, x, pair, rows) and the options of the node."""


def beside_conv(
    base: torch.Tensor, x: torch.Tensor, pair: Pair, call: ConvCall, shape: Sequence[int], rows: Rows
) -> torch.Tensor:
    """Return `base + scale B (A * x)` for base [batch, out, *out_space] and x [batch, in, *space].

    With a pair for each row of the batch, all rows are computed by one convolution with a group per row. If the op
    itself has groups, the delta B A is used as the kernel.

    Args:
        base, x, pair, rows: as for `beside`.
        call: arguments of the convolution.
        shape: shape of the weight, [out, in/groups, *kernel].
    """
    x, kernel = call.padded(x), tuple(shape[1:])
    down, up, scale = pair.down.to(x.dtype), pair.up.to(x.dtype), pair.scale.to(x.dtype)
    axes = len(kernel) - 1
    if down.dim() == 2:
        if call.groups != 1:
            return base + call.conv(axes, x, (up * scale @ down).view(-1, *kernel)).to(base.dtype)
        low = call.conv(axes, x, down.view(-1, *kernel)) * scale
        return base + ConvCall().conv(axes, low, up[(..., *(None for _ in range(axes)))]).to(base.dtype)
    count, scale = len(down), scale.reshape(-1, 1, 1)
    x = rows.first(x, count).transpose(0, 1).flatten(1, 2)  # [images, rows * in, *space]
    call = call._replace(groups=count * call.groups)
    if call.groups != count:
        term = call.conv(axes, x, (up * scale @ down).view(-1, *kernel))
    else:
        low = call.conv(axes, x, (down * scale).view(-1, *kernel))
        stacked = up.reshape(-1, up.shape[-1])[(..., *(None for _ in range(axes)))]
        term = ConvCall(groups=count).conv(axes, low, stacked)
    return base + rows.back(term.unflatten(1, (count, -1)).transpose(0, 1)).to(base.dtype)


def _plus_rows(
    base: torch.Tensor, low: torch.Tensor, up: torch.Tensor, scale: torch.Tensor, rows: Rows
) -> torch.Tensor:
    """Return `base + scale B low` for low [rows, entries, rank] and B `up` [rows, out, rank]."""
    low = low * scale.to(low.dtype).reshape(-1, 1, 1)
    up = up.to(low.dtype).transpose(1, 2)
    by_row = rows.first(base, len(up))
    if rows != FIRST_AXIS or not base.is_contiguous():  # the sum keeps the strides of base
        return base + rows.back(torch.bmm(low, up).view(by_row.shape))
    flat = by_row.flatten(1, -2)
    add = flat.baddbmm_ if _is_scratch(base, low) else partial(torch.baddbmm, flat)
    return add(low, up).view(base.shape)


def _is_scratch(base: torch.Tensor, low: torch.Tensor) -> bool:
    """Whether `base` can be overwritten to save a copy: in eager mode without gradients.

    `base` is the output of an op, and nothing except the branch of the op reads it.
    """
    plain = type(base) is type(low) is torch.Tensor and base.dtype == low.dtype
    return plain and not (
        torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    )
