"""Bytes of a file that anybody may have written: opened once, of a known size, so that what is checked is what is used.

A file that is mapped, or opened a second time by its path, may have changed since its digest was taken; one that is cut
short while it is mapped ends the process. So a file is read, and digest and content come from the same bytes.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from lorasc_fx.errors import CheckpointError

__all__ = ["plain_bytes", "told"]

_FLAGS = ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY")  # not every system has each


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
            f"{path}: is a link; a checkpoint holds its files itself: copy the file there", code="not-a-file"
        )
    flags = sum(getattr(os, name, 0) for name in (*_FLAGS, *(() if links else ("O_NOFOLLOW",))))
    handle = os.open(path, os.O_RDONLY | flags)  # not blocking: a pipe is refused, not waited for
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(
                f"{path}: is no plain file; a folder, a pipe or a device is not read", code="not-a-file"
            )
        limit = most if most is not None else _memory()
        if limit is not None and found.st_size > limit:
            why = "such a file has" if most is not None else "this machine has memory for"
            raise CheckpointError(f"{path}: has {found.st_size} bytes, {why} {limit} at most", code="file-too-large")
        try:
            with os.fdopen(handle, "rb", closefd=False) as file:
                return file.read(found.st_size)
        except MemoryError as fault:
            raise CheckpointError(
                f"{path}: has {found.st_size} bytes, for which there is no memory; free some, or take a larger machine",
                code="out-of-memory",
            ) from fault
    finally:
        os.close(handle)


def _memory() -> int | None:
    """Return the bytes of memory of this machine, where it tells."""
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def told(name: object, most: int = 80) -> str:
    """Return a name from a file as a message can hold it: short, and without anything that a terminal obeys."""
    text = name if isinstance(name, str) and name.isprintable() else repr(name)
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"
