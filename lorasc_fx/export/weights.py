"""The folded weights as safetensors, one tensor in memory at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Literal

import torch

from lorasc_fx.errors import SpecError, StateError, path_of
from lorasc_fx.export.original import Progress, beside, check_free, fold_files
from lorasc_fx.export.shards import Entry, entry_of, head_of, write_tensor
from lorasc_fx.runtime import Cascade
from lorasc_fx.runtime.base_file import INDEX, SINGLE
from lorasc_fx.runtime.folded import of_core
from lorasc_fx.runtime.folding import folded_each

__all__ = ["safetensors"]

Values = dict[str, Callable[[], torch.Tensor]]


def safetensors(
    cascade: Cascade,
    path: str | PathLike[str],
    *,
    base: str | PathLike[str] | None = None,
    which: Literal["slow", "averaged"] = "slow",
    max_shard_bytes: int = 5_000_000_000,
    progress: Progress | None = None,
) -> Path:
    """Write the folded weights as safetensors; the cascade goes on. One tensor is computed and written at a time.

    A stage that has trained is counted as `release` would: it is folded.

    Args:
        cascade: whose weights are written.
        path: a file that ends with `.safetensors`, or a folder, which gets `model.safetensors`, or shards with an index
            as transformers reads them.
        base: the safetensors file or folder that the model came from: what is written has its files, names, dtypes and
            metadata, and every tensor that the fold does not change is copied as it is.
        which: `slow`, or their average over stages.
        max_shard_bytes: size above which a folder's weights are split, without `base`.
        progress: told how many bytes are done, of how many.

    Returns:
        The path.

    Raises:
        StateError: the path is the base, or a folder that is there already; after `release`, inside `weights`, or
            inside a backward; or a quantized weight is to be written.
        CheckpointError: base is not what was adapted, or the path cannot be written. Nothing is left there.
        NonFiniteBranch: the running branch of a site holds inf or nan.
    """
    out, call = path_of(path), "export.safetensors"
    with cascade.core.exclusive(call):
        if base is not None:
            return fold_files(of_core(cascade.core, call, which), path_of(base), out, progress)
        if isinstance(max_shard_bytes, bool) or not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
            raise SpecError(f"{call}: max_shard_bytes is {max_shard_bytes!r}; give a number of bytes of 1 or more")
        check_free(out)
        values: Values = {}
        entries: list[Entry] = []
        for name, now, new in folded_each(cascade.core, call, which=which):
            if not isinstance(now, torch.Tensor):
                raise StateError(
                    f"{call}: {name} of the state dict is {type(now).__name__}, and no tensor", code="not-serializable"
                )
            entries.append(entry_of(name, now))
            values[name] = new
        total, done = sum(entry.size for entry in entries), 0

        def tell(size: int) -> None:
            nonlocal done
            done += size
            if progress is not None:
                progress(done, total)

        with beside(out) as room:
            if out.suffix == ".safetensors":
                _write(room, entries, values, tell)
            else:
                room.mkdir()
                _write_folder(room, entries, values, max_shard_bytes, tell)
        return out


def _write_folder(folder: Path, entries: list[Entry], values: Values, most: int, tell: Callable[[int], None]) -> None:
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(each.size for each in shards[-1]) + entry.size > most:
            shards.append([])
        shards[-1].append(entry)
    if len(shards) == 1:
        _write(folder / SINGLE, entries, values, tell)
        return
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write(folder / name, shard, values, tell)
    index = {
        "metadata": {"total_size": sum(entry.size for entry in entries)},
        "weight_map": {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write(path: Path, entries: list[Entry], values: Values, tell: Callable[[int], None]) -> None:
    head, order = head_of(entries, {"format": "pt"})
    sizes = {entry.name: entry.size for entry in entries}
    with path.open("wb") as file:
        file.write(head)
        for name in order:
            write_tensor(file, values[name]())
            tell(sizes[name])
        file.flush()
        os.fsync(file.fileno())
