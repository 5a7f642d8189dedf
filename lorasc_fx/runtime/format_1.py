"""Format 1 of a checkpoint, which earlier releases wrote: other names, and row scales apart from their experts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from lorasc_fx.runtime.manifest import VIEWS

FIELDS: Mapping[str, str] = {
    "parked": "idle",
    "turning": "waits_for_gradient",
    "pending": "unapplied_gradients",
    "outside": "tensor_references",
    "past": "stage_ends",
    "kept": "noises",
}
"""Fields of a manifest, and of a weight's entry in it, by their names then."""

TENSORS: Mapping[str, str] = {
    r"outside/": "reference/",
    r"rows/": "row_scale/",
    r"began/(.*)/m": r"initial/\1/magnitude",
    r"began/(.*)": r"initial/\1",
    r"trained/(.*)/past/(\d+)": r"trained/\1/stage/\2",
}
"""Tensors, by patterns of their names then, of which the first one counts."""


def from_format_1(manifest: Mapping[str, Any]) -> tuple[dict[str, Any], Callable[[str], str]]:
    """Return a manifest in today's format, unchecked as before, and what returns the name of a tensor by that of then.

    Raises:
        ValueError: it is none of format 1.
    """
    numbers: dict[str, str] = {}  # names of the tensors of experts

    def name_of(name: str) -> str:
        if name in numbers:
            return numbers[name]
        for pattern, new in TENSORS.items():
            changed, count = re.subn(rf"^{pattern}", new, name)
            if count:
                return changed
        return name

    try:
        now = {FIELDS.get(key, key): value for key, value in manifest.items()}
        now["slow"] = {name: _entry(name, entry, numbers) for name, entry in manifest["slow"].items()}
        now["tensor_references"] = [
            {"path": note["place"], **{key: name_of(note[key]) for key in ("tensor", "number") if key in note}}
            for note in manifest.get("outside", ())
        ]
        if "shards" in manifest:
            now["shards"] = {name_of(name): axis for name, axis in manifest["shards"].items()}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as fault:
        raise ValueError(f"is not what format 1 holds: {type(fault).__name__}: {fault}") from fault
    if now.get("frontend") == "pieces":
        now["frontend"] = "graph-breaks"
    return now, name_of


def _entry(weight: str, entry: Mapping[str, Any], numbers: dict[str, str]) -> dict[str, Any]:
    """Return the entry of a weight in which a row scale is a tensor of the expert of its stage; add to `numbers` what
    the tensors of experts are called then.

    "turns" had the stage of each row scale, and the number of experts before it; a stage that scaled rows alone had no
    expert, and every view from then on has the coefficient 1 for it.
    """
    now = {FIELDS.get(key, key): value for key, value in entry.items() if key not in ("stages", "turns")}
    now["gone"] = max((stage for stage, vector in entry["past"] if vector is None), default=0)
    now["stage_ends"] = [[stage, [*vector]] for stage, vector in entry["past"] if stage > now["gone"]]
    now |= {view: [*entry[view]] for view in VIEWS if view in entry}
    experts: list[dict[str, Any]] = [{"stage": stage, "tensors": ["b", "a"]} for stage in entry["stages"]]
    of_then: list[int | None] = [*range(len(experts))]
    for number, (stage, before) in enumerate(entry.get("turns", ())):
        index = before + of_then.count(None)
        expert = experts[index] if index < len(experts) else {}
        if expert.get("stage") != stage or "row_scale" in expert["tensors"]:
            vectors = [now[view] for view in VIEWS if view in now]
            for vector in vectors + [vector for end, vector in now["stage_ends"] if end >= stage]:
                vector.insert(index, 1.0)
            experts.insert(index, {"stage": stage, "tensors": []})
            of_then.insert(index, None)
        experts[index]["tensors"].append("row_scale")
        numbers[f"turn/{weight}/{number}"] = f"expert/{weight}/{index}/row_scale"
    for index, number_then in enumerate(of_then):
        if number_then is not None:
            numbers |= {f"expert/{weight}/{number_then}/{key}": f"expert/{weight}/{index}/{key}" for key in "ba"}
    return {**now, "experts": experts}
