"""Loads a model that was built on the meta device from safetensors files, one tensor at a time.

All names, ties and shapes are checked against the headers of the files before the first tensor of the model is
replaced. The files are memory-mapped, so a rank reads only its shards. Fingerprints need full tensors. They are
distributed over the ranks and computed block by block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from lorasc_fx.checkpoint.base_file import FileTensor, headers, keys_of, mapped_tensors, same_bits, shards_of
from lorasc_fx.errors import CaptureError, CheckpointError, SpecError, listed, named, nearest
from lorasc_fx.parameters import exchange
from lorasc_fx.shards import ShardSpec, local, local_like
from lorasc_fx.util.fingerprint import data_of, fingerprint_of
from lorasc_fx.util.undo import Undo

_BLOCK = 1 << 21
"""Number of elements that are read at a time to compute a fingerprint."""


@dataclass
class _Tensor:
    """A parameter or buffer of the model, its names, whether a state dict stores it, and its keys in the files."""

    value: torch.Tensor
    names: tuple[str, ...]
    persistent: bool
    keys: list[str] = field(default_factory=list)


def groups_of(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Return the names of each parameter and buffer of a model. A tied one has several names."""
    return tuple(tensor.names for tensor in _tensors(model))


def check_attributes(model: nn.Module) -> None:
    """Check that all tensors on the meta device are parameters or buffers, which files can store.

    Raises:
        CaptureError: one is a plain attribute.
    """
    for prefix, module in model.named_modules():
        for leaf, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                raise CaptureError(
                    f"{f'{prefix}.{leaf}'.lstrip('.')} is a tensor on the meta device, but neither a parameter nor a "
                    "buffer, so that no file stores it; register it as a buffer, or create it in forward",
                    code="meta-model",
                )


def _tensors(model: nn.Module) -> list[_Tensor]:
    tensors: dict[int, _Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaf, value in [*module._parameters.items(), *module._buffers.items()]:
            if value is not None:
                tensor = tensors.setdefault(id(value), _Tensor(value, (), True))
                tensor.names += (f"{prefix}.{leaf}".lstrip("."),)
                tensor.persistent = tensor.persistent and leaf not in module._non_persistent_buffers_set
    return list(tensors.values())


class DeferredValues:
    """Matches the tensors of a model on the meta device with the tensors of its files, and loads them.

    Args:
        model: a model with tensors on the meta device.
        path: a safetensors file, or a folder with `model.safetensors` or its shards.
        groups: all names of each tensor, before some were untied.
        buffers: values of buffers that the files do not store, by name.

    Attributes:
        files: by file, the keys and the tensors of the model that they belong to.

    Raises:
        CheckpointError: the files cannot be read, a tensor is missing or unexpected or has another shape, or the copies
            of a tied weight differ in the files. Nothing was changed.
        SpecError: `buffers` has a name or shape that the model does not have.
    """

    def __init__(
        self, model: nn.Module, path: Path, groups: Iterable[tuple[str, ...]], buffers: Mapping[str, torch.Tensor]
    ) -> None:
        tensors = _tensors(model)
        by_name = {name: tensor for tensor in tensors for name in tensor.names}
        _check_buffers(by_name, buffers)
        stored = headers(shards_of(path))
        tied = {name: group for group in groups for name in group}
        keys = keys_of({*by_name, *tied}, stored)
        for tensor in tensors:
            names = dict.fromkeys([*tensor.names, *(name for alias in tensor.names for name in tied.get(alias, ()))])
            candidates = [keys[name] for name in names if name in keys]
            # After an untie, a key may be the name of another tensor. Such a key is only used if there is no other.
            certain = [key for key in candidates if by_name.get(key, tensor) is tensor]
            tensor.keys = list(dict.fromkeys(certain or candidates))
        _check_names(path, tensors, stored, buffers)
        self.files: dict[Path, list[tuple[str, torch.Tensor]]] = {}
        for tensor in tensors:
            if tensor.keys and not any(name in buffers for name in tensor.names):
                key, *aliases = tensor.keys
                self.files.setdefault(stored[key].path, []).append((key, tensor.value))
                for alias in aliases:
                    pair = [mapped_tensors(stored[name].path, [name])[0] for name in (key, alias)]
                    if pair[0].dtype != pair[1].dtype or not same_bits(*pair):
                        raise CheckpointError(
                            f"materialize: {key} and {alias} are tied in the model, but differ in the files; build the "
                            "model without this tie",
                            code="tied-weights-differ",
                        )
        self._model = model
        self._tensors = [tensor.value for tensor in tensors]
        self._buffers = [(by_name[name].value, value) for name, value in buffers.items()]

    def fingerprints(self, names: Mapping[int, str], part: int, parts: int) -> dict[str, str]:
        """Compute this rank's part of the parameters' fingerprints, from the values in the files.

        Args:
            names: names of the parameters, by id.
            part, parts: the rank, and the number of ranks. Each rank computes every `parts`-th fingerprint.
        """
        stored = [(path, key, old) for path, pairs in self.files.items() for key, old in pairs if id(old) in names]
        stored.sort(key=lambda entry: (-entry[2].numel(), names[id(entry[2])]))  # all ranks get large tensors
        fingerprints = {}
        for path, key, old in stored[part::parts]:
            (tensor,) = mapped_tensors(path, [key])
            blocks = (data_of(block.to(old.dtype).contiguous()) for block in tensor.reshape(-1).split(_BLOCK))
            fingerprints[names[id(old)]] = fingerprint_of(old.dtype, tuple(old.shape), blocks)
        return fingerprints

    def put(self, device: torch.device, undo: Undo) -> None:
        """Replace the tensors on the meta device by tensors with values, and move all others to the device.

        For a DTensor, only the local shard is read.
        """
        new: dict[int, torch.Tensor] = {}
        with torch.no_grad():
            for path, pairs in self.files.items():
                read = mapped_tensors(path, [key for key, _ in pairs])
                for (_, old), tensor in zip(pairs, read, strict=True):
                    new[id(old)] = with_values(old, local_like(tensor, old), device)
            for old, value in self._buffers:
                new[id(old)] = with_values(old, value, device)
            for old in self._tensors:
                if id(old) not in new and old.device != device:
                    new[id(old)] = with_values(old, local(old), device)
        exchange(self._model, lambda holder: new.get(id(holder.value)), undo)


def _check_buffers(by_name: Mapping[str, _Tensor], buffers: Mapping[str, torch.Tensor]) -> None:
    for name, value in buffers.items():
        tensor = by_name.get(name)
        if tensor is None or isinstance(tensor.value, nn.Parameter):
            names = [key for key, candidate in by_name.items() if not isinstance(candidate.value, nn.Parameter)]
            raise SpecError(
                f"buffers: {name!r} is not a buffer of the model{nearest(name, names) or listed(names)}; "
                "give values of buffers by their names",
                code="unknown-name",
            )
        if value.shape != tensor.value.shape or value.is_meta:
            shape = "on the meta device" if value.is_meta else f"{list(value.shape)}"
            raise SpecError(f"buffers: {name!r} is {shape}, but the model's buffer is {list(tensor.value.shape)}")


def _check_names(
    path: Path, tensors: list[_Tensor], stored: Mapping[str, FileTensor], buffers: Mapping[str, torch.Tensor]
) -> None:
    """Raise one error that lists all tensors that are missing, unexpected, or have another shape."""
    used = {key for tensor in tensors for key in tensor.keys}
    missing = [tensor for tensor in tensors if tensor.value.is_meta and not tensor.keys]
    missing = [tensor for tensor in missing if not any(name in buffers for name in tensor.names)]
    faults = {
        "missing": [tensor.names[0] for tensor in missing if tensor.persistent],
        "buffers that the files do not store, give them as buffers={name: tensor}": [
            tensor.names[0] for tensor in missing if not tensor.persistent
        ],
        "unexpected": [key for key in stored if key not in used],
        "of another shape": [
            f"{key} {list(stored[key].shape)} instead of {list(tensor.value.shape)}"
            for tensor in tensors
            for key in tensor.keys
            if stored[key].shape != tuple(tensor.value.shape)
        ],
    }
    lines = [f"  {title}: {named(names, 5)}" for title, names in faults.items() if names]
    if lines:
        raise CheckpointError(
            f"materialize: the tensors in {path} do not fit this model. Give the files of the model. Nothing was "
            "changed:\n" + "\n".join(lines),
            code="base-differs",
        )


def with_values(old: torch.Tensor, values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor with new values on a device, with the type and attributes of an old tensor.

    For a DTensor, `values` is the local shard.
    """
    shard = local(old)
    value = torch.empty_strided(shard.size(), shard.stride(), dtype=old.dtype, device=device)
    value.copy_(values)
    if hasattr(old, "to_local"):
        return nn.Parameter(ShardSpec.of(old).dtensor(value, old), old.requires_grad)
    value = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
    vars(value).update(vars(old))
    return value
