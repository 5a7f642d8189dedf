"""Row scales of the slow state under DoRA: what a stage multiplies the rows of all that was there before it by.

Algorithm.md, "The slow state is small": DoRA stays closed under the slow rule. With g of the stage's branch,
`S_t + W0 = (1 - p) W_{t-1} + p diag(g) (W_{t-1} + s B A) = diag(1 - p + p g) W_{t-1} + p diag(g) s B A`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lorasc_fx.state.kept import Factors

__all__ = ["Turn", "along", "grown", "scaled", "times"]


@dataclass(frozen=True)
class Turn:
    """The rows [out] in fp64 by which a stage multiplied W0, what was collapsed, and the first `before` experts."""

    stage: int
    before: int
    rows: torch.Tensor


def grown(turns: Iterable[Turn], place: int = -1) -> torch.Tensor | None:
    """Return the product of the turns since the expert of this place, or of all; None where there is none."""
    found = [turn.rows for turn in turns if turn.before > place]
    return torch.stack(found).prod(0) if found else None


def along(rows: torch.Tensor, tensor: torch.Tensor, turned: bool) -> torch.Tensor:
    """Return `diag(rows) tensor` of a weight [out, ...], or of one that is stored as [in, out], in its dtype."""
    spread = (1, -1) if turned else (-1, *(1 for _ in tensor.shape[1:]))
    return tensor * rows.to(device=tensor.device, dtype=tensor.dtype).view(spread)


def times(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    """Return the product of two row scales of which either may be missing."""
    return other if one is None else one if other is None else one * other


def scaled(pair: Factors, rows: torch.Tensor | None, turned: bool) -> Factors:
    """Return the factors of `diag(rows) b a`, what is scaled in fp64."""
    if rows is None:
        return pair
    if turned:
        return Factors(pair.b, along(rows, pair.a.double(), True))
    return Factors(along(rows, pair.b.double(), False), pair.a)
