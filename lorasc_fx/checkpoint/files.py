"""Defines the files of a checkpoint, reads their bytes, and reports damage.

A checkpoint folder contains versions. Each version is a folder with a manifest and the tensors. The tensors are in one
file, or in one file per rank if the weights are sharded. Then each file has the shards of its rank, and the first one
also has everything else.

W0 is not saved, except for parameters trained in full. The manifest has a fingerprint of each base parameter, so that a
wrong base is an error that names the parameter. Loading runs no code from a file.

Each file is opened once and read into memory, and the digest is computed from these bytes. A file that is memory-mapped
or opened a second time could change after its digest was computed. If a mapped file is truncated, the process is
killed.

`pack` converts nested values to JSON and tensors: dataclasses, dicts with any keys, tuples, tensors, inf and nan. JSON
has no such values, so each is an object with one key: `{"$tensor": NAME}`, `{"$tuple": [...]}`,
`{"$dict": [[key, value], ...]}` or `{"$float": "nan"}`. A tensor is named by its path. A tensor that occurs several
times is stored once, and is one object again after the load.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from safetensors import SafetensorError
from torch import nn

from lorasc_fx.errors import CheckpointError, LorascError, SpecError, reason_of
from lorasc_fx.shards import local
from lorasc_fx.util.decode import Check, decode
from lorasc_fx.util.environment import version
from lorasc_fx.util.fingerprint import fingerprint, text_digest

FORMAT = 2
MANIFEST = "manifest.json"
TENSORS = "state.safetensors"
KEY = "lorasc_fx.manifest"
"""Name of the tensor with the manifest, in a state dict."""

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip
"""Dtypes by their names in a safetensors file. A tensor with another dtype can only be copied as bytes."""

_NAME = re.compile(r"version-([0-9]{8,})")
"""Name of a version. The number counts the saves into the folder."""
_FILE = re.compile(rf"{re.escape(MANIFEST)}|state(-\d{{5}}-of-\d{{5}})?\.safetensors")
_DAMAGE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""Exceptions that code may raise if it gets damaged content without checking it."""


@contextmanager
def refusing(
    where: object, advice: str, *, code: str | None = None, also: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Convert exceptions that a damaged or forged file causes inside the block to CheckpointError.

    The message is `WHERE: REASON; ADVICE`. Other errors of this package are not converted.

    Args:
        where: the file or folder.
        advice: what the user can do.
        code: the code of errors that have none.
        also: further exceptions to convert. A MemoryError gets the code "unreadable-file".
    """
    damage: tuple[type[Exception], ...] = (*_DAMAGE, *also)
    try:
        yield
    except (CheckpointError, SpecError) as fault:
        original = fault.code if isinstance(fault, CheckpointError) else code
        raise CheckpointError(f"{where}: {fault}; {advice}", code=original) from fault
    except LorascError:
        raise
    except (OSError, SafetensorError) as fault:
        reason = sanitized(reason_of(fault), 300)
        raise CheckpointError(f"{where}: cannot be read: {reason}; {advice}", code="unreadable-file") from fault
    except damage as fault:
        name = "" if isinstance(fault, ValueError) else f"{type(fault).__name__}: "
        code = "unreadable-file" if isinstance(fault, MemoryError) else code
        raise CheckpointError(f"{where}: {name}{sanitized(str(fault), 400)}; {advice}", code=code) from fault


def is_our_file(name: str) -> bool:
    """Return whether a file of a version can have this name."""
    return _FILE.fullmatch(name) is not None


def file_names(count: int) -> list[str]:
    """Return the names of the tensor files that this many ranks write."""
    return [TENSORS] if count == 1 else [f"state-{rank:05d}-of-{count:05d}.safetensors" for rank in range(1, count + 1)]


def canonical(manifest: Mapping[str, object]) -> str:
    """Return the text from which the digest of a manifest is computed: all fields except the digest."""
    return json.dumps({key: value for key, value in manifest.items() if key != "digest"}, sort_keys=True)


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of the names and fingerprints of tensors."""
    return text_digest(json.dumps({name: fingerprint(tensors[name]) for name in sorted(tensors)}))


def list_versions(root: Path) -> list[Path]:
    """Return the versions in a folder, oldest first. A folder without files of a checkpoint is not a version."""
    if not root.is_dir():
        return []
    numbered = []
    for path in root.iterdir():
        try:
            if _number(path) and not path.is_symlink() and any(is_our_file(entry.name) for entry in path.iterdir()):
                numbered.append((_number(path), path))
        except (FileNotFoundError, NotADirectoryError):  # it is a file, or a writer has just deleted this version
            continue
    return [path for _, path in sorted(numbered)]


def next_name(root: Path) -> str:
    """Return the name of the next version. Its number is larger than all numbers in the folder."""
    return f"version-{max(map(_number, root.iterdir()), default=0) + 1:08d}"


def recovery_advice(version: Path) -> str:
    """Return advice for a version that cannot be loaded: use the previous version, if there is one."""
    earlier = [path.name for path in list_versions(version.parent) if _number(path) < _number(version)]
    if not earlier:
        return "there is no earlier version: start again, and keep several versions with save(..., keep=N)"
    return f"move {version.name} away to load {earlier[-1]} instead"


def _number(path: Path) -> int:
    """Return the number in the name of a version, or 0 for other names."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match is not None else 0


def sanitized(name: object, max_length: int = 80) -> str:
    """Return a name from a file in a form that is safe in a message: short, without control characters."""
    text = name if isinstance(name, str) and name.isprintable() else repr(name)
    return text if len(text) <= max_length else f"{text[:max_length]}... ({len(text)} characters)"


def versions() -> dict[str, str]:
    """Return the versions of torch, this package and Python. A resume is bit-identical only with equal versions."""
    return {"torch": str(torch.__version__), "lorasc-fx": version(), "python": platform.python_version()}


Count = Annotated[int, Check(lambda number: 0 <= number < 2**31, "give an integer of 0 or more")]
Digest = Annotated[str, Check(re.compile("[0-9a-f]{64}").fullmatch, "a digest has 64 hexadecimal digits")]


@dataclass(frozen=True)
class Manifest:
    """The text file of a version.

    Args:
        format: number of the format.
        content: the content without tensors (`pack`).
        shards: axis of each sharded tensor, by name.
        files: digest of each tensor file, by name.
        digest: digest of all other fields.
    """

    format: int
    content: dict[str, Any]
    shards: dict[str, Count]
    files: dict[str, Digest]
    digest: str

    @classmethod
    def of(cls, data: bytes, path: Path, advice: str) -> Self:
        """Return the manifest of the version at a path, from the bytes of the file. Raises CheckpointError."""
        with refusing(path / MANIFEST, advice, code="unreadable-file"):
            manifest = json.loads(data)
        with refusing(path / MANIFEST, advice):
            written = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
            if type(written) is not int or written != FORMAT:
                raise CheckpointError(
                    f"has format {sanitized(repr(written))}, but this version of lorasc-fx reads format {FORMAT}: load "
                    "it with the version that wrote it",
                    code="format-not-supported",
                )
            if manifest.get("digest") != text_digest(canonical(manifest)):
                raise ValueError("differs from its own digest: the file is damaged, or was edited")
            checked: Self = decode(cls, manifest)
            if list(checked.files) != file_names(max(len(checked.files), 1)):
                raise ValueError(f"files names {sanitized(', '.join(checked.files))}")
            return checked


def packed(manifest: dict[str, object], digest: str) -> torch.Tensor:
    """Add the digest of the tensors (`digest_of`) to a manifest, and return its bytes as a tensor."""
    manifest["files"] = dict.fromkeys(file_names(1), digest)
    manifest["digest"] = text_digest(canonical(manifest))
    text = json.dumps(manifest, allow_nan=False).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


Tensors = dict[str, torch.Tensor]
_STORABLE = frozenset(DTYPES.values())


def is_storable(tensor: torch.Tensor) -> bool:
    """Return whether safetensors can store this tensor without conversion. Of a DTensor, the local shard counts."""
    shard = local(tensor)
    return type(shard) in (torch.Tensor, nn.Parameter) and shard.layout is torch.strided and shard.dtype in _STORABLE


def pack(value: object) -> tuple[Any, Tensors]:
    """Return a value as JSON, and its tensors by name, which are not copied.

    Fields of a dataclass that equal their default are left out. Its tuples become lists, because `util.decode` restores
    the types of its fields.

    Raises:
        TypeError: safetensors cannot store a tensor.
    """
    tensors: Tensors = {}
    names: dict[int, str] = {}

    def packed(value: object, path: str) -> Any:
        if isinstance(value, torch.Tensor):
            return {"$tensor": names[id(value)] if id(value) in names else added(value, path)}
        if isinstance(value, float):
            return value if isfinite(value) else {"$float": repr(float(value))}
        if dataclasses.is_dataclass(value):
            return {
                item.name: packed([*field] if isinstance(field, tuple) else field, f"{path}/{item.name}")
                for item in dataclasses.fields(value)
                if not _is_default(item, field := getattr(value, item.name))
            }
        if isinstance(value, Mapping):
            pairs = [(key, packed(item, f"{path}/{key}")) for key, item in value.items()]
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return dict(pairs)
            return {"$dict": [[packed(key, path), item] for key, item in pairs]}
        if isinstance(value, (list, tuple)):
            items = [packed(item, f"{path}/{index}") for index, item in enumerate(value)]
            return {"$tuple": items} if isinstance(value, tuple) else items
        return value

    def added(tensor: torch.Tensor, path: str) -> str:
        name = path.removeprefix("/")
        if not is_storable(tensor):
            kind = f"{type(tensor).__name__} of {str(tensor.dtype).removeprefix('torch.')}, {tensor.layout}"
            raise TypeError(f"{name} is a {kind}")
        while name in tensors:  # keys with slashes can give two tensors the same path
            name += "'"
        names[id(tensor)], tensors[name] = name, tensor
        return name

    return packed(value, ""), tensors


def _is_default(item: dataclasses.Field[Any], value: object) -> bool:
    """Return whether a field has its default, or is empty if `default_factory` makes an empty one."""
    if item.default_factory is not dataclasses.MISSING:
        return not value
    return type(value) is type(item.default) and value == item.default


def unpack(plain: object, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return the value that was packed. Dataclasses are dicts: `util.decode.decode` converts and checks them.

    Raises:
        ValueError: a tensor is missing, no part of the value uses it, or two keys of a dict are equal.
    """
    used: set[str] = set()

    def tensor(name: str) -> torch.Tensor:
        if name not in tensors:
            raise ValueError(f"has no tensor {name!r:.90}")
        used.add(name)
        return tensors[name]

    def table(pairs: list[tuple[object, object]]) -> dict[Any, Any]:
        found = {unpacked(key): unpacked(item) for key, item in pairs}
        if len(found) < len(pairs):  # for example 1 and true
            raise ValueError("has two equal keys in one table")
        return found

    special: dict[str, Callable[[Any], Any]] = {
        "$tensor": tensor,
        "$float": float,
        "$tuple": lambda items: tuple(unpacked(items)),
        "$dict": table,
    }

    def unpacked(value: object) -> Any:
        if isinstance(value, list):
            return [unpacked(item) for item in value]
        if not isinstance(value, dict):
            return value
        if any(key.startswith("$") for key in value):
            ((key, item),) = value.items()
            return special[key](item)
        return {name: unpacked(item) for name, item in value.items()}

    value = unpacked(plain)
    if odd := next((name for name in tensors if name not in used), None):
        raise ValueError(f"has the unexpected tensor {odd!r:.90}")
    return value
