"""Numbers for a model that was built on the meta device: out of safetensors files, one tensor in memory at a time.

All names, ties and shapes are checked by the headers of the files, before the first tensor of the model is replaced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorasc_fx.errors import CaptureError, CheckpointError, SpecError, listed, named, nearest
from lorasc_fx.parameters import exchange
from lorasc_fx.runtime.base_file import opened, renamed, shards_of
from lorasc_fx.undo import Undo

__all__ = ["MetaModel", "Numbers", "check_attributes", "find_numbers", "groups_of", "put_numbers"]

_SHOWN = 5


@dataclass(frozen=True)
class MetaModel:
    """What a cascade on a model without numbers remembers until it gets them.

    Args:
        base: the argument of `adapt`.
        groups: the names of each tensor of the model, before any was untied.
    """

    base: Any
    groups: tuple[tuple[str, ...], ...]


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
                    code="meta-constant",
                )


def _tensors(model: nn.Module) -> list[_Tensor]:
    found: dict[int, _Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaf, value in [*module._parameters.items(), *module._buffers.items()]:
            if value is not None:
                tensor = found.setdefault(id(value), _Tensor(value, (), True))
                tensor.names += (f"{prefix}.{leaf}".lstrip("."),)
                tensor.kept = tensor.kept and leaf not in module._non_persistent_buffers_set
    return list(found.values())


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
    shapes, places = _headers(path)
    also = {name: group for group in groups for name in group}
    keys = renamed(by_name, places)
    for tensor in tensors:
        names = dict.fromkeys([*tensor.names, *(name for alias in tensor.names for name in also.get(alias, ()))])
        found = [name if name in places else keys[name] for name in names if name in places or name in keys]
        own = [key for key in found if by_name.get(key, tensor) is tensor]
        tensor.keys = list(dict.fromkeys(own or found))
    _check_names(path, tensors, shapes, buffers)
    files: dict[Path, list[tuple[str, torch.Tensor]]] = {}
    for tensor in tensors:
        if tensor.keys and not any(name in buffers for name in tensor.names):
            files.setdefault(places[tensor.keys[0]], []).append((tensor.keys[0], tensor.value))
            _check_tied(tensor.keys, places)
    given = [(by_name[name].value, value) for name, value in buffers.items()]
    filled = {id(tensor) for pairs in files.values() for _, tensor in pairs} | {id(tensor) for tensor, _ in given}
    return Numbers(files, given, [tensor.value for tensor in tensors if id(tensor.value) not in filled])


def _headers(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, Path]]:
    """Return shape and file of each tensor of the files."""
    shapes, places = {}, {}
    for shard in shards_of(path):
        with opened(shard) as handle:
            for key in handle.keys():  # noqa: SIM118 - no mapping
                shapes[key], places[key] = tuple(handle.get_slice(key).get_shape()), shard
    return shapes, places


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
            own = list(tensor.value.shape)
            raise SpecError(f"buffers: {name!r} is {shape}, the model's is {own}; give one like it")


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
            code="weights-do-not-fit",
        )


def _check_tied(keys: list[str], places: Mapping[str, Path]) -> None:
    """Refuse names of one tensor under which the files hold different numbers."""
    for other in keys[1:]:
        with opened(places[keys[0]]) as one, opened(places[other]) as two:
            bits = [
                handle.get_tensor(key).contiguous().flatten().view(torch.uint8)
                for handle, key in ((one, keys[0]), (two, other))
            ]
        if not torch.equal(*bits):
            raise CheckpointError(
                f"materialize: {keys[0]} and {other} are one tensor of the model, and differ in the files; "
                "build the model without that tie",
                code="tied-weights-differ",
            )


def put_numbers(found: Numbers, model: nn.Module, device: torch.device, undo: Undo) -> None:
    """Put tensors with numbers in the place of those on the meta device, and move the rest, on one device."""
    new: dict[int, torch.Tensor] = {}

    def materialize(old: torch.Tensor, numbers: torch.Tensor) -> None:
        value = torch.empty_strided(old.size(), old.stride(), dtype=old.dtype, device=device)
        value.copy_(numbers)
        new[id(old)] = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
        vars(new[id(old)]).update(vars(old))

    with torch.no_grad():
        for path, pairs in found.files.items():
            with opened(path) as handle:
                for key, old in pairs:
                    materialize(old, handle.get_tensor(key))
        for old, numbers in found.given:
            materialize(old, numbers)
        for old in found.rest:
            if old.device != device:
                materialize(old, old)
    exchange(model, lambda holder: new.get(id(holder.value)), undo)
