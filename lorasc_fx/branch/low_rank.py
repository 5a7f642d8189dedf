"""Low-rank matmuls: products with a factor of few rows, in the layouts in which they are fast.

They are memory bound, so each tensor is read once. Rows [tokens, features] are seen as [folds, tokens/folds, features]:
a batched product of a few folds keeps every core busy where one thin product does not, and a product whose short side
comes first reads its long operand in order.

Of convolutions, a 1x1 one is such a product: of channels-first tensors image by image, of channels-last ones over rows.
Other kernels go to torch's convolution with `rank` channels. Source of the choice: CPU seconds of each on the shapes of
a ResNet-50.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F

_LEAST = 64
"""Tokens per fold below which another fold costs more than it gains."""


def by_hand(*tensors: torch.Tensor) -> bool:
    """Whether these tensors may go through a hand-written backward: gradients are wanted, nobody traces or transforms.

    A compiler plans its own backward; function transforms, forward-mode gradients and tensor subclasses have rules for
    plain operations only.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) and not t.is_nested for t in tensors)
    return plain and not torch._C._are_functorch_transforms_active() and torch.autograd.forward_ad._current_level < 0


def apply(function: type[torch.autograd.Function], *args: Any) -> torch.Tensor:
    """Call an autograd Function that returns one tensor."""
    output: torch.Tensor = function.apply(*args)
    return output


def owned(fresh: torch.Tensor) -> torch.Tensor:
    """Return the output of a Function detached from its inputs' views, so that the next op may write into it."""
    return fresh.detach()


def plus(base: torch.Tensor, term: torch.Tensor, scale: float) -> torch.Tensor:
    """Return `base + scale * term`.

    Inductor (torch 2.13) fuses a product that `torch.add` adds into addmm, and drops the alpha: no compiler gets one.
    """
    if torch.compiler.is_compiling():
        return base + term * scale
    return torch.add(base, term, alpha=scale)


def computes_in(x: torch.Tensor) -> torch.dtype:
    """Return the dtype in which a product of x is computed: autocast's own, or that of x."""
    kind = x.device.type
    cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if cast and x.dtype != torch.float64 else x.dtype


def in_own_dtype(method: Callable[..., Any]) -> Callable[..., Any]:
    """Run a Function's method on the dtypes that it is given: no autocast inside."""

    @wraps(method)
    def run(ctx: Any, first: torch.Tensor, *rest: Any) -> Any:
        kind = first.device.type
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return method(ctx, first, *rest)
        with torch.autocast(kind, enabled=False):
            return method(ctx, first, *rest)

    return run


def folded(rows: torch.Tensor) -> torch.Tensor:
    """Return rows [tokens, features] as [folds, tokens/folds, features]: a fold per core, where tokens divide so."""
    tokens, folds = rows.shape[0], 1
    if rows.device.type == "cpu":
        while 2 * folds <= torch.get_num_threads() and tokens % (2 * folds) == 0 and tokens >= 2 * folds * _LEAST:
            folds *= 2
    return rows.reshape(folds, tokens // folds, rows.shape[-1])


def down(factor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return `factor @ rows^T`, [folds, rank, tokens/folds], of factor [rank, features] and folded rows."""
    return torch.bmm(factor.expand(rows.shape[0], -1, -1), rows.transpose(1, 2))


def up(rows: torch.Tensor | None, low: torch.Tensor, factor: torch.Tensor, scale: float) -> torch.Tensor:
    """Return `rows + scale * low^T @ factor`: folded rows, low [folds, rank, tokens/folds], factor [rank, features]."""
    wide = factor.expand(low.shape[0], -1, -1)
    if rows is None:
        return torch.bmm(low.transpose(1, 2), wide).mul_(scale)
    return torch.baddbmm(rows, low.transpose(1, 2), wide, alpha=scale)


def factor_gradient(low: torch.Tensor, rows: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Return `scale * sum_tokens low rows`, [rank, features]."""
    product = torch.bmm(low, rows)
    total = product[0] if product.shape[0] == 1 else product.sum(0)
    return total.mul_(scale) if scale != 1.0 else total


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
        spread = _per_axis(dilation, axes)
        if isinstance(padding, str):
            total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(spread, kernel, strict=True)]
            if any(size % 2 for size in total):
                return None
            padding = [size // 2 for size in total]
        return cls(_per_axis(stride, axes), _per_axis(padding, axes), spread, groups)

    def is_product(self, kernel: Sequence[int]) -> bool:
        """Whether a kernel of this size multiplies each place by a matrix, and does nothing else."""
        return all(size == 1 for size in (*kernel, *self.stride)) and not any(self.padding) and self.groups == 1

    def conv(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return the convolution on this grid."""
        convolve = CONV[len(self.stride)]
        output: torch.Tensor = convolve(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return output

    def gradients(
        self, slope: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, wants: tuple[bool, bool, bool]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Return the gradients of x, weight and bias."""
        gradients: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
        gradients = torch.ops.aten.convolution_backward(
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
        return gradients


def _per_axis(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value) * (axes if len(value) == 1 else 1)


def _in_rows(x: torch.Tensor) -> bool:
    """Whether channels are the innermost axis in memory."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _pixels(x: torch.Tensor) -> torch.Tensor:
    """Return x [batch, channels, h, w] as rows [places, channels]; in channels-last memory a view."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _images(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return rows as [batch, channels, h, w] in channels-last memory."""
    batch, _, height, width = like.shape
    return rows.reshape(batch, height, width, rows.shape[-1]).permute(0, 3, 1, 2)


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(2)


def conv_down(a: torch.Tensor, x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return A x [batch, rank, *space]: lora_A as a kernel [rank, in, *kernel]."""
    if not grid.is_product(a.shape[2:]):
        return grid.conv(x, a)
    return _thin_product(a.flatten(1), x)


def _thin_product(thin: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the product [batch, rank, *space] of a factor [rank, channels] and x [batch, channels, *space]."""
    if _in_rows(x):
        return _images(down(thin, folded(_pixels(x))).transpose(1, 2), x)
    return torch.bmm(thin.expand(len(x), -1, -1), _flat(x)).view(len(x), len(thin), *x.shape[2:])


def conv_up(base: torch.Tensor, low: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Return `base + scale * B low` of base [batch, out, *space], low [batch, rank, *space], b [out, rank]."""
    if _in_rows(base):
        return _images(torch.addmm(_pixels(base), _pixels(low), b.t(), alpha=scale), base)
    return torch.baddbmm(_flat(base), b.expand(len(base), -1, -1), _flat(low), alpha=scale).view(base.shape)


def conv_down_back(b: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """Return B^T slope [batch, rank, *space] of slope [batch, out, *space]."""
    return _thin_product(b.t().contiguous(), slope)


def conv_factor_gradient(low: torch.Tensor, slope: torch.Tensor, scale: float) -> torch.Tensor:
    """Return `scale * sum low slope`, [rank, channels], over batch and space."""
    if _in_rows(slope):
        return factor_gradient(folded(_pixels(low)).transpose(1, 2), folded(_pixels(slope)), scale)
    return torch.bmm(_flat(low), _flat(slope).transpose(1, 2)).sum(0).mul_(scale)


def conv_kernel_gradient(
    back: torch.Tensor, x: torch.Tensor, a: torch.Tensor, grid: Grid, scale: float
) -> torch.Tensor:
    """Return the gradient of lora_A, as a kernel [rank, in, *kernel], of back [batch, rank, *space]."""
    if grid.is_product(a.shape[2:]):
        return conv_factor_gradient(back, x, scale).view(a.shape)
    gradient = grid.gradients(back, x, a, (False, True, False))[1]
    assert gradient is not None
    return gradient.mul_(scale)


def conv_input_gradient(back: torch.Tensor, x: torch.Tensor, a: torch.Tensor, grid: Grid, scale: float) -> torch.Tensor:
    """Return the branch's gradient of x, of back [batch, rank, *space]."""
    if not grid.is_product(a.shape[2:]):
        gradient = grid.gradients(back, x, a, (True, False, False))[0]
        assert gradient is not None
        return gradient.mul_(scale)
    thin = a.flatten(1)
    if _in_rows(x):
        return _images((_pixels(back) @ thin).mul_(scale), x)
    return torch.bmm(thin.t().expand(len(x), -1, -1), _flat(back)).mul_(scale).view(x.shape)
