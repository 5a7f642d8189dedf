"""Products with a factor of few rows, in the layouts in which they are fast: memory bound, so each tensor is read once.

Rows [tokens, features] are seen as [folds, tokens/folds, features]: a batched product of a few folds keeps every core
busy where one skinny product does not, and a product whose short side comes first reads its long operand in order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

__all__ = [
    "apply",
    "by_hand",
    "computes_in",
    "down",
    "factor_gradient",
    "folded",
    "in_own_dtype",
    "owned",
    "plus",
    "up",
]

_LEAST = 64


def by_hand(*tensors: torch.Tensor) -> bool:
    """Whether these tensors may go through a hand-written backward: gradients are wanted, nobody traces or transforms.

    A compiler plans its own backward; function transforms, forward-mode gradients and tensor subclasses have rules for
    plain operations only.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    plain = all(type(each) in (torch.Tensor, torch.nn.Parameter) and not each.is_nested for each in tensors)
    return plain and not torch._C._are_functorch_transforms_active() and torch.autograd.forward_ad._current_level < 0


def apply(function: type[torch.autograd.Function], *args: Any) -> torch.Tensor:
    """Call an autograd Function that returns one tensor."""
    found: torch.Tensor = function.apply(*args)
    return found


def owned(fresh: torch.Tensor) -> torch.Tensor:
    """Return what a Function has made as nobody's view, which the next op may write into."""
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
