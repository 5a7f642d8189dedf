"""The branch of a convolution site, with the base op's own stride, padding, dilation and groups: beside it, merged into
it, or on the weight.

Without groups A is a convolution with the site's kernel to `rank` channels and B a 1x1 convolution (LoRA for
convolutions, as in PEFT). With groups the delta keeps its matrix form, [out, in/groups * kernel], and is itself the
kernel of a grouped convolution: exact, and for depthwise sites cheaper than `rank` channels per group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from lorasc_fx.branch.branch import Branch
from lorasc_fx.branch.conv_functions import BesideConv, MergedConv
from lorasc_fx.branch.grid import CONV, Grid
from lorasc_fx.branch.skinny import apply, by_hand, computes_in, plus

__all__ = ["ConvBranch"]


class ConvBranch(Branch):
    """`forward(base [batch, out, *space], x [batch, in, *space], ...)` beside the op, `forward(weight)` on the weight,
    `forward(x, weight, bias, ..., op="conv")` in place of the op.
    """

    def forward(
        self,
        base: torch.Tensor,
        x: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        pad: Sequence[int] | None = None,
        pad_mode: str = "constant",
        op: str = "",
    ) -> torch.Tensor:
        """Return base plus the branch's term (algorithm.md, "Conv").

        Without x, base is the weight itself, and what is returned is the weight plus the delta. With `op` base is x, x
        the weight and bias the op's own, and what is returned is the convolution with the merged weight.

        `pad` and `pad_mode` are those of a module whose padding_mode is not zeros: x is padded first, as the module
        does, and `padding` is then 0.
        """
        if x is None:
            return plus(base, self.delta().to(base.dtype), self.scale)
        kernel = self.weight_shape[2:]
        conv: Callable[..., torch.Tensor] = CONV[len(kernel)]
        args = (stride, padding, dilation, groups)
        image = base if op else x
        if pad is not None:
            image = F.pad(image, list(pad), mode=pad_mode)
        grid = Grid.of(kernel, *args) if by_hand(base, x) and image.dim() == 2 + len(kernel) else None
        if op and grid is not None:
            return self._merged(image, x, bias, grid)
        base = conv(image, x, bias, *args) if op else base
        if grid is not None and groups == 1:
            image, seed = image.to(base.dtype), self.seed()
            a, b = self.lora_A.to(base.dtype).view(-1, *self.weight_shape[1:]), self.up.to(base.dtype)
            return apply(BesideConv, base, image, a, b, grid, self.scale, self.dropout, seed)
        image = F.dropout(image, self.dropout) if self.drops else image
        a, b = self.lora_A.to(image.dtype), self.up.to(image.dtype)
        if groups == 1:
            low = conv(image, a.view(-1, *self.weight_shape[1:]), None, *args[:3])
            high = conv(low, b[(..., *(None for _ in kernel))])
        else:
            high = conv(image, self.delta().to(image.dtype), None, *args)
        return plus(base, high, self.scale)

    def _merged(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, grid: Grid) -> torch.Tensor:
        a, dtype = self.lora_A.view(-1, *self.weight_shape[1:]), computes_in(x)
        bias = bias.to(dtype) if bias is not None else None
        return apply(MergedConv, x.to(dtype), weight, bias, a, self.up, grid, self.scale)
