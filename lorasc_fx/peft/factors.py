"""What the stages added to each weight, as one pair of factors of any rank: a cascade without its base.

A pair of a smaller rank is computed without the delta itself: QR of both factors leaves a core of at most the ranks'
size, whose singular values are those of the delta. What is cut off is, by Eckart and Young, exactly the error in the
Frobenius norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lorasc_fx.branch import Branch
from lorasc_fx.cascade.run import Run
from lorasc_fx.cascade.transition import ended
from lorasc_fx.peft.format import RANKS
from lorasc_fx.quantized import dense
from lorasc_fx.state import (
    Factors,
    WeightState,
    Which,
    factors_of,
    gain_of,
    has_trained,
    scaled,
    sum_of,
    svd_of,
    truncated,
)


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


def factored(delta: torch.Tensor) -> Factors:
    """Return a dense delta [rows, columns], or a stack of them, as a pair of its numerical rank, in fp64.

    Singular values below the rounding of the sum that made the delta are no part of it.
    """
    left, values, right = torch.linalg.svd(delta.cpu().double(), full_matrices=False)
    noise = torch.finfo(delta.dtype).eps * max(delta.shape[-2:]) * values.amax(-1, keepdim=True)
    rank = max(1, int((values > noise).sum(-1).max()))
    return truncated(left, values, right, rank)


def compressed(pair: Factors, rank: int) -> tuple[Factors, CutOff]:
    """Return the pair of at most this rank that is nearest in the Frobenius norm, and what that cost; in fp64.

    For stacked factors the rank is that of each matrix, and the error that of all of them together.
    """
    left, values, right = svd_of(pair)
    before, norm = pair.a.shape[-2], float(values.norm())
    if rank >= before:
        return pair, CutOff(before, before, 0.0, norm)
    rank = min(rank, values.shape[-1])
    return truncated(left, values, right, rank), CutOff(before, rank, float(values[..., rank:].norm()), norm)


def padded(pair: Factors, rank: int) -> Factors:
    """Return the same delta with zeros up to this rank."""
    more = rank - pair.a.shape[-2]
    b = torch.nn.functional.pad(pair.b, (0, more))
    return Factors(b, torch.nn.functional.pad(pair.a, (0, 0, 0, more)))


@dataclass
class Change:
    """Of a whole cascade.

    Args:
        pairs: by weight, in fp64, as the weight is stored; of weights that have moved.
        magnitudes: of weights whose rows are scaled: `diag(d) (W0 + b a)` is `diag(m / |W0 + b a|) (W0 + b a)` with the
            pair of DoRA that stands in `pairs`; [out], in fp64.
        trained: values of parameters trained in full, in their own dtype.
        refused: reasons of weights whose change is no product of factors.
        cut: what a smaller rank cost.
    """

    pairs: dict[str, Factors] = field(default_factory=dict)
    magnitudes: dict[str, torch.Tensor] = field(default_factory=dict)
    trained: dict[str, torch.Tensor] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    cut: dict[str, CutOff] = field(default_factory=dict)

    @property
    def ranks(self) -> Mapping[str, int]:
        """Rank of each pair."""
        return {name: pair.a.shape[-2] for name, pair in self.pairs.items()}

    def at_most(self, rank: int) -> None:
        """Cut every pair of a higher rank, and note what that cost."""
        for name, before in self.ranks.items():
            if before > rank:
                self.pairs[name], self.cut[name] = compressed(self.pairs[name], rank)

    def at_one_rank(self) -> None:
        """Bring all pairs to the first of RANKS that holds the highest, by zeros; refuse those above the last."""
        ranks = self.ranks
        over = {name: rank for name, rank in ranks.items() if rank > RANKS[-1]}
        self.refused |= {name: f"its rank is {rank}, over {RANKS[-1]}; give max_rank" for name, rank in over.items()}
        if not over:
            one = next(rank for rank in RANKS if rank >= max(ranks.values(), default=1))
            self.pairs = {name: padded(pair, one) for name, pair in self.pairs.items()}


def _add_scaled(
    change: Change, state: WeightState, terms: Sequence[tuple[float, Factors]], row_scale: torch.Tensor
) -> None:
    """Note `diag(d) W0 + b a` as `diag(d) (W0 + diag(1 / d) b a)`, of a row scale d: the pair, and the norms that this
    has.
    """
    pair = scaled(_total(terms) or nothing(state), 1 / row_scale, state.transposed)
    rows = _rows(_summed(state, pair), state)
    change.pairs[state.name], change.magnitudes[state.name] = pair, row_scale * rows.norm(dim=1)


def merged(change: Change, state: WeightState) -> torch.Tensor:
    """Return a weight of an unstacked site with its change, rounded once to its dtype, on the CPU."""
    total = _summed(state, change.pairs.get(state.name) or nothing(state))
    if state.name in change.magnitudes:
        rows = _rows(total, state)
        rows *= (change.magnitudes[state.name] / rows.norm(dim=1))[:, None]  # a view: what is scaled is the total
    return total.to(state.base.dtype)


def _summed(state: WeightState, pair: Factors) -> torch.Tensor:
    weight = dense(state.base).cpu().double()
    return weight + (pair.b @ pair.a).view_as(weight)


def _rows(weight: torch.Tensor, state: WeightState) -> torch.Tensor:
    """Return a contiguous weight as rows [out, in], a view."""
    return weight.mT if state.transposed else weight.flatten(1)


def _total(terms: Sequence[tuple[float, Factors]]) -> Factors | None:
    return sum_of(terms, torch.float64, torch.device("cpu")) if terms else None


def nothing(state: WeightState) -> Factors:
    """Return factors of rank 1 that add nothing."""
    *stack, rows, columns = state.matrix
    return Factors(torch.zeros(*stack, rows, 1).double(), torch.zeros(*stack, 1, columns).double())


def change_of(run: Run, which: Which) -> Change:
    """Return the change of a cascade's weights; of slow and averaged ones a stage that has trained counts as ended.

    What a dense collapse has left is factored at its numerical rank: the delta is there, and its pair is never larger
    than twice that. Kept noise has full rank, and is refused.
    """
    slow = run.slow if which == "fast" else ended(run, "export.peft")
    learners, change, parameters = run.learners(), Change(), run.parameters_by_name()
    at = "slow" if which == "fast" and slow.idle else which
    for name, state in slow.states.items():
        live, gain, branch = None, None, learners.get(name)
        if state.full:
            change.trained[name] = slow.value(name, which, parameters[name], branch).cpu()
            continue
        if which == "fast" and isinstance(branch, Branch) and has_trained(branch, state):
            live = factors_of(branch, torch.device("cpu"), state)
            gain = gain_of(branch, state, run.plan.spec, run.plan.stage, not slow.idle)
        _, delta, terms = state.terms(at if live is None else "fast", live, gain)
        if delta is not None and bool(delta.any()):
            terms.append((1.0, factored(delta)))
        row_scale = state.scale(gain)
        if row_scale is None and terms and run.plan.spec.row_scale.trained:  # experts that came from elsewhere
            row_scale = torch.ones(state.out, dtype=torch.float64)
        if state.noises:
            change.refused[name] = "it keeps the noise of a stage (noise.keep), which has no low rank"
        elif row_scale is not None and not bool(row_scale.all()):
            change.refused[name] = "a row of it was scaled to 0, which no magnitude does"
        elif row_scale is not None:
            _add_scaled(change, state, terms, row_scale)
        elif (pair := _total(terms)) is not None:
            change.pairs[name] = pair
    return change
