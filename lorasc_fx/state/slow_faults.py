"""What can be wrong with the slow state of a weight, as a checkpoint may hold it."""

from __future__ import annotations

import math

import torch

from lorasc_fx.state.slow import SlowWeight

__all__ = ["slow_faults"]


def slow_faults(state: SlowWeight) -> list[str]:
    """Return what is wrong with the experts, each as the end of a sentence about the slow state."""
    found = []
    average = state.vector("averaged")[0]
    if not len(state.experts) == len(state.slow) == len(state.start):
        counts = f"{len(state.slow)} slow and {len(state.start)} start coefficients"
        found.append(f"has {len(state.experts)} experts, but {counts}")
    elif len(average) != len(state.experts):
        found.append(f"has {len(state.experts)} experts, but {len(average)} coefficients of an average")
    *stack, rows, columns = state.matrix
    for expert in state.experts:
        b, a = tuple(expert.factors.b.shape), tuple(expert.factors.a.shape)
        rank = a[-2] if len(a) > 1 else 0
        if b != (*stack, rows, rank) or a != (*stack, rank, columns):
            found.append(f"has an expert of stage {expert.stage} of {b} and {a}, which is no delta of {state.matrix}")
    deltas = [each for each in (state.dense_slow, state.dense_start, state.dense_average) if each is not None]
    for delta in deltas:
        if tuple(delta.shape) != state.matrix:
            found.append(f"has a dense delta of {tuple(delta.shape)}, which is none of {state.matrix}")
    scales = [turn.rows for turn in state.turns] + ([state.rows] if state.rows is not None else [])
    out = state.matrix[-1 if state.turned else -2]
    found += [f"scales {tuple(each.shape)} rows, not {out}" for each in scales if tuple(each.shape) != (out,)]
    held = [each for expert in state.experts for each in (expert.factors.b, expert.factors.a)]
    held += deltas + scales
    if not all(bool(torch.isfinite(each).all()) for each in held) or not all(
        map(math.isfinite, state.slow + state.start + average)
    ):
        found.append("holds inf or nan")
    return found
