"""What JSON cannot hold, taken out of a value that it can hold otherwise: tensors, inf and nan.

Each leaves None in its place and a note that tells the place, so that nothing that is in JSON has a second meaning.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

__all__ = ["TakenOut", "fits", "kind", "put_back", "take_out"]

_HELD = {
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn,
    torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz,
}  # fmt: skip


@dataclass(frozen=True)
class TakenOut:
    """The value without them; a note for each; the tensors, by the names that the notes give."""

    value: Any
    notes: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


def fits(tensor: torch.Tensor) -> bool:
    """Whether safetensors holds such a tensor, and gives back the same."""
    return type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided and tensor.dtype in _HELD


def kind(tensor: torch.Tensor) -> str:
    """Return what it is that does not fit."""
    return f"a {type(tensor).__name__} of {str(tensor.dtype).removeprefix('torch.')}, {tensor.layout}"


def take_out(value: Any) -> TakenOut:
    """Return a value of dicts and lists without tensors, inf and nan. A tensor that stands twice is kept once.

    Raises:
        ValueError: a container holds itself.
    """
    notes: list[dict[str, Any]] = []
    tensors: dict[str, torch.Tensor] = {}
    names: dict[int, str] = {}

    def plain(each: Any, place: tuple[str | int, ...], above: tuple[int, ...]) -> Any:
        if isinstance(each, torch.Tensor) and fits(each):
            name = names.setdefault(id(each), f"outside/{len(names)}")
            tensors[name] = tensors.get(name, each).detach().clone()
            notes.append({"place": place, "tensor": name})
            return None
        if isinstance(each, float) and not math.isfinite(each):
            notes.append({"place": place, "number": repr(float(each))})
            return None
        if not isinstance(each, (Mapping, list, tuple)):
            return each
        if id(each) in above:
            raise ValueError("Circular reference detected")
        above = (*above, id(each))
        if isinstance(each, Mapping):
            return {key: plain(inner, (*place, _as_json(key)), above) for key, inner in each.items()}
        return [plain(inner, (*place, index), above) for index, inner in enumerate(each)]

    return TakenOut(plain(value, (), ()), notes, tensors)


def put_back(value: Any, notes: Sequence[Mapping[str, Any]], tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return what `take_out` was given, with lists for tuples and strings for keys, as JSON has them.

    Raises:
        KeyError, IndexError, TypeError, ValueError: the notes are not of this value.
    """
    whole = copy.deepcopy(value)
    made: dict[str, torch.Tensor] = {}
    for note in notes:
        *way, last = note["place"]
        inner = whole
        for key in way:
            inner = inner[key]
        if inner[last] is not None:
            raise ValueError(f"the place {note['place']} is taken")
        if "tensor" in note:
            name = note["tensor"]
            inner[last] = made.setdefault(name, tensors[name].clone())
        else:
            inner[last] = float(note["number"])
    return whole


def _as_json(key: Any) -> str:
    """Return the string that JSON makes of a key."""
    return key if isinstance(key, str) else json.dumps(key)
