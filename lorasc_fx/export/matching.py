"""Which tensor of a base's files is which parameter of the model: by name, by prefix, and by its bytes.

The fingerprints that a cascade keeps of its base decide. A file may have other names than the model (a prefix, tied
weights under the other name, or under both), and a narrower dtype than the model was adapted in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch

from lorasc_fx.errors import CheckpointError, nearest
from lorasc_fx.export.shards import DTYPES, Entry, Shard
from lorasc_fx.runtime.base_file import renamed
from lorasc_fx.runtime.fingerprint import fingerprint
from lorasc_fx.runtime.folded import Change, FoldedWeights

__all__ = ["matched"]

_WIDER = {
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
}
"""Dtypes that hold every number of a narrower one: a model that was loaded in them has the numbers of the file."""


@dataclass
class _Found:
    names: dict[str, str] = field(default_factory=dict)  # of parameters, by key
    wider: dict[str, torch.dtype] = field(default_factory=dict)  # that the model was adapted in, by key
    foreign: list[tuple[Path, Entry, str]] = field(default_factory=list)  # keys that are none by their name


def matched(
    weights: FoldedWeights, base: Path, shards: Sequence[Shard], tell: Callable[[int], None]
) -> dict[str, Change]:
    """Return what is to change, by the names that the files have; every tensor is read once.

    Args:
        weights: of the fold.
        base: the path that was given, for messages.
        shards: the files.
        tell: is told of each tensor's size, when it was read.

    Raises:
        CheckpointError: the files are another base, or hold no tensor that a changed weight was.
    """
    keys = {entry.name: shard.path for shard in shards for entry in shard.entries}
    names = _by_name(weights, keys)
    found, changes = _Found(), dict[str, Change]()
    for shard in shards:
        with shard.path.open("rb") as file:
            for entry in shard.entries:
                name = names.get(entry.name)
                if name is not None and name in weights.buffers:
                    if change := _buffer(weights.buffers[name], entry, file):
                        changes[entry.name] = change
                else:
                    _look(weights, entry, file, shard.path, name, found)
                tell(entry.size)
    _unnamed(weights, base, keys, found)
    for key, name in found.names.items():
        if name in weights.changes:
            dtype = found.wider.get(key)
            changes[key] = weights.changes[name] if dtype is None else partial(_rounded, weights.changes[name], dtype)
    return changes


def _rounded(change: Change, dtype: torch.dtype, base: torch.Tensor) -> torch.Tensor:
    """Return what a change makes of a tensor in the dtype that the model was adapted in, in that of the file."""
    return change(base.to(dtype)).to(base.dtype)


def _by_name(weights: FoldedWeights, keys: Mapping[str, Path]) -> dict[str, str]:
    """Return the first name of each key that is a parameter's or buffer's, as such or under a common prefix."""
    known = {*weights.base, *weights.aliases, *weights.buffers}
    elsewhere = renamed(known, dict(keys))
    first = {name: weights.aliases.get(name, (name,))[0] for name in known}
    found = {key: first[name] for name, key in elsewhere.items()}
    return found | {name: first[name] for name in known if name in keys}


def _look(weights: FoldedWeights, entry: Entry, file: BinaryIO, path: Path, name: str | None, found: _Found) -> None:
    """Note what one tensor of a file is."""
    digest = entry.fingerprint(file)
    expected = weights.base.get(name or "")
    if name is None or expected is None:
        found.foreign.append((path, entry, digest))
    elif digest == expected:
        found.names[entry.name] = name
    elif dtype := _wide(entry, file).get(expected):
        found.names[entry.name], found.wider[entry.name] = name, dtype
    elif entry.name in weights.base or entry.name in weights.aliases:
        raise CheckpointError(
            f"base: {entry.name} of {path} holds other numbers than the {name} that was adapted "
            f"({weights.where}); give the files of the model that was adapted",
            code="base-differs",
        )
    else:  # a prefix that fits by chance
        found.foreign.append((path, entry, digest))


def _wide(entry: Entry, file: BinaryIO) -> dict[str, torch.dtype]:
    """Return the fingerprints that a tensor has in wider dtypes."""
    wider = _WIDER.get(DTYPES.get(entry.dtype, torch.bool), ())
    tensor = entry.read(file) if wider else torch.empty(0)
    return {fingerprint(tensor.to(dtype)): dtype for dtype in wider}


def _unnamed(weights: FoldedWeights, base: Path, keys: Mapping[str, Path], found: _Found) -> None:
    """Find changed weights that have other names in the files, and other names of tied ones, by their bytes."""
    alike: dict[str, list[tuple[Path, Entry]]] = {}
    expected = {weights.base[name] for name in weights.changes if name in weights.base}
    for path, entry, digest in found.foreign:
        alike.setdefault(digest, []).append((path, entry))
        if found.wider:
            with path.open("rb") as file:
                for other, dtype in _wide(entry, file).items():
                    alike.setdefault(other, []).append((path, entry))
                    if other in expected:
                        found.wider[entry.name] = dtype
    named = set(found.names.values())
    missing = [name for name in weights.changes if name not in named]
    for name in weights.changes:
        places = alike.get(weights.base.get(name, "-"), [])
        rivals = [other for other in missing if weights.base[other] == weights.base[name]]
        distinct = all(_distinct(path, entry) for path, entry in places)
        if name in named:
            places = places if distinct else []
        elif not places:
            raise CheckpointError(
                f"base: {base} holds no tensor with the numbers that {name} had before ({weights.where})"
                f"{nearest(name, keys)}. Give the files of the model that was adapted; what they do not hold, or hold "
                "in another layout, lorasc_fx.export.safetensors(cascade, folder) writes without a base",
                code="base-tensor-missing",
            )
        elif len(rivals) > 1 or not (distinct or len(places) == 1):
            others = ", ".join(entry.name for _, entry in places)
            raise CheckpointError(
                f"base: {name} goes by another name in {base}, and cannot be told by its numbers: {others} all hold "
                "the same; rename the tensors there as the model names them",
                code="base-ambiguous",
            )
        found.names |= dict.fromkeys((entry.name for _, entry in places), name)


def _distinct(path: Path, entry: Entry) -> bool:
    """Whether a tensor is a matrix with different numbers in it: one that equals another is the same one, tied."""
    if len(entry.shape) < 2 or not entry.size:
        return False
    with path.open("rb") as file:
        flat = entry.read(file).flatten()
    return not bool((flat == flat[0]).all())


def _buffer(buffer: torch.Tensor, entry: Entry, file: BinaryIO) -> Change | None:
    """Return what writes a buffer as the model has it, if it has moved."""
    if DTYPES.get(entry.dtype) is None or entry.shape != tuple(buffer.shape):
        return None
    before = entry.read(file).to(buffer.dtype)
    if torch.equal(before, buffer):
        return None
    return lambda base: buffer.to(base.dtype)
