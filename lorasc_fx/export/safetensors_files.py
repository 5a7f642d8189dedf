"""Writes folded weights as safetensors, with the model's state dict names or in the layout of the base's files.

Only the new tensors of one file are in memory at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lorasc_fx.cascade import run_of
from lorasc_fx.cascade.weights import folded_each
from lorasc_fx.checkpoint import Change, FoldedWeights, folded_run
from lorasc_fx.checkpoint.files import DTYPES, refusing, replacing, write_tensors
from lorasc_fx.errors import SpecError, StateError, path_of
from lorasc_fx.export.base_weights import INDEX, SINGLE, mapped, matched, shards_of
from lorasc_fx.facade import Cascade
from lorasc_fx.quantized import dense, is_quantized

CONFIG = "config.json"
"""Name of the configuration in a model folder of transformers."""

_WEIGHTS = (
    ".safetensors", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot",
)  # fmt: skip
"""Suffixes of files with weights of the base. These files are not copied, because their weights would be stale."""


def safetensors(
    cascade: Cascade,
    path: str | PathLike[str],
    *,
    base: str | PathLike[str] | None = None,
    view: str = "slow",
    quantized: Literal["dequantize"] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write the folded weights as safetensors, file by file, so that only the new tensors of one file are in memory.

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

    Returns:
        The path.

    Raises:
        StateError: the path is the base or a non-empty folder, or a quantized weight cannot be written. Or the cascade
            was released, or the call is inside `with cascade.weights(...)` or inside a backward.
        CheckpointError: `base` is not the model that was adapted.
        ExportError: the path cannot be written. Nothing is left there.
        SpecError: `quantized` is invalid, or given with `base`.
        NonFiniteBranch: the running branch of a site holds inf or nan.
    """
    out, call = path_of(path), "export.safetensors"
    with run_of(cascade).exclusive(call, keeps=True):
        if base is not None:
            if quantized is not None:
                raise SpecError(
                    f"{call}: quantized cannot be combined with base: the branches trained beside the quantized "
                    "weights, whose values differ from the files of the base. Remove base=...",
                    code="conflicting-options",
                )
            labels = getattr(getattr(cascade.model, "config", None), "id2label", None)
            classes = list(labels.values()) if isinstance(labels, dict) else None
            return fold_files(folded_run(run_of(cascade), call, view), path_of(base), out, classes)
        _check_free(out)
        values: dict[str, Callable[[], torch.Tensor]] = {}
        sizes: dict[str, int] = {}
        for name, value, folded in folded_each(run_of(cascade), call, quantized, view):
            is_dense = quantized is not None and is_quantized(value)
            if not (is_dense or _is_storable(value)):
                raise StateError(
                    f"{call}: {name} is {getattr(value, 'dtype', '')} in a {type(value).__name__}, which a safetensors "
                    "file cannot store; give quantized='dequantize', or convert it to another dtype",
                    code="not-serializable",
                )
            values[name] = partial(_dense, folded) if is_dense else folded
            sizes[name] = value.numel() * value.dtype.itemsize
        with replacing(out) as new:
            shards = {new: list(values)}
            if out.suffix != ".safetensors":
                new.mkdir()
                shards = _shards(new, sizes, max_shard_bytes)
            for shard, names in shards.items():
                write_tensors({name: _plain(values[name]()) for name in names}, shard, {"format": "pt"})
        return out


def _is_storable(value: object) -> bool:
    """Return whether a safetensors file can store an entry of a state dict."""
    wrapped = is_traceable_wrapper_subclass(value)
    return isinstance(value, torch.Tensor) and not wrapped and value.dtype in DTYPES.values()


def _plain(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor as safetensors writes it: on the CPU and contiguous."""
    return value.detach().to("cpu").contiguous()


def _dense(value: Callable[[], torch.Tensor]) -> torch.Tensor:
    return dense(value())


def _shards(folder: Path, sizes: Mapping[str, int], max_bytes: int) -> dict[Path, list[str]]:
    """Return {file: names of its tensors} for files of at most `max_bytes`, and write the index of several files."""
    groups: list[list[str]] = [[]]
    for name, size in sizes.items():
        if groups[-1] and sum(sizes[member] for member in groups[-1]) + size > max_bytes:
            groups.append([])
        groups[-1].append(name)
    files = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    if len(groups) == 1:
        files = [SINGLE]
    else:
        weight_map = {name: file for file, group in zip(files, groups, strict=True) for name in group}
        _write_index(folder, {"metadata": {}, "weight_map": weight_map}, sum(sizes.values()))
    return {folder / file: group for file, group in zip(files, groups, strict=True)}


def _write_index(folder: Path, index: dict[str, Any], size: int) -> None:
    """Write the index of a folder's files, with the total size of the tensors."""
    index["metadata"] = {**index.get("metadata", {}), "total_size": size}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def fold_files(
    weights: FoldedWeights,
    base: Path,
    out: Path,
    classes: Sequence[str] | None,
) -> Path:
    """Write copies of a base's files with the folded weights. A new head is added to the last file.

    If the base is a folder, its other files (configuration, tokenizer) are copied, and config.json gets `classes`.

    Raises:
        CheckpointError: the base cannot be read, or is not the model that was adapted.
        ExportError: `out` cannot be written.
        StateError: `out` is the base or a non-empty folder. Nothing was written.
    """
    files = shards_of(base)
    _check_free(out, base)
    changes, added = matched(weights, base, files)
    with replacing(out) as new:
        if base.is_file() and base.suffix != ".json":
            _write_like(files[0], new, changes, added, added)
            return out
        new.mkdir()
        for path in sorted((base if base.is_dir() else base.parent).iterdir()):
            if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_WEIGHTS):
                shutil.copyfile(path, new / path.name)
        if classes is not None and (new / CONFIG).exists():
            _name_classes(new / CONFIG, classes)
        size = 0
        for file in files:
            size += _write_like(file, new / file.name, changes, added, added if file is files[-1] else {})
        if added and (new / INDEX).exists():
            index = json.loads((new / INDEX).read_text(encoding="utf-8"))
            index["weight_map"] |= dict.fromkeys(added, files[-1].name)
            _write_index(new, index, size)
    return out


def _name_classes(config: Path, classes: Sequence[str]) -> None:
    """Write the classes into the `config.json` of a classifier, because transformers builds the head from it."""
    with refusing(f"base: {config.name}", "give the folder of the model that was adapted", code="unreadable-file"):
        settings = json.loads(config.read_text(encoding="utf-8"))
    if not isinstance(settings, dict) or "Classification" not in str(settings.get("architectures")):
        return
    settings |= {
        "id2label": {str(number): name for number, name in enumerate(classes)},
        "label2id": {name: number for number, name in enumerate(classes)},
    }
    settings.pop("num_labels", None)
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _check_free(out: Path, base: Path | None = None) -> None:
    """Raise StateError if the output is a non-empty folder or the base itself. Other files may be replaced."""
    if out.is_dir() and any(out.iterdir()):
        raise StateError(f"{out} is not empty; give another path, or remove it first", code="path-in-the-way")
    if base is not None and out.exists() and out.samefile(base):
        raise StateError(f"{out} is the base, which is not overwritten; give another path", code="path-in-the-way")


def _write_like(
    file: Path, new: Path, changes: Mapping[str, Change], replaced: Collection[str], added: Mapping[str, torch.Tensor]
) -> int:
    """Write a copy of a base's file, and return the size of its tensors in bytes.

    Tensors in `changes` are changed, keys in `replaced` are left out, and tensors in `added` are added.
    """
    with safe_open(file, framework="pt") as handle:
        metadata = handle.metadata()
    tensors = {key: value for key, value in mapped(file).items() if key not in replaced}
    tensors |= {key: _plain(changes[key](tensors[key])) for key in tensors.keys() & changes.keys()}
    tensors |= {name: _plain(value) for name, value in added.items()}
    write_tensors(tensors, new, metadata)
    return sum(value.nbytes for value in tensors.values())
