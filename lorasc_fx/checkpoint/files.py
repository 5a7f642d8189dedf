"""The files of a checkpoint: their names and formats, reads that report damage, and atomic writes.

A checkpoint folder contains versions. Each version is a folder with a manifest and the tensors. The tensors are in one
file, or in one file per rank if the weights are sharded. The file of a rank has the shards of this rank. The first file
also has everything else.

W0 is not saved, except for parameters trained in full. The manifest has a fingerprint of each base parameter, so that
an error about a wrong base names the parameter. Loading runs no code from a file.

Each file is opened once and read into memory, and the digest is computed from these bytes. A file that is memory-mapped
or opened a second time could change after its digest was computed. If another process truncates a mapped file, the
system kills the process that reads it.

`pack` converts nested values to JSON and tensors. Values that JSON cannot represent become an object with one key:
`{"$tensor": NAME}`, `{"$tuple": [...]}`, `{"$dict": [[key, value], ...]}` or `{"$float": "nan"}`. A tensor is named by
its path. A tensor that occurs several times is stored once. After the load it is one object again.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from lorasc_fx.errors import CheckpointError, ExportError, LorascError, SpecError, reason_of
from lorasc_fx.shards import local
from lorasc_fx.util.environment import OUT_OF_MEMORY, version
from lorasc_fx.util.fingerprint import fingerprint, text_digest

FORMAT = 2
MANIFEST = "manifest.json"
TENSORS = "state.safetensors"
KEY = "lorasc_fx.manifest"
"""Key of the manifest in a state dict. Its value is a tensor of bytes."""

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
"""Names of versions. The number increases with each save into the folder."""
_FILE = re.compile(rf"{re.escape(MANIFEST)}|state(-\d{{5}}-of-\d{{5}})?\.safetensors")


@contextmanager
def refusing(where: object, advice: str, *, code: str | None = None) -> Iterator[None]:
    """Context manager: convert exceptions that the content of a file causes to CheckpointError.

    The message is `WHERE: REASON; ADVICE`. Other errors of this package, and out-of-memory errors, are not converted.

    Args:
        where: the file or folder.
        advice: what the user can do.
        code: the code of the new error, unless the original is a CheckpointError or an error of the file system.
    """
    try:
        yield
    except (CheckpointError, SpecError) as fault:
        original = fault.code if isinstance(fault, CheckpointError) else code
        raise CheckpointError(f"{where}: {fault}; {advice}", code=original) from fault
    except (LorascError, *OUT_OF_MEMORY):
        raise
    except (OSError, SafetensorError) as fault:
        reason = sanitized(reason_of(fault), 300)
        raise CheckpointError(f"{where}: cannot be read: {reason}; {advice}", code="unreadable-file") from fault
    except Exception as fault:  # unchecked content may cause any exception
        name = "" if isinstance(fault, ValueError) else f"{type(fault).__name__}: "
        raise CheckpointError(f"{where}: {name}{sanitized(str(fault), 400)}; {advice}", code=code) from fault


def file_names(count: int) -> list[str]:
    """Return the names of the tensor files that this many ranks write."""
    return [TENSORS] if count == 1 else [f"state-{rank:05d}-of-{count:05d}.safetensors" for rank in range(1, count + 1)]


def canonical(manifest: Mapping[str, object]) -> str:
    """Return the text whose digest a manifest stores: all fields except `digest`, as sorted JSON."""
    return json.dumps({key: value for key, value in manifest.items() if key != "digest"}, sort_keys=True)


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return one SHA-256 over the names and fingerprints of these tensors."""
    return text_digest(json.dumps({name: fingerprint(tensors[name]) for name in sorted(tensors)}))


def list_versions(root: Path) -> list[Path]:
    """Return the versions in a folder, oldest first. A folder without files of a checkpoint is not a version."""
    if not root.is_dir():
        return []
    numbered = []
    for path in root.iterdir():
        try:
            if _number(path) and not path.is_symlink() and any(_FILE.fullmatch(entry.name) for entry in path.iterdir()):
                numbered.append((_number(path), path))
        except (FileNotFoundError, NotADirectoryError):  # it is a file, or a writer has just deleted this version
            continue
    return [path for _, path in sorted(numbered)]


def next_name(root: Path) -> str:
    """Return the name of the next version. Its number is larger than all numbers in the folder."""
    return f"version-{max(map(_number, root.iterdir()), default=0) + 1:08d}"


def recovery_advice(version: Path) -> str:
    """Return advice for a version that cannot be loaded: use the previous version, or start again."""
    earlier = [path.name for path in list_versions(version.parent) if _number(path) < _number(version)]
    if not earlier:
        return "there is no earlier version: start again, and keep several versions with save(..., keep=N)"
    return f"move {version.name} away to load {earlier[-1]} instead"


def _number(path: Path) -> int:
    """Return the number in the name of a version, or 0 for other names."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match is not None else 0


def sanitized(name: object, max_length: int = 80) -> str:
    """Return a name from a file in a form that is safe in messages: shortened, with control characters escaped."""
    text = name if isinstance(name, str) and name.isprintable() else repr(name)
    return text if len(text) <= max_length else f"{text[:max_length]}... ({len(text)} characters)"


def versions() -> dict[str, str]:
    """Return the versions of torch, this package and Python. A resume is bit-identical only with equal versions."""
    return {"torch": str(torch.__version__), "lorasc-fx": version(), "python": platform.python_version()}


@dataclass(frozen=True)
class Manifest:
    """The text file of a version.

    Args:
        format: number of the format.
        content: the packed content, with names instead of tensors (`pack`).
        shards: {name of a sharded tensor: the axis along which it is sharded}.
        files: {name of a tensor file: its digest}.
        digest: digest of all other fields.
    """

    format: int
    content: dict[str, Any]
    shards: dict[str, int]
    files: dict[str, str]
    digest: str

    @classmethod
    def of(cls, data: bytes, path: Path, advice: str) -> Self:
        """Return the manifest of the version at a path, given the bytes of its file. Raises CheckpointError."""
        with refusing(path / MANIFEST, advice, code="unreadable-file"):
            manifest = json.loads(data)
        with refusing(path / MANIFEST, advice):
            written = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
            if written != FORMAT:
                raise CheckpointError(
                    f"has format {sanitized(repr(written))}, but this version of lorasc-fx reads format {FORMAT}: load "
                    "it with the version that wrote it",
                    code="format-not-supported",
                )
            if manifest.get("digest") != text_digest(canonical(manifest)):
                raise ValueError("differs from its own digest: the file is damaged, or was edited")
            return cls(**manifest)


def packed(manifest: dict[str, object], digest: str) -> torch.Tensor:
    """Add the digest of the tensors (`digest_of`) to a manifest, and return the manifest as a tensor of bytes."""
    manifest["files"] = dict.fromkeys(file_names(1), digest)
    manifest["digest"] = text_digest(canonical(manifest))
    text = json.dumps(manifest, allow_nan=False).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


Tensors = dict[str, torch.Tensor]
_STORABLE = frozenset(DTYPES.values())


def is_storable(tensor: torch.Tensor) -> bool:
    """Return whether safetensors can store a tensor without conversion. For a DTensor, the local shard decides."""
    shard = local(tensor)
    return type(shard) in (torch.Tensor, nn.Parameter) and shard.layout is torch.strided and shard.dtype in _STORABLE


def pack(value: object) -> tuple[Any, Tensors]:
    """Return a value as JSON data, and {name: tensor}. The tensors are not copied.

    Tuples in fields of a dataclass become lists, because `util.decode` restores the types of fields.

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
        if is_dataclass(value):
            parts = {item.name: getattr(value, item.name) for item in fields(value)}
            parts = {name: [*part] if isinstance(part, tuple) else part for name, part in parts.items()}
            return {name: packed(part, f"{path}/{name}") for name, part in parts.items()}
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


def unpack(plain: object, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return the value that was packed, with dicts instead of dataclasses. `util.decode.decode` converts these."""
    special: dict[str, Callable[[Any], Any]] = {
        "$tensor": tensors.__getitem__,
        "$float": float,
        "$tuple": lambda items: tuple(unpack(items, tensors)),
        "$dict": lambda pairs: {unpack(key, tensors): unpack(item, tensors) for key, item in pairs},
    }
    if isinstance(plain, list):
        return [unpack(item, tensors) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if any(key.startswith("$") for key in plain):
        ((key, item),) = plain.items()
        return special[key](item)
    return {name: unpack(item, tensors) for name, item in plain.items()}


# ---- atomic writes: to a temporary path next to the target, synced to disk, and then renamed


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(root: Path) -> None:
    """Create a folder and its missing parents, and sync each folder that gets a new entry."""
    created = [folder for folder in (root, *root.parents) if not folder.exists()]
    root.mkdir(parents=True, exist_ok=True)
    for folder in reversed(created):
        sync(folder.parent)


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of the umask. safetensors would allow only the owner to read it."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(dict(tensors), path, metadata)
    path.chmod(mode)


@contextmanager
def one_writer(folder: Path) -> Iterator[bool]:
    """Context manager: lock the file `.lock` of a folder, so that no other process saves into the folder.

    Yields whether the lock is held, which is False if the file system does not support locks. The operating system
    releases the lock if the process dies.

    Raises:
        CheckpointError: another process is writing into the folder.
        OSError: the lock file cannot be created.
    """
    lock = folder / ".lock"
    with lock.open("a") as file:
        locked = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as fault:
            raise CheckpointError(
                f"{folder}: another process is writing to this path. Give each run its own path, and write from one "
                "process of a run only",
                code="concurrent-save",
            ) from fault
        except OSError:
            locked = False
        try:
            yield locked
        finally:
            lock.unlink(missing_ok=True)


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Context manager: yield a temporary path, which replaces the file or folder `out` at the end of the block.

    If the block raises, `out` is unchanged.

    Raises:
        ExportError: `out` cannot be written.
    """
    target = Path(os.path.realpath(out)) if out.is_dir() else out
    token = uuid.uuid4().hex
    new = target.with_name(f".{target.name}.writing-{token}{target.suffix}")
    old = target.with_name(f".{target.name}.leaving-{token}")
    try:
        make_folder(target.parent)
        try:
            yield new
            for path in [*new.rglob("*"), new]:
                if path.is_file() or path.is_dir():
                    sync(path)
            # A rename can replace a file, but not a folder with content.
            if target.is_dir():
                target.rename(old)
            try:
                new.replace(target)
            except BaseException:
                if old.exists():
                    old.rename(target)
                raise
            sync(target.parent)
        finally:
            _remove(new)
            _remove(old)
    except (OSError, SafetensorError) as fault:
        raise ExportError(
            f"{out}: was not written: {reason_of(fault)}. The previous content is unchanged", code="write-failed"
        ) from fault


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
