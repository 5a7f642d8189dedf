"""How much of the trained change a fold keeps, after its weights are rounded to the dtype of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from lorasc_fx.quantized import is_quantized
from lorasc_fx.state.weight import Summed, WeightState

ROWS = 16
"""Rows of a weight that are compared, evenly spaced. The numbers of a row tell those of the others."""
SAMPLE = 8
"""Weights that are compared at each transition, evenly spaced."""
ENOUGH = 0.9
"""A fold that keeps a smaller share of the change of a weight warns."""


class Kept(NamedTuple):
    """How much of the change of a weight since W0 a fold keeps. Computed in fp64.

    Args:
        share: projection of the stored change on the exact one, divided by the norm of the exact one. 1 if nothing is
            lost, 0 if all is lost. Errors that have nothing to do with the change do not count.
        error: norm of the difference between the stored change and the exact one, divided by the norm of the exact one.
    """

    share: float
    error: float

    @classmethod
    def of(cls, change: torch.Tensor, stored: torch.Tensor) -> Kept:
        """Compare an exact change with the stored one, in the same shape."""
        change, stored = change.double().flatten(), stored.double().flatten()
        size = change.dot(change)
        if not size > 0:
            return cls(1.0, 0.0)
        return cls(float(change.dot(stored) / size), float((stored - change).norm() / size.sqrt()))


def kept_by(state: WeightState, view: Summed = "slow") -> Kept | None:
    """Return how much of the change of a weight its own dtype keeps.

    None if the weight is trained in full, quantized, unchanged, or trained on a grid, which loses nothing.
    """
    if state.full or state.grid or is_quantized(state.base) or not state.changed:
        return None
    part = state.sampled(ROWS)
    change = part.exact(view, torch.float64)
    stored = change.to(part.base.dtype).double().sub_(part.base)
    return Kept.of(change.sub_(part.base), stored)


def sample(states: Iterable[WeightState]) -> dict[str, Kept]:
    """Return how much a few of the weights in half precision keep, by name."""
    narrow = [state for state in states if state.base.dtype.itemsize < 4 and state.changed]
    step = max(1, -(-len(narrow) // SAMPLE))
    found = {state.name: kept_by(state) for state in narrow[::step]}
    return {name: kept for name, kept in found.items() if kept is not None}


def loss_of(found: Mapping[str, Kept]) -> str:
    """Return a sentence about the weight that keeps the least, if that is less than `ENOUGH`. Otherwise ""."""
    name, kept = min(found.items(), key=lambda item: item[1].share, default=("", Kept(1.0, 0.0)))
    if kept.share >= ENOUGH:
        return ""
    return (
        f"the rounding of {name} keeps {kept.share:.2f} of what was trained (relative error {kept.error:.2g}). Train "
        "with the rounded weights (CascadeSpec.grid), keep the branches (lorasc_fx.save, export.peft), or fold into a "
        "wider dtype"
    )
