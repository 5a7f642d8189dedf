"""Folded weights as safetensors, under the model's names or in the files of the base, one tensor in memory at a time.

In the files of the base, names, dtypes and metadata are those of the original, and what the fold does not change is
copied byte for byte; no model is needed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Literal

import torch

from lorasc_fx.cascade import Cascade
from lorasc_fx.cascade.folding import folded_each
from lorasc_fx.checkpoint.base_file import INDEX, SINGLE, shards_of
from lorasc_fx.checkpoint.folded import Change, FoldedWeights, of_run
from lorasc_fx.checkpoint.write_base import Entry, Shard, entry_of, extended, head_of, matched, read_shard, write_tensor
from lorasc_fx.errors import CheckpointError, SpecError, StateError, path_of
from lorasc_fx.quantized import dense, is_quantized
from lorasc_fx.util.checks import is_integer
from lorasc_fx.util.files import parse_json, replacing

Values = dict[str, Callable[[], torch.Tensor]]

Progress = Callable[[int, int], object]
"""Called with the number of bytes that are done, and of all."""

CONFIG = "config.json"
"""The configuration in a folder of transformers."""

_WEIGHTS = (
    ".safetensors", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot",
)  # fmt: skip
"""Ends of the names of files that hold the base's weights in other formats, and are not taken along."""


def safetensors(
    cascade: Cascade,
    path: str | PathLike[str],
    *,
    base: str | PathLike[str] | None = None,
    which: str | Mapping[str, float] = "slow",
    quantized: Literal["dequantize"] | None = None,
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
        which: `slow`, or their average over stages (`averaged`); without `base` also a run that was added, or a sum, as
            of `Cascade.weights`.
        quantized: `dequantize` to write dense tensors in place of quantized weights; else those that have trained, or
            that a file cannot hold, are refused. Not with `base`.
        max_shard_bytes: size above which a folder's weights are split, without `base`.
        progress: called with the number of bytes that are done, and of all.

    Returns:
        The path.

    Raises:
        StateError: the path is the base, or a folder that is there already; after `release`, inside `weights`, or
            inside a backward; or a quantized weight is to be written.
        CheckpointError: base is not what was adapted.
        ExportError: the path cannot be written. Nothing is left there.
        SpecError: `quantized` with `base`, or another value.
        NonFiniteBranch: the running branch of a site holds inf or nan.
    """
    out, call = path_of(path), "export.safetensors"
    with cascade._run.exclusive(call):
        if base is not None and quantized is not None:
            raise SpecError(
                f"{call}: quantized and base are given, and the files of the base hold other numbers than those beside "
                "which was trained; leave base out",
                code="conflicting-options",
            )
        if base is not None:
            labels = getattr(getattr(cascade.model, "config", None), "id2label", None)
            classes = list(labels.values()) if isinstance(labels, dict) else None
            return fold_files(of_run(cascade._run, call, which), path_of(base), out, progress, classes)
        if not is_integer(max_shard_bytes, 1):
            raise SpecError(f"{call}: max_shard_bytes is {max_shard_bytes!r}; give a number of bytes of 1 or more")
        check_free(out)
        values: Values = {}
        entries: list[Entry] = []
        for name, held, folded in folded_each(cascade._run, call, quantized, which):
            if not isinstance(held, torch.Tensor):
                raise StateError(
                    f"{call}: {name} of the state dict is {type(held).__name__}, and no tensor",
                    code="not-serializable",
                )
            dequantized = quantized is not None and is_quantized(held)
            shape = torch.empty(held.shape, dtype=held.dtype, device="meta")
            entries.append(entry_of(name, shape if dequantized else held))
            values[name] = partial(_dense, folded) if dequantized else folded
        done = _counter(progress, sum(entry.size for entry in entries))
        with replacing(out) as new:
            if out.suffix == ".safetensors":
                _write(new, entries, values, done)
            else:
                new.mkdir()
                _write_folder(new, entries, values, max_shard_bytes, done)
        return out


def _dense(value: Callable[[], torch.Tensor]) -> torch.Tensor:
    return dense(value())


def _counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    """Return what is called with the size of each tensor that is done, and reports their sum."""
    bytes_done = 0

    def done(size: int) -> None:
        nonlocal bytes_done
        bytes_done += size
        if progress is not None:
            progress(bytes_done, total)

    return done


def _write_folder(folder: Path, entries: list[Entry], values: Values, most: int, done: Callable[[int], None]) -> None:
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(other.size for other in shards[-1]) + entry.size > most:
            shards.append([])
        shards[-1].append(entry)
    if len(shards) == 1:
        _write(folder / SINGLE, entries, values, done)
        return
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write(folder / name, shard, values, done)
    index = {
        "metadata": {"total_size": sum(entry.size for entry in entries)},
        "weight_map": {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write(path: Path, entries: list[Entry], values: Values, done: Callable[[int], None]) -> None:
    head, order = head_of(entries, {"format": "pt"})
    sizes = {entry.name: entry.size for entry in entries}
    with path.open("wb") as file:
        file.write(head)
        for name in order:
            write_tensor(file, values[name]())
            done(sizes[name])


def fold_files(
    weights: FoldedWeights,
    base: Path,
    out: Path,
    progress: Progress | None,
    classes: Sequence[str] | None = None,
) -> Path:
    """Write a base's files with folded weights in them; a new head that they lack is added to the last one.

    Args:
        weights: of the fold.
        base: a safetensors file, or a folder with `model.safetensors` or its shards.
        out: the file or folder to write; a folder gets the base's other files as well (configuration, tokenizer).
        progress: called with the number of bytes that were compared or written, and of all.
        classes: names of a classifier's classes, which a `config.json` of transformers gets.

    Raises:
        CheckpointError: the base cannot be read, or is another one than was adapted.
        ExportError: `out` cannot be written.
        StateError: `out` is the base, or a folder that is there already. Nothing was written.
    """
    shards = [read_shard(path) for path in shards_of(base)]
    single = base.is_file() and base.suffix != ".json"
    check_free(out, base)
    done = _counter(progress, 2 * sum(entry.size for shard in shards for entry in shard.entries))
    changes, added = matched(weights, base, shards, done)
    shards = extended(shards, added)
    with replacing(out) as new:
        if single:
            _write_like(shards[0], changes, added, new, done)
            return out
        new.mkdir()
        folder = base if base.is_dir() else base.parent
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_WEIGHTS):
                shutil.copyfile(path, new / path.name)
        if classes is not None and (new / CONFIG).exists():
            _name_classes(new / CONFIG, classes)
        if added and (new / INDEX).exists():
            index = json.loads((new / INDEX).read_text(encoding="utf-8"))
            index["weight_map"] |= dict.fromkeys(added, shards[-1].path.name)
            index.setdefault("metadata", {})["total_size"] = sum(
                entry.size for shard in shards for entry in shard.entries
            )
            (new / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for shard in shards:
            _write_like(shard, changes, added, new / shard.path.name, done)
    return out


def _name_classes(config: Path, classes: Sequence[str]) -> None:
    """Write the classes into a configuration of transformers that has others: their number is that of the head.

    Raises:
        CheckpointError: the configuration is not JSON.
    """
    try:
        about = parse_json(config.read_text(encoding="utf-8"))
    except ValueError as fault:
        raise CheckpointError(
            f"base: its {config.name} is not JSON ({fault}); give the folder of the model that was adapted",
            code="unreadable-file",
        ) from fault
    if not isinstance(about, dict) or "Classification" not in str(about.get("architectures")):
        return
    given = about.get("id2label") or {str(number): f"LABEL_{number}" for number in range(about.get("num_labels", 2))}
    labels = {str(number): name for number, name in enumerate(classes)}
    if given != labels:
        about |= {"id2label": labels, "label2id": {name: number for number, name in enumerate(classes)}}
        about.pop("num_labels", None)
        config.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


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


def _write_like(
    shard: Shard,
    changes: Mapping[str, Change],
    added: Mapping[str, torch.Tensor],
    path: Path,
    done: Callable[[int], None],
) -> None:
    """Write one file: its own header, and one tensor after the other, computed or copied."""
    with shard.path.open("rb") as source, path.open("wb") as target:
        target.write(shard.head)
        for entry in shard.entries:
            change = changes.get(entry.name)
            if entry.name in added:
                write_tensor(target, added[entry.name])
            elif change is None:
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
            done(entry.size)
