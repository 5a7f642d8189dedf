"""The placements of branches: what a branch node computes beside an op, instead of an op, or from a weight.

In a convolution without groups, A has the kernel size of the weight and `rank` output channels. B is a 1x1 convolution,
as in peft. With groups, the delta `B A` [out, in/groups * kernel] is used as the kernel of a grouped convolution. This
is exact. For depthwise convolutions it is cheaper than `rank` channels per group.

If factors are inputs of the graph, there is one pair for the whole batch, or one pair per row of the batch. Their
functions use plain operations, so that torch.export, ONNX and torch.compile work. The scale is a tensor that multiplies
A x, the smallest operand. With zero factors or scale 0, they return the output of the op, bit for bit.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from lorasc_fx.branch.products import (
    CONV,
    PRODUCTS,
    Beside,
    BesideConv,
    ConvGeometry,
    DenseGradient,
    FrozenGrouped,
    MergedConv,
    MergedProduct,
    allows_custom_backward,
    apply,
    compute_dtype,
    plus,
    with_strides,
)
from lorasc_fx.util.torch_private import functorch_is_active

if TYPE_CHECKING:
    from lorasc_fx.branch.lora import LowRankBranch


class Placement(enum.StrEnum):
    """What a branch node computes, given as its option `at` (docs/algorithm.md, "Placements")."""

    BESIDE = "beside"
    """Adds the term of the branch to the output of an op."""
    LOOKUP = "lookup"
    """Adds the term to the output of the lookup of an embedding."""
    GROUPED = "grouped"
    """Adds the term to the output of a product whose rows are grouped by matrix (`grouped_mm`)."""
    MERGED = "merged"
    """Computes the op with the adapted weight, instead of the op itself."""
    WEIGHT = "weight"
    """Returns the adapted weight."""
    ADAPTED = "adapted"
    """Returns the adapted weight, with a scale that is an input of the graph. Only for `Branch.computed_with`."""
    FACTORS = "factors"
    """Returns A and B. Only for `LowRankBranch.computed_with`."""

    def __repr__(self) -> str:
        return repr(self.value)


_ALIGNED = 8
"""Pad the rank to multiples of 8: torch's grouped matmul needs strides of multiples of 16 bytes."""

SMALL = 1 << 15
"""Maximum number of entries of input and output for which plain operations are faster than an autograd.Function."""


class MatrixOps:
    """The placements of a low-rank branch at a matrix (docs/algorithm.md, "Placements"), as functions of the branch.

    Together with the op, all compute `W_t x + s B A x` (docs/algorithm.md, row "training").
    """

    @staticmethod
    def beside(branch: LowRankBranch, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return `output + s B A x` for output [..., out] and x [..., in].

        For a quantized weight, this includes the deltas of earlier stages.
        """
        if branch.unmerged_A is not None and branch.unmerged_B is not None:
            output = output + F.linear(F.linear(x, branch.unmerged_A.to(x.dtype)), branch.unmerged_B.to(x.dtype)).to(
                output.dtype
            )
        return MatrixOps._beside(branch, output, x)

    @staticmethod
    def beside_small(branch: LowRankBranch, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the same as `beside`, without dropout. Plain operations take less time for small tensors."""
        if branch.unmerged_A is not None:
            return MatrixOps.beside(branch, output, x)
        a, b = branch.down, branch.up
        low = F.linear(x, a if a.dtype == x.dtype else a.to(x.dtype))
        return torch.add(output, F.linear(low, b if b.dtype == low.dtype else b.to(low.dtype)), alpha=branch.scale)

    @staticmethod
    def on_weight(branch: LowRankBranch, weight: torch.Tensor) -> torch.Tensor:
        """Return `W + s B A` in the layout of the weight."""
        total = plus(weight, branch.product().to(weight.dtype), branch.scale)
        return apply(DenseGradient, total) if allows_custom_backward(weight) and total.dim() == 2 else total

    @staticmethod
    def merged(
        branch: LowRankBranch, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, op: str
    ) -> torch.Tensor:
        """Return `op(x, W + s B A, bias)`, the product with the merged weight. `op` is a key of PRODUCTS.

        If custom backwards are not allowed, compute `op(x, W, bias) + s B A x`, which is equal up to rounding.
        """
        if not allows_custom_backward(x, weight):
            return MatrixOps._beside(branch, PRODUCTS[op](x, weight, bias), x)
        dtype = compute_dtype(x)
        bias = bias.to(dtype) if bias is not None else None
        return apply(MergedProduct, x.to(dtype), weight, bias, branch.down, branch.up, branch.scale, op)

    @staticmethod
    def at_lookup(
        branch: LowRankBranch, output: torch.Tensor, indices: torch.Tensor, padding_idx: int = -1
    ) -> torch.Tensor:
        """Return `output + s B[indices] A` for output [..., out] and indices [...]. B is [entries, rank].

        As in `F.embedding`, entries at padding_idx contribute no gradient. A negative padding_idx means none.
        """
        low = F.embedding(indices, branch.up.type_as(output), padding_idx if padding_idx >= 0 else None)
        delta = (low @ branch.down.type_as(low)).type_as(output)  # autocast does not change the dtype of a lookup
        total = plus(output, delta, branch.scale)
        return torch.where((indices == padding_idx).unsqueeze(-1), total.detach(), total) if padding_idx >= 0 else total

    @staticmethod
    def grouped(
        branch: LowRankBranch,
        output: torch.Tensor,
        x: torch.Tensor,
        offs: torch.Tensor,
        by: str,
        weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return `output + s B_e (A_e x)` beside a grouped product, with the factors of the matrix e of each row x.

        Rows after the last end in `offs` belong to no matrix. They are never read, and their output is undefined, as in
        the op.

        Args:
            output: output of the grouped product, [rows, out].
            x, offs: rows [rows, in] sorted by matrix, and the index after the last row of each matrix.
            by: qualified name in `torch.ops` of the op for grouped products, such as `aten::_grouped_mm`.
            weight: frozen weight [matrices, in, out], if the backward of the op would compute a gradient of it.
        """
        space, _, name = by.partition("::")
        product: Any = getattr(getattr(torch.ops, space), name)
        if (
            weight is not None
            and not weight.requires_grad
            and x.requires_grad
            and allows_custom_backward(output, x, weight)
        ):
            output = apply(FrozenGrouped, output.detach(), x, weight, offs, product)
        # Pad the rank with zeros, because torch's op needs aligned strides.
        a, b, padding = branch.down.to(x.dtype), branch.up.to(x.dtype), -branch.rank % _ALIGNED
        if padding and space == "aten":
            a, b = F.pad(a, (0, 0, 0, padding)), F.pad(b, (0, padding))
        term: torch.Tensor = product(product(x, a.transpose(-2, -1), offs), b.transpose(-2, -1), offs)
        return plus(output, term.to(output.dtype), branch.scale)

    @staticmethod
    def _beside(branch: LowRankBranch, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        # Check for tracers first: they must not compare sizes, which would specialize the graph.
        if allows_custom_backward(output, x) and max(output.numel(), x.numel()) > SMALL:
            a, b, seed = branch.down.to(output.dtype), branch.up.to(output.dtype), branch.dropout_seed()
            return apply(Beside, output, x.to(output.dtype), a, b, branch.scale, branch.dropout, seed)
        x = F.dropout(x, branch.dropout) if branch.drops else x
        return MatrixOps._added(branch, output, F.linear(x, branch.down.to(x.dtype)))

    @staticmethod
    def _added(branch: LowRankBranch, output: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        """Return `output + s B low` with plain operations."""
        if isinstance(output, torch.Tensor) and output.is_nested:  # addmm does not support nested tensors
            return output + F.linear(low, branch.up.to(low.dtype)) * branch.scale
        rows, up = output.reshape(-1, output.shape[-1]), branch.up.t().to(low.dtype)
        return torch.addmm(rows, low.reshape(-1, low.shape[-1]), up, alpha=branch.scale).view(output.shape)


class ConvCall(NamedTuple):
    """The arguments of a convolution except its tensors.

    If the padding_mode of the module is not "zeros", the module pads its input before the convolution. Then `pad` and
    `pad_mode` are the arguments of `F.pad`, and `padding` is 0.
    """

    stride: int | Sequence[int] = 1
    padding: int | str | Sequence[int] = 0
    dilation: int | Sequence[int] = 1
    groups: int = 1
    pad: Sequence[int] | None = None
    pad_mode: str = "constant"

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input, padded like the module does before the convolution."""
        return x if self.pad is None else F.pad(x, list(self.pad), mode=self.pad_mode)

    def conv(self, axes: int, x: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return the convolution of a padded input with a kernel [out, in/groups, *kernel].

        The number of spatial `axes` is an argument, because a Proxy of torch.fx.symbolic_trace has no shape.
        """
        convolve: Callable[..., torch.Tensor] = CONV[axes]
        return convolve(x, kernel, bias, self.stride, self.padding, self.dilation, self.groups)

    def geometry(self, x: torch.Tensor, kernel: Sequence[int]) -> ConvGeometry | None:
        """Return the stride, padding, dilation and groups for the autograd functions, one number per spatial axis.

        None for an input without a batch axis, or if `padding="same"` pads the two sides of an axis differently.
        """
        axes, padding = len(kernel), self.padding
        if x.dim() != 2 + axes:
            return None
        dilations = _per_axis(self.dilation, axes)
        if isinstance(padding, str):
            total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilations, kernel, strict=True)]
            if any(size % 2 for size in total):
                return None
            padding = [size // 2 for size in total]
        return ConvGeometry(_per_axis(self.stride, axes), _per_axis(padding, axes), dilations, self.groups)


def _per_axis(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value) * (axes if len(value) == 1 else 1)


class ConvOps:
    """The placements of a low-rank branch of a convolution, as functions of the branch.

    The formula is in docs/algorithm.md, "Conv". `A * x` is the convolution of x with A. The options of `beside` and
    `merged` are the fields of a `ConvCall`.
    """

    @staticmethod
    def on_weight(branch: LowRankBranch, weight: torch.Tensor) -> torch.Tensor:
        """Return `W + s B A` for a kernel W [out, in/groups, *kernel]."""
        return with_strides(plus(weight, branch.product().to(weight.dtype), branch.scale), weight)

    @staticmethod
    def beside(branch: LowRankBranch, output: torch.Tensor, x: torch.Tensor, **options: Any) -> torch.Tensor:
        """Return `output + s B (A * x)` for output [batch, out, *out_space] and x [batch, in, *space]."""
        call = ConvCall(**options)
        image = call.padded(x)
        geometry = call.geometry(image, branch.weight_shape[2:]) if allows_custom_backward(output, x) else None
        return ConvOps._beside(branch, output, image, call, geometry)

    @staticmethod
    def merged(
        branch: LowRankBranch,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        op: str,
        **options: Any,
    ) -> torch.Tensor:
        """Return `(W + s B A) * x + bias`, the convolution with the merged kernel.

        If custom backwards are not allowed, compute `W * x + bias + s B (A * x)`, which is equal up to rounding.
        """
        call = ConvCall(**options)
        image = call.padded(x)
        geometry = call.geometry(image, branch.weight_shape[2:]) if allows_custom_backward(x, weight) else None
        if geometry is None:
            output = call.conv(len(branch.weight_shape) - 2, image, weight, bias)
            return ConvOps._beside(branch, output, image, call, geometry)
        a, dtype = branch.down.view(-1, *branch.weight_shape[1:]), compute_dtype(image)
        bias = bias.to(dtype) if bias is not None else None
        return apply(MergedConv, image.to(dtype), weight, bias, a, branch.up, geometry, branch.scale)

    @staticmethod
    def _beside(
        branch: LowRankBranch, output: torch.Tensor, image: torch.Tensor, call: ConvCall, geometry: ConvGeometry | None
    ) -> torch.Tensor:
        if geometry is not None and call.groups == 1:
            image, seed = image.to(output.dtype), branch.dropout_seed()
            a, b = branch.down.to(output.dtype).view(-1, *branch.weight_shape[1:]), branch.up.to(output.dtype)
            return apply(BesideConv, output, image, a, b, geometry, branch.scale, branch.dropout, seed)
        image = F.dropout(image, branch.dropout) if branch.drops else image
        return plus(output, low_rank_conv(branch, image, call), branch.scale)


def low_rank_conv(branch: LowRankBranch, image: torch.Tensor, call: ConvCall) -> torch.Tensor:
    """Return `B (A * x)` for a padded input, with plain operations. With groups, convolve with the kernel `B A`."""
    kernel = branch.weight_shape[2:]
    if call.groups != 1:
        return call.conv(len(kernel), image, branch.product().type_as(image))
    # In a traced graph, `type_as` depends on the input, so constant folding keeps the parameters trainable.
    a, b = branch.down.type_as(image), branch.up.type_as(image)
    low = call.conv(len(kernel), image, a.view(-1, *branch.weight_shape[1:]))
    return ConvCall().conv(len(kernel), low, b[(..., *(None for _ in kernel))])


class GivenFactors(NamedTuple):
    """The factors of a site, as inputs of the graph.

    Args:
        down: A [rank, in], or [matrices, rank, in] if stacked. With a pair per row of the batch: [rows, rank, in].
        up: B [out, rank], or [matrices, out, rank] if stacked. With a pair per row of the batch: [rows, out, rank].
        scale: scale of the delta, a scalar tensor. With a pair per row of the batch: [rows].
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: torch.Tensor


def beside(output: torch.Tensor, x: torch.Tensor, pair: GivenFactors) -> torch.Tensor:
    """Return `output + scale B A x` for output [..., out] and x [..., in]."""
    down = pair.down.to(x.dtype)
    if down.dim() == 2:
        low = F.linear(x, down) * pair.scale
        up = pair.up.to(low.dtype)
        if (
            not output.is_contiguous()
        ):  # keep the strides of output, because later ops may choose their order of sums by strides
            return output + F.linear(low, up)
        flat, low = output.view(-1, output.shape[-1]), low.reshape(-1, low.shape[-1])
        add = flat.addmm_ if _is_scratch(output, low) else partial(torch.addmm, flat)
        return add(low, up.t()).view(output.shape)
    x = x.unflatten(0, (len(down), -1)).flatten(1, -2)
    return _plus_rows(output, torch.bmm(x, down.transpose(1, 2)), pair.up, pair.scale)


def at_lookup(output: torch.Tensor, indices: torch.Tensor, pair: GivenFactors, padding_idx: int = -1) -> torch.Tensor:
    """Return `output + scale B[indices] A` for output [..., out] and indices [...]. B is [entries, rank].

    Entries at padding_idx contribute no gradient. A negative padding_idx means none.
    """
    up, down = pair.up.to(output.dtype), pair.down.to(output.dtype)
    if up.dim() == 2:
        total = output + (F.embedding(indices, up) * pair.scale) @ down
    else:
        row_indices = indices.unflatten(0, (len(up), -1)).flatten(1).unsqueeze(-1)
        low = up.gather(1, row_indices.expand(-1, -1, up.shape[-1]))
        total = _plus_rows(output, low, down.transpose(1, 2), pair.scale)
    return torch.where((indices == padding_idx).unsqueeze(-1), total.detach(), total) if padding_idx >= 0 else total


def grouped(
    output: torch.Tensor,
    x: torch.Tensor,
    pair: GivenFactors,
    offs: torch.Tensor,
    by: str,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `output + scale B_e (A_e x)`; see `MatrixOps.grouped`."""
    space, _, name = by.partition("::")
    product: Any = getattr(getattr(torch.ops, space), name)
    a, b = pair.down.to(x.dtype), pair.up.to(x.dtype)
    padding = -a.shape[-2] % 8 if space == "aten" else 0  # torch's op needs strides of multiples of 16 bytes
    a, b = F.pad(a, (0, 0, 0, padding)), F.pad(b, (0, padding))
    low = product(x, a.transpose(-2, -1), offs) * pair.scale.to(x.dtype)
    term: torch.Tensor = product(low, b.transpose(-2, -1), offs)
    return output + term.to(output.dtype)


BESIDE: dict[Placement, Callable[..., torch.Tensor]] = {
    Placement.BESIDE: beside,
    Placement.MERGED: beside,
    Placement.LOOKUP: at_lookup,
    Placement.GROUPED: grouped,
}
"""Functions for the placements at matrices. Their arguments are (output, x, pair) and the options of the node."""


def beside_conv(
    output: torch.Tensor, x: torch.Tensor, pair: GivenFactors, call: ConvCall, shape: Sequence[int]
) -> torch.Tensor:
    """Return `output + scale B (A * x)` for output [batch, out, *out_space] and x [batch, in, *space].

    With a pair per row of the batch, one convolution computes all rows, with one group per row. If the op itself has
    groups, the delta B A is the kernel.

    Args:
        output, x, pair: as for `beside`.
        call: arguments of the convolution.
        shape: shape of the weight, [out, in/groups, *kernel].
    """
    x, kernel = call.padded(x), tuple(shape[1:])
    down, up, scale = pair.down.to(x.dtype), pair.up.to(x.dtype), pair.scale.to(x.dtype)
    axes = len(kernel) - 1
    if down.dim() == 2:
        if call.groups != 1:
            return output + call.conv(axes, x, (up * scale @ down).view(-1, *kernel)).to(output.dtype)
        low = call.conv(axes, x, down.view(-1, *kernel)) * scale
        return output + ConvCall().conv(axes, low, up[(..., *(None for _ in range(axes)))]).to(output.dtype)
    count, scale = len(down), scale.reshape(-1, 1, 1)
    x = x.unflatten(0, (count, -1)).transpose(0, 1).flatten(1, 2)  # [images, rows * in, *space]
    call = call._replace(groups=count * call.groups)
    if call.groups != count:
        term = call.conv(axes, x, (up * scale @ down).view(-1, *kernel))
    else:
        low = call.conv(axes, x, (down * scale).view(-1, *kernel))
        stacked = up.reshape(-1, up.shape[-1])[(..., *(None for _ in range(axes)))]
        term = ConvCall(groups=count).conv(axes, low, stacked)
    total: torch.Tensor = output + term.unflatten(1, (count, -1)).transpose(0, 1).flatten(0, 1).to(output.dtype)
    return total


def _plus_rows(output: torch.Tensor, low: torch.Tensor, up: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return `output + scale B low` for low [rows, entries, rank] and B `up` [rows, out, rank]."""
    low = low * scale.to(low.dtype).reshape(-1, 1, 1)
    up = up.to(low.dtype).transpose(1, 2)
    if not output.is_contiguous():  # the sum keeps the strides of output
        return output + torch.bmm(low, up).view(output.shape)
    flat = output.view(*low.shape[:2], output.shape[-1])
    add = flat.baddbmm_ if _is_scratch(output, low) else partial(torch.baddbmm, flat)
    return add(low, up).view(output.shape)


def _is_scratch(output: torch.Tensor, low: torch.Tensor) -> bool:
    """Whether `output` may be overwritten to save a copy: in eager mode without gradients.

    This is safe because only the branch of an op reads the output of the op.
    """
    plain = type(output) is type(low) is torch.Tensor and output.dtype == low.dtype
    return plain and not (torch.is_grad_enabled() or torch.compiler.is_compiling() or functorch_is_active())
