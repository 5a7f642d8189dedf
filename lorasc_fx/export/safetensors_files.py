"""Writes folded weights as safetensors, with the model's state dict names or in the layout of the base's files.

Only one tensor is in memory at a time. In the layout of the base, the names, dtypes and metadata of the files are kept,
and unchanged tensors are copied byte for byte. This does not need the model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from io import BufferedReader
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch

from lorasc_fx.cascade.folding import folded_each
from lorasc_fx.checkpoint.base import INDEX, SINGLE, shards_of
from lorasc_fx.checkpoint.files import refusing
from lorasc_fx.checkpoint.reader import Change, FoldedWeights, folded_run
from lorasc_fx.errors import CheckpointError, SpecError, StateError, path_of
from lorasc_fx.export.base_weights import matched
from lorasc_fx.export.tensor_files import Entry, TensorFile, bytes_of, extended
from lorasc_fx.facade import Cascade
from lorasc_fx.quantized import dense, is_quantized
from lorasc_fx.util.checks import is_integer
from lorasc_fx.util.files import parse_json, replacing
from lorasc_fx.util.fingerprint import Buffer

Progress = Callable[[int, int], object]
"""A callback that gets the number of bytes done so far, and the total."""

CONFIG = "config.json"
"""Name of the configuration in a model folder of transformers."""

_WEIGHTS = (
    ".safetensors", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot",
)  # fmt: skip
"""Endings of files with weights of the base in other formats. They are not copied, because they would be stale."""


def safetensors(
    cascade: Cascade,
    path: str | PathLike[str],
    *,
    base: str | PathLike[str] | None = None,
    view: str = "slow",
    quantized: Literal["dequantize"] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: Progress | None = None,
) -> Path:
    """Write the folded weights as safetensors. One tensor is computed and written at a time.

    The cascade is not changed and can train on. A running stage that has trained counts as ended, as in `release`.

    Args:
        cascade: the cascade.
        path: a file that ends with `.safetensors`, or a folder. A folder gets `model.safetensors`, or shards with an
            index, in the layout of transformers.
        base: the safetensors file or folder that the model was loaded from. If it is given, the output has its files,
            names, dtypes and metadata, and all unchanged tensors are copied from it.
        view: the weights to write: `slow`, or their average over stages (`averaged`).
        quantized: `dequantize` to write quantized weights as dense tensors. By default, quantized weights that have
            trained, or that safetensors cannot store, are an error. Cannot be combined with `base`.
        max_shard_bytes: maximum size of a file in a folder, without `base`.
        progress: is called with the number of bytes done so far, and the total.

    Returns:
        The path.

    Raises:
        StateError: the path is the base or a non-empty folder, a quantized weight would be written, the cascade was
            released, or the call is inside `with cascade.weights(...)` or inside a backward.
        CheckpointError: `base` is not the model that was adapted.
        ExportError: the path cannot be written. Nothing is left there.
        SpecError: `quantized` is invalid, or given with `base`.
        NonFiniteBranch: the running branch of a site holds inf or nan.
    """
    out, call = path_of(path), "export.safetensors"
    with cascade._run.exclusive(call, keeps=True):
        if base is not None:
            if quantized is not None:
                raise SpecError(
                    f"{call}: quantized cannot be combined with base: the branches trained beside the quantized "
                    "weights, whose values differ from the files of the base. Remove base=...",
                    code="conflicting-options",
                )
            labels = getattr(getattr(cascade.model, "config", None), "id2label", None)
            classes = list(labels.values()) if isinstance(labels, dict) else None
            return fold_files(folded_run(cascade._run, call, view), path_of(base), out, progress, classes)
        if not is_integer(max_shard_bytes, 1):
            raise SpecError(f"{call}: max_shard_bytes is {max_shard_bytes!r}; give an integer of 1 or more")
        _check_free(out)
        values: dict[str, Callable[[], torch.Tensor]] = {}
        entries: list[Entry] = []
        for name, value, folded in folded_each(cascade._run, call, quantized, view):
            if not isinstance(value, torch.Tensor):
                raise StateError(
                    f"{call}: {name} in the state dict is a {type(value).__name__}, which safetensors cannot store; "
                    "store it as a tensor, or remove it from the state dict",
                    code="not-serializable",
                )
            if quantized is not None and is_quantized(value):
                entries.append(Entry.of(name, torch.empty(value.shape, dtype=value.dtype, device="meta")))
                values[name] = partial(_dense, folded)
            else:
                entries.append(Entry.of(name, value))
                values[name] = folded
        done = _counter(progress, sum(entry.size for entry in entries))
        with replacing(out) as new:
            shards = [TensorFile.of(new, entries, {"format": "pt"})]
            if out.suffix != ".safetensors":
                new.mkdir()
                shards = _shards(new, entries, max_shard_bytes)
            for shard in shards:
                shard.write(shard.path, lambda entry: bytes_of(values[entry.name]()), done)
        return out


def _dense(value: Callable[[], torch.Tensor]) -> torch.Tensor:
    return dense(value())


def _counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    """Return a function that gets the size of each finished tensor, and reports the sum of the sizes."""
    bytes_done = 0

    def done(size: int) -> None:
        nonlocal bytes_done
        bytes_done += size
        if progress is not None:
            progress(bytes_done, total)

    return done


def _shards(folder: Path, entries: list[Entry], max_bytes: int) -> list[TensorFile]:
    """Divide tensors into files of at most `max_bytes`, and write the index if there are several files."""
    groups: list[list[Entry]] = [[]]
    for entry in entries:
        if groups[-1] and sum(member.size for member in groups[-1]) + entry.size > max_bytes:
            groups.append([])
        groups[-1].append(entry)
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    if len(groups) == 1:
        names = [SINGLE]
    else:
        weight_map = {entry.name: name for name, group in zip(names, groups, strict=True) for entry in group}
        _write_index(folder, {"metadata": {}, "weight_map": weight_map}, entries)
    return [TensorFile.of(folder / name, group, {"format": "pt"}) for name, group in zip(names, groups, strict=True)]


def _write_index(folder: Path, index: dict[str, Any], entries: Iterable[Entry]) -> None:
    """Write the index of a folder's files, with the total size of the tensors."""
    index["metadata"] = {**index.get("metadata", {}), "total_size": sum(entry.size for entry in entries)}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def fold_files(
    weights: FoldedWeights,
    base: Path,
    out: Path,
    progress: Progress | None,
    classes: Sequence[str] | None,
) -> Path:
    """Write copies of a base's files with the folded weights. A new head is added to the last file.

    Args:
        weights: the folded weights.
        base: a safetensors file, or a folder with `model.safetensors` or its shards.
        out: the file or folder to write. A folder also gets the other files of the base (configuration, tokenizer).
        progress: is called with the number of bytes compared or written so far, and the total.
        classes: names of a classifier's classes, for the `config.json` of transformers.

    Raises:
        CheckpointError: the base cannot be read, or is not the model that was adapted.
        ExportError: `out` cannot be written.
        StateError: `out` is the base or a non-empty folder. Nothing was written.
    """
    files = [TensorFile.read(path) for path in shards_of(base)]
    _check_free(out, base)
    done = _counter(progress, 2 * sum(entry.size for file in files for entry in file.entries))
    changes, added = matched(weights, base, files, done)
    files = extended(files, added)
    with replacing(out) as new:
        if base.is_file() and base.suffix != ".json":
            _write_like(files[0], changes, added, new, done)
            return out
        new.mkdir()
        for path in sorted((base if base.is_dir() else base.parent).iterdir()):
            if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_WEIGHTS):
                shutil.copyfile(path, new / path.name)
        if classes is not None and (new / CONFIG).exists():
            _name_classes(new / CONFIG, classes)
        if added and (new / INDEX).exists():
            index = json.loads((new / INDEX).read_text(encoding="utf-8"))
            index["weight_map"] |= dict.fromkeys(added, files[-1].path.name)
            _write_index(new, index, [entry for file in files for entry in file.entries])
        for file in files:
            _write_like(file, changes, added, new / file.path.name, done)
    return out


def _name_classes(config: Path, classes: Sequence[str]) -> None:
    """Write the classes into the `config.json` of a classifier, because transformers builds the head from it."""
    with refusing(f"base: {config.name}", "give the folder of the model that was adapted", code="unreadable-file"):
        settings = parse_json(config.read_text(encoding="utf-8"))
    if not isinstance(settings, dict) or "Classification" not in str(settings.get("architectures")):
        return
    old_labels = settings.get("id2label") or {
        str(number): f"LABEL_{number}" for number in range(settings.get("num_labels", 2))
    }
    labels = {str(number): name for number, name in enumerate(classes)}
    if old_labels != labels:
        settings |= {"id2label": labels, "label2id": {name: number for number, name in enumerate(classes)}}
        settings.pop("num_labels", None)
        config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _check_free(out: Path, base: Path | None = None) -> None:
    """Raise StateError if the output is a non-empty folder or the base itself. Other files may be replaced."""
    if out.is_dir() and any(out.iterdir()):
        raise StateError(f"{out} is not empty; give another path, or remove it first", code="path-in-the-way")
    if base is not None and out.exists() and out.samefile(base):
        raise StateError(f"{out} is the base, which is not overwritten; give another path", code="path-in-the-way")


def _write_like(
    file: TensorFile,
    changes: Mapping[str, Change],
    added: Mapping[str, torch.Tensor],
    path: Path,
    done: Callable[[int], None],
) -> None:
    """Write a copy of a base's file, in which the changed and added tensors have their new values."""

    def content(entry: Entry, source: BufferedReader) -> Iterable[Buffer]:
        if entry.name in added:
            return bytes_of(added[entry.name])
        if entry.name not in changes:
            return entry.blocks(source)
        base = entry.read(source)
        value = changes[entry.name](base)
        if value.shape != base.shape or value.dtype != base.dtype:
            raise CheckpointError(
                f"{entry.name} is {list(base.shape)} {base.dtype} in the base, but {list(value.shape)} {value.dtype} "
                "after the fold. The checkpoint was edited: use one that `save` wrote"
            )
        return bytes_of(value)

    with file.path.open("rb") as source:
        file.write(path, lambda entry: content(entry, source), done)
