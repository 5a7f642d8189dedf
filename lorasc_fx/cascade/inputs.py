"""Descriptions of the arguments of a call as plain data, which a checkpoint stores, and stand-ins made from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

Description = dict[str, Any]
"""One of `{"tensor": shape, "dtype": name, "fill": number}`, `{"list": [...]}`, `{"tuple": [...]}`, `{"dict": {...}}`
and `{"value": plain value}`. `fill` is absent for floating-point tensors."""


def describe(args: Sequence[object], kwargs: Mapping[str, object]) -> Description | None:
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


def _described(value: Any) -> Description:
    """Return the description of a value. Raise TypeError if it has none."""
    if type(value) is torch.Tensor or isinstance(value, torch.nn.Parameter):
        if value.layout is not torch.strided or value.is_nested or value.is_complex():
            raise TypeError("only dense real tensors can be described")
        result: Description = {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        if not value.is_floating_point():
            result["fill"] = int(value.max()) if value.numel() else 0
        return result
    if type(value) in (list, tuple):
        return {type(value).__name__: [_described(part) for part in value]}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: _described(part) for key, part in value.items()}}
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return {"value": value}
    raise TypeError(f"a {type(value).__name__} cannot be described")


def _built(description: Any, source: torch.Generator, device: torch.device) -> Any:
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
    ((kind, parts),) = description.items()
    return {"tuple": tuple, "list": list}[kind](_built(part, source, device) for part in parts)
