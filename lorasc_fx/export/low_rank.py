"""Sums of experts as one pair of factors, and the best pair of a smaller rank, without the delta itself.

QR of both factors leaves a core of at most the ranks' size, whose singular values are those of the delta; what is cut
off is, by Eckart and Young, exactly the error in the Frobenius norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorasc_fx.state import Factors

__all__ = ["CutOff", "compressed", "factored", "padded", "stacked"]


@dataclass(frozen=True)
class CutOff:
    """What a smaller rank cost one weight: ranks before and after, and the norm of the error.

    Args:
        before, after: ranks.
        error: Frobenius norm of the difference of the two deltas.
        norm: of the delta.
    """

    before: int
    after: int
    error: float
    norm: float

    @property
    def relative(self) -> float:
        """The error as a share of the delta."""
        return self.error / self.norm if self.norm else 0.0


def stacked(terms: Sequence[tuple[float, Factors]]) -> Factors | None:
    """Return the sum of `c * b @ a` as one pair in fp64: every `a` above the next, every `b` beside it, times c.

    Terms of coefficient 0 are left out; None where nothing is left.
    """
    left = [(c, pair) for c, pair in terms if c != 0]
    if not left:
        return None
    b = torch.cat([pair.b.double().cpu() * c for c, pair in left], dim=-1)
    return Factors(b, torch.cat([pair.a.double().cpu() for _, pair in left], dim=-2))


def factored(delta: torch.Tensor) -> Factors:
    """Return a dense delta [rows, columns], or a stack of them, as a pair of its numerical rank, in fp64.

    Singular values below the rounding of the sum that made the delta are no part of it.
    """
    left, values, right = torch.linalg.svd(delta.double().cpu(), full_matrices=False)
    noise = torch.finfo(delta.dtype).eps * max(delta.shape[-2:]) * values.amax(-1, keepdim=True)
    rank = max(1, int((values > noise).sum(-1).max()))
    return _pair(left, values, right, rank)


def compressed(pair: Factors, rank: int) -> tuple[Factors, CutOff]:
    """Return the pair of at most this rank that is nearest in the Frobenius norm, and what that cost; in fp64.

    For stacked factors the rank is that of each matrix, and the error that of all of them together.
    """
    left, upper = torch.linalg.qr(pair.b)
    right, lower = torch.linalg.qr(pair.a.mT)
    inner, values, outer = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    before, norm = pair.a.shape[-2], float(values.norm())
    if rank >= before:
        return pair, CutOff(before, before, 0.0, norm)
    kept = min(rank, values.shape[-1])
    cut = CutOff(before, kept, float(values[..., kept:].norm()), norm)
    return _pair(left @ inner, values, outer @ right.mT, kept), cut


def padded(pair: Factors, rank: int) -> Factors:
    """Return the same delta with zeros up to this rank."""
    more = rank - pair.a.shape[-2]
    b = torch.nn.functional.pad(pair.b, (0, more))
    return Factors(b, torch.nn.functional.pad(pair.a, (0, 0, 0, more)))


def _pair(left: torch.Tensor, values: torch.Tensor, right: torch.Tensor, rank: int) -> Factors:
    """Return `left * values @ right`, cut to a rank, with the values shared out evenly."""
    root = values[..., :rank].sqrt()
    return Factors(left[..., :rank] * root.unsqueeze(-2), root.unsqueeze(-1) * right[..., :rank, :])
