"""Weighted sums of runs on the same base: `W0 + sum_i w_i S_i`, computed exactly.

A sum has the experts of all runs, each coefficient multiplied by the weight w_i of its run. Dense parts (collapsed
deltas, parameters trained in full) are summed in fp64 and rounded once. No rounded weight of a run is read. Related
work: model soups (2203.05482), task arithmetic (2212.04089).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from lorasc_fx.cascade.run import Run
from lorasc_fx.cascade.transition import install_slow
from lorasc_fx.errors import SpecError, named, warn
from lorasc_fx.plan import Plan
from lorasc_fx.quantized import dense
from lorasc_fx.state import Expert, History, Part, SlowWeights, StageEnd, WeightState, summing
from lorasc_fx.util.undo import Undo


def check_summable(call: str, plans: Mapping[str, Plan], advice: str) -> None:
    """Raise SpecError if a run scales rows (DoRA), because row scales cannot be summed. `plans` is by run name."""
    scaled = next((name for name, plan in plans.items() if plan.spec.method.magnitude), None)
    if scaled is not None:
        raise SpecError(
            f"{call}: {scaled}, has magnitudes (DoRA). Runs with magnitudes cannot be summed, because they scale rows "
            f"of the weights, and row scales do not add. {advice}",
            code="method-not-supported",
        )


def check_same_kind(call: str, run_name: str, state: WeightState, reference: WeightState) -> None:
    """Raise SpecError if a weight is a stack of matrices in one of the two states, and a single matrix in the other."""
    if state.stacked != reference.stacked and not (state.full or reference.full):
        raise SpecError(
            f"{call}: {run_name}, adapted {state.name} as another kind of matrix than the first run. Sum only runs of "
            "one model",
            code="sites-differ",
        )


def check_fits(after: SlowWeights, call: str) -> None:
    """Raise SpecError if a weight of a sum overflows its dtype."""
    if overflowing := [name for name, state in after.states.items() if not state.fits()]:
        raise SpecError(f"{call}: the sum overflows the dtype of {named(overflowing)}. Give the runs smaller numbers")


def weighted_sum(fresh: SlowWeights, parts: Sequence[Part], weights: Sequence[float], stage: int) -> SlowWeights:
    """Return `W0 + sum_i w_i S_i` for every weight of `fresh`. A run that did not adapt a weight has S = 0 there.

    Args:
        fresh: slow weights of a new cascade on the common base, with every weight of every run.
        parts: the runs.
        weights: one number w_i per run. They need not sum to 1.
        stage: number of the stage that ends with the sum.

    Raises:
        SpecError: a run has a weight that `fresh` does not have, or adapted one as another kind of matrix.
    """
    terms = list(zip(weights, parts, strict=True))
    for part in parts:
        foreign = sorted(part.slow.states.keys() - fresh.states.keys())
        if foreign:
            raise SpecError(
                f"merge: {part.name}, keeps noise in {foreign[0]}, which is not a site of the first run. Give a run "
                "with noise.where='all' first",
                code="sites-differ",
            )
    history = History((StageEnd(stage, 1.0),))
    return SlowWeights({name: _summed(state, terms, history) for name, state in fresh.states.items()}, history=history)


def _summed(fresh: WeightState, terms: Sequence[tuple[float, Part]], history: History) -> WeightState:
    """Return the sum of one weight over (weight of the run, run) pairs."""
    if fresh.full:  # there are no experts, so the values themselves are summed
        after = fresh.bare().holding(fresh.base.double() + _dense(fresh.name, fresh.base, terms))
        return replace(after, history=history, ends={history.last: after.dense["slow"]})
    experts: list[Expert] = []
    noises = []
    collapsed = False
    for weight, part in terms:
        state = part.slow.states.get(fresh.name)
        if state is None or weight == 0:
            continue
        check_same_kind("merge", part.name, state, fresh)
        for coefficient, expert in zip(state.coefficients("slow"), state.experts, strict=True):
            if coefficient != 0:
                summand = weight * coefficient
                experts.append(replace(expert, stage=0, origin=(summand, summand, summand)))
        noises += [replace(noise, amplitude=weight * noise.amplitude) for noise in state.noises]
        collapsed |= bool(state.dense)
    after = replace(fresh.bare(), experts=tuple(experts), history=history, noises=tuple(noises))
    if collapsed:  # a run whose experts were collapsed makes the sum partly dense
        delta = _dense(fresh.name, fresh.base, terms, factors=False).view(fresh.matrix).to(summing(fresh.base.dtype))
        after = replace(after, dense={"slow": delta})
    return after.compact()


def _dense(name: str, base: torch.Tensor, terms: Sequence[tuple[float, Part]], factors: bool = True) -> torch.Tensor:
    """Return the weighted sum of the deltas of one weight in fp64, in the shape of the weight.

    Without `factors` it has only the dense parts: collapsed deltas and parameters trained in full.
    """
    total = torch.zeros(base.shape, dtype=torch.float64)
    for weight, part in terms:
        state = part.slow.states.get(name)
        if weight == 0 or state is None:
            continue
        if factors or state.full:
            slow = replace(state, base=base).exact("slow", torch.float64, device=total.device)
            total += weight * (slow - dense(base).cpu().double())
        elif state.dense:
            total += weight * state.dense["slow"].cpu().double().view(base.shape)
    return total


def install_sum(run: Run, after: SlowWeights, parts: Sequence[Part], undo: Undo) -> None:
    """Start the first stage of a new cascade from a sum of runs, as part of a larger transaction.

    Buffers (running statistics) cannot be summed. A buffer that is equal in all runs is copied. All others keep the
    values of the base, with a warning.
    """
    check_fits(after, "merge")
    buffers = dict(run.model.named_buffers())
    shared = {name: parts[0].buffers[name] for name in buffers if agree(name, parts)}
    differing = [name for name, buffer in buffers.items() if name not in shared and buffer.is_floating_point()]
    install_slow(run, after, [*after.states], shared, undo)
    if differing:
        warn(
            f"merge: {len(differing)} buffers differ between the runs and keep the values of the base: "
            f"{named(differing)}. Estimate running statistics again by torch.optim.swa_utils.update_bn(batches, model)",
            "buffers-differ",
        )


def agree(name: str, parts: Sequence[Part]) -> bool:
    """Whether all runs have a buffer of this name, with the same dtype and equal values."""
    reference, *others = [part.buffers.get(name) for part in parts]
    return reference is not None and all(
        buffer is not None and buffer.dtype == reference.dtype and torch.equal(buffer.cpu(), reference.cpu())
        for buffer in others
    )
