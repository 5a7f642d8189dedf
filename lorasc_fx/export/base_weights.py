"""Finds which tensor of a base's files is which weight of the model, and checks it by the fingerprint of W0.

The names in a file may have another prefix than those in the model, and a tied weight its other name, or both. A file
may have a narrower dtype than the model was adapted in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        CheckpointError: the files are another base, or lack a changed weight.
    """
    keys = [entry.name for file in files for entry in file.entries]
    all_names = {*weights.base, *weights.aliases, *weights.buffers}
    names = {key: weights.aliases.get(name, (name,))[0] for name, key in keys_of(all_names, keys).items()}
    changes, found = dict[str, Change](), set[str]()
    for tensors in files:
        with tensors.path.open("rb") as file:
            for entry in tensors.entries:
                name = names.get(entry.name, "")
                if name in weights.buffers:
                    if change := _buffer(weights.buffers[name], entry, file):
                        changes[entry.name] = change
                elif name in weights.base and not _is_new_head(weights, name, entry):
                    dtype = _dtype_of(entry, file, weights.base[name])
                    if dtype is None and (entry.name in weights.base or entry.name in weights.aliases):
                        raise CheckpointError(
                            f"base: {entry.name} of {tensors.path} holds other values than the {name} that was adapted "
                            f"({weights.where}); give the files of the model that was adapted",
                            code="base-differs",
                        )
                    if dtype is not None:  # otherwise a prefix that fits by chance
                        found.add(name)
                        if name in weights.changes:
                            changes[entry.name] = partial(_rounded, weights.changes[name], dtype)
                done(entry.size)
    added = {name for name in weights.changes if name not in found and name in weights.whole}
    for name in weights.changes.keys() - found - added:
        raise CheckpointError(
            f"base: {base} holds no {name} with the values that it had before ({weights.where}){nearest(name, keys)}. "
            "Give the files of the model that was adapted. To write weights that they lack, name otherwise, or hold in "
            "another layout, call lorasc_fx.export.safetensors(cascade, folder) without base",
            code="base-differs",
        )
    return changes, {name: weights.whole[name] for name in added}


def _is_new_head(weights: FoldedWeights, name: str, entry: Entry) -> bool:
    """Whether a parameter trained in full replaces a tensor of its name that has another shape."""
    return name in weights.whole and entry.name == name and entry.shape != tuple(weights.whole[name].shape)


def _dtype_of(entry: Entry, file: BinaryIO, fingerprint: str) -> torch.dtype | None:
    """Return the dtype, its own or a wider one, in which a tensor of a file has this fingerprint; or None."""
    for dtype in (DTYPES.get(entry.dtype), *_WIDER.get(entry.dtype, ())):
        if dtype is not None and entry.fingerprint(file, dtype) == fingerprint:
            return dtype
    return None


def _rounded(change: Change, dtype: torch.dtype, base: torch.Tensor) -> torch.Tensor:
    """Apply a change in the dtype that the model was adapted in, and round the result to the dtype of the file."""
    return change(base.to(dtype)).to(base.dtype)


def _buffer(buffer: torch.Tensor, entry: Entry, file: BinaryIO) -> Change | None:
    """Return the change of a buffer to its value in the model, if it has moved."""
    if DTYPES.get(entry.dtype) is None or entry.shape != tuple(buffer.shape):
        return None
    before = entry.read(file).to(buffer.dtype)
    return None if torch.equal(before, buffer) else lambda base: buffer.to(base.dtype)
