"""One row of the table: a step of each rival, its memory, and the floor."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import lorasc_fx as lx

from .floor import floor_ratio
from .measure import Turn, alternate, ratio
from .memory import activation_bytes, allowed_bytes
from .models import Work
from .rivals import Rival, can_drop, entries, make, make_all

__all__ = ["DROPOUT", "measured"]

DROPOUT = 0.1

PAIRS = (("ours", "frozen"), ("peft", "frozen"), ("full", "frozen"), ("folded", "frozen"), ("ours", "peft"))


def measured(
    work: Work, rounds: int, forced: Mapping[str, Mapping[str, Any]] | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Return all that is measured of one model in this process, as plain data.

    Args:
        work: the model.
        rounds: in which the rivals take turns.
        forced: more rivals of ours, by name, with options of our spec; `ratios` has ours over each of them.
        device: on which the model is, and whose clock is read.

    Raises:
        RuntimeError: ours and peft train different numbers of entries, or a site met no product.
    """
    rivals = make_all(work, forced)
    pairs = [*PAIRS, *(("ours", name) for name in forced or {})]
    times = alternate({name: Turn(rival.prepare, rival.step) for name, rival in rivals.items()}, rounds, device)
    ours, frozen = rivals["ours"].model, rivals["frozen"]
    assert isinstance(ours, lx.Cascade)
    frozen.prepare()
    return {
        "title": work.title,
        "front end": ours.frontend,
        "sites": len(ours.sites),
        "entries": entries(ours),
        "seconds": {name: time.to_dict() for name, time in times.items()},
        "ratios": {f"{one}/{other}": ratio(times[one], times[other]) for one, other in pairs},
        "floor": floor_ratio(frozen.step, frozen.loss, frozen.model, ours.sites),
        "activation": {
            **{name: activation_bytes(rival.loss, rival.model) for name, rival in rivals.items()},
            "allowed": allowed_bytes(frozen.loss, frozen.model, ours.sites),
        },
        "activation with dropout": _with_dropout(work, frozen),
    }


def _with_dropout(work: Work, frozen: Rival) -> dict[str, int]:
    """Return the activation memory of both libraries with adapter dropout, where they can be asked for it."""
    if not work.dropout:
        return {}
    found = {}
    for name in ("ours", "peft") if can_drop() else ("peft",):
        batch = {key: value.detach() for key, value in frozen.inputs.items()}
        rival = make(name, work, copy.deepcopy(frozen.model), batch, DROPOUT)
        found[name] = activation_bytes(rival.loss, rival.model)
    return found
