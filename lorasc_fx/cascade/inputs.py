"""Descriptions of example inputs as plain data: structure, shapes and dtypes, without the user's values.

A checkpoint stores a description. If a run is loaded without inputs, functions that must run the model (`export.peft`)
use stand-ins of the same shapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

Description = dict[str, Any]
"""One of `{"tensor": shape, "dtype": name, "fill": number}`, `{"list": [...]}`, `{"tuple": [...]}`, `{"dict": {...}}`
and `{"value": plain value}`. `fill` is absent for floating-point tensors."""


def describe(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Description | None:
    """Return a description of the arguments of a call, or None if they cannot be described as JSON.

    Of an integer or boolean tensor, the largest value is stored, because it is a valid index or class.
    """
    try:
        return _described((tuple(args), dict(kwargs)))
    except TypeError:
        return None


def stand_ins(description: Description, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments that fit a description, as (args, kwargs).

    Floating-point tensors are drawn from N(0, 1) with a fixed seed. All others have the stored value in every entry.
    """
    source = torch.Generator().manual_seed(0)
    args, kwargs = _built(description, source, device)
    return args, kwargs


def is_description(value: Any) -> bool:
    """Whether plain data from a file is a valid description of the arguments of a call."""
    pair = value.get("tuple") if isinstance(value, dict) else None
    kinds = ["tuple", "dict"]
    if not isinstance(pair, list) or [next(iter(part), "") for part in pair if isinstance(part, dict)] != kinds:
        return False
    return _is_valid(value)


def _described(value: Any) -> Description:
    """Return the description of a value. Raise TypeError if it has none."""
    if type(value) is torch.Tensor or isinstance(value, torch.nn.Parameter):
        if value.layout is not torch.strided or value.is_nested or value.is_complex():
            raise TypeError("only dense real tensors can be described")
        result: Description = {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        if not value.is_floating_point():
            result["fill"] = int(value.max()) if value.numel() and not value.is_meta else 0
        return result
    if type(value) in (list, tuple):
        return {type(value).__name__: [_described(part) for part in value]}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: _described(part) for key, part in value.items()}}
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return {"value": value}
    raise TypeError(f"a {type(value).__name__} cannot be described")


def _built(description: Description, source: torch.Generator, device: torch.device) -> Any:
    """Return a value that fits a description. `source` draws floating-point tensors, in order."""
    if "tensor" in description:
        shape, dtype = description["tensor"], getattr(torch, description["dtype"])
        if "fill" in description:
            return torch.full(shape, description["fill"], dtype=dtype, device=device)
        return torch.randn(shape, generator=source).to(device, dtype)
    if "dict" in description:
        return {key: _built(part, source, device) for key, part in description["dict"].items()}
    if "value" in description:
        return description["value"]
    kind, parts = next(iter(description.items()))
    built = [_built(part, source, device) for part in parts]
    return tuple(built) if kind == "tuple" else built


def _is_valid(description: Any) -> bool:
    """Whether plain data is a description of any value."""
    if not isinstance(description, dict):
        return False
    if "tensor" in description:
        dtype = getattr(torch, str(description.get("dtype")), None)
        return (
            isinstance(dtype, torch.dtype)
            and not dtype.is_complex
            and description.keys() == {"tensor", "dtype"} | (set() if dtype.is_floating_point else {"fill"})
            and isinstance(description["tensor"], list)
            and all(type(size) is int and size >= 0 for size in description["tensor"])
            and type(description.get("fill", 0)) is int
        )
    kind, value = next(iter(description.items()), ("", None))
    if len(description) != 1:
        return False
    if kind == "value":
        return value is None or type(value) in (bool, int, str, float)
    if kind == "dict":
        return isinstance(value, dict) and all(map(_is_valid, value.values()))
    return kind in ("list", "tuple") and isinstance(value, list) and all(map(_is_valid, value))
