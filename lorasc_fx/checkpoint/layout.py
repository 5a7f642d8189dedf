"""The files of a checkpoint, how their bytes are read, and how damage is reported.

A checkpoint folder holds versions. Each version is a folder with a manifest and the tensors, which are in one file, or
in one file per rank if several ranks hold shards: each file has the shards of its rank, the first one everything else.

W0 is not copied, except W0 of parameters trained in full. The manifest has a fingerprint of each base parameter, so
that another base is refused by name. Loading runs no code from a file.

A file that is memory-mapped, or opened twice by its path, may change after its digest was computed. If a mapped file is
truncated, the process is killed. So each file is opened once and read into memory, and digest and content come from the
same bytes.
"""

from __future__ import annotations

import json
import os
import platform
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lorasc_fx.errors import CheckpointError, LorascError, SpecError, reason_of
from lorasc_fx.util.version import version

FORMAT = 1
MANIFEST = "manifest.json"
TENSORS = "state.safetensors"

_NAME = re.compile(r"version-([0-9]{8,})")
"""A version is numbered by the count of saves."""
_FILE = re.compile(rf"{re.escape(MANIFEST)}|state(-\d{{5}}-of-\d{{5}})?\.safetensors")
_DAMAGE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""Exceptions that unsuspecting code raises for damaged content."""


@contextmanager
def refusing(
    where: object, advice: str, *, code: str | None = None, also: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Raise whatever a damaged or forged file causes inside the block as a CheckpointError.

    The message says where, why, and what to do. Other errors of this package pass.

    Args:
        where: the file or folder.
        advice: what to do about it.
        code: for errors without a code.
        also: further exceptions to raise so. For MemoryError, the code is "unreadable-file".
    """
    damage: tuple[type[Exception], ...] = (*_DAMAGE, *also)
    try:
        yield
    except (CheckpointError, SpecError) as fault:
        own = fault.code if isinstance(fault, CheckpointError) else code
        raise CheckpointError(f"{where}: {fault}; {advice}", code=own) from fault
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
    """Whether a version has a file of this name."""
    return _FILE.fullmatch(name) is not None


def file_names(count: int) -> list[str]:
    """Return the names of the tensor files that this many ranks write."""
    return [TENSORS] if count == 1 else [f"state-{rank:05d}-of-{count:05d}.safetensors" for rank in range(1, count + 1)]


def canonical(manifest: Mapping[str, Any]) -> str:
    """Return the text of a manifest that its digest is computed from: everything except the digest."""
    return json.dumps({key: value for key, value in manifest.items() if key != "digest"}, sort_keys=True)


def list_versions(root: Path) -> list[Path]:
    """Return the versions in a folder, oldest first. A folder without any file of ours is not a version."""
    if not root.is_dir():
        return []
    numbered = []
    for path in root.iterdir():
        try:
            if _number(path) and not path.is_symlink() and any(is_our_file(entry.name) for entry in path.iterdir()):
                numbered.append((_number(path), path))
        except (FileNotFoundError, NotADirectoryError):  # a file; or a writer has just deleted this version
            continue
    return [path for _, path in sorted(numbered)]


def next_name(root: Path) -> str:
    """Return the name of the next version in a folder; no entry of the folder has it or a later number."""
    return f"version-{max(map(_number, root.iterdir()), default=0) + 1:08d}"


def way_back(version: Path) -> str:
    """Return what to do about a version that cannot be loaded: use the one before it, if there is one."""
    before = [path.name for path in list_versions(version.parent) if _number(path) < _number(version)]
    if not before:
        return "there is no earlier version here: start again, and keep several versions (save(keep=N))"
    return f"move {version.name} away, and {before[-1]} is loaded"


def _number(path: Path) -> int:
    """Return the number in the name of a version; 0 for other names."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match is not None else 0


def plain_bytes(path: Path, most: int | None = None, links: bool = False) -> bytes:
    """Return the content of a regular file. Errors do not name the path: read inside `refusing`.

    Args:
        path: of the file.
        most: largest size that such a file can have; by default the memory of this machine.
        links: whether to follow a symbolic link.

    Raises:
        CheckpointError: it is a link, a folder, a pipe or a device, or larger than such a file or the memory can be.
        OSError: it cannot be read.
    """
    if not links and path.is_symlink():
        raise CheckpointError(
            "is a symbolic link, and a checkpoint holds its files itself: copy the file there", code="unreadable-file"
        )
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # non-blocking, so that a pipe is refused and not waited for
    handle = os.open(path, flags if links else flags | os.O_NOFOLLOW)
    about = os.fstat(handle)
    if not stat.S_ISREG(about.st_mode):
        os.close(handle)
        raise CheckpointError("is not a regular file, but a folder, a pipe or a device", code="unreadable-file")
    with os.fdopen(handle, "rb") as file:
        limit = most if most is not None else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if about.st_size > limit:
            why = "such a file has" if most is not None else "this machine has memory for"
            raise CheckpointError(f"has {about.st_size} bytes; {why} at most {limit}")
        try:
            return file.read(about.st_size)
        except MemoryError as fault:
            raise CheckpointError(
                f"has {about.st_size} bytes, and there is not enough memory for them: free some", code="unreadable-file"
            ) from fault


def sanitized(name: object, most: int = 80) -> str:
    """Return a name from a file, safe for a message: short, and without control characters."""
    text = name if isinstance(name, str) and name.isprintable() else repr(name)
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def versions() -> dict[str, str]:
    """Return the versions of torch, this package and Python. Equal bits are promised under equal versions only."""
    return {"torch": str(torch.__version__), "lorasc-fx": version(), "python": platform.python_version()}
