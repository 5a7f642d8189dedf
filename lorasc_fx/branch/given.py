"""Low-rank branches with factors that are inputs of the graph: one pair for all rows of the batch, or one for each.

Every function is plain operations, which torch.export, ONNX and torch.compile take as they are. The scale is a tensor,
and multiplies A x, the smallest one. Zero factors or the scale 0 add zero: the output is the base's, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from lorasc_fx.branch.conv import ConvCall


class Pair(NamedTuple):
    """The factors of a site.

    Args:
        down: A [rank, in], or [experts, rank, in]. One for each row of the batch has the axis of rows before.
        up: B [out, rank], or [experts, out, rank]; likewise.
        scale: of shape [], or [rows].
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: torch.Tensor


class Rows(NamedTuple):
    """Where the rows of the batch are in the input of a site.

    Args:
        axis: that holds them. Its size is a multiple of their number, if other axes were flattened into it.
        inner: whether an index of the axis is `i * rows + row`, and not `row * size + i`.
    """

    axis: int
    inner: bool = False

    def first(self, value: torch.Tensor, count: int) -> torch.Tensor:
        """Return a view [count, ...] with the axis of the rows first, and what was flattened into it where it was."""
        split = value.unflatten(self.axis, (-1, count) if self.inner else (count, -1))
        moved: torch.Tensor = split.movedim(self.axis + self.inner, 0)
        return moved

    def back(self, value: torch.Tensor) -> torch.Tensor:
        """Return a value in the order of axes that `first` changed."""
        return value.movedim(0, self.axis + self.inner).flatten(self.axis, self.axis + 1)


FIRST_AXIS = Rows(0)


def beside(base: torch.Tensor, x: torch.Tensor, pair: Pair, rows: Rows) -> torch.Tensor:
    """Return `base + scale B A x` of base [..., out], x [..., in]."""
    down = pair.down.to(x.dtype)
    if down.dim() == 2:
        low = F.linear(x, down) * pair.scale
        up = pair.up.to(low.dtype)
        if not base.is_contiguous():  # keep its strides, or what follows may sum in another order
            return base + F.linear(low, up)
        flat, low = base.view(-1, base.shape[-1]), low.reshape(-1, low.shape[-1])
        add = flat.addmm_ if _is_scratch(base, low) else partial(torch.addmm, flat)
        return add(low, up.t()).view(base.shape)
    x = rows.first(x, len(down)).flatten(1, -2)
    return _plus_rows(base, torch.bmm(x, down.transpose(1, 2)), pair.up, pair.scale, rows)


def at_lookup(base: torch.Tensor, indices: torch.Tensor, pair: Pair, rows: Rows, padding_idx: int = -1) -> torch.Tensor:
    """Return `base + scale B[indices] A` of base [..., out], indices [...]; B is [entries, rank].

    What is looked up at padding_idx gives no factor a gradient.
    """
    up, down = pair.up.to(base.dtype), pair.down.to(base.dtype)
    if up.dim() == 2:
        total = base + (F.embedding(indices, up) * pair.scale) @ down
    else:
        places = rows.first(indices, len(up)).flatten(1).unsqueeze(-1)
        low = up.gather(1, places.expand(-1, -1, up.shape[-1]))
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
    """Return `base + scale B_e (A_e x)` for the rows x of expert e; see `MatrixOps.grouped`."""
    space, _, name = by.partition("::")
    product: Any = getattr(getattr(torch.ops, space), name)
    a, b = pair.down.to(x.dtype), pair.up.to(x.dtype)
    short = -a.shape[-2] % 8 if space == "aten" else 0
    a, b = F.pad(a, (0, 0, 0, short)), F.pad(b, (0, short))
    low = product(x, a.transpose(-2, -1), offs) * pair.scale.to(x.dtype)
    term: torch.Tensor = product(low, b.transpose(-2, -1), offs)
    return base + term.to(base.dtype)


BESIDE: dict[str, Callable[..., torch.Tensor]] = {
    "beside": beside,
    "in_place": beside,
    "at_lookup": at_lookup,
    "grouped": grouped,
}
"""The placements of matrices by name. All get (base, x, pair, rows) and the options of the placement."""


def beside_conv(
    base: torch.Tensor, x: torch.Tensor, pair: Pair, call: ConvCall, shape: Sequence[int], rows: Rows
) -> torch.Tensor:
    """Return `base + scale B (A * x)` of base [batch, out, *places], x [batch, in, *space].

    Factors for each row are one convolution with a group for each row. With groups of its own the delta is the kernel.

    Args:
        base, x, pair, rows: as for `beside`.
        call: the arguments of the convolution.
        shape: of the weight, [out, in/groups, *kernel].
    """
    x, kernel = call.padded(x), tuple(shape[1:])
    down, up, scale = pair.down.to(x.dtype), pair.up.to(x.dtype), pair.scale.to(x.dtype)
    places = len(kernel) - 1
    if down.dim() == 2:
        if call.groups != 1:
            return base + call.conv(places, x, (up * scale @ down).view(-1, *kernel)).to(base.dtype)
        low = call.conv(places, x, down.view(-1, *kernel)) * scale
        return base + ConvCall().conv(places, low, up[(..., *(None for _ in range(places)))]).to(base.dtype)
    count, scale = len(down), scale.reshape(-1, 1, 1)
    x = rows.first(x, count).transpose(0, 1).flatten(1, 2)  # [images, rows * in, *space]
    call = call._replace(groups=count * call.groups)
    if call.groups != count:
        term = call.conv(places, x, (up * scale @ down).view(-1, *kernel))
    else:
        low = call.conv(places, x, (down * scale).view(-1, *kernel))
        wide = up.reshape(-1, up.shape[-1])[(..., *(None for _ in range(places)))]
        term = ConvCall(groups=count).conv(places, low, wide)
    return base + rows.back(term.unflatten(1, (count, -1)).transpose(0, 1)).to(base.dtype)


def _plus_rows(
    base: torch.Tensor, low: torch.Tensor, up: torch.Tensor, scale: torch.Tensor, rows: Rows
) -> torch.Tensor:
    """Return `base + scale up low` for low [rows, entries, rank], with factors up [rows, out, rank]."""
    low = low * scale.to(low.dtype).reshape(-1, 1, 1)
    up = up.to(low.dtype).transpose(1, 2)
    first = rows.first(base, len(up))
    if rows != FIRST_AXIS or not base.is_contiguous():  # the sum keeps the strides of base
        return base + rows.back(torch.bmm(low, up).view(first.shape))
    flat = first.flatten(1, -2)
    add = flat.baddbmm_ if _is_scratch(base, low) else partial(torch.baddbmm, flat)
    return add(low, up).view(base.shape)


def _is_scratch(base: torch.Tensor, low: torch.Tensor) -> bool:
    """Whether the output of an op can be overwritten, which saves a copy: in plain eager mode without gradients.

    Only its branch reads it.
    """
    plain = type(base) is type(low) is torch.Tensor and base.dtype == low.dtype
    return plain and not (
        torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    )
