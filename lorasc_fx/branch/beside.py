"""The branch beside a product, by a hand-written backward: `y + s B (A x)`, nothing kept but x and A x, and x only for
the gradient of lora_A.

Algorithm.md, row "training". The same numbers as the plain formula; what is gained is layout (see `skinny`), one fused
accumulate, and that adapter dropout keeps no mask.
"""

from __future__ import annotations

from typing import Any

import torch

from lorasc_fx.branch.dropout import dropped, kept
from lorasc_fx.branch.skinny import down, factor_gradient, folded, in_own_dtype, owned, up
from lorasc_fx.errors import StateError

__all__ = ["Beside", "check_kept", "plain_gradients"]


class Beside(torch.autograd.Function):
    """`apply(base [..., out], x [..., in], lora_A [rank, in], lora_B [out, rank], scale, p, seed)`.

    All tensors have one dtype. `seed` is None without dropout.
    """

    @staticmethod
    @in_own_dtype
    def forward(
        ctx: Any,
        base: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        p: float,
        seed: int | None,
    ) -> torch.Tensor:
        """Return base plus the branch's term."""
        ctx.scale, ctx.p, ctx.seed = scale, p, seed
        rows = folded(dropped(x, p, seed).reshape(-1, x.shape[-1]))
        low = down(a, rows)
        ctx.shape = x.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, a, b, low)
        term = up(folded(base.reshape(-1, base.shape[-1])), low, b.t().contiguous(), scale)
        return owned(term.view(base.shape))

    @staticmethod
    @in_own_dtype
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        """Return the gradients of base, x, lora_A and lora_B."""
        x, a, b, low = ctx.saved_tensors
        nothing = (None, None, None)
        if torch.is_grad_enabled():  # the backward is itself differentiated
            check_kept(x)
            return gradient, *plain_gradients(ctx, gradient, x, a, b), *nothing
        slopes = folded(gradient.reshape(-1, gradient.shape[-1]))
        back = down(b.t().contiguous(), slopes)
        dx = da = db = None
        if ctx.needs_input_grad[3]:  # first, while the slopes are in the cache
            db = factor_gradient(low, slopes, ctx.scale).t()
        if ctx.needs_input_grad[2]:
            rows = folded(dropped(x, ctx.p, ctx.seed).reshape(-1, x.shape[-1]))
            da = factor_gradient(back, rows, ctx.scale)
        if ctx.needs_input_grad[1]:
            dx = up(None, back, a, ctx.scale).view(ctx.shape)
            dx = dx if ctx.seed is None else dx.mul_(kept(dx, ctx.p, ctx.seed))
        return gradient, dx, da, db, *nothing


def check_kept(x: torch.Tensor | None) -> None:
    """Raise StateError where a gradient of a gradient needs an input that a lora_A without a gradient did not keep."""
    if x is None:
        raise StateError(
            "a gradient of a gradient needs the input of a branch, which train_A=False does not keep; "
            "adapt with train_A=True",
            code="double-backward",
        )


def plain_gradients(
    ctx: Any, gradient: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of x, lora_A and lora_B by operations that can be differentiated again."""
    mask = None if ctx.seed is None else kept(x, ctx.p, ctx.seed)
    rows = (x if mask is None else x * mask).reshape(-1, x.shape[-1])
    slopes = gradient.reshape(-1, gradient.shape[-1]) * ctx.scale
    back = slopes @ b
    dx = (back @ a).view(x.shape)
    return (dx if mask is None else dx * mask), back.t() @ rows, slopes.t() @ (rows @ a.t())
