"""The branch of a site under DoRA (2402.09353): direction by the low-rank pair, length of each row by a magnitude.

`W' = diag(g) (W + s B A)` with `g = m / |W + s B A|`, the norms taken by rows [out] and, as peft does, held constant in
the backward. It stands in place of its op, so that the product is scaled and the bias is not: `y = g (x W^T + s B A x)
+ b`. Source: DoRA, equation 5 and section 4.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lorasc_fx.branch.branch import Branch
from lorasc_fx.branch.grid import CONV
from lorasc_fx.branch.skinny import plus
from lorasc_fx.errors import StateError
from lorasc_fx.plan import Site

__all__ = ["DoraBranch"]


class DoraBranch(Branch):
    """`forward(x, weight, bias, ..., op=...)` in place of a product or a convolution.

    Attributes:
        lora_magnitude_vector: m [out]; a new branch has the norms of the weight's rows.
    """

    def __init__(self, site: Site, seed: int, stage: int, like: torch.Tensor) -> None:
        super().__init__(site, seed, stage, like)
        self.lora_magnitude_vector = nn.Parameter(self.norms(like))

    def norms(self, weight: torch.Tensor) -> torch.Tensor:
        """Return `|W + s B A|` of each row [out] in the factors' dtype, without a gradient; 1 for a row of zeros."""
        left, right = self.oriented()
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            matrix = weight.detach().to(left.dtype).reshape(left.shape[0], right.shape[1])
            total = torch.addmm(matrix, left.detach(), right.detach(), alpha=self.scale)
            norms = torch.linalg.vector_norm(total, dim=0 if self.transposed else 1)
            return torch.where(norms == 0, 1.0, norms)

    def gain(self, weight: torch.Tensor) -> torch.Tensor:
        """Return g = m / |W + s B A| [out], for a weight as it is stored."""
        return self.lora_magnitude_vector / self.norms(weight)

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
        """Return `g (op(base, W) + s B A base) + bias`: base is the op's input, x the weight as it is stored.

        The other arguments are those of `ConvBranch` and `MatrixBranch`.

        Raises:
            StateError: it is called beside an op, or on a weight.
        """
        if not op or x is None:
            raise StateError(
                f"the branch of {self.weight_name} has magnitudes and stands in place of its op only; exclude the "
                f"weight (exclude=({self.weight_name!r},)), or give use_dora=False",
                code="dora-not-supported",
            )
        spread = (-1, *(1 for _ in self.weight_shape[2:])) if op == "conv" else (-1,)
        if op == "conv":
            image = base if pad is None else F.pad(base, list(pad), mode=pad_mode)
            found = self._convolved(image, x, (stride, padding, dilation, groups))
        else:
            found = F.linear(base, x) if op == "linear" else base @ x
            low = F.linear(base, self.lora_A.to(base.dtype))
            found = plus(found, F.linear(low, self.lora_B.to(low.dtype)), self.scale)
        found = found * self.gain(x).to(found.dtype).view(spread)
        if bias is None:
            return found
        return found + (bias.view(spread) if op == "conv" else bias).to(found.dtype)

    def _convolved(self, image: torch.Tensor, weight: torch.Tensor, grid: tuple[Any, ...]) -> torch.Tensor:
        """Return the convolution with `W + s B A`, without a bias."""
        kernel = self.weight_shape[2:]
        conv: Callable[..., torch.Tensor] = CONV[len(kernel)]
        base = conv(image, weight, None, *grid)
        a, b = self.lora_A.to(image.dtype), self.lora_B.to(image.dtype)
        if grid[-1] != 1:
            return plus(base, conv(image, self.delta().to(image.dtype), None, *grid), self.scale)
        low = conv(image, a.view(-1, *self.weight_shape[1:]), None, *grid[:3])
        return plus(base, conv(low, b[(..., *(None for _ in kernel))]), self.scale)
