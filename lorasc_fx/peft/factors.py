"""What the stages added to each weight, as one pair of factors: a cascade without its base.

The norm of the singular values that a smaller rank cuts off is exactly its error in the Frobenius norm (Eckart and
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
from lorasc_fx.peft.format import RANKS, rows_with
from lorasc_fx.quantized import dense
from lorasc_fx.state import (
    ViewName,
    WeightState,
    delta_of,
    has_trained,
    scaled,
    sum_of,
    svd_of,
    truncated,
)

KEEPS_NOISE = "it keeps the noise of a stage (noise.keep), which has no low rank"
"""Reason for which a weight has no pair."""


@dataclass(frozen=True)
class CutOff:
    """What reducing the rank of one weight cost.

    Args:
        before, after: ranks.
        error: Frobenius norm of the difference of the two deltas.
        norm: Frobenius norm of the delta.
    """

    before: int
    after: int
    error: float
    norm: float

    @property
    def relative(self) -> float:
        """The error as a share of the delta."""
        return self.error / self.norm if self.norm else 0.0

    def __str__(self) -> str:
        return f"rank {self.before} to {self.after}, error {self.error:.3g} of {self.norm:.3g} ({self.relative:.2%})"


def factored(delta: torch.Tensor) -> Factors:
    """Return a dense delta [rows, columns], or a stack of them, as a pair of its numerical rank, in fp64.

    Singular values below the rounding errors of the delta are left out.
    """
    left, values, right = torch.linalg.svd(delta.cpu().double(), full_matrices=False)
    noise = torch.finfo(delta.dtype).eps * max(delta.shape[-2:]) * values.amax(-1, keepdim=True)
    rank = max(1, int((values > noise).sum(-1).max()))
    return truncated(left, values, right, rank)


def compressed(pair: Factors, rank: int) -> tuple[Factors, CutOff]:
    """Return the nearest pair of at most this rank in the Frobenius norm, in fp64, and what the reduction cost.

    For stacked factors the rank is that of each matrix, and the error that of all together.
    """
    before = pair.a.shape[-2]
    if rank >= before:
        squared = ((pair.b.mT @ pair.b) * (pair.a @ pair.a.mT)).sum()  # trace(B^T B A A^T), without a decomposition
        return pair, CutOff(before, before, 0.0, math.sqrt(max(0.0, float(squared))))
    left, values, right = svd_of(pair)
    norm = float(values.norm())
    rank = min(rank, values.shape[-1])
    return truncated(left, values, right, rank), CutOff(before, rank, float(values[..., rank:].norm()), norm)


def padded(pair: Factors, rank: int) -> Factors:
    """Return a pair with the same delta, padded with zeros to this rank."""
    more = rank - pair.a.shape[-2]
    b = torch.nn.functional.pad(pair.b, (0, more))
    return Factors(b, torch.nn.functional.pad(pair.a, (0, 0, 0, more)))


@dataclass
class Change:
    """The change of a cascade's weights.

    Args:
        pairs: factors of the weights that have moved, in fp64, oriented like the stored weight.
        magnitudes: [out] in fp64, of weights whose rows are scaled: with the pair in `pairs`, their value is
            `diag(m / |W0 + b a|) (W0 + b a)`.
        trained: values of parameters trained in full, in their own dtype.
        rows: values of the rows that a rule trains (`Rule.tokens`), with their numbers.
        refused: for weights whose change is not a product of factors, the reason.
        cut: what a smaller rank cost, by weight.
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

    def at_most(self, rank: int) -> None:
        """Reduce every pair of a higher rank, and record what that cost."""
        for name, before in self.ranks.items():
            if before > rank:
                self.pairs[name], self.cut[name] = compressed(self.pairs[name], rank)

    def at_one_rank(self) -> None:
        """Pad all pairs with zeros to the smallest of RANKS that fits all of them. Refuse those above the largest."""
        ranks = self.ranks
        over = {name: rank for name, rank in ranks.items() if rank > RANKS[-1]}
        self.refused |= {name: f"its rank is {rank}, over {RANKS[-1]}; give max_rank" for name, rank in over.items()}
        if not over:
            one = next(rank for rank in RANKS if rank >= max(ranks.values(), default=1))
            self.pairs = {name: padded(pair, one) for name, pair in self.pairs.items()}


def merged(change: Change, state: WeightState) -> torch.Tensor:
    """Return the weight of an unstacked site with its change, rounded once to its dtype, on the host."""
    rows = rows_with(state.base, change.pairs.get(state.name) or nothing(state), state.transposed)
    if state.name in change.magnitudes:
        rows *= (change.magnitudes[state.name] / rows.norm(dim=1))[:, None]
    return (rows.mT if state.transposed else rows.view(state.base.shape)).to(state.base.dtype)


def nothing(state: WeightState) -> Factors:
    """Return factors of rank 1 whose product is 0."""
    *stack, rows, columns = state.matrix
    return Factors(torch.zeros(*stack, rows, 1).double(), torch.zeros(*stack, 1, columns).double())


def pair_of(state: WeightState, view: ViewName, running: Delta | None = None) -> Factors | None:
    """Return what a view adds to a weight as one pair, in fp64 on the host. None if it adds nothing.

    A dense delta, which replaced experts, is factored at its numerical rank.
    """
    _, delta, terms = state.terms(view, running)
    if delta is not None and bool(delta.any()):
        terms.append((1.0, factored(delta)))
    return sum_of(terms, torch.float64, torch.device("cpu")) if terms else None


def change_of(run: Run, view: ViewName) -> Change:
    """Return the change of a cascade's weights. Slow and averaged weights count a stage that has trained as ended.

    A dense delta, which replaced experts, is factored at its numerical rank. Its pair is at most twice as large as the
    delta. Weights with kept noise, which has full rank, are refused.
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
        pair = pair_of(state, view if running is None else "fast", running)
        row_scale = state.scale(running.gain if running is not None else None)
        site = run.plan.site(name)
        if row_scale is None and pair is not None and site is not None and site.options.method.scales_rows:
            # experts that came from elsewhere
            row_scale = torch.ones(state.out, dtype=torch.float64)
        if state.noises:
            change.refused[name] = KEEPS_NOISE
        elif row_scale is not None and not bool(row_scale.all()):
            change.refused[name] = "one of its rows was scaled to 0, which magnitudes cannot express"
        elif row_scale is not None:
            # With d the row scale, diag(d) W0 + b a = diag(d) (W0 + diag(1 / d) b a).
            change.pairs[name] = scaled(pair or nothing(state), 1 / row_scale, state.transposed)
            rows = rows_with(state.base, change.pairs[name], state.transposed)
            change.magnitudes[name] = row_scale * rows.norm(dim=1)
        elif site is not None and site.options.tokens and pair is not None:
            numbers = list(site.options.tokens)
            total = state.exact(view if running is None else "fast", torch.float64, running, torch.device("cpu"))
            others = (total != dense(state.base).cpu().double()).any(1)
            others[numbers] = False
            if bool(others.any()):
                change.refused[name] = "other rows than those of its rule have changed"
            change.rows[name] = site.options.tokens, total[numbers]
        elif pair is not None:
            change.pairs[name] = pair
    return change
