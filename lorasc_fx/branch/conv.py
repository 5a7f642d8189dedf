"""The branch of a convolution site, beside the base op, with the base op's own stride, padding, dilation and groups.

Without groups A is a convolution with the site's kernel to `rank` channels and B a 1x1 convolution (LoRA for
convolutions, as in PEFT). With groups the delta keeps its matrix form, [out, in/groups * kernel], and is itself the
kernel of a grouped convolution: exact, and for depthwise sites cheaper than `rank` channels per group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from lorasc_fx.branch.branch import Branch

__all__ = ["ConvBranch"]

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvBranch(Branch):
    """`forward(base [batch, out, *space], x [batch, in, *space], ...)` beside the op, `forward(weight)` on it."""

    def forward(
        self,
        base: torch.Tensor,
        x: torch.Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        pad: Sequence[int] | None = None,
        pad_mode: str = "constant",
    ) -> torch.Tensor:
        """Return base plus the branch's term.

        Without x, base is the weight itself, and what is returned is the weight plus the delta.

        `pad` and `pad_mode` are those of a module whose padding_mode is not zeros: x is padded first, as the module
        does, and `padding` is then 0 (algorithm.md, "Conv").
        """
        if x is None:
            return torch.add(base, self.delta().to(base.dtype), alpha=self.scale)
        kernel = self.weight_shape[2:]
        conv = _CONV[len(kernel)]
        if pad is not None:
            x = F.pad(x, list(pad), mode=pad_mode)
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        if groups == 1:
            down = conv(x, a.view(-1, *self.weight_shape[1:]), None, stride, padding, dilation)
            up = conv(down, b[(..., *(None for _ in kernel))])
        else:
            up = conv(x, self.delta().to(x.dtype), None, stride, padding, dilation, groups)
        return torch.add(base, up, alpha=self.scale)
