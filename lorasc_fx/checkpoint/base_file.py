"""W0 as pages of the safetensors file that the model came from, in place of a copy in host memory (`base="file"`).

Such a tensor is mapped: the system reads its pages when they are used, we give them back after each use, and no file
stays open. It is compared once, bit for bit, with what the model holds, so that W0 is the same whatever keeps it.
Nothing is written to the file, and no other program may write to it while the cascade lives; this is checked before
each call that needs W0.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lorasc_fx.checkpoint.layout import plain_bytes, sanitized
from lorasc_fx.checkpoint.manifest import LONGEST, parsed
from lorasc_fx.errors import CheckpointError, SpecError, StateError, nearest, path_of
from lorasc_fx.parameters import names_of
from lorasc_fx.quantized import is_quantized
from lorasc_fx.shards import local, local_like

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_ADVICE = "Load these files into the model before you adapt it, or give base='memory'"


@dataclass(frozen=True)
class BaseFile:
    """Where the tensors of a base lie.

    Args:
        path: the file or folder that was asked for.
        files: of each tensor by its name there, and `shapes` of each.
        keys: names there by the model's names, where a common prefix stands between the two.
        aliases: all names of a parameter, by each of them.
        stamps: of the files, as they were first seen.
    """

    path: Path
    files: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]
    keys: Mapping[str, str]
    aliases: Mapping[str, tuple[str, ...]]
    stamps: Mapping[Path, tuple[int, ...]]

    def mapped(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        """Return W0 of these parameters as mapped tensors, of a DTensor its shard; quantized ones are left out.

        Raises:
            CheckpointError: one is not there, or has another shape, dtype or value than the model's.
        """
        wanted: dict[Path, list[tuple[str, str]]] = {}
        for name, parameter in parameters.items():
            if not is_quantized(parameter):
                key = self._key(name)
                wanted.setdefault(self.files[key], []).append((name, key))
        tensors = {}
        for path, pairs in wanted.items():
            read = _tensors(path, [key for _, key in pairs])
            pages = MappedPages.of([path])
            for (name, key), tensor in zip(pairs, read, strict=True):
                held = parameters[name].detach()
                here = local_like(tensor, held) if tensor.shape == held.shape else tensor
                _check_same(f"base: {key} of {path}", here, name, local(held), pages)
                pages.release(tensor)  # of which a shard may be a copy
                tensors[name] = here
        return tensors

    def releaser(self) -> Callable[[torch.Tensor], None]:
        """Return `MappedPages.release` for the pages of the files that are mapped now."""
        return MappedPages.of(self.stamps).release

    def lacking(self, parameters: Mapping[str, torch.Tensor]) -> list[str]:
        """Return those of these parameters that the files have not under their names, or in another shape."""
        return [
            name
            for name, parameter in parameters.items()
            if tuple(parameter.shape) not in {self.shapes.get(self.keys.get(key, key)) for key in self.aliases[name]}
        ]

    def read(self, name: str, shape: torch.Size) -> torch.Tensor:
        """Return the numbers of a weight before it was quantized.

        Raises:
            CheckpointError: they are not there, or of another shape.
        """
        key = self._key(name)
        (tensor,) = _tensors(self.files[key], [key])
        if tensor.shape != shape:
            raise CheckpointError(
                f"base: {key} of {self.files[key]} is {list(tensor.shape)}, and {name} is {list(shape)}. Give the "
                "files of the model that was quantized",
                code="base-differs",
            )
        return tensor

    def check(self, call: str) -> None:
        """Raise StateError if a file was written to since; one that was deleted or replaced is still mapped.

        A change of permissions or of hard links looks the same.
        """
        for path, (device, inode, *rest) in self.stamps.items():
            now = _stamp(path) if path.exists() else None
            if now is not None and now[:2] == (device, inode) and [*now[2:]] != rest:
                raise StateError(
                    f"{call}: {path} was written to while the cascade lives (or its permissions or links changed), and "
                    "W0 is read from it (base=...). Load the model and the newest checkpoint anew, and write to other "
                    "files",
                    code="weights-changed-outside",
                )

    def _find(self, name: str) -> str | None:
        keys = (alias if alias in self.files else self.keys.get(alias) for alias in self.aliases.get(name, (name,)))
        return next((key for key in keys if key is not None), None)

    def _key(self, name: str) -> str:
        if (key := self._find(name)) is not None:
            return key
        raise CheckpointError(
            f"base: {self.path} holds no {name}{nearest(name, self.files)}. "
            f"{_ADVICE}; a weight that is new can be excluded, or trained in full",
            code="base-differs",
        )


@dataclass(frozen=True)
class MappedPages:
    """Memory of this process that is mapped from files (Linux; empty elsewhere).

    Args:
        spans: addresses, begin and end.
    """

    spans: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, paths: Iterable[Path]) -> MappedPages:
        """Return what is mapped of these files."""
        if not _MAPS.exists() or not hasattr(mmap, "MADV_DONTNEED"):
            return cls()
        wanted = {(os.stat(path).st_ino, os.path.realpath(path)) for path in paths if path.exists()}
        spans = []
        for line in _MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            span, _, _, _, inode, *path = line.split(maxsplit=5)
            if path and (int(inode), path[0]) in wanted:
                begin, end = span.split("-")
                spans.append((int(begin, 16), int(end, 16)))
        return cls(tuple(spans))

    def release(self, tensor: torch.Tensor) -> None:
        """Give the pages of a mapped tensor, to which nothing was written, back to the system: the next use reads them
        from the file again. Memory that is not mapped from the files is left alone.
        """
        size = mmap.PAGESIZE
        begin = -(-tensor.data_ptr() // size) * size
        end = (tensor.data_ptr() + tensor.nbytes) // size * size
        if begin < end and tensor.is_contiguous() and any(low <= begin and end <= high for low, high in self.spans):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)

    def same_bits(self, tensor: torch.Tensor, held: torch.Tensor) -> bool:
        """Whether a mapped tensor is another of its shape and dtype, bit for bit; pages are released as it goes."""
        parts = [value.contiguous().view(-1).view(torch.uint8).split(_PART) for value in (tensor, held.detach())]
        for part, other in zip(*parts, strict=True):
            same = torch.equal(part, other.to("cpu"))
            self.release(part)
            if not same:
                return False
        return True


_PART = 8 << 20
"""Bytes of a file that are compared at a time."""
_MAPS = Path("/proc/self/maps")


def open_base(base: str | PathLike[str], model: nn.Module) -> BaseFile | None:
    """Return where W0 of a model lies, by the argument `base` of `adapt`; None for `memory`.

    Raises:
        SpecError: `file`, and the model names no local folder; or no path at all.
        CheckpointError: a path that holds no safetensors, or cannot be read.
    """
    if not isinstance(base, (str, PathLike)):
        raise SpecError(f"base is {base!r}; give 'memory', 'file', or the path of a safetensors file or folder")
    if base == "memory":
        return None
    path = path_of(_named_by(model) if base == "file" else base)
    shards, aliases = shards_of(path), names_of(model)
    shapes, files = headers(shards)
    stamps = {shard: _stamp(shard) for shard in shards}
    return BaseFile(path, files, shapes, renamed(aliases, files), aliases, stamps)


def name_or_path(model: nn.Module) -> str | None:
    """Return what a model of transformers says that it was loaded from; None for one that does not."""
    named = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    return named if isinstance(named, str) and named else None


def _named_by(model: nn.Module) -> str:
    """Return the folder that a model of transformers says it was loaded from."""
    named = name_or_path(model)
    if named is None or not Path(named).is_dir():
        said = f"says {named!r}, which is no local folder" if named else "does not say where it came from"
        raise SpecError(
            f"base='file': {type(model).__name__} {said}; give the path of its safetensors file or folder as base",
            code="no-base",
        )
    return named


def shards_of(path: Path) -> list[Path]:
    """Return the safetensors files of a path: itself, or those of a folder as transformers writes it."""
    if path.is_file() and path.suffix != ".json":
        return [path]
    index = path if path.is_file() else path / INDEX
    if not index.is_file():
        single = path / SINGLE
        if not single.is_file():
            raise CheckpointError(
                f"base: {path} is no safetensors file, nor a folder with {SINGLE} or {INDEX}", code="no-base"
            )
        return [single]
    try:
        table = parsed(plain_bytes(index, LONGEST, links=True))["weight_map"]
        names = sorted(set(table.values()))
        if any(Path(name).name != name or name in ("", "..") for name in names):
            raise ValueError("it names files outside its folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        raise CheckpointError(
            f"base: {index} cannot be read as an index of safetensors: {fault}", code="unreadable-file"
        ) from fault
    return [index.parent / name for name in names]


def headers(shards: Iterable[Path]) -> tuple[dict[str, tuple[int, ...]], dict[str, Path]]:
    """Return shape and file of each tensor of safetensors files, by its name there."""
    shapes, files = {}, {}
    for shard in shards:
        with opened(shard) as handle:
            for key in handle.keys():  # noqa: SIM118 - no mapping
                shapes[key], files[key] = tuple(handle.get_slice(key).get_shape()), shard
    return shapes, files


def _tensors(path: Path, keys: Iterable[str]) -> list[torch.Tensor]:
    with opened(path) as handle:
        return [handle.get_tensor(key) for key in keys]


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file, whose header the library holds against its size; what is odd in it is one error."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise CheckpointError(f"base: {path} cannot be read: it is no plain file", code="unreadable-file")
    try:
        with safe_open(path, framework="pt") as handle:
            yield handle
    except (OSError, SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as fault:  # no dtype of torch's
        raise CheckpointError(
            f"base: {path} cannot be read: {sanitized(str(fault), 300)}", code="unreadable-file"
        ) from fault


def _stamp(path: Path) -> tuple[int, ...]:
    now = os.stat(path)
    # A program can put mtime back after a write (rsync -t, cp -p, touch -r), but not ctime.
    return now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns


def renamed(names: Iterable[str], files: Mapping[str, Path]) -> dict[str, str]:
    """Return the key of each name that is not there as such, by the one prefix that finds most of them."""
    missing = {name for name in names if name not in files}
    counts: Counter[tuple[str, str]] = Counter()
    for key in files:
        counts.update((prefix, "") for prefix, rest in _cuts(key) if rest in missing)
    for name in missing:
        counts.update(("", prefix) for prefix, rest in _cuts(name) if rest in files)
    if not counts:
        return {}
    theirs, ours = min(counts, key=lambda prefixes: (-counts[prefixes], sum(map(len, prefixes)), prefixes))
    keys = {name: theirs + name.removeprefix(ours) for name in missing if name.startswith(ours)}
    return {name: key for name, key in keys.items() if key in files}


def _cuts(name: str) -> Iterator[tuple[str, str]]:
    """Yield the name in two, cut after each of its dots."""
    for end, letter in enumerate(name, start=1):
        if letter == ".":
            yield name[:end], name[end:]


def _same_kind(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def _check_same(where: str, tensor: torch.Tensor, name: str, held: torch.Tensor, pages: MappedPages) -> None:
    """Raise CheckpointError where a tensor of a file is not, bit for bit, what the model holds."""
    if not _same_kind(tensor, held):
        there, here = (f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}" for value in (tensor, held))
        raise CheckpointError(f"{where} is {there}, the model's {name} is {here}. {_ADVICE}", code="base-differs")
    if not pages.same_bits(tensor, held):
        raise CheckpointError(f"{where} holds other numbers than the model's {name}. {_ADVICE}", code="base-differs")
