"""Matches the tensors in a base's files with the weights of the model, and checks them by the fingerprints of W0.

The names in a file may have another prefix than the names in the model. A file may have a tied weight under any or all
of its names. The dtype in the file may be narrower than the dtype in which the model was adapted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open

from lorasc_fx.checkpoint import Change, FoldedWeights
from lorasc_fx.checkpoint.files import refusing
from lorasc_fx.errors import CheckpointError, nearest
from lorasc_fx.util.fingerprint import fingerprint

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

_WIDER = {
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
}
"""Dtypes that represent every value of a narrower dtype. A model loaded in them has exactly the values of the file."""


def shards_of(path: Path) -> list[Path]:
    """Return the safetensors files at a path: the file itself, or the files in a folder that transformers wrote.

    Raises:
        CheckpointError: there is no safetensors file, or the index is damaged.
    """
    if path.is_file() and path.suffix != ".json":
        return [path]
    index = path if path.is_file() else path / INDEX
    if not index.is_file():
        if (path / SINGLE).is_file():
            return [path / SINGLE]
        raise CheckpointError(
            f"base: {path} is not a safetensors file, nor a folder with {SINGLE} or {INDEX}", code="no-base"
        )
    with refusing(
        f"base: {index}", "give a safetensors file, or a folder that transformers wrote", code="unreadable-file"
    ):
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if any(Path(name).name != name or name in ("", "..") for name in names):
            raise ValueError("lists files outside its folder")
    return [index.parent / name for name in names]


def mapped(path: Path) -> dict[str, torch.Tensor]:
    """Return the memory-mapped tensors of a safetensors file: {key: tensor}."""
    with (
        refusing(f"base: {path}", "give complete safetensors files", code="unreadable-file"),
        safe_open(path, framework="pt") as handle,
    ):
        return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - no mapping


def keys_of(names: Iterable[str], keys: Iterable[str]) -> dict[str, str]:
    """Return {name in the model: key in its files}. Names without a key are left out.

    A name that equals a key matches this key. To all other names, the same prefix is added, or the same prefix is
    removed: the one with the most matches. Names that equal their key come last in the result.
    """
    names, available = set(names), set(keys)
    missing = names - available
    counts: Counter[tuple[str, str]] = Counter()
    for key in available:
        counts.update((prefix, "") for prefix, suffix in _cuts(key) if suffix in missing)
    for name in missing:
        counts.update(("", prefix) for prefix, suffix in _cuts(name) if suffix in available)
    keys_by_name = {}
    if counts:
        added, removed = min(counts, key=lambda prefixes: (-counts[prefixes], sum(map(len, prefixes)), prefixes))
        renamed = {name: added + name.removeprefix(removed) for name in missing if name.startswith(removed)}
        keys_by_name = {name: key for name, key in renamed.items() if key in available}
    return keys_by_name | {name: name for name in names & available}


def _cuts(name: str) -> Iterator[tuple[str, str]]:
    """Yield (prefix, suffix) of a name, split after each of its dots."""
    for end, letter in enumerate(name, start=1):
        if letter == ".":
            yield name[:end], name[end:]


def matched(
    weights: FoldedWeights, base: Path, files: Sequence[Path]
) -> tuple[dict[str, Change], dict[str, torch.Tensor]]:
    """Return {key in the files: its change}, and {name: tensor to add}.

    A parameter that was trained in full is added if the files lack it or have another shape, such as a new head.

    Raises:
        CheckpointError: the files are from another base, or lack a changed weight.
    """
    keys = [key for path in files for key in mapped(path)]
    all_names = {*weights.base, *weights.aliases, *weights.buffers}
    names = {key: weights.aliases.get(name, (name,))[0] for name, key in keys_of(all_names, keys).items()}
    changes, matched_names = dict[str, Change](), set[str]()
    for path in files:
        for key, value in mapped(path).items():
            name = names.get(key, "")
            if name in weights.buffers:
                if change := _buffer(weights.buffers[name], value):
                    changes[key] = change
            elif name in weights.base and not _is_new_head(weights, name, key, value):
                dtype = _dtype_of(value, weights.base[name])
                if dtype is None and (key in weights.base or key in weights.aliases):
                    raise CheckpointError(
                        f"base: the values of {key} in {path} differ from the {name} that was adapted "
                        f"({weights.where}); give the files of the model that was adapted",
                        code="base-differs",
                    )
                if dtype is not None:  # otherwise another tensor has the same suffix
                    matched_names.add(name)
                    if name in weights.changes:
                        changes[key] = partial(_rounded, weights.changes[name], dtype)
    added = {name for name in weights.changes if name not in matched_names and name in weights.full}
    for name in weights.changes.keys() - matched_names - added:
        raise CheckpointError(
            f"base: {base} has no {name} with the values that it had before the training ({weights.where})"
            f"{nearest(name, keys)}. Give the files of the model that was adapted. If they lack this weight, or "
            "have it under another name or in another layout, call lorasc_fx.export.safetensors(cascade, folder) "
            "without base",
            code="base-differs",
        )
    return changes, {name: weights.full[name] for name in added}


def _is_new_head(weights: FoldedWeights, name: str, key: str, value: torch.Tensor) -> bool:
    """Return whether a parameter trained in full replaces a tensor with the same name and another shape."""
    return name in weights.full and key == name and value.shape != weights.full[name].shape


def _dtype_of(value: torch.Tensor, expected: str) -> torch.dtype | None:
    """Return the dtype, its own or a wider one, in which a tensor of a file has this fingerprint. None if none has."""
    dtypes = (value.dtype, *_WIDER.get(value.dtype, ()))
    return next((dtype for dtype in dtypes if fingerprint(value.to(dtype)) == expected), None)


def _rounded(change: Change, dtype: torch.dtype, base: torch.Tensor) -> torch.Tensor:
    """Apply a change in the dtype that the model was adapted in, and round the result to the dtype of the file."""
    return change(base.to(dtype)).to(base.dtype)


def _buffer(buffer: torch.Tensor, stored: torch.Tensor) -> Change | None:
    """Return a change that sets a buffer to its value in the model. None if the value is equal or the shape is not."""
    if stored.shape != buffer.shape or torch.equal(stored.to(buffer.dtype), buffer.to("cpu")):
        return None
    return lambda base: buffer.to(base.dtype)
