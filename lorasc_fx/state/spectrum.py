"""Singular values of a delta from its factors, and what they say: norm and effective rank. The delta is never formed.

`b @ a` has the singular values of the small core `R_b R_a^T` of two QR decompositions. Effective rank: O. Roy and
M. Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007: the exponential of the entropy
of the singular values that are scaled to sum to 1.
"""

from __future__ import annotations

import torch

from lorasc_fx.branch import Delta
from lorasc_fx.quantized import dense
from lorasc_fx.state.weight import WeightState


def singular_values(delta: Delta) -> torch.Tensor:
    """Return the singular values of a delta [min(rank, rows, columns)], or [experts, ...], in fp64, largest first."""
    if delta.dense is not None:
        dense_values: torch.Tensor = torch.linalg.svdvals(delta.dense.detach().flatten(1).cpu().double())
        return dense_values
    assert delta.factors is not None
    factors = delta.factors
    b, a = factors.b.detach().cpu().double(), factors.a.detach().cpu().double()
    _, left = torch.linalg.qr(b)
    _, right = torch.linalg.qr(a.transpose(-2, -1))
    values: torch.Tensor = torch.linalg.svdvals(left @ right.transpose(-2, -1))
    return values


def slow_spectrum(state: WeightState) -> torch.Tensor:
    """Return the singular values of the slow delta S [values], or [experts, values]; without kept noise.

    A delta that was collapsed into a dense one is decomposed as it is.
    """
    if state.scale() is not None:
        delta = state.exact("slow", torch.float64, device=torch.device("cpu")) - dense(state.base).cpu().double()
        exact: torch.Tensor = torch.linalg.svdvals(delta.reshape(state.matrix))
        return exact
    factors = state.unmerged("slow")
    if state.slow.dense is not None:
        total = state.slow.dense.cpu().double()
        if factors is not None:
            total = total + factors.b.cpu().double() @ factors.a.cpu().double()
        values: torch.Tensor = torch.linalg.svdvals(total)
        return values
    if factors is None:
        return torch.zeros((*state.matrix[:-2], 0), dtype=torch.float64)
    return singular_values(Delta(factors))


def norm_of(values: torch.Tensor) -> float:
    """Return the Frobenius norm that these singular values belong to; of stacked matrices, that of all together."""
    return float(values.square().sum().sqrt().item())


def effective_rank(values: torch.Tensor) -> float:
    """Return exp(entropy) of singular values: 0 for a zero matrix, k for k equal ones; of stacked matrices the mean."""
    total = values.sum(-1, keepdim=True)
    share = torch.where(total > 0, values / total.clamp_min(torch.finfo(values.dtype).tiny), 0.0)
    ranks = torch.special.entr(share).sum(-1).exp().where(total.squeeze(-1) > 0, torch.zeros(()).to(values))
    return float(ranks.mean().item())
