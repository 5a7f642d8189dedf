"""A fold in the layout of the original model: the same files, names, dtypes and metadata, other numbers.

One tensor is in memory at a time, and what the fold does not change is copied byte for byte. No model is needed: the
base's files and the experts are enough.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from lorasc_fx.errors import CheckpointError, StateError
from lorasc_fx.export.matching import matched
from lorasc_fx.export.shards import Shard, read_shard, write_tensor
from lorasc_fx.runtime.base_file import shards_of
from lorasc_fx.runtime.folded import Change, FoldedWeights

__all__ = ["Progress", "beside", "check_free", "fold_files"]

Progress = Callable[[int, int], object]
"""Told how many bytes are done, of how many."""

_WEIGHTS = (
    ".safetensors", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot",
)  # fmt: skip
"""Ends of the names of files that hold the base's weights in other formats, and are not taken along."""


def fold_files(weights: FoldedWeights, base: Path, out: Path, progress: Progress | None = None) -> Path:
    """Write a base's files with folded weights in them.

    Args:
        weights: of the fold.
        base: a safetensors file, or a folder with `model.safetensors` or its shards.
        out: the file or folder to write; a folder gets the base's other files as well (configuration, tokenizer).
        progress: told of the bytes that were compared and written.

    Raises:
        CheckpointError: the base cannot be read, is another one than was adapted, or `out` cannot be written.
        StateError: `out` is the base, or a folder that is there already. Nothing was written.
    """
    shards = [read_shard(path) for path in shards_of(base)]
    single = base.is_file() and base.suffix != ".json"
    check_free(out, base)
    total, done = 2 * sum(entry.size for shard in shards for entry in shard.entries), 0

    def tell(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    changes = matched(weights, base, shards, tell)
    with beside(out) as room:
        if single:
            _write(shards[0], changes, room, tell)
            return out
        room.mkdir()
        folder = base if base.is_dir() else base.parent
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_WEIGHTS):
                shutil.copyfile(path, room / path.name)
        for shard in shards:
            _write(shard, changes, room / shard.path.name, tell)
    return out


def check_free(out: Path, base: Path | None = None) -> None:
    """Raise StateError for a folder that is there already, or for the base itself; a file is replaced when the new one
    is whole.
    """
    if out.is_dir() and any(out.iterdir()):
        raise StateError(
            f"{out} is there already, and is not written into; give another place, or remove it first",
            code="path-in-the-way",
        )
    if base is not None and out.exists() and out.samefile(base):
        raise StateError(f"{out} is the base, and is not overwritten; give another place", code="path-in-the-way")


@contextlib.contextmanager
def beside(out: Path) -> Iterator[Path]:
    """Yield the path of a file or folder that takes the place of `out` when it is whole, and is removed otherwise.

    Raises:
        CheckpointError: it cannot be written.
    """
    room = out.with_name(f".{out.name}.partial-{os.getpid()}{out.suffix}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield room
        os.replace(room, out)
    except OSError as fault:
        _remove(room)
        reason = fault.strerror or str(fault)
        raise CheckpointError(f"{out}: was not written: {reason}; what was there stays", code="write-failed") from fault
    except BaseException:
        _remove(room)
        raise


def _remove(room: Path) -> None:
    if room.is_dir():
        shutil.rmtree(room, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            room.unlink()


def _write(shard: Shard, changes: Mapping[str, Change], path: Path, tell: Callable[[int], None]) -> None:
    """Write one file: its own header, and one tensor after the other, computed or copied."""
    with shard.path.open("rb") as source, path.open("wb") as target:
        target.write(shard.head)
        for entry in shard.entries:
            change = changes.get(entry.name)
            if change is None:
                for block in entry.blocks(source):
                    target.write(block)
            else:
                base = entry.read(source)
                value = change(base)
                if value.shape != base.shape or value.dtype != base.dtype:
                    raise CheckpointError(
                        f"{entry.name} is {list(base.shape)} {base.dtype}, and became {list(value.shape)} "
                        f"{value.dtype} in the fold; the checkpoint was edited, take one that save wrote"
                    )
                write_tensor(target, value)
            tell(entry.size)
        target.flush()
        os.fsync(target.fileno())
