"""Low-rank branches of convolutions, with the stride, padding, dilation and groups of the base op.

Without groups, A is a convolution with the kernel size of the weight and `rank` output channels, and B is a 1x1
convolution, as in peft. With groups, the delta `B A` [out, in/groups * kernel] is used as the kernel of a grouped
convolution. This is exact, and for depthwise convolutions cheaper than `rank` channels per group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from lorasc_fx.branch.functions import BesideConv, MergedConv
from lorasc_fx.branch.low_rank import (
    CONV,
    ConvGeometry,
    allows_custom_backward,
    apply,
    compute_dtype,
    plus,
    with_strides,
)

if TYPE_CHECKING:
    from lorasc_fx.branch.lora import LowRankBranch


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
        """Return the input as the module pads it before the convolution."""
        return x if self.pad is None else F.pad(x, list(self.pad), mode=self.pad_mode)

    def conv(self, axes: int, x: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return the convolution of a padded input with a kernel [out, in/groups, *kernel].

        The number of spatial axes is an argument, because the Proxy of torch.fx.symbolic_trace has no shape.
        """
        convolve: Callable[..., torch.Tensor] = CONV[axes]
        return convolve(x, kernel, bias, self.stride, self.padding, self.dilation, self.groups)

    def geometry(self, x: torch.Tensor, kernel: Sequence[int]) -> ConvGeometry | None:
        """Return the geometry for the autograd functions.

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
    """The placements of a low-rank branch of a convolution (docs/design.md, "Placements"), as functions of the branch.

    The formula is in docs/algorithm.md, "Conv". `A * x` is the convolution of x with A. The options of `beside` and
    `merged` are the fields of a `ConvCall`.
    """

    @staticmethod
    def on_weight(branch: LowRankBranch, weight: torch.Tensor) -> torch.Tensor:
        """Return `W + s B A` for a kernel W [out, in/groups, *kernel]."""
        return with_strides(plus(weight, branch.product().to(weight.dtype), branch.scale), weight)

    @staticmethod
    def beside(branch: LowRankBranch, base: torch.Tensor, x: torch.Tensor, **options: Any) -> torch.Tensor:
        """Return `base + s B (A * x)` for base [batch, out, *out_space] and x [batch, in, *space]."""
        call = ConvCall(**options)
        image = call.padded(x)
        geometry = call.geometry(image, branch.weight_shape[2:]) if allows_custom_backward(base, x) else None
        return ConvOps._beside(branch, base, image, call, geometry)

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
            base = call.conv(len(branch.weight_shape) - 2, image, weight, bias)
            return ConvOps._beside(branch, base, image, call, geometry)
        a, dtype = branch.down.view(-1, *branch.weight_shape[1:]), compute_dtype(image)
        bias = bias.to(dtype) if bias is not None else None
        return apply(MergedConv, image.to(dtype), weight, bias, a, branch.up, geometry, branch.scale)

    @staticmethod
    def _beside(
        branch: LowRankBranch, base: torch.Tensor, image: torch.Tensor, call: ConvCall, geometry: ConvGeometry | None
    ) -> torch.Tensor:
        if geometry is not None and call.groups == 1:
            image, seed = image.to(base.dtype), branch.dropout_seed()
            a, b = branch.down.to(base.dtype).view(-1, *branch.weight_shape[1:]), branch.up.to(base.dtype)
            return apply(BesideConv, base, image, a, b, geometry, branch.scale, branch.dropout, seed)
        image = F.dropout(image, branch.dropout) if branch.drops else image
        return plus(base, low_rank_conv(branch, image, call), branch.scale)


def low_rank_conv(branch: LowRankBranch, image: torch.Tensor, call: ConvCall) -> torch.Tensor:
    """Return `B (A * x)` for a padded input, with plain operations. With groups, convolve with the kernel `B A`."""
    kernel = branch.weight_shape[2:]
    if call.groups != 1:
        return call.conv(len(kernel), image, branch.product().to(image.dtype))
    a, b = branch.down.to(image.dtype), branch.up.to(image.dtype)
    low = call.conv(len(kernel), image, a.view(-1, *branch.weight_shape[1:]))
    return ConvCall().conv(len(kernel), low, b[(..., *(None for _ in kernel))])
