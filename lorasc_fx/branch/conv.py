"""Low-rank branches of convolutions, with the base op's own stride, padding, dilation and groups.

Without groups A is a convolution with the site's kernel to `rank` channels and B a 1x1 convolution (LoRA for
convolutions, as in PEFT). With groups the delta keeps its matrix form, [out, in/groups * kernel], and is itself the
kernel of a grouped convolution: exact, and for depthwise sites cheaper than `rank` channels per group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from lorasc_fx.branch.functions import BesideConv, MergedConv
from lorasc_fx.branch.low_rank import CONV, Grid, apply, by_hand, computes_in, plus

if TYPE_CHECKING:
    from lorasc_fx.branch.lora import LowRankBranch


class ConvCall(NamedTuple):
    """The arguments of a convolution except its tensors.

    If the padding_mode of the module is not zeros, `pad` and `pad_mode` say how the module pads its input first, and
    `padding` is 0.
    """

    stride: int | Sequence[int] = 1
    padding: int | str | Sequence[int] = 0
    dilation: int | Sequence[int] = 1
    groups: int = 1
    pad: Sequence[int] | None = None
    pad_mode: str = "constant"

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input after the module's own padding."""
        return x if self.pad is None else F.pad(x, list(self.pad), mode=self.pad_mode)

    def conv(
        self, places: int, x: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the convolution of a padded input with a kernel [out, in/groups, *kernel].

        The number of spatial axes is an argument, because a proxy of torch.fx.symbolic_trace has no shape.
        """
        convolve: Callable[..., torch.Tensor] = CONV[places]
        return convolve(x, kernel, bias, self.stride, self.padding, self.dilation, self.groups)

    def grid(self, x: torch.Tensor, kernel: Sequence[int]) -> Grid | None:
        """Return the grid for a hand-written backward; None for an input without a batch, or uneven padding."""
        if x.dim() != 2 + len(kernel):
            return None
        return Grid.of(kernel, self.stride, self.padding, self.dilation, self.groups)


class ConvOps:
    """The placements of a low-rank branch: beside a convolution, in place of it, or on its kernel (algorithm.md,
    "Conv").

    The options of `beside` and `in_place` are the fields of a `ConvCall`.
    """

    @staticmethod
    def on_weight(branch: LowRankBranch, weight: torch.Tensor) -> torch.Tensor:
        """Return `W + s B A` of the kernel [out, in/groups, *kernel]."""
        return plus(weight, branch.product().to(weight.dtype), branch.scale)

    @staticmethod
    def beside(branch: LowRankBranch, base: torch.Tensor, x: torch.Tensor, **options: Any) -> torch.Tensor:
        """Return `base + s B (A * x)` of base [batch, out, *places], x [batch, in, *space]."""
        call = ConvCall(**options)
        image = call.padded(x)
        grid = call.grid(image, branch.weight_shape[2:]) if by_hand(base, x) else None
        return ConvOps._beside(branch, base, image, call, grid)

    @staticmethod
    def in_place(
        branch: LowRankBranch,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        op: str,
        **options: Any,
    ) -> torch.Tensor:
        """Return `(W + s B A) * x + bias`.

        Without a hand-written backward it is computed as `W * x + bias + s B (A * x)`, the same up to rounding.
        """
        call = ConvCall(**options)
        image = call.padded(x)
        grid = call.grid(image, branch.weight_shape[2:]) if by_hand(x, weight) else None
        if grid is None:
            base = call.conv(len(branch.weight_shape) - 2, image, weight, bias)
            return ConvOps._beside(branch, base, image, call, grid)
        a, dtype = branch.down.view(-1, *branch.weight_shape[1:]), computes_in(image)
        bias = bias.to(dtype) if bias is not None else None
        return apply(MergedConv, image.to(dtype), weight, bias, a, branch.up, grid, branch.scale)

    @staticmethod
    def _beside(
        branch: LowRankBranch, base: torch.Tensor, image: torch.Tensor, call: ConvCall, grid: Grid | None
    ) -> torch.Tensor:
        if grid is not None and call.groups == 1:
            image, seed = image.to(base.dtype), branch.dropout_seed()
            a, b = branch.down.to(base.dtype).view(-1, *branch.weight_shape[1:]), branch.up.to(base.dtype)
            return apply(BesideConv, base, image, a, b, grid, branch.scale, branch.dropout, seed)
        image = F.dropout(image, branch.dropout) if branch.drops else image
        return plus(base, low_rank_conv(branch, image, call), branch.scale)


def low_rank_conv(branch: LowRankBranch, image: torch.Tensor, call: ConvCall) -> torch.Tensor:
    """Return `B (A * x)` of a padded input by plain operations; with groups as one convolution with the delta."""
    kernel = branch.weight_shape[2:]
    if call.groups != 1:
        return call.conv(len(kernel), image, branch.product().to(image.dtype))
    a, b = branch.down.to(image.dtype), branch.up.to(image.dtype)
    low = call.conv(len(kernel), image, a.view(-1, *branch.weight_shape[1:]))
    return ConvCall().conv(len(kernel), low, b[(..., *(None for _ in kernel))])
