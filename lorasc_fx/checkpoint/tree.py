"""Converts nested values to JSON and tensors, and back: dataclasses, dicts with any keys, tuples, tensors, inf and nan.

JSON has no such values, so each is an object with one key: `{"$tensor": NAME}`, `{"$tuple": [...]}`,
`{"$dict": [[key, value], ...]}` or `{"$float": "nan"}`. A tensor is named by its path. A tensor that occurs several
times is stored once, and is one object again after the load.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

import torch
from torch import nn

from lorasc_fx.checkpoint.files import DTYPES
from lorasc_fx.shards import local

Tensors = dict[str, torch.Tensor]
_STORABLE = frozenset(DTYPES.values())


def is_storable(tensor: torch.Tensor) -> bool:
    """Return whether safetensors can store this tensor without conversion. Of a DTensor, the local shard counts."""
    shard = local(tensor)
    return type(shard) in (torch.Tensor, nn.Parameter) and shard.layout is torch.strided and shard.dtype in _STORABLE


def pack(value: object) -> tuple[Any, Tensors]:
    """Return a value as JSON, and its tensors by name, which are not copied.

    Fields of a dataclass that equal their default are left out. Its tuples become lists, because `util.decode` restores
    the types of its fields.

    Raises:
        TypeError: safetensors cannot store a tensor.
    """
    tensors: Tensors = {}
    names: dict[int, str] = {}

    def packed(value: Any, path: str) -> Any:
        if isinstance(value, torch.Tensor):
            return {"$tensor": names[id(value)] if id(value) in names else added(value, path)}
        if isinstance(value, float):
            return value if isfinite(value) else {"$float": repr(float(value))}
        if dataclasses.is_dataclass(value):
            return {
                item.name: packed([*field] if isinstance(field, tuple) else field, f"{path}/{item.name}")
                for item in dataclasses.fields(value)
                if not _is_default(item, field := getattr(value, item.name))
            }
        if isinstance(value, Mapping):
            pairs = [(key, packed(item, f"{path}/{key}")) for key, item in value.items()]
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return dict(pairs)
            return {"$dict": [[packed(key, path), item] for key, item in pairs]}
        if isinstance(value, (list, tuple)):
            items = [packed(item, f"{path}/{index}") for index, item in enumerate(value)]
            return {"$tuple": items} if isinstance(value, tuple) else items
        return value

    def added(tensor: torch.Tensor, path: str) -> str:
        name = path.removeprefix("/")
        if not is_storable(tensor):
            kind = f"{type(tensor).__name__} of {str(tensor.dtype).removeprefix('torch.')}, {tensor.layout}"
            raise TypeError(f"{name} is a {kind}")
        while name in tensors:  # keys with slashes can give two tensors the same path
            name += "'"
        names[id(tensor)], tensors[name] = name, tensor
        return name

    return packed(value, ""), tensors


def _is_default(item: dataclasses.Field[Any], value: object) -> bool:
    """Return whether a field has its default, or is empty if `default_factory` makes an empty one."""
    if item.default_factory is not dataclasses.MISSING:
        return not value
    return type(value) is type(item.default) and value == item.default


def unpack(plain: object, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return the value that was packed. Dataclasses are dicts: `util.decode.decode` converts and checks them.

    Raises:
        ValueError: a tensor is missing, no part of the value uses it, or two keys of a dict are equal.
    """
    used: set[str] = set()

    def tensor(name: str) -> torch.Tensor:
        if name not in tensors:
            raise ValueError(f"has no tensor {name!r:.90}")
        used.add(name)
        return tensors[name]

    def table(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
        found = {unpacked(key): unpacked(item) for key, item in pairs}
        if len(found) < len(pairs):  # for example 1 and true
            raise ValueError("has two equal keys in one table")
        return found

    special: dict[str, Callable[[Any], Any]] = {
        "$tensor": tensor,
        "$float": float,
        "$tuple": lambda items: tuple(unpacked(items)),
        "$dict": table,
    }

    def unpacked(value: Any) -> Any:
        if isinstance(value, list):
            return [unpacked(item) for item in value]
        if not isinstance(value, dict):
            return value
        if any(key.startswith("$") for key in value):
            ((key, item),) = value.items()
            return special[key](item)
        return {name: unpacked(item) for name, item in value.items()}

    value = unpacked(plain)
    if odd := next((name for name in tensors if name not in used), None):
        raise ValueError(f"has the unexpected tensor {odd!r:.90}")
    return value
