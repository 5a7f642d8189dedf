"""Atomic writes of files and folders, by one process at a time.

New data is written to a temporary path next to its target, synced to disk, and then renamed. If a writer is killed, the
operating system releases its lock, and the next writer deletes its temporary files.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from safetensors import SafetensorError

from lorasc_fx.errors import CheckpointError, ExportError, LorascError, reason_of
from lorasc_fx.util.undo import Block, isolated


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


@isolated
def one_writer(undo: Block, file: Path, target: Path, kind: type[LorascError] = CheckpointError) -> bool:
    """Context manager: hold an exclusive lock, so that no other process writes the same target.

    Yields whether the lock is held. It is not held if the file system does not support locks. The operating system
    releases the lock if the process dies.

    Args:
        file: the lock file. It exists only while a process writes.
        target: the path to write, for error messages.
        kind: class of the error to raise.

    Raises:
        kind: another process is writing the target.
        OSError: the lock file cannot be created.
    """
    while True:
        handle, locked = os.open(file, os.O_RDWR | os.O_CREAT, 0o666), True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as fault:
            os.close(handle)
            raise kind(
                f"{target}: another process is writing to this path. Give each run its own path, and write from one "
                "process of a run only",
                code="concurrent-save",
            ) from fault
        except OSError:
            locked = False
        if _names(file, handle):
            break
        os.close(handle)  # the previous owner deleted the file in the meantime, so lock the new one
    undo(partial(os.close, handle))
    undo(partial(file.unlink, missing_ok=True))
    return locked


def _names(file: Path, handle: int) -> bool:
    """Whether a path still refers to the open file."""
    try:
        return os.path.samestat(file.lstat(), os.fstat(handle))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Context manager: yield a temporary path, which replaces the file or folder `out` at the end of the block.

    If the block raises, `out` is unchanged.

    Raises:
        ExportError: `out` cannot be written, or another process is writing it.
    """
    target = Path(os.path.realpath(out)) if out.is_dir() else out
    token = uuid.uuid4().hex
    new = target.with_name(f".{target.name}.writing-{token}{target.suffix}")
    old = target.with_name(f".{target.name}.leaving-{token}")
    try:
        make_folder(target.parent)
        with one_writer(target.with_name(f".{target.name}.lock"), out, ExportError) as locked:
            if locked:
                _clear(target)
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


def _clear(target: Path) -> None:
    """Delete the temporary files of killed writers. If one of them had moved the target away, restore it."""
    for path in target.parent.iterdir():
        if path.name.startswith(f".{target.name}.leaving-") and not target.exists():
            path.rename(target)
        elif path.name.startswith((f".{target.name}.writing-", f".{target.name}.leaving-")):
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
