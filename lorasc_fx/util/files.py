"""Atomic writes of files and folders, by one process at a time.

New data gets a temporary name next to its target, is synced, and is then renamed. The system releases the lock of a
writer that dies, and the next writer deletes what is left.
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
    """Return the value of a JSON text from a file, which may be damaged or forged.

    Args:
        text: the JSON.
        hooks: `parse_float` and the like, passed to `json.loads`.

    Raises:
        ValueError: the text is not JSON, is nested too deeply, or holds an integer of too many digits.
    """
    try:
        return json.loads(text, **hooks)  # type: ignore[arg-type]
    except RecursionError as fault:
        raise ValueError("it is nested too deeply") from fault


def open_plain(path: Path, flags: int, kind: type[LorascError]) -> int:
    """Open a file for writing, create it if it is missing, and return the descriptor.

    A link is not followed, because this would write to a file elsewhere. Nothing has been written when this raises.

    Args:
        path: the file.
        flags: for `os.open`, in addition to O_CREAT.
        kind: class of the error.

    Raises:
        kind: the path is a link, a file with several names (hard links), a folder, a pipe or a device.
        OSError: the file cannot be opened.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for its reader.
        handle = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError:
        if path.is_symlink() or path.is_dir() or path.is_fifo() or path.is_socket():
            raise _not_plain(path, kind) from None
        raise
    about = os.fstat(handle)
    if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:
        os.close(handle)
        raise _not_plain(path, kind)
    return handle


def _not_plain(path: Path, kind: type[LorascError]) -> LorascError:
    return kind(
        f"{path}: is a link, a folder, a pipe or a device, but a plain file is to be written here; nothing was "
        "written. Delete it, or give another path",
        code="unreadable-file",
    )


def append_text(path: Path, text: str, kind: type[LorascError]) -> None:
    """Append text to a file. Raises like `open_plain`."""
    with os.fdopen(open_plain(path, os.O_WRONLY | os.O_APPEND, kind), "a", encoding="utf-8") as file:
        file.write(text)


def make_folder(root: Path) -> None:
    """Make a folder and its missing parents, and sync all folders that get a new entry."""
    new = [made for made in (root, *root.parents) if not made.exists()]
    root.mkdir(parents=True, exist_ok=True)
    for made in reversed(new):
        sync(made.parent)


@isolated
def one_writer(undo: Block, file: Path, target: Path, kind: type[LorascError] = CheckpointError) -> bool:
    """Keep other writers out while a block runs. Returns False, and locks nothing, if the file system has no locks.

    The system's lock is free as soon as its owner is dead.

    Args:
        file: the lock file, which exists while somebody writes.
        target: the path that is written, for messages.
        kind: class of the error.

    Raises:
        kind: another process writes there, or the lock file is not a plain file.
        OSError: the lock file cannot be made.
    """
    while True:
        handle, locked = open_plain(file, os.O_RDWR, kind), True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as fault:
            os.close(handle)
            raise kind(
                f"{target}: another process is writing there. Give each run its own path, and write from one process "
                "of a run",
                code="concurrent-save",
            ) from fault
        except OSError:
            locked = False
        if _names(file, handle):
            break
        os.close(handle)  # its owner has deleted the file meanwhile
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
    """Yield a temporary path to write, which replaces `out` at the end of the block. If the block raises, `out` stays.

    Raises:
        ExportError: it cannot be written, or another process is writing there.
    """
    target = Path(os.path.realpath(out)) if out.is_dir() else out
    number = uuid.uuid4().hex
    new = target.with_name(f".{target.name}.writing-{number}{target.suffix}")
    old = target.with_name(f".{target.name}.leaving-{number}")
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
            f"{out}: was not written: {reason_of(fault)}; what was there stays", code="write-failed"
        ) from fault


def _clear(target: Path) -> None:
    """Delete what killed writers have left. A folder that one had moved away is moved back."""
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
