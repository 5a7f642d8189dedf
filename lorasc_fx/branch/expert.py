"""What the slow weights keep of a stage: its expert, the coefficients of its end, and noise by its address."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from lorasc_fx.spec import Noise

__all__ = ["Expert", "Factors", "KeptNoise", "Past", "joined"]


@dataclass(frozen=True)
class Factors:
    """`b` [rows, r] with the branch's scale folded in, and `a` [r, columns]: `b @ a` is added to the weight as stored.

    For stacked experts both have the axis of experts before.
    """

    b: torch.Tensor
    a: torch.Tensor

    @cached_property
    def bound(self) -> float:
        """A number that no entry of `b @ a` exceeds: the product of their norms (Cauchy and Schwarz)."""
        b, a = (torch.linalg.vector_norm(each, dtype=torch.float64).item() for each in (self.b, self.a))
        return b * a if math.isfinite(b * a) else math.inf


@dataclass(frozen=True)
class Expert:
    """A trained branch that the slow weights keep, and the stage that trained it."""

    stage: int
    factors: Factors


@dataclass(frozen=True)
class KeptNoise:
    """The noise of a stage that stays in the weights (noise.keep): its address and amplitude, not its values."""

    noise: Noise
    seed: int
    stage: int
    amplitude: float


@dataclass(frozen=True)
class Past:
    """The slow coefficients at the end of a stage; None where the experts of that time are gone into a dense delta."""

    stage: int
    slow: tuple[float, ...] | None


def joined(
    pairs: Sequence[tuple[float, Factors]], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `b` and `a` of all pairs side by side, the coefficients in `b`; of one pair that fits, its own tensors."""
    one = pairs[0][1] if len(pairs) == 1 else None
    b = one.b if one is not None else torch.cat([factors.b for _, factors in pairs], dim=-1)
    a = one.a if one is not None else torch.cat([factors.a for _, factors in pairs], dim=-2)
    b, a = b.to(device=device, dtype=dtype), a.to(device=device, dtype=dtype)
    if all(c == pairs[0][0] for c, _ in pairs):
        return (b if pairs[0][0] == 1 else b * pairs[0][0]), a
    columns = [c for c, factors in pairs for _ in range(factors.b.shape[-1])]
    return b * torch.tensor(columns, dtype=dtype, device=device), a
