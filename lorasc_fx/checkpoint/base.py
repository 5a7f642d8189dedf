"""Reads W0 from the memory-mapped safetensors files of the model, instead of a copy in host memory (`base="file"`).

The operating system reads mapped pages on use and drops them when memory is short. Each tensor is compared with the
model once, bit for bit, so that W0 is the same wherever it is stored. The files are never written. No other program may
write to them while the cascade exists. This is checked before each call that needs W0.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from safetensors import safe_open
from torch import nn

from lorasc_fx.checkpoint.files import refusing
from lorasc_fx.errors import CaptureError, CheckpointError, SpecError, StateError, listed, named, nearest, path_of
from lorasc_fx.parameters import exchange, names_of
from lorasc_fx.quantized import writable
from lorasc_fx.shards import ShardSpec, local, local_like
from lorasc_fx.state import BaseMemory
from lorasc_fx.util.fingerprint import data_of, fingerprint_of
from lorasc_fx.util.undo import Undo

MEMORIES = get_args(BaseMemory)
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
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
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


_BLOCK = 1 << 21
"""Number of elements that are read at a time to compute a fingerprint."""


@dataclass
class _Tensor:
    """A parameter or buffer of the model, its names, whether a state dict stores it, and its keys in the files."""

    value: torch.Tensor
    names: tuple[str, ...]
    persistent: bool
    keys: list[str] = field(default_factory=list)


def groups_of(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Return the names of each parameter and buffer of a model. A tied one has several names."""
    return tuple(tensor.names for tensor in _tensors(model))


def check_attributes(model: nn.Module) -> None:
    """Check that all tensors on the meta device are parameters or buffers, which files can store.

    Raises:
        CaptureError: one is a plain attribute.
    """
    for prefix, module in model.named_modules():
        for leaf, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                raise CaptureError(
                    f"{f'{prefix}.{leaf}'.lstrip('.')} is a tensor on the meta device, but neither a parameter nor a "
                    "buffer, so that no file stores it; register it as a buffer, or create it in forward",
                    code="meta-model",
                )


def _tensors(model: nn.Module) -> list[_Tensor]:
    tensors: dict[int, _Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaf, value in [*module._parameters.items(), *module._buffers.items()]:
            if value is not None:
                tensor = tensors.setdefault(id(value), _Tensor(value, (), True))
                tensor.names += (f"{prefix}.{leaf}".lstrip("."),)
                tensor.persistent = tensor.persistent and leaf not in module._non_persistent_buffers_set
    return list(tensors.values())


class DeferredValues:
    """Matches the tensors of a model on the meta device with the tensors of its files, and loads them.

    Args:
        model: a model with tensors on the meta device.
        path: a safetensors file, or a folder with `model.safetensors` or its shards.
        groups: all names of each tensor, before some were untied.
        buffers: values of buffers that the files do not store, by name.

    Attributes:
        files: by file, the keys and the tensors of the model that they belong to.

    Raises:
        CheckpointError: the files cannot be read, a tensor is missing or unexpected or has another shape, or the copies
            of a tied weight differ in the files. Nothing was changed.
        SpecError: `buffers` has a name or shape that the model does not have.
    """

    def __init__(
        self, model: nn.Module, path: Path, groups: Iterable[tuple[str, ...]], buffers: Mapping[str, torch.Tensor]
    ) -> None:
        tensors = _tensors(model)
        by_name = {name: tensor for tensor in tensors for name in tensor.names}
        _check_buffers(by_name, buffers)
        stored = headers(shards_of(path))
        tied = {name: group for group in groups for name in group}
        keys = keys_of({*by_name, *tied}, stored)
        for tensor in tensors:
            names = dict.fromkeys([*tensor.names, *(name for alias in tensor.names for name in tied.get(alias, ()))])
            candidates = [keys[name] for name in names if name in keys]
            # After an untie, a key may be the name of another tensor. Such a key is only used if there is no other.
            certain = [key for key in candidates if by_name.get(key, tensor) is tensor]
            tensor.keys = list(dict.fromkeys(certain or candidates))
        _check_names(path, tensors, stored, buffers)
        self.files: dict[Path, list[tuple[str, torch.Tensor]]] = {}
        for tensor in tensors:
            if tensor.keys and not any(name in buffers for name in tensor.names):
                key, *aliases = tensor.keys
                self.files.setdefault(stored[key].path, []).append((key, tensor.value))
                for alias in aliases:
                    pair = [mapped_tensors(stored[name].path, [name])[0] for name in (key, alias)]
                    if pair[0].dtype != pair[1].dtype or not same_bits(*pair):
                        raise CheckpointError(
                            f"materialize: {key} and {alias} are tied in the model, but differ in the files; build the "
                            "model without this tie",
                            code="tied-weights-differ",
                        )
        self._model = model
        self._tensors = [tensor.value for tensor in tensors]
        self._buffers = [(by_name[name].value, value) for name, value in buffers.items()]

    def fingerprints(self, names: Mapping[int, str], part: int, parts: int) -> dict[str, str]:
        """Compute this rank's part of the parameters' fingerprints, from the values in the files.

        Args:
            names: names of the parameters, by id.
            part, parts: the rank, and the number of ranks. Each rank computes every `parts`-th fingerprint.
        """
        stored = [(path, key, old) for path, pairs in self.files.items() for key, old in pairs if id(old) in names]
        stored.sort(key=lambda entry: (-entry[2].numel(), names[id(entry[2])]))  # all ranks get large tensors
        fingerprints = {}
        for path, key, old in stored[part::parts]:
            (tensor,) = mapped_tensors(path, [key])
            blocks = (data_of(block.to(old.dtype).contiguous()) for block in tensor.reshape(-1).split(_BLOCK))
            fingerprints[names[id(old)]] = fingerprint_of(old.dtype, tuple(old.shape), blocks)
        return fingerprints

    def put(self, device: torch.device, undo: Undo) -> None:
        """Replace the tensors on the meta device by tensors with values, and move all others to the device.

        For a DTensor, only the local shard is read.
        """
        new: dict[int, torch.Tensor] = {}
        with torch.no_grad():
            for path, pairs in self.files.items():
                read = mapped_tensors(path, [key for key, _ in pairs])
                for (_, old), tensor in zip(pairs, read, strict=True):
                    new[id(old)] = with_values(old, local_like(tensor, old), device)
            for old, value in self._buffers:
                new[id(old)] = with_values(old, value, device)
            for old in self._tensors:
                if id(old) not in new and old.device != device:
                    new[id(old)] = with_values(old, local(old), device)
        exchange(self._model, lambda holder: new.get(id(holder.value)), undo)


def _check_buffers(by_name: Mapping[str, _Tensor], buffers: Mapping[str, torch.Tensor]) -> None:
    for name, value in buffers.items():
        tensor = by_name.get(name)
        if tensor is None or isinstance(tensor.value, nn.Parameter):
            names = [key for key, candidate in by_name.items() if not isinstance(candidate.value, nn.Parameter)]
            raise SpecError(
                f"buffers: {name!r} is not a buffer of the model{nearest(name, names) or listed(names)}; "
                "give values of buffers by their names",
                code="unknown-name",
            )
        if value.shape != tensor.value.shape or value.is_meta:
            shape = "on the meta device" if value.is_meta else f"{list(value.shape)}"
            raise SpecError(f"buffers: {name!r} is {shape}, but the model's buffer is {list(tensor.value.shape)}")


def _check_names(
    path: Path, tensors: list[_Tensor], stored: Mapping[str, FileTensor], buffers: Mapping[str, torch.Tensor]
) -> None:
    """Raise one error that lists all tensors that are missing, unexpected, or have another shape."""
    used = {key for tensor in tensors for key in tensor.keys}
    missing = [tensor for tensor in tensors if tensor.value.is_meta and not tensor.keys]
    missing = [tensor for tensor in missing if not any(name in buffers for name in tensor.names)]
    faults = {
        "missing": [tensor.names[0] for tensor in missing if tensor.persistent],
        "buffers that the files do not store, give them as buffers={name: tensor}": [
            tensor.names[0] for tensor in missing if not tensor.persistent
        ],
        "unexpected": [key for key in stored if key not in used],
        "of another shape": [
            f"{key} {list(stored[key].shape)} instead of {list(tensor.value.shape)}"
            for tensor in tensors
            for key in tensor.keys
            if stored[key].shape != tuple(tensor.value.shape)
        ],
    }
    lines = [f"  {title}: {named(names, 5)}" for title, names in faults.items() if names]
    if lines:
        raise CheckpointError(
            f"materialize: the tensors in {path} do not fit this model. Give the files of the model. Nothing was "
            "changed:\n" + "\n".join(lines),
            code="base-differs",
        )


def with_values(old: torch.Tensor, values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor with new values on a device, with the type and attributes of an old tensor.

    For a DTensor, `values` is the local shard.
    """
    shard = local(old)
    value = torch.empty_strided(shard.size(), shard.stride(), dtype=old.dtype, device=device)
    value.copy_(values)
    if hasattr(old, "to_local"):
        return nn.Parameter(ShardSpec.of(old).dtensor(value, old), old.requires_grad)
    value = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
    vars(value).update(vars(old))
    return value
