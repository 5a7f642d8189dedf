"""Reads W0 from the memory-mapped safetensors files of the model, instead of a copy in host memory (`base="file"`).

The operating system reads mapped pages on use and drops them when memory is short. Each tensor is compared with the
model once, bit for bit, so that W0 is the same wherever it is stored. The files are never written. No other program may
write to them while the cascade exists. This is checked before each call that needs W0.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from safetensors import safe_open
from torch import nn

from lorasc_fx.checkpoint.layout import MAX_MANIFEST_BYTES, parsed, plain_bytes, refusing
from lorasc_fx.errors import CheckpointError, SpecError, StateError, nearest, path_of
from lorasc_fx.parameters import names_of
from lorasc_fx.quantized import writable
from lorasc_fx.shards import local, local_like
from lorasc_fx.state import Memory

MEMORIES = get_args(Memory)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_ADVICE = "Load these files into the model before you adapt it, or give base='memory'"


class FileTensor(NamedTuple):
    """The file that holds a tensor, and the tensor's shape in it."""

    path: Path
    shape: tuple[int, ...]


class BaseFile:
    """The safetensors files of a base, and which parameter of the model each of their tensors is.

    Args:
        path: a safetensors file, or a folder with `model.safetensors` or its shards.
        model: the model that was loaded from the files.

    Raises:
        CheckpointError: there is no safetensors file at the path, or it cannot be read.
    """

    def __init__(self, path: Path, model: nn.Module) -> None:
        shards = shards_of(path)
        self.path, self.tensors, self.aliases = path, headers(shards), names_of(model)
        self.keys = keys_of(self.aliases, self.tensors)
        self.stamps = {shard: _stamp(shard) for shard in shards}

    def mapped(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        """Return W0 of these parameters as mapped tensors, except quantized ones. For a DTensor, map its local shard.

        Raises:
            CheckpointError: a tensor is missing, or its shape, dtype or values differ from the model.
        """
        keys_by_file: dict[Path, dict[str, str]] = {}
        for name in writable(parameters):
            key = self._key(name)
            keys_by_file.setdefault(self.tensors[key].path, {})[name] = key
        tensors = {}
        for path, keys in keys_by_file.items():
            read = mapped_tensors(path, keys.values())
            for name, tensor in zip(keys, read, strict=True):
                value, where = parameters[name].detach(), f"base: {keys[name]} of {path}"
                shard = local_like(tensor, value) if tensor.shape == value.shape else tensor
                value = local(value)
                if (shard.shape, shard.dtype) != (value.shape, value.dtype):
                    stored, current = (
                        f"{list(item.shape)} {str(item.dtype).removeprefix('torch.')}" for item in (shard, value)
                    )
                    raise CheckpointError(
                        f"{where} is {stored}, but {name} of the model is {current}. {_ADVICE}", code="base-differs"
                    )
                if not same_bits(shard, value):
                    raise CheckpointError(
                        f"{where} has other values than {name} of the model. {_ADVICE}", code="base-differs"
                    )
                tensors[name] = shard
        return tensors

    def check(self, call: str) -> None:
        """Raise StateError if a file was written to.

        A file that was deleted or replaced is still mapped and raises no error. A change of permissions or hard links
        cannot be distinguished from a write.
        """
        for path, (device, inode, *written) in self.stamps.items():
            stamp = _stamp(path) if path.exists() else None
            if stamp is not None and stamp[:2] == (device, inode) and [*stamp[2:]] != written:
                raise StateError(
                    f"{call}: {path} was written to (or its permissions or links were changed), but the cascade still "
                    "reads W0 from it (base=...). Load the model and the newest checkpoint again, and do not write to "
                    "the files of the base",
                    code="weights-changed-outside",
                )

    def _key(self, name: str) -> str:
        for alias in self.aliases.get(name, (name,)):
            if alias in self.keys:
                return self.keys[alias]
        raise CheckpointError(
            f"base: {self.path} has no {name}{nearest(name, self.tensors)}. "
            f"{_ADVICE}; a new weight can be excluded, or trained in full",
            code="base-differs",
        )


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Return whether two tensors with the same shape and dtype are equal bit for bit."""
    return torch.equal(*(value.detach().cpu().contiguous().view(-1).view(torch.uint8) for value in (x, y)))


def open_base(base: str | PathLike[str], model: nn.Module) -> BaseFile | None:
    """Open the files that the argument `base` of `adapt` names. Return None if it says to keep W0 in memory.

    Raises:
        SpecError: base is `file` but the model does not name a local folder, or base is not a path.
        CheckpointError: there is no safetensors file at the path, or it cannot be read.
    """
    if not isinstance(base, (str, PathLike)):
        raise SpecError(
            f"base is {base!r}; give 'memory', 'pinned', 'device', 'file', or the path of a safetensors file or folder"
        )
    if base == "pinned" and not torch.accelerator.is_available():
        raise SpecError(
            "base='pinned' needs an accelerator, and this machine has none. Pinned memory only makes copies to an "
            "accelerator faster: give base='memory'"
        )
    if base in MEMORIES:
        return None
    if base == "file":
        named = name_or_path(model)
        if named is None or not Path(named).is_dir():
            reason = f"was loaded from {named!r}, which is not a local folder" if named else "does not name its files"
            raise SpecError(
                f"base='file': the {type(model).__name__} {reason}; give the path of its safetensors file or folder as "
                "base",
                code="no-base",
            )
        base = named
    path = path_of(base)
    if not path.exists():
        raise CheckpointError(
            f"base: {path} does not exist. Give a safetensors file, a folder with {SINGLE} or {INDEX}, or 'memory', "
            "'pinned', 'device' or 'file'",
            code="no-base",
        )
    return BaseFile(path, model)


def name_or_path(model: nn.Module) -> str | None:
    """Return the name or path that a model of transformers was loaded from. None if it is unknown."""
    named = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    return named if isinstance(named, str) and named else None


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
        names = sorted(set(parsed(plain_bytes(index, MAX_MANIFEST_BYTES, links=True))["weight_map"].values()))
        if any(Path(name).name != name or name in ("", "..") for name in names):
            raise ValueError("lists files outside its folder")
    return [index.parent / name for name in names]


def headers(shards: Iterable[Path]) -> dict[str, FileTensor]:
    """Return the file and the shape of each tensor in safetensors files, by key."""
    tensors = {}
    for shard in shards:
        with _refusing(shard), safe_open(shard, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 - no mapping
                tensors[key] = FileTensor(shard, tuple(handle.get_slice(key).get_shape()))
    return tensors


def mapped_tensors(path: Path, keys: Iterable[str]) -> list[torch.Tensor]:
    """Return tensors of a safetensors file as memory-mapped tensors."""
    with _refusing(path), safe_open(path, framework="pt") as handle:
        return [handle.get_tensor(key) for key in keys]


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Raise any error of reading a safetensors file as CheckpointError. The library checks the header and the size."""
    # safetensors raises RuntimeError for a dtype that torch lacks.
    with refusing(f"base: {path}", "give complete safetensors files", code="unreadable-file", also=(RuntimeError,)):
        if path.exists() and not path.is_file():  # opening a named pipe would block
            raise ValueError("is not a regular file")
        yield


def _stamp(path: Path) -> tuple[int, ...]:
    status = os.stat(path)
    # A program can reset mtime after a write (rsync -t, cp -p, touch -r), but it cannot reset ctime.
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def keys_of(names: Iterable[str], keys: Iterable[str]) -> dict[str, str]:
    """Match names of a model with the keys of its files. Names without a key are left out.

    A name that is a key matches it. For the other names, one prefix is added or removed, the same for all. It is the
    prefix that matches most of them. Names that are keys come last in the result.
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
    """Yield the name split into two parts, after each of its dots."""
    for end, letter in enumerate(name, start=1):
        if letter == ".":
            yield name[:end], name[end:]
