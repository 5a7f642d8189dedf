"""The gradient of lora_B whose step is nearest to the step of full training, where lora_A stands still.

A step of B moves the weight by `s dB A`. The dB for which that is nearest to the weight's own gradient G, in the
Frobenius norm, is `G A^T (A A^T)^-1 / s`, which is lora_B's gradient `s G A^T` times `(A A^T)^-1 / s^2`. Source:
LoRA-Pro (2407.18242), equation for a fixed A; peft's optimizer for LoRA-FA (2308.03303) steps so, and adds the same
1e-8 to the diagonal.
"""

from __future__ import annotations

import torch

__all__ = ["nearest_full"]

_DIAGONAL = 1e-8


def nearest_full(b: torch.Tensor, a: torch.Tensor, scale: float, parts: tuple[int, ...]) -> torch.Tensor:
    """Return lora_B as it is; its gradient on the way back is multiplied by `(A A^T)^-1 / scale^2`.

    Plain operations, for whoever compiles or transforms them: what is added to the values is a product of zeros.

    Args:
        b: lora_B [out, rank], or with an axis of experts before.
        a: lora_A [rank, in], likewise; with parts [parts * rank, in].
        scale: s of the branch.
        parts: rows of lora_B of each slice that has a lora_A of its own; empty for one of all.
    """
    if not torch.is_grad_enabled():
        return b
    parts = parts or (b.shape[-2],)
    pairs = zip((b - b.detach()).split(parts, -2), a.detach().chunk(len(parts), -2), strict=True)
    return b.detach() + torch.cat([zero @ _inverse(each, scale) for zero, each in pairs], -2)


def _inverse(a: torch.Tensor, scale: float) -> torch.Tensor:
    """Return `(A A^T)^-1 / scale^2`, [rank, rank]."""
    gram = a @ a.transpose(-2, -1)
    steady = gram + _DIAGONAL * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    inverse: torch.Tensor = torch.linalg.pinv(steady)
    return inverse / scale**2
