"""Atomic writes of files and folders, by one process at a time.

New data is written to a temporary path next to its target, synced to disk, and then renamed. If a writer is killed, the
operating system releases its lock, and the next writer deletes its temporary files.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

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


def parse_json(text: str | bytes, **hooks: Callable[[str], Any]) -> Any:
    """Parse JSON from a file that may be damaged or malicious.

    Args:
        text: the JSON.
        hooks: keyword arguments for `json.loads`, such as `parse_float`.

    Raises:
        ValueError: the text is not JSON, is nested too deeply, or contains an integer with too many digits.
    """
    try:
        return json.loads(text, **hooks)  # type: ignore[arg-type]
    except RecursionError as fault:
        raise ValueError("it is nested too deeply") from fault


def open_plain(path: Path, flags: int, kind: type[LorascError]) -> int:
    """Open a regular file for writing, create it if it does not exist, and return the descriptor.

    Symbolic links are not followed, because this would write to another place. Nothing was written if this raises.

    Args:
        path: the file.
        flags: flags for `os.open`, in addition to O_CREAT.
        kind: class of the error to raise.

    Raises:
        kind: the path is a symbolic link, a file with several hard links, a folder, a pipe or a device.
        OSError: the file cannot be opened.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for its reader.
        handle = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError:
        if path.is_symlink() or path.is_dir() or path.is_fifo() or path.is_socket():
            raise _not_plain(path, kind) from None
        raise
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(handle)
        raise _not_plain(path, kind)
    return handle


def _not_plain(path: Path, kind: type[LorascError]) -> LorascError:
    return kind(
        f"{path}: is a link, a folder, a pipe or a device, and cannot be replaced by a regular file. Nothing was "
        "written. Delete it, or give another path",
        code="unreadable-file",
    )


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
        kind: another process is writing the target, or the lock file is not a regular file.
        OSError: the lock file cannot be created.
    """
    while True:
        handle, locked = open_plain(file, os.O_RDWR, kind), True
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
