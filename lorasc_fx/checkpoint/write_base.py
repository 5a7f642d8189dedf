"""The safetensors files of a base, read and written tensor by tensor, and which tensor is which weight of the model.

The library writes whole files from memory, and a model may be larger than that. A file is the length of its header in
eight bytes, the header in JSON, and the numbers of one tensor after the other.

Fingerprints that a cascade keeps of its base decide which tensor is which weight. A file may have other names than the
model (a prefix, tied weights under the other name, or under both), and a narrower dtype than the model was adapted in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lorasc_fx.checkpoint.base_file import renamed
from lorasc_fx.checkpoint.folded import Change, FoldedWeights
from lorasc_fx.errors import CheckpointError, StateError, nearest
from lorasc_fx.util.files import parse_json
from lorasc_fx.util.fingerprint import Buffer, data_of, fingerprint, fingerprint_of

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip
"""By their names in a header; a tensor of another dtype can be copied, and nothing else."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Entry:
    """A tensor of a file.

    Args:
        name, dtype, shape: as the header has them.
        begin, end: where its bytes lie in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.end - self.begin

    def blocks(self, file: BinaryIO) -> Iterator[Buffer]:
        """Yield the tensor's bytes in blocks, each valid until the next."""
        room = memoryview(bytearray(min(_BLOCK, self.size)))
        file.seek(self.begin)
        left = self.size
        while left:
            count = file.readinto(room[: min(left, len(room))])  # type: ignore[attr-defined]  # of a file that is read
            if not count:
                raise OSError(f"{self.name} ends early")
            left -= count
            yield room[:count]

    def read(self, file: BinaryIO) -> torch.Tensor:
        """Return the tensor, in memory of its own."""
        tensor = torch.empty(self.shape, dtype=DTYPES[self.dtype])
        view, offset = memoryview(data_of(tensor)).cast("B"), 0
        for block in self.blocks(file):
            view[offset : offset + len(block)] = block
            offset += len(block)
        return tensor

    def fingerprint(self, file: BinaryIO) -> str:
        """Return what `lorasc_fx.util.fingerprint` says of the tensor; of a dtype without a name here, nothing."""
        dtype = DTYPES.get(self.dtype)
        return "" if dtype is None else fingerprint_of(dtype, self.shape, self.blocks(file))


@dataclass(frozen=True)
class Shard:
    """A file: what stands before its numbers, byte for byte, and its tensors in the order of their bytes."""

    path: Path
    head: bytes
    entries: tuple[Entry, ...]


def read_shard(path: Path) -> Shard:
    """Read a file's header; the library checks that it is a right one.

    Raises:
        CheckpointError: it cannot be read, or is no safetensors file.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            length = file.read(8)
            header = file.read(int.from_bytes(length, "little"))
        named = parse_json(header)
    except (OSError, SafetensorError, ValueError) as fault:
        raise CheckpointError(f"base: {path} cannot be read: {fault}", code="unreadable-file") from fault
    start = 8 + len(header)
    entries = [
        Entry(name, fields["dtype"], tuple(fields["shape"]), *(start + offset for offset in fields["data_offsets"]))
        for name, fields in named.items()
        if name != "__metadata__"
    ]
    return Shard(path, length + header, tuple(sorted(entries, key=lambda entry: (entry.begin, entry.end))))


def extended(shards: Sequence[Shard], added: Mapping[str, torch.Tensor]) -> list[Shard]:
    """Return the files with these tensors in the last one, in place of any of their names; other bytes stay."""
    if not added:
        return list(shards)
    changed = []
    for number, shard in enumerate(shards, start=1):
        entries = {entry.name: entry for entry in shard.entries if entry.name not in added}
        if number == len(shards):
            entries |= {name: entry_of(name, tensor) for name, tensor in added.items()}
        elif len(entries) == len(shard.entries):
            changed.append(shard)
            continue
        head, order = head_of(entries.values(), json.loads(shard.head[8:]).get("__metadata__", {}))
        changed.append(Shard(shard.path, head, tuple(entries[name] for name in order)))
    return changed


def entry_of(name: str, tensor: torch.Tensor) -> Entry:
    """Return the entry of a tensor that lies nowhere yet.

    Raises:
        StateError: a safetensors file cannot hold it.
    """
    if (wrapped := is_traceable_wrapper_subclass(tensor)) or tensor.dtype not in _NAMES:
        what = type(tensor).__name__ if wrapped else tensor.dtype
        raise StateError(
            f"safetensors: {name} is {what}, which a safetensors file cannot hold; give quantized='dequantize', "
            "or cast it",
            code="not-serializable",
        )
    return Entry(name, _NAMES[tensor.dtype], tuple(tensor.shape), 0, tensor.numel() * tensor.element_size())


def head_of(entries: Iterable[Entry], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """Return what stands before the numbers, and the names in the order in which these follow.

    Wide dtypes come first, as the library has them, so that each number lies at a multiple of its size.
    """
    order = sorted(entries, key=lambda entry: (-DTYPES[entry.dtype].itemsize, entry.name))
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for entry in order:
        offsets = [offset, offset + entry.size]
        table[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        offset += entry.size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [entry.name for entry in order]


def write_tensor(file: BinaryIO, tensor: torch.Tensor) -> None:
    """Write a tensor's bytes."""
    plain = tensor.detach().to("cpu").contiguous()
    file.write(data_of(plain))


_WIDER = {
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
}
"""Dtypes that hold every number of a narrower one: a model that was loaded in them has the numbers of the file."""


@dataclass
class _Matching:
    """Which tensor of the files is which parameter, by their bytes.

    Args:
        weights: of the fold.
        base: the path that was given, for messages.
        names: of parameters, by the names of the tensors.
        wider: dtypes that the model was adapted in, by the names of the tensors, which have narrower ones.
        unnamed: tensors that no parameter has the name of, with their fingerprints.
        added: parameters that the files lack, or have in another shape.
    """

    weights: FoldedWeights
    base: Path
    names: dict[str, str] = field(default_factory=dict)
    wider: dict[str, torch.dtype] = field(default_factory=dict)
    unnamed: list[tuple[Path, Entry, str]] = field(default_factory=list)
    added: set[str] = field(default_factory=set)

    def take(self, path: Path, entry: Entry, file: BinaryIO, name: str | None) -> None:
        """Take one tensor of a file, whose name is that of a parameter or no one's."""
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
                f"base: {entry.name} of {path} holds other numbers than the {name} that was adapted "
                f"({weights.where}); give the files of the model that was adapted",
                code="base-differs",
            )
        else:  # a prefix that fits by chance
            self.unnamed.append((path, entry, digest))

    def match_unnamed(self, keys: Iterable[str]) -> None:
        """Find changed weights that have other names in the files, and other names of tied ones, by their bytes."""
        weights = self.weights
        by_digest: dict[str, list[tuple[Path, Entry]]] = {}
        expected = {weights.base[name] for name in weights.changes if name in weights.base}
        for path, entry, digest in self.unnamed:
            by_digest.setdefault(digest, []).append((path, entry))
            if self.wider:
                with path.open("rb") as file:
                    for other, dtype in _wide(entry, file).items():
                        by_digest.setdefault(other, []).append((path, entry))
                        if other in expected:
                            self.wider[entry.name] = dtype
        named = {*self.names.values(), *self.added}
        missing = [name for name in weights.changes if name not in named]
        for name in weights.changes:
            if name in self.added:
                continue
            entries = by_digest.get(weights.base.get(name, "-"), [])
            rivals = [other for other in missing if weights.base[other] == weights.base[name]]
            distinct = all(_distinct(path, entry) for path, entry in entries)
            if name in named:
                entries = entries if distinct else []
            elif not entries and name in weights.whole:
                self.added.add(name)
            elif not entries:
                raise CheckpointError(
                    f"base: {self.base} holds no tensor with the numbers that {name} had before ({weights.where})"
                    f"{nearest(name, keys)}. Give the files of the model that was adapted; what they do not hold, or "
                    "hold in another layout, lorasc_fx.export.safetensors(cascade, folder) writes without a base",
                    code="base-differs",
                )
            elif len(rivals) > 1 or not (distinct or len(entries) == 1):
                others = ", ".join(entry.name for _, entry in entries)
                raise CheckpointError(
                    f"base: {name} goes by another name in {self.base}, and cannot be recognized by its numbers: "
                    f"{others} all hold the same; rename the tensors there as the model names them",
                    code="base-differs",
                )
            self.names |= dict.fromkeys((entry.name for _, entry in entries), name)


def matched(
    weights: FoldedWeights, base: Path, shards: Sequence[Shard], done: Callable[[int], None]
) -> tuple[dict[str, Change], dict[str, torch.Tensor]]:
    """Return what is to change, and what to add, by the names of the files; every tensor is read once.

    A parameter trained in full that the files lack, or have in another shape, is a new head: it is added.

    Args:
        weights: of the fold.
        base: the path that was given, for messages.
        shards: the files.
        done: is called with each tensor's size, when it was read.

    Raises:
        CheckpointError: the files are another base, or hold no tensor that a changed weight was.
    """
    keys = {entry.name: shard.path for shard in shards for entry in shard.entries}
    names = _by_name(weights, keys)
    matching, changes = _Matching(weights, base), dict[str, Change]()
    for shard in shards:
        with shard.path.open("rb") as file:
            for entry in shard.entries:
                name = names.get(entry.name)
                if name is None or name not in weights.buffers:
                    matching.take(shard.path, entry, file, name)
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
    """Return what a change makes of a tensor in the dtype that the model was adapted in, in that of the file."""
    return change(base.to(dtype)).to(base.dtype)


def _by_name(weights: FoldedWeights, keys: Mapping[str, Path]) -> dict[str, str]:
    """Return the first name of each key that is a parameter's or buffer's, as such or under a common prefix."""
    known = {*weights.base, *weights.aliases, *weights.buffers}
    elsewhere = renamed(known, dict(keys))
    first = {name: weights.aliases.get(name, (name,))[0] for name in known}
    return {key: first[name] for name, key in elsewhere.items()} | {name: first[name] for name in known if name in keys}


def _wide(entry: Entry, file: BinaryIO) -> dict[str, torch.dtype]:
    """Return the fingerprints that a tensor has in wider dtypes."""
    wider = _WIDER.get(DTYPES.get(entry.dtype, torch.bool), ())
    tensor = entry.read(file) if wider else torch.empty(0)
    return {fingerprint(tensor.to(dtype)): dtype for dtype in wider}


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
