"""Reads and writes safetensors files one tensor at a time.

The safetensors library can only write tensors that are all in memory, but a model may be larger than the memory. The
format of a file: the length of the header (8 bytes, little-endian), the header as JSON, and the bytes of the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import torch
from safetensors import safe_open
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lorasc_fx.checkpoint.files import DTYPES, refusing
from lorasc_fx.errors import StateError
from lorasc_fx.util.files import parse_json
from lorasc_fx.util.fingerprint import Buffer, data_of, fingerprint_of

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Entry:
    """The position and type of a tensor in a file.

    Args:
        name, dtype, shape: its values in the header.
        begin, end: offsets of its bytes in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> Entry:
        """Return the entry for a new tensor. `TensorFile.of` decides its position in the file.

        Raises:
            StateError: a safetensors file cannot store it.
        """
        if (wrapped := is_traceable_wrapper_subclass(tensor)) or tensor.dtype not in _NAMES:
            kind = type(tensor).__name__ if wrapped else tensor.dtype
            raise StateError(
                f"safetensors: {name} is {kind}, which a safetensors file cannot store; give quantized='dequantize', "
                "or convert it to another dtype",
                code="not-serializable",
            )
        return cls(name, _NAMES[tensor.dtype], tuple(tensor.shape), 0, tensor.numel() * tensor.element_size())

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.end - self.begin

    def blocks(self, file: BufferedReader) -> Iterator[Buffer]:
        """Yield the tensor's bytes in blocks. All blocks share one buffer, so use each block before the next one."""
        buffer = memoryview(bytearray(min(_BLOCK, self.size)))
        file.seek(self.begin)
        for start in range(0, self.size, _BLOCK):
            block = buffer[: self.size - start]
            if file.readinto(block) < len(block):
                raise OSError(f"{self.name} ends early")
            yield block

    def read(self, file: BufferedReader) -> torch.Tensor:
        """Read the tensor into new memory."""
        tensor = torch.empty(self.shape, dtype=DTYPES[self.dtype])
        file.seek(self.begin)
        if file.readinto(data_of(tensor)) < self.size:
            raise OSError(f"{self.name} ends early")
        return tensor

    def fingerprint(self, file: BufferedReader, dtype: torch.dtype) -> str:
        """Return the fingerprint (`util.fingerprint`) of the tensor converted to this dtype."""
        stored = DTYPES[self.dtype]
        blocks = (data_of(torch.frombuffer(block, dtype=stored).to(dtype)) for block in self.blocks(file))
        return fingerprint_of(dtype, self.shape, blocks)


@dataclass(frozen=True)
class TensorFile:
    """The path and header of a safetensors file, which may not exist yet.

    Args:
        path: path of the file.
        head: the bytes before the first tensor.
        entries: the tensors in the order of their bytes.
    """

    path: Path
    head: bytes
    entries: tuple[Entry, ...]

    @classmethod
    def read(cls, path: Path) -> TensorFile:
        """Read the header of a file.

        Raises:
            CheckpointError: the file cannot be read, or is not a safetensors file.
        """
        with refusing(f"base: {path}", "give complete safetensors files", code="unreadable-file"):
            with safe_open(path, framework="pt"):  # raises if the header is invalid
                pass
            with path.open("rb") as file:
                length = file.read(8)
                header = file.read(int.from_bytes(length, "little"))
            named = parse_json(header)
        start = 8 + len(header)
        entries = [
            Entry(name, fields["dtype"], tuple(fields["shape"]), *(start + offset for offset in fields["data_offsets"]))
            for name, fields in named.items()
            if name != "__metadata__"
        ]
        return cls(path, length + header, tuple(sorted(entries, key=lambda entry: (entry.begin, entry.end))))

    @classmethod
    def of(cls, path: Path, entries: Iterable[Entry], metadata: Mapping[str, str]) -> TensorFile:
        """Lay out a new file with these tensors. It is not written yet.

        Wider dtypes come first, as in the safetensors library, so that each element is aligned to its size.
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
        return cls(path, len(text).to_bytes(8, "little") + text, tuple(order))

    @property
    def metadata(self) -> dict[str, str]:
        """The `__metadata__` of the header."""
        metadata: dict[str, str] = json.loads(self.head[8:]).get("__metadata__", {})
        return metadata

    def write(self, path: Path, content: Callable[[Entry], Iterable[Buffer]], done: Callable[[int], None]) -> None:
        """Write the file.

        Args:
            path: the path to write to.
            content: returns the bytes of a tensor.
            done: is called with the size in bytes of each tensor that was written.
        """
        with path.open("wb") as file:
            file.write(self.head)
            for entry in self.entries:
                for block in content(entry):
                    file.write(block)
                done(entry.size)


def bytes_of(tensor: torch.Tensor) -> Iterable[Buffer]:
    """Return the bytes of a tensor as one block."""
    return [data_of(tensor.detach().to("cpu").contiguous())]


def extended(files: Sequence[TensorFile], added: Mapping[str, torch.Tensor]) -> list[TensorFile]:
    """Add tensors to the last file. They replace tensors with the same names in any of the files."""
    if not added:
        return list(files)
    changed = []
    for file in files:
        entries = {entry.name: entry for entry in file.entries if entry.name not in added}
        if file is files[-1]:
            entries |= {name: Entry.of(name, tensor) for name, tensor in added.items()}
        elif len(entries) == len(file.entries):
            changed.append(file)
            continue
        changed.append(TensorFile.of(file.path, entries.values(), file.metadata))
    return changed
