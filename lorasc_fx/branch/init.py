"""Where the factors of a branch start: lora_A fresh as in LoRA, lora_B zero."""

from __future__ import annotations

import torch

from lorasc_fx.branch.address import generator

__all__ = ["fresh_a"]


def fresh_a(seed: int, stage: int, weight: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return lora_A [rank, in], or [experts, rank, in], in fp32: Kaiming uniform with a = sqrt(5), which is
    U(-1/sqrt(in), 1/sqrt(in)).

    Source: LoRA's reference code and PEFT's default; algorithm.md, row "branch". The values are drawn in fp32
    whatever the dtype of the branch, so that they depend on the address alone.
    """
    bound = shape[-1] ** -0.5 if shape[-1] else 0.0
    draw = torch.rand(shape, generator=generator(seed, stage, "lora_A", weight), dtype=torch.float32)
    return draw.mul_(2 * bound).sub_(bound)
