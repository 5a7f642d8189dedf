"""Values for a model that was built on the meta device, read from safetensors files one tensor at a time.

All names, ties and shapes are checked against the headers of the files before the first tensor of the model is
replaced. Files are memory-mapped, so that a rank reads only its shards. Fingerprints, which are of full tensors, are
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
"""Entries of a tensor that are read at a time for its fingerprint."""


@dataclass
class _Tensor:
    """A tensor of the model: its names, whether files store it, and the keys under which they do."""

    value: torch.Tensor
    names: tuple[str, ...]
    persistent: bool
    keys: list[str] = field(default_factory=list)


def groups_of(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Return the names of each parameter and buffer of a model; a tied one has several."""
    return tuple(tensor.names for tensor in _tensors(model))


def check_attributes(model: nn.Module) -> None:
    """Refuse a tensor on the meta device that no file can fill.

    Raises:
        CaptureError: it is neither a parameter nor a buffer.
    """
    for prefix, module in model.named_modules():
        for leaf, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                raise CaptureError(
                    f"{f'{prefix}.{leaf}'.lstrip('.')} is a tensor on the meta device, and neither a parameter nor a "
                    "buffer, so no file stores it; register it as a buffer, or create it in forward",
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
    """Where the tensors of a model get their values from.

    Args:
        model: some of its tensors are on the meta device.
        path: a safetensors file, or a folder with `model.safetensors` or its shards.
        groups: the names of each tensor before some were untied.
        buffers: values of buffers that no file stores, by name.

    Attributes:
        files: keys and the tensors of the model that they belong to, by file.

    Raises:
        CheckpointError: the files cannot be read, lack a tensor, or hold an unexpected one or one of another shape; or
            two that are tied in the model differ in the files. Nothing was changed.
        SpecError: `buffers` has another name or shape than the model.
    """

    def __init__(
        self, model: nn.Module, path: Path, groups: Iterable[tuple[str, ...]], buffers: Mapping[str, torch.Tensor]
    ) -> None:
        tensors = _tensors(model)
        by_name = {name: tensor for tensor in tensors for name in tensor.names}
        _check_given(by_name, buffers)
        stored = headers(shards_of(path))
        tied = {name: group for group in groups for name in group}
        keys = keys_of({*by_name, *tied}, stored)
        for tensor in tensors:
            names = dict.fromkeys([*tensor.names, *(name for alias in tensor.names for name in tied.get(alias, ()))])
            candidates = [keys[name] for name in names if name in keys]
            # A key that is the name of another tensor now, after an untie, is only used if there is no other.
            certain = [key for key in candidates if by_name.get(key, tensor) is tensor]
            tensor.keys = list(dict.fromkeys(certain or candidates))
        _check_names(path, tensors, stored, buffers)
        self.files: dict[Path, list[tuple[str, torch.Tensor]]] = {}
        for tensor in tensors:
            if tensor.keys and not any(name in buffers for name in tensor.names):
                first = tensor.keys[0]
                self.files.setdefault(stored[first].path, []).append((first, tensor.value))
                for alias in tensor.keys[1:]:
                    pair = [mapped_tensors(stored[key].path, [key])[0] for key in (first, alias)]
                    if pair[0].dtype != pair[1].dtype or not same_bits(*pair):
                        raise CheckpointError(
                            f"materialize: {first} and {alias} are one tensor in the model, and differ in the files; "
                            "build the model without that tie",
                            code="tied-weights-differ",
                        )
        self._model = model
        self._tensors = [tensor.value for tensor in tensors]
        self._given = [(by_name[name].value, value) for name, value in buffers.items()]

    def fingerprints(self, names: Mapping[int, str], part: int, parts: int) -> dict[str, str]:
        """Return the fingerprints that every `parts`-th parameter has once it holds the values of the files.

        Args:
            names: of the parameters that are wanted, by id.
            part, parts: a rank, which computes its part, and the number of ranks.
        """
        wanted = [(path, key, old) for path, pairs in self.files.items() for key, old in pairs if id(old) in names]
        wanted.sort(key=lambda entry: (-entry[2].numel(), names[id(entry[2])]))
        prints = {}
        for path, key, old in wanted[part::parts]:
            (tensor,) = mapped_tensors(path, [key])
            blocks = (data_of(block.to(old.dtype).contiguous()) for block in tensor.reshape(-1).split(_BLOCK))
            prints[names[id(old)]] = fingerprint_of(old.dtype, tuple(old.shape), blocks)
        return prints

    def put(self, device: torch.device, undo: Undo) -> None:
        """Replace the tensors on the meta device by tensors with values, and move all others to the device.

        Of a DTensor only the local shard is read.
        """
        new: dict[int, torch.Tensor] = {}
        with torch.no_grad():
            for path, pairs in self.files.items():
                read = mapped_tensors(path, [key for key, _ in pairs])
                for (_, old), tensor in zip(pairs, read, strict=True):
                    new[id(old)] = with_values(old, local_like(tensor, old), device)
            for old, value in self._given:
                new[id(old)] = with_values(old, value, device)
            for old in self._tensors:
                if id(old) not in new and old.device != device:
                    new[id(old)] = with_values(old, local(old), device)
        exchange(self._model, lambda holder: new.get(id(holder.value)), undo)


def _check_given(by_name: Mapping[str, _Tensor], buffers: Mapping[str, torch.Tensor]) -> None:
    for name, value in buffers.items():
        tensor = by_name.get(name)
        if tensor is None or isinstance(tensor.value, nn.Parameter):
            names = [key for key, other in by_name.items() if not isinstance(other.value, nn.Parameter)]
            raise SpecError(
                f"buffers: {name!r} is not a buffer of the model{nearest(name, names) or listed(names)}; "
                "give values of buffers by their names",
                code="unknown-name",
            )
        if value.shape != tensor.value.shape or value.is_meta:
            shape = "on the meta device" if value.is_meta else f"{list(value.shape)}"
            raise SpecError(f"buffers: {name!r} is {shape}, and the model's is {list(tensor.value.shape)}")


def _check_names(
    path: Path, tensors: list[_Tensor], stored: Mapping[str, FileTensor], buffers: Mapping[str, torch.Tensor]
) -> None:
    """Raise one error for all that is missing, unexpected, or of another shape."""
    used = {key for tensor in tensors for key in tensor.keys}
    missing = [tensor for tensor in tensors if tensor.value.is_meta and not tensor.keys]
    missing = [tensor for tensor in missing if not any(name in buffers for name in tensor.names)]
    faults = {
        "missing": [tensor.names[0] for tensor in missing if tensor.persistent],
        "buffers that no file stores, give them as buffers={name: tensor}": [
            tensor.names[0] for tensor in missing if not tensor.persistent
        ],
        "unexpected": [key for key in stored if key not in used],
        "of another shape": [
            f"{key} {list(stored[key].shape)} for {list(tensor.value.shape)}"
            for tensor in tensors
            for key in tensor.keys
            if stored[key].shape != tuple(tensor.value.shape)
        ],
    }
    lines = [f"  {title}: {named(names, 5)}" for title, names in faults.items() if names]
    if lines:
        raise CheckpointError(
            f"materialize: {path} does not hold this model; give its own files, nothing was changed:\n"
            + "\n".join(lines),
            code="base-differs",
        )


def with_values(old: torch.Tensor, values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor like an old one on a device, with these values. For a DTensor, give the local shard's values."""
    shard = local(old)
    value = torch.empty_strided(shard.size(), shard.stride(), dtype=old.dtype, device=device)
    value.copy_(values)
    if hasattr(old, "to_local"):
        return nn.Parameter(ShardSpec.of(old).dtensor(value, old), old.requires_grad)
    value = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
    vars(value).update(vars(old))
    return value
