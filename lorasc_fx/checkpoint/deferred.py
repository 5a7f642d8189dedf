"""Numbers for a model that was built on the meta device: out of safetensors files, one tensor in memory at a time.

All names, ties and shapes are checked by the headers of the files, before the first tensor of the model is replaced. Of
a DTensor its shard is read, and nothing else; fingerprints, which are of whole tensors, are shared out over the ranks
and computed block by block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorasc_fx.checkpoint.base_file import headers, opened, renamed, shards_of
from lorasc_fx.errors import CaptureError, CheckpointError, SpecError, listed, named, nearest
from lorasc_fx.parameters import exchange
from lorasc_fx.shards import ShardSpec, local
from lorasc_fx.util.fingerprint import Buffer, data_of, fingerprint_of
from lorasc_fx.util.undo import Undo

_SHOWN = 5
_BLOCK = 1 << 24
"""Bytes of a file that are read at a time where a whole tensor is looked at."""


@dataclass
class _Tensor:
    """A tensor of the model: its names, and the files' keys that mean it."""

    value: torch.Tensor
    names: tuple[str, ...]
    kept: bool
    keys: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Numbers:
    """Where the numbers of a model's tensors are.

    Args:
        files: keys and the tensors that they mean, by file.
        given: numbers that the call brought itself.
        rest: tensors that have numbers, and keep them.
    """

    files: Mapping[Path, list[tuple[str, torch.Tensor]]]
    given: list[tuple[torch.Tensor, torch.Tensor]]
    rest: list[torch.Tensor]


def groups_of(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Return the names of each parameter and buffer of a model, tied ones together."""
    return tuple(tensor.names for tensor in _tensors(model))


def check_attributes(model: nn.Module) -> None:
    """Refuse a tensor on the meta device that no file can fill.

    Raises:
        CaptureError: it is neither parameter nor buffer.
    """
    for prefix, module in model.named_modules():
        for leaf, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                raise CaptureError(
                    f"{f'{prefix}.{leaf}'.lstrip('.')} is a tensor on the meta device, and neither parameter nor "
                    "buffer: no file keeps it; register it as a buffer, or make it in forward",
                    code="meta-model",
                )


def _tensors(model: nn.Module) -> list[_Tensor]:
    tensors: dict[int, _Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaf, value in [*module._parameters.items(), *module._buffers.items()]:
            if value is not None:
                tensor = tensors.setdefault(id(value), _Tensor(value, (), True))
                tensor.names += (f"{prefix}.{leaf}".lstrip("."),)
                tensor.kept = tensor.kept and leaf not in module._non_persistent_buffers_set
    return list(tensors.values())


def find_numbers(
    model: nn.Module, path: Path, groups: Iterable[tuple[str, ...]], buffers: Mapping[str, torch.Tensor]
) -> Numbers:
    """Return where each tensor of the model gets its numbers.

    Args:
        model: some of its tensors are on the meta device.
        path: a safetensors file, or a folder with `model.safetensors` or its shards.
        groups: names that meant one tensor before some were untied.
        buffers: numbers of buffers that no file holds, by name.

    Raises:
        CheckpointError: the files cannot be read, lack a tensor, hold one that the model has not, or one of another
            shape; or two that are one in the model and differ. Nothing was changed.
        SpecError: `buffers` has another name or shape than the model.
    """
    tensors = _tensors(model)
    by_name = {name: tensor for tensor in tensors for name in tensor.names}
    _check_given(by_name, buffers)
    shapes, files_of = headers(shards_of(path))
    also = {name: group for group in groups for name in group}
    keys = renamed(by_name, files_of)
    for tensor in tensors:
        names = dict.fromkeys([*tensor.names, *(name for alias in tensor.names for name in also.get(alias, ()))])
        known = [name if name in files_of else keys[name] for name in names if name in files_of or name in keys]
        certain = [key for key in known if by_name.get(key, tensor) is tensor]
        tensor.keys = list(dict.fromkeys(certain or known))
    _check_names(path, tensors, shapes, buffers)
    files: dict[Path, list[tuple[str, torch.Tensor]]] = {}
    for tensor in tensors:
        if tensor.keys and not any(name in buffers for name in tensor.names):
            files.setdefault(files_of[tensor.keys[0]], []).append((tensor.keys[0], tensor.value))
            _check_tied(tensor.keys, files_of)
    given = [(by_name[name].value, value) for name, value in buffers.items()]
    filled = {id(tensor) for pairs in files.values() for _, tensor in pairs} | {id(tensor) for tensor, _ in given}
    return Numbers(files, given, [tensor.value for tensor in tensors if id(tensor.value) not in filled])


def _check_given(by_name: Mapping[str, _Tensor], buffers: Mapping[str, torch.Tensor]) -> None:
    for name, value in buffers.items():
        tensor = by_name.get(name)
        if tensor is None or isinstance(tensor.value, nn.Parameter):
            known = [key for key, other in by_name.items() if not isinstance(other.value, nn.Parameter)]
            raise SpecError(
                f"buffers: {name!r} is no buffer of the model{nearest(name, known) or listed(known)}; "
                "give numbers of buffers by their names",
                code="unknown-name",
            )
        if value.shape != tensor.value.shape or value.is_meta:
            shape = "without numbers" if value.is_meta else f"{list(value.shape)}"
            shape_here = list(tensor.value.shape)
            raise SpecError(f"buffers: {name!r} is {shape}, the model's is {shape_here}; give one like it")


def _check_names(
    path: Path, tensors: list[_Tensor], shapes: Mapping[str, tuple[int, ...]], buffers: Mapping[str, torch.Tensor]
) -> None:
    """Raise one error for all that is missing, unexpected, or of another shape."""
    used = {key for tensor in tensors for key in tensor.keys}
    missing = [tensor for tensor in tensors if tensor.value.is_meta and not tensor.keys]
    missing = [tensor for tensor in missing if not any(name in buffers for name in tensor.names)]
    faults = {
        "missing": [tensor.names[0] for tensor in missing if tensor.kept],
        "buffers that no file keeps, give them by buffers={name: tensor}": [
            tensor.names[0] for tensor in missing if not tensor.kept
        ],
        "unexpected": [key for key in shapes if key not in used],
        "of another shape": [
            f"{key} {list(shapes[key])} for {list(tensor.value.shape)}"
            for tensor in tensors
            for key in tensor.keys
            if shapes[key] != tuple(tensor.value.shape)
        ],
    }
    lines = [f"  {what}: {named(names, _SHOWN)}" for what, names in faults.items() if names]
    if lines:
        raise CheckpointError(
            f"materialize: {path} does not hold this model; give its own files, nothing was changed:\n"
            + "\n".join(lines),
            code="base-differs",
        )


def _check_tied(keys: list[str], files: Mapping[str, Path]) -> None:
    """Refuse names of one tensor under which the files hold different numbers."""
    for other in keys[1:]:
        with opened(files[keys[0]]) as one, opened(files[other]) as two:
            pairs = zip(_blocks(one, keys[0]), _blocks(two, other), strict=True)
            same = all(torch.equal(*(block.contiguous().view(torch.uint8) for block in pair)) for pair in pairs)
        if not same:
            raise CheckpointError(
                f"materialize: {keys[0]} and {other} are one tensor of the model, and differ in the files; "
                "build the model without that tie",
                code="tied-weights-differ",
            )


def _blocks(handle: Any, key: str) -> Iterator[torch.Tensor]:
    """Yield the entries of a tensor of a file in vectors, some rows at a time."""
    whole = handle.get_slice(key)
    first, *rest = whole.get_shape() or (0,)
    if not first:
        yield handle.get_tensor(key).flatten()
        return
    rows = max(1, _BLOCK // max(1, math.prod(rest) * 8))
    for start in range(0, first, rows):
        yield whole[start : min(first, start + rows)].flatten()


def fingerprints_of_files(numbers: Numbers, names: Mapping[int, str], part: int, parts: int) -> dict[str, str]:
    """Return the fingerprints that parameters have once they hold the numbers of the files, of each `parts`-th one.

    Args:
        numbers: where they are.
        names: of the parameters that are wanted, by id.
        part, parts: which of them are computed here: a rank, and the number of ranks.
    """
    wanted = [(path, key, old) for path, pairs in numbers.files.items() for key, old in pairs if id(old) in names]
    wanted.sort(key=lambda entry: (-entry[2].numel(), names[id(entry[2])]))
    made = {}
    for path, key, old in wanted[part::parts]:
        with opened(path) as handle:
            made[names[id(old)]] = fingerprint_of(old.dtype, tuple(old.shape), _bytes(handle, key, old.dtype))
    return made


def _bytes(handle: Any, key: str, dtype: torch.dtype) -> Iterator[Buffer]:
    for block in _blocks(handle, key):
        yield data_of(block.to(dtype).contiguous())


def put_numbers(numbers: Numbers, model: nn.Module, device: torch.device, undo: Undo) -> None:
    """Put tensors with numbers in the place of those on the meta device, and move the rest, on one device.

    Of a DTensor the shard that is here is read from its file.
    """
    new: dict[int, torch.Tensor] = {}

    def materialize(old: torch.Tensor, value: torch.Tensor) -> None:
        new[id(old)] = with_numbers(old, value, device)

    with torch.no_grad():
        for path, pairs in numbers.files.items():
            with opened(path) as handle:
                for key, old in pairs:
                    materialize(old, _shard_of(handle, key, old))
        for old, value in numbers.given:
            materialize(old, value)
        for old in numbers.rest:
            if old.device != device:
                materialize(old, local(old))
    exchange(model, lambda holder: new.get(id(holder.value)), undo)


def with_numbers(old: torch.Tensor, numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor like an old one, with these numbers, on a device; for a DTensor they are those of its shard."""
    held = local(old)
    value = torch.empty_strided(held.size(), held.stride(), dtype=old.dtype, device=device)
    value.copy_(numbers)
    if hasattr(old, "to_local"):
        return nn.Parameter(ShardSpec.of(old).dtensor(value, old), old.requires_grad)
    value = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
    vars(value).update(vars(old))
    return value


def _shard_of(handle: Any, key: str, like: torch.Tensor) -> torch.Tensor:
    """Return a tensor of a file; for a DTensor the shard of it that is here."""
    if not hasattr(like, "to_local"):
        tensor: torch.Tensor = handle.get_tensor(key)
        return tensor
    shard = ShardSpec.of(like)
    if not shard.count:
        return torch.empty(local(like).shape)
    cut = (*(slice(None) for _ in range(shard.axis or 0)), slice(shard.first, shard.first + shard.count))
    tensor = handle.get_slice(key)[cut]
    return tensor
