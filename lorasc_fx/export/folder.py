"""A folder that is written beside and put in place when it is whole; what stood there stays until then."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

from safetensors import SafetensorError

from lorasc_fx.errors import ExportError
from lorasc_fx.runtime.checkpoint_write import sync

__all__ = ["write_folder"]


def write_folder(folder: Path, marker: str, ours: Collection[str], write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder, and put it in the place of `folder`, with the files there that are not ours.

    Args:
        folder: where it goes; absent, empty, or one that was written before.
        marker: name of a file that such a one holds.
        ours: names of all files that a writer of such folders owns.
        write: fills the folder that it is given.

    Raises:
        ExportError: the folder is something else, or cannot be written; what was there stays.
    """
    given, folder = folder, Path(os.path.realpath(folder))
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{given} is a file; give the name of a folder", code="path-in-the-way")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise ExportError(
            f"{given} holds other files and no {marker}; give an empty folder, or a new one", code="path-in-the-way"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as fault:
        raise ExportError(
            f"{given} cannot be written: {fault.strerror}; what was there stays", code="not-writable"
        ) from fault
    new, old = beside / "new", beside / "old"
    try:
        new.mkdir()
        write(new)
        for path in new.iterdir():
            sync(path)
        if folder.is_dir():
            for path in folder.iterdir():
                if path.name not in ours:
                    _copy(path, new / path.name)
            folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
        sync(folder.parent)
    except (OSError, SafetensorError) as fault:
        raise ExportError(f"{given} was not written: {fault}; what was there stays", code="write-failed") from fault
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _copy(path: Path, target: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.copytree(path, target, symlinks=True)
    else:
        shutil.copy2(path, target, follow_symlinks=False)
