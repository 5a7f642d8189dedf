"""Safetensors files piece by piece: the library writes whole files from memory, a model may be larger than that.

A file is the length of its header in eight bytes, the header in JSON, and the numbers of one tensor after the other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lorasc_fx.errors import CheckpointError, StateError
from lorasc_fx.runtime.fingerprint import Buffer, data_of, fingerprint_of

__all__ = ["DTYPES", "Entry", "Shard", "entry_of", "head_of", "read_shard", "write_tensor"]

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
        """Yield the tensor's bytes in pieces, each valid until the next."""
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
        view, place = memoryview(data_of(tensor)).cast("B"), 0
        for block in self.blocks(file):
            view[place : place + len(block)] = block
            place += len(block)
        return tensor

    def fingerprint(self, file: BinaryIO) -> str:
        """Return what `lorasc_fx.runtime.fingerprint` says of the tensor; of a dtype without a name here, nothing."""
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
    except (OSError, SafetensorError) as fault:
        raise CheckpointError(f"base: {path} cannot be read: {fault}", code="unreadable-file") from fault
    start = 8 + len(header)
    entries = [
        Entry(name, each["dtype"], tuple(each["shape"]), *(start + offset for offset in each["data_offsets"]))
        for name, each in json.loads(header).items()
        if name != "__metadata__"
    ]
    return Shard(path, length + header, tuple(sorted(entries, key=lambda entry: (entry.begin, entry.end))))


def entry_of(name: str, tensor: torch.Tensor) -> Entry:
    """Return the entry of a tensor that lies nowhere yet.

    Raises:
        StateError: a safetensors file cannot hold it.
    """
    if (wrapped := is_traceable_wrapper_subclass(tensor)) or tensor.dtype not in _NAMES:
        what = type(tensor).__name__ if wrapped else tensor.dtype
        raise StateError(
            f"safetensors: {name} is {what}, which a safetensors file cannot hold; dequantize or cast it",
            code="not-serializable",
        )
    return Entry(name, _NAMES[tensor.dtype], tuple(tensor.shape), 0, tensor.numel() * tensor.element_size())


def head_of(entries: Iterable[Entry], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """Return what stands before the numbers, and the names in the order in which these follow.

    Wide dtypes come first, as the library has them, so that each number lies at a multiple of its size.
    """
    order = sorted(entries, key=lambda entry: (-DTYPES[entry.dtype].itemsize, entry.name))
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    place = 0
    for entry in order:
        table[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [place, place + entry.size],
        }
        place += entry.size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [entry.name for entry in order]


def write_tensor(file: BinaryIO, tensor: torch.Tensor) -> None:
    """Write a tensor's bytes."""
    plain = tensor.detach().to("cpu").contiguous()
    file.write(data_of(plain))
