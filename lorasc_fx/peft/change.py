"""Computes the total change of each weight over all stages, as one pair of low-rank factors.

Reducing the rank drops the smallest singular values. Their norm is exactly the error in the Frobenius norm (Eckart and
Young, 1936).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from lorasc_fx.branch import Branch, Delta, Factors
from lorasc_fx.cascade.run import Run
from lorasc_fx.cascade.transition import ended
from lorasc_fx.peft.mirror import rows_with
from lorasc_fx.quantized import dense, is_quantized, quantizer_of, requantized
from lorasc_fx.state import (
    Summed,
    WeightState,
    delta_of,
    has_trained,
    scaled,
    sum_of,
    svd_of,
    truncated,
)

ON_GRID = "it trains on a grid, and the sum of a weight and factors is not rounded: export folded weights"
"""The reason why the change of a weight that trains on a grid is not a pair of factors."""

KEEPS_NOISE = "it keeps the noise of a stage (noise.keep), which is not low-rank"
"""The reason why the change of a weight with kept noise is not a pair of factors."""


@dataclass(frozen=True)
class CutOff:
    """The error of reducing the rank of one weight's delta from `before` to `after`.

    `error` and `norm` are the Frobenius norms of the difference and of the original delta.
    """

    before: int
    after: int
    error: float
    norm: float

    @property
    def relative(self) -> float:
        """The error divided by the norm of the original delta."""
        return self.error / self.norm if self.norm else 0.0

    def __str__(self) -> str:
        return f"rank {self.before} to {self.after}, error {self.error:.3g} of {self.norm:.3g} ({self.relative:.2%})"


def factored(delta: torch.Tensor) -> Factors:
    """Factor a dense delta [rows, columns], or a stack of them, at its numerical rank, in fp64.

    Singular values below the rounding error of the delta's dtype are dropped.
    """
    u, values, vh = torch.linalg.svd(delta.cpu().double(), full_matrices=False)
    rounding = torch.finfo(delta.dtype).eps * max(delta.shape[-2:]) * values.amax(-1, keepdim=True)
    rank = max(1, int((values > rounding).sum(-1).max()))
    return truncated(u, values, vh, rank)


def compressed(pair: Factors, rank: int) -> tuple[Factors, CutOff]:
    """Return the nearest pair of at most this rank in the Frobenius norm, in fp64, and the error.

    Stacked factors are reduced matrix by matrix. The error is the norm over all of the matrices.
    """
    before = pair.a.shape[-2]
    if rank >= before:
        squared = ((pair.b.mT @ pair.b) * (pair.a @ pair.a.mT)).sum()  # trace(B^T B A A^T), without a decomposition
        return pair, CutOff(before, before, 0.0, math.sqrt(max(0.0, float(squared))))
    u, values, vh = svd_of(pair)
    norm = float(values.norm())
    rank = min(rank, values.shape[-1])
    return truncated(u, values, vh, rank), CutOff(before, rank, float(values[..., rank:].norm()), norm)


def padded(pair: Factors, rank: int) -> Factors:
    """Pad a pair with zeros to this rank. The delta stays the same."""
    padding = rank - pair.a.shape[-2]
    b = torch.nn.functional.pad(pair.b, (0, padding))
    return Factors(b, torch.nn.functional.pad(pair.a, (0, 0, 0, padding)))


@dataclass
class Change:
    """The change of a cascade's weights relative to W0. The keys of all fields are weight names.

    Args:
        pairs: factors of the changed weights, in fp64, oriented like the stored weight.
        magnitudes: DoRA's magnitudes m [out], in fp64, for weights with scaled rows. With the pair in `pairs`, the
            weight is `diag(m / |W0 + b a|) (W0 + b a)`.
        trained: values of parameters trained in full, in their own dtype.
        rows: indices and new values of the rows that a rule trains (`Rule.tokens`).
        refused: the reason, for weights whose change is not a product of factors.
        cut: the error, for weights whose rank was reduced.
    """

    pairs: dict[str, Factors] = field(default_factory=dict)
    magnitudes: dict[str, torch.Tensor] = field(default_factory=dict)
    trained: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: dict[str, tuple[tuple[int, ...], torch.Tensor]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    cut: dict[str, CutOff] = field(default_factory=dict)

    @property
    def ranks(self) -> Mapping[str, int]:
        """Rank of each pair."""
        return {name: pair.a.shape[-2] for name, pair in self.pairs.items()}

    def limit_rank(self, rank: int) -> None:
        """Reduce every pair of a higher rank to this rank, and record the errors in `cut`."""
        for name, before in self.ranks.items():
            if before > rank:
                self.pairs[name], self.cut[name] = compressed(self.pairs[name], rank)

    def pad_to_uniform_rank(self) -> None:
        """Pad all pairs with zeros to the largest rank."""
        largest = max(self.ranks.values(), default=1)
        self.pairs = {name: padded(pair, largest) for name, pair in self.pairs.items()}


def nothing(state: WeightState) -> Factors:
    """Return a zero pair of rank 1 for a weight."""
    *stack, rows, columns = state.matrix
    return Factors(torch.zeros(*stack, rows, 1).double(), torch.zeros(*stack, 1, columns).double())


def pair_of(state: WeightState, view: Summed, running: Delta | None = None) -> Factors | None:
    """Return the delta of a view of a weight as one pair, in fp64 on the CPU. None if the delta is zero.

    If experts were summed into a dense delta, this delta is factored at its numerical rank.
    """
    _, delta, terms = state.terms(view, running)
    if delta is not None and bool(delta.any()):
        terms.append((1.0, factored(delta)))
    return sum_of(terms, torch.float64, torch.device("cpu")) if terms else None


def residual_of(run: Run, view: Summed, rank: int) -> Change:
    """Return the change that the rounding of folded weights loses, as the nearest pairs of a rank (Frobenius norm).

    Quantized weights are quantized again for this. Weights of at least 32 bits, and those on a grid, have no pair.
    """
    change = Change()
    for name, state in ended(run, "export.peft").states.items():
        is_wide = state.base.dtype.itemsize >= 4 and not is_quantized(state.base)
        if state.full or state.grid or is_wide or not state.changed:
            continue
        exact = state.exact(view, torch.float64, device=torch.device("cpu"))
        folded = exact.to(state.base.dtype)
        if is_quantized(state.base):
            if quantizer_of(state.base) is None:
                change.refused[name] = "its quantized layer cannot be quantized again, so it is not folded"
                continue
            folded = requantized(state.base, folded.to(state.base.device)).cpu()
        error = (exact - folded.double()).reshape(state.matrix)
        if error.any():
            u, values, vh = torch.linalg.svd(error, full_matrices=False)
            change.pairs[name] = truncated(u, values, vh, rank)
            cut_norm = float(values[..., rank:].norm())
            change.cut[name] = CutOff(values.shape[-1], min(rank, values.shape[-1]), cut_norm, float(values.norm()))
    return change


def change_of(run: Run, view: Summed) -> Change:
    """Return the change of a cascade's weights relative to W0.

    For the slow and averaged weights, a running stage that has trained counts as ended. Weights with kept noise are in
    `refused`, because the noise has full rank.
    """
    slow = run.slow if view == "fast" else ended(run, "export.peft")
    learners, change, parameters = run.learners(), Change(), run.parameters_by_name()
    view = "slow" if view == "fast" and slow.idle else view
    for name, state in slow.states.items():
        running, branch = None, learners.get(name)
        if state.full:
            change.trained[name] = slow.value(name, view, parameters[name], branch).cpu()
            continue
        if view == "fast" and isinstance(branch, Branch) and has_trained(branch, state):
            running = delta_of(branch, state, run.plan.spec, run.plan.stage, not slow.idle, torch.device("cpu"))
        # Compute the delta as one pair, and the row scale of DoRA.
        pair = pair_of(state, view, running)
        row_scale = state.scale(running.gain if running is not None else None)
        site = run.plan.site(name)
        if row_scale is None and pair is not None and site is not None and site.options.method.magnitude:
            # Experts without a row scale, for example from a LoRA run, are exported as DoRA with the scale 1.
            row_scale = torch.ones(state.out, dtype=torch.float64)
        if state.noises or state.grid:
            change.refused[name] = ON_GRID if state.grid else KEEPS_NOISE
        elif row_scale is not None and not bool(row_scale.all()):
            change.refused[name] = "one of its rows was scaled to 0, which magnitudes cannot express"
        elif row_scale is not None:
            # With the row scale d, the weight is diag(d) W0 + b a = diag(d) (W0 + diag(1 / d) b a).
            change.pairs[name] = scaled(pair or nothing(state), 1 / row_scale, state.transposed)
            rows = rows_with(state.base, change.pairs[name], state.transposed)
            change.magnitudes[name] = row_scale * rows.norm(dim=1)
        elif site is not None and site.options.tokens and pair is not None:
            indices = list(site.options.tokens)
            total = state.exact(view, torch.float64, running, torch.device("cpu"))
            changed = (total != dense(state.base).cpu().double()).any(1)
            changed[indices] = False
            if bool(changed.any()):
                change.refused[name] = "rows outside of its rule's `tokens` have changed"
            change.rows[name] = site.options.tokens, total[indices]
        elif pair is not None:
            change.pairs[name] = pair
    return change
