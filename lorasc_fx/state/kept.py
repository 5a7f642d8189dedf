"""What a slow state is made of: factors, experts, noise that stays, where a stage began, and what stages have ended."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from lorasc_fx.spec import Noise

__all__ = ["Began", "Expert", "Factors", "KeptNoise", "Past", "pruned"]


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
class Began:
    """Where the running stage began, if not at B = 0: the factors that were taken out of the weight, and the magnitudes
    [out] of DoRA. In fp64, on the host.
    """

    factors: Factors | None = None
    magnitude: torch.Tensor | None = None


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


def pruned(past: tuple[Past, ...]) -> tuple[Past, ...]:
    """Return the ends of stages with the last of those alone that are gone: the earlier ones are gone as well."""
    gone = [each for each in past if each.slow is None]
    return (*gone[-1:], *(each for each in past if each.slow is not None))
