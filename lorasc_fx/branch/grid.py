"""Low-rank products of convolutions: which of torch's operations is fast for a kernel, a stride and a memory format.

A 1x1 convolution is a product, of channels-first tensors image by image and of channels-last ones over rows; other
kernels go to torch's convolution with `rank` channels. Source of the choice: CPU seconds of each on the shapes of a
ResNet-50.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lorasc_fx.branch import skinny

__all__ = ["CONV", "Grid", "down", "down_back", "factor_gradient", "up", "up_gradient", "whole_gradient"]

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Grid:
    """Stride, padding, dilation (one number an axis) and groups of a convolution."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @classmethod
    def of(
        cls,
        kernel: Sequence[int],
        stride: int | Sequence[int],
        padding: int | str | Sequence[int],
        dilation: int | Sequence[int],
        groups: int,
    ) -> Grid | None:
        """Return the grid of a call's arguments; None where `same` pads one side more than the other."""
        axes = len(kernel)
        spread = _each(dilation, axes)
        if isinstance(padding, str):
            total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(spread, kernel, strict=True)]
            if any(each % 2 for each in total):
                return None
            padding = [each // 2 for each in total]
        return cls(_each(stride, axes), _each(padding, axes), spread, groups)

    def is_product(self, kernel: Sequence[int]) -> bool:
        """Whether a kernel of this size multiplies each place by a matrix, and does nothing else."""
        return all(size == 1 for size in (*kernel, *self.stride)) and not any(self.padding) and self.groups == 1

    def conv(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return the convolution on this grid."""
        convolve = CONV[len(self.stride)]
        found: torch.Tensor = convolve(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return found

    def gradients(
        self, slope: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, wants: tuple[bool, bool, bool]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Return the gradients of x, weight and bias."""
        found: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
        found = torch.ops.aten.convolution_backward(
            slope,
            x,
            weight,
            [weight.shape[0]],
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * len(self.stride),
            self.groups,
            wants,
        )
        return found


def _each(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value) * (axes if len(value) == 1 else 1)


def _in_rows(x: torch.Tensor) -> bool:
    """Whether channels are the innermost axis in memory."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return x [batch, channels, h, w] in channels-last memory as folded rows [folds, places, channels], a view."""
    return skinny.folded(x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]))


def _images(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return rows as [batch, channels, h, w] in channels-last memory."""
    batch, _, height, width = like.shape
    return rows.reshape(batch, height, width, rows.shape[-1]).permute(0, 3, 1, 2)


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(2)


def down(a: torch.Tensor, x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return A x [batch, rank, *space]: lora_A as a kernel [rank, in, *kernel]."""
    if not grid.is_product(a.shape[2:]):
        return grid.conv(x, a)
    thin = a.flatten(1)
    if _in_rows(x):
        return _images(skinny.down(thin, _rows(x)).transpose(1, 2), x)
    return torch.bmm(thin.expand(len(x), -1, -1), _flat(x)).view(len(x), len(thin), *x.shape[2:])


def up(base: torch.Tensor, low: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Return `base + scale * B low` of base [batch, out, *space], low [batch, rank, *space], b [out, rank]."""
    if _in_rows(base):
        rows = low.permute(0, 2, 3, 1).reshape(-1, low.shape[1])
        tall = base.permute(0, 2, 3, 1).reshape(-1, base.shape[1])
        return _images(torch.addmm(tall, rows, b.t(), alpha=scale), base)
    return torch.baddbmm(_flat(base), b.expand(len(base), -1, -1), _flat(low), alpha=scale).view(base.shape)


def down_back(b: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """Return B^T slope [batch, rank, *space] of slope [batch, out, *space]."""
    thin = b.t().contiguous()
    if _in_rows(slope):
        return _images(skinny.down(thin, _rows(slope)).transpose(1, 2), slope)
    return torch.bmm(thin.expand(len(slope), -1, -1), _flat(slope)).view(len(slope), len(thin), *slope.shape[2:])


def factor_gradient(low: torch.Tensor, slope: torch.Tensor, scale: float) -> torch.Tensor:
    """Return `scale * sum low slope`, [rank, channels], over batch and space."""
    if _in_rows(slope):
        rows = low.permute(0, 2, 3, 1).reshape(-1, low.shape[1])
        return skinny.factor_gradient(skinny.folded(rows).transpose(1, 2), _rows(slope), scale)
    return torch.bmm(_flat(low), _flat(slope).transpose(1, 2)).sum(0).mul_(scale)


def up_gradient(back: torch.Tensor, x: torch.Tensor, a: torch.Tensor, grid: Grid, scale: float) -> torch.Tensor:
    """Return the gradient of lora_A, as a kernel [rank, in, *kernel], of back [batch, rank, *space]."""
    if grid.is_product(a.shape[2:]):
        return factor_gradient(back, x, scale).view(a.shape)
    found = grid.gradients(back, x, a, (False, True, False))[1]
    assert found is not None
    return found.mul_(scale)


def whole_gradient(back: torch.Tensor, x: torch.Tensor, a: torch.Tensor, grid: Grid, scale: float) -> torch.Tensor:
    """Return the branch's gradient of x, of back [batch, rank, *space]."""
    if not grid.is_product(a.shape[2:]):
        found = grid.gradients(back, x, a, (True, False, False))[0]
        assert found is not None
        return found.mul_(scale)
    thin = a.flatten(1)
    if _in_rows(x):
        rows = back.permute(0, 2, 3, 1).reshape(-1, back.shape[1])
        return _images((rows @ thin).mul_(scale), x)
    return torch.bmm(thin.t().expand(len(x), -1, -1), _flat(back)).mul_(scale).view(x.shape)
