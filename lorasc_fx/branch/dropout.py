"""Adapter dropout: zeros in the input of lora_A, drawn from a seed, so that the backward draws them again."""

from __future__ import annotations

import torch

__all__ = ["draw_seed", "dropped", "kept"]


def draw_seed() -> int:
    """Return a seed from torch's own generator, as torch's dropout would: manual_seed and checkpointing hold for it."""
    return int(torch.randint(2**62, ()).item())


def kept(like: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """Return the mask of this seed: 0 with probability p, else 1 / (1 - p)."""
    source = torch.Generator(like.device).manual_seed(seed)
    mask = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    return mask.bernoulli_(1 - p, generator=source).div_(1 - p)


def dropped(x: torch.Tensor, p: float, seed: int | None) -> torch.Tensor:
    """Return x with the mask of this seed on it; without a seed x itself."""
    return x if seed is None else kept(x, p, seed).mul_(x)
