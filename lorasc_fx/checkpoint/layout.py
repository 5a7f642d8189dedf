"""The files of a checkpoint: versions, each a folder with a manifest and tensors, and how their bytes are read.

The tensors are in one file, or in one of each rank that holds shards: then each file has its shards, in the order of
ranks, and the first one all else.

W0 is not copied, except W0 of what is trained in full. A fingerprint of each base parameter refuses another base and
names what differs. Loading runs no code from a file.

A file that is mapped, or opened a second time by its path, may have changed since its digest was taken; one that is cut
short while it is mapped ends the process. So a file is opened once and read, and digest and content come from the same
bytes.
"""

from __future__ import annotations

import json
import os
import platform
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lorasc_fx.errors import CheckpointError
from lorasc_fx.util.version import version

FORMAT = 1
MANIFEST = "manifest.json"
TENSORS = "state.safetensors"

_NAME = re.compile(r"version-([0-9]{8,})")
"""A version is numbered by the count of saves."""
_FILE = re.compile(rf"{re.escape(MANIFEST)}|state(-\d{{5}}-of-\d{{5}})?\.safetensors")


def is_our_file(name: str) -> bool:
    """Whether a version has a file of this name."""
    return _FILE.fullmatch(name) is not None


def file_names(count: int) -> list[str]:
    """Return the names of the files of tensors that so many ranks write."""
    return [TENSORS] if count == 1 else [f"state-{rank:05d}-of-{count:05d}.safetensors" for rank in range(1, count + 1)]


def canonical(manifest: Mapping[str, Any]) -> str:
    """Return the text of a manifest that its digest is computed from: everything except the digest."""
    return json.dumps({key: value for key, value in manifest.items() if key != "digest"}, sort_keys=True)


def list_versions(root: Path) -> list[Path]:
    """Return the versions in a folder, oldest first. A folder without any file of ours is none."""
    if not root.is_dir():
        return []
    numbered = [(_number(path), path) for path in root.iterdir() if _number(path) and _holds_files(path)]
    return [path for _, path in sorted(numbered)]


def next_name(root: Path) -> str:
    """Return the name of the next version in a folder; no entry of the folder has it or a later number."""
    return f"version-{max(map(_number, root.iterdir()), default=0) + 1:08d}"


def way_back(version: Path) -> str:
    """Return the sentence that says what to do about a version that cannot be loaded: use the one before it."""
    before = [path.name for path in list_versions(version.parent) if _number(path) < _number(version)]
    if not before:
        return "no version before it is here: start anew, and keep several (save(keep=N))"
    return f"take {version.name} away, and {before[-1]} is loaded"


def _number(path: Path) -> int:
    """Return the number in the name of a version; 0 for other names."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match is not None else 0


def _holds_files(path: Path) -> bool:
    try:
        return not path.is_symlink() and any(is_our_file(entry.name) for entry in path.iterdir())
    except (FileNotFoundError, NotADirectoryError):  # a file; or a writer has just deleted this version
        return False


def plain_bytes(path: Path, most: int | None = None, links: bool = False) -> bytes:
    """Return the content of a plain file.

    Args:
        path: of the file.
        most: number of bytes that such a file can have; by default what this machine has memory for.
        links: whether a link is followed.

    Raises:
        CheckpointError: it is a link, a folder, a pipe or a device, or larger than it can be.
        OSError: it cannot be read.
    """
    if not links and path.is_symlink():
        raise CheckpointError(
            f"{path}: is a link; a checkpoint holds its files itself: copy the file there", code="unreadable-file"
        )
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # not blocking: a pipe is refused, not waited for
    handle = os.open(path, flags if links else flags | os.O_NOFOLLOW)
    try:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode):
            raise CheckpointError(
                f"{path}: is no plain file; a folder, a pipe or a device is not read", code="unreadable-file"
            )
        limit = most if most is not None else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if about.st_size > limit:
            why = "such a file has" if most is not None else "this machine has memory for"
            raise CheckpointError(f"{path}: has {about.st_size} bytes, {why} {limit} at most")
        try:
            with os.fdopen(handle, "rb", closefd=False) as file:
                return file.read(about.st_size)
        except MemoryError as fault:
            raise CheckpointError(
                f"{path}: has {about.st_size} bytes, for which there is no memory; free some, or take a larger machine",
                code="out-of-memory",
            ) from fault
    finally:
        os.close(handle)


def sanitized(name: object, most: int = 80) -> str:
    """Return a name from a file, safe for a message: short, and without control characters."""
    text = name if isinstance(name, str) and name.isprintable() else repr(name)
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def versions() -> dict[str, str]:
    """Return the versions of torch, of this package and of python: the same bits are promised under the same ones."""
    return {"torch": str(torch.__version__), "lorasc-fx": version(), "python": platform.python_version()}


def differences(saved: Any) -> list[str]:
    """Return what is another version now, as `torch 2.13.0, here 2.14.0`; what was not written down is not compared."""
    if not isinstance(saved, dict):
        return []
    return [
        f"{name} {saved[name]}, here {now}" for name, now in versions().items() if name in saved and saved[name] != now
    ]
