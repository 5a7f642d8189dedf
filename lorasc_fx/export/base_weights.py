"""Finds which tensor of a base's files is which weight of the model, by the fingerprints of W0.

A file may have other names than the model (a prefix; a tied weight under its other name, or under both), and a narrower
dtype than the model was adapted in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch

from lorasc_fx.checkpoint.base_file import keys_of
from lorasc_fx.checkpoint.folded import Change, FoldedWeights
from lorasc_fx.errors import CheckpointError, nearest
from lorasc_fx.export.tensor_files import DTYPES, Entry, TensorFile

_WIDER = {
    "BF16": (torch.float32, torch.float64),
    "F16": (torch.float32, torch.float64),
    "F32": (torch.float64,),
}
"""Dtypes that hold every number of a narrower one: a model loaded in them has exactly the values of the file."""


@dataclass
class _Matching:
    """Which tensor of the files is which parameter.

    Args:
        weights: of the fold.
        base: the path that the user gave, for messages.
        names: of parameters, by key.
        wider: dtype that the model was adapted in, for the keys of tensors in narrower ones.
        unnamed: tensors whose key is not the name of a parameter, with their fingerprints.
        added: parameters that the files lack, or have in another shape.
    """

    weights: FoldedWeights
    base: Path
    names: dict[str, str] = field(default_factory=dict)
    wider: dict[str, torch.dtype] = field(default_factory=dict)
    unnamed: list[tuple[Path, Entry, str]] = field(default_factory=list)
    added: set[str] = field(default_factory=set)

    def take(self, path: Path, entry: Entry, file: BinaryIO, name: str | None) -> None:
        """Match one tensor of a file, given the parameter that its key seems to name, if any."""
        weights, digest = self.weights, entry.fingerprint(file)
        expected = weights.base.get(name or "")
        if name is None or expected is None:
            self.unnamed.append((path, entry, digest))
        elif digest == expected:
            self.names[entry.name] = name
        elif dtype := _wide(entry, file).get(expected):
            self.names[entry.name], self.wider[entry.name] = name, dtype
        elif name in weights.whole and entry.name == name and entry.shape != tuple(weights.whole[name].shape):
            self.added.add(name)
        elif entry.name in weights.base or entry.name in weights.aliases:
            raise CheckpointError(
                f"base: {entry.name} of {path} holds other values than the {name} that was adapted "
                f"({weights.where}); give the files of the model that was adapted",
                code="base-differs",
            )
        else:  # a prefix that fits by chance
            self.unnamed.append((path, entry, digest))

    def match_unnamed(self, keys: Iterable[str]) -> None:
        """Match changed weights that have other names in the files, and further names of tied ones, by their values."""
        weights = self.weights
        by_digest: dict[str, list[tuple[Path, Entry]]] = {}
        expected = {weights.base[name] for name in weights.changes if name in weights.base}
        for path, entry, digest in self.unnamed:
            by_digest.setdefault(digest, []).append((path, entry))
            if self.wider:
                with path.open("rb") as file:
                    for wide_digest, dtype in _wide(entry, file).items():
                        by_digest.setdefault(wide_digest, []).append((path, entry))
                        if wide_digest in expected:
                            self.wider[entry.name] = dtype
        named = {*self.names.values(), *self.added}
        missing = [name for name in weights.changes if name not in named]
        for name in weights.changes:
            if name in self.added:
                continue
            entries = by_digest.get(weights.base.get(name, "-"), [])
            rivals = [wide_digest for wide_digest in missing if weights.base[wide_digest] == weights.base[name]]
            distinct = all(_distinct(path, entry) for path, entry in entries)
            if name in named:
                entries = entries if distinct else []
            elif not entries and name in weights.whole:
                self.added.add(name)
            elif not entries:
                raise CheckpointError(
                    f"base: {self.base} holds no tensor with the values that {name} had before ({weights.where})"
                    f"{nearest(name, keys)}. Give the files of the model that was adapted. To write weights that they "
                    "lack, or hold in another layout, call lorasc_fx.export.safetensors(cascade, folder) without base",
                    code="base-differs",
                )
            elif len(rivals) > 1 or not (distinct or len(entries) == 1):
                others = ", ".join(entry.name for _, entry in entries)
                raise CheckpointError(
                    f"base: {name} has another name in {self.base}, and cannot be recognized by its values, because "
                    f"several tensors hold the same ({others}); rename the tensors there as in the model",
                    code="base-differs",
                )
            self.names |= dict.fromkeys((entry.name for _, entry in entries), name)


def matched(
    weights: FoldedWeights, base: Path, files: Sequence[TensorFile], done: Callable[[int], None]
) -> tuple[dict[str, Change], dict[str, torch.Tensor]]:
    """Return the changes by key, and the tensors to add by key. Every tensor of the files is read once.

    A parameter trained in full that the files lack, or have in another shape, is a new head, and is added.

    Args:
        weights: of the fold.
        base: the path that the user gave, for messages.
        files: of the base.
        done: is called with the size of each tensor that was read.

    Raises:
        CheckpointError: the files are another base, or hold no tensor with the old values of a changed weight.
    """
    keys = [entry.name for file in files for entry in file.entries]
    all_names = {*weights.base, *weights.aliases, *weights.buffers}
    names = {key: weights.aliases.get(name, (name,))[0] for name, key in keys_of(all_names, keys).items()}
    matching, changes = _Matching(weights, base), dict[str, Change]()
    for tensors in files:
        with tensors.path.open("rb") as file:
            for entry in tensors.entries:
                name = names.get(entry.name)
                if name is None or name not in weights.buffers:
                    matching.take(tensors.path, entry, file, name)
                elif change := _buffer(weights.buffers[name], entry, file):
                    changes[entry.name] = change
                done(entry.size)
    matching.match_unnamed(keys)
    for key, name in matching.names.items():
        if name in weights.changes:
            dtype = matching.wider.get(key)
            changes[key] = weights.changes[name] if dtype is None else partial(_rounded, weights.changes[name], dtype)
    return changes, {name: weights.whole[name] for name in matching.added}


def _rounded(change: Change, dtype: torch.dtype, base: torch.Tensor) -> torch.Tensor:
    """Apply a change in the dtype that the model was adapted in, and round the result to the dtype of the file."""
    return change(base.to(dtype)).to(base.dtype)


def _wide(entry: Entry, file: BinaryIO) -> dict[str, torch.dtype]:
    """Return the fingerprints that a tensor has in wider dtypes."""
    return {entry.fingerprint(file, dtype): dtype for dtype in _WIDER.get(entry.dtype, ())}


def _distinct(path: Path, entry: Entry) -> bool:
    """Whether a tensor is a matrix with different numbers in it, so that an equal tensor must be the same one, tied."""
    if len(entry.shape) < 2 or not entry.size:
        return False
    with path.open("rb") as file:
        flat = entry.read(file).flatten()
    return not bool((flat == flat[0]).all())


def _buffer(buffer: torch.Tensor, entry: Entry, file: BinaryIO) -> Change | None:
    """Return the change of a buffer to its value in the model, if it has moved."""
    if DTYPES.get(entry.dtype) is None or entry.shape != tuple(buffer.shape):
        return None
    before = entry.read(file).to(buffer.dtype)
    return None if torch.equal(before, buffer) else lambda base: buffer.to(base.dtype)
