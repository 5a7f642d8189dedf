"""Atomic writes of files and folders: to a temporary path next to the target, synced to disk, and then renamed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from lorasc_fx.errors import CheckpointError, ExportError, reason_of


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(root: Path) -> None:
    """Create a folder and its missing parents, and sync all folders that get a new entry."""
    created = [folder for folder in (root, *root.parents) if not folder.exists()]
    root.mkdir(parents=True, exist_ok=True)
    for folder in reversed(created):
        sync(folder.parent)


@contextlib.contextmanager
def one_writer(folder: Path) -> Iterator[bool]:
    """Context manager: lock the file `.lock` of a folder, so that no other process writes into the folder.

    Yields whether the lock is held. It is not held if the file system does not support locks. The operating system
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


@contextlib.contextmanager
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
        with contextlib.suppress(OSError):
            path.unlink()
