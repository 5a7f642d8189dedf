"""Reads a LoRA or DoRA adapter that peft saved. peft builds its layers on a copy of the model and loads the tensors.

peft gets only known options of the configuration, because it imports the modules that some other options name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import nn

from lorasc_fx.checkpoint.files import refusing, sanitized
from lorasc_fx.errors import CheckpointError, nearest, path_of
from lorasc_fx.graph import matches, named_weights
from lorasc_fx.peft.mirror import (
    ADAPTER,
    CONFIG,
    IGNORED,
    READ,
    TENSORS,
    Mirror,
    is_transposed,
    pair_in,
    rows_with,
)
from lorasc_fx.peft.spec_from_peft import spec_of_mirror
from lorasc_fx.quantized import dense
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.state import Expert, scaled
from lorasc_fx.util.decode import is_integer
from lorasc_fx.util.environment import module_of

_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Accepted values of `init_lora_weights`. Other values change the base weights, or need another layer."""
_ADVICE = "give the folder of a LoRA adapter that peft saved for this model"


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits a model.

    Args:
        folder: the folder of the adapter.
        mirror: a copy of the model that peft has wrapped, with the tensors of the adapter.
        changes: {parameter name: its change as an expert}, with the scale folded into `b`.
        full: {name: value} of the parameters and buffers that were trained in full.
    """

    folder: Path
    mirror: Mirror
    changes: Mapping[str, Expert]
    full: Mapping[str, torch.Tensor]

    def by_weight(self, model: nn.Module, untie: Iterable[str] = ()) -> dict[str, Expert]:
        """Return {name: change} with one entry for each weight, under the first name of a tied weight.

        Args:
            model: the model that the adapter was read for.
            untie: patterns of names that become separate weights.

        Raises:
            CheckpointError: the adapter changes a tied weight under some of its names only, or differently.
        """
        changes = {}
        groups: list[list[str]] = []
        for names in named_weights(model).names.values():
            untied = [name for name in names if any(matches(pattern, (name,)) for pattern in untie)]
            tied = [name for name in names if name not in untied]
            groups += [[name] for name in untied] + ([tied] if tied else [])
        for group in groups:
            self._check_tied(group, self.full, torch.equal)
            if self._check_tied(group, self.changes, _equal):
                changes[group[0]] = self.changes[group[0]]
        return changes

    def _check_tied(self, group: list[str], values: Mapping[str, Value], equal: Callable[[Value, Value], bool]) -> bool:
        """Return whether names of one weight have a value. Raise CheckpointError unless all have the same value."""
        named = [name for name in group if name in values]
        if named and (named != group or not all(equal(values[named[0]], values[name]) for name in named[1:])):
            raise CheckpointError(
                f"{self.folder}: {' and '.join(group)} are names of one tied weight, but the adapter changes "
                f"{' and '.join(named)} separately. Untie them: for from_peft by CascadeSpec(untie=({group[-1]!r},)), "
                f"otherwise in the model, by {group[-1]} = torch.nn.Parameter({group[-1]}.detach().clone())",
                code="tied-weights-differ",
            )
        return bool(named)


Value = TypeVar("Value")


def _equal(one: Expert, other: Expert) -> bool:
    """Return whether two experts have equal tensors."""
    pairs = ((one.b, other.b), (one.a, other.a), (one.row_scale, other.row_scale))
    return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)


def peft_spec(folder: str | PathLike[str], model: nn.Module) -> CascadeSpec:
    """Return a spec that trains the same parameters as an adapter, with its ranks, scales and dropout.

    Use `dataclasses.replace` to change the pace, the noise or other options.

    Raises:
        CheckpointError: the adapter is damaged, not a LoRA, or for another model.
        MissingExtra: peft is not installed.
    """
    return spec_of_mirror(read_adapter(path_of(folder), model).mirror, model)


def read_adapter(folder: Path, model: nn.Module) -> Adapter:
    """Read the folder of an adapter and check that it fits a model, which is not changed.

    Raises:
        CheckpointError: the adapter is damaged, not a LoRA, or for another model. The message names file and tensor.
        MissingExtra: peft is not installed.
    """
    peft = module_of("peft", "peft")
    with refusing(folder / CONFIG, _ADVICE, code="invalid-adapter"):
        options = _options(json.loads((folder / CONFIG).read_bytes()), peft.LoraConfig)
    path = folder / TENSORS
    # safetensors raises RuntimeError for a dtype that torch lacks.
    with refusing(path, _ADVICE, code="invalid-adapter"):
        if not path.is_file():
            raise CheckpointError("does not exist; peft writes it by save_pretrained(folder)", code="unreadable-file")
        tensors = load_file(path)
        for key, value in tensors.items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise CheckpointError(f"{key!r} holds inf or nan", code="non-finite")
        try:
            mirror = Mirror(model, peft.LoraConfig(**options))
            expected = set(mirror.state_dict())
            result = peft.set_peft_model_state_dict(mirror.wrapped, tensors, low_cpu_mem_usage=True)
        except _ERRORS as fault:
            text = sanitized(" ".join(str(fault).split()), 300)
            raise _does_not_fit(f"peft raises {type(fault).__name__}: {text}") from fault
        if result.unexpected_keys:
            key = result.unexpected_keys[0].replace(f".{ADAPTER}", "")
            raise _does_not_fit(f"{key!r} is no tensor of peft's model{nearest(key, expected)}")
        if missing := [key for key, value in mirror.state_dict().items() if value.is_meta]:
            raise ValueError(f"has no {missing[0]!r}, which the configuration requires")
        parameters = dict(model.named_parameters(remove_duplicate=False))
        changes = {name: _expert(name, layer, parameters) for name, layer in mirror.layers.items()}
        changes |= {name: _rows(layer, parameters[name]) for name, layer in mirror.tokens.items()}
        return Adapter(folder, mirror, changes, _full(mirror, model))


def _options(data: object, config_class: type) -> dict[str, Any]:
    """Return the options to pass to peft. Raise an error unless the adapter is a LoRA with supported options only."""
    if not isinstance(data, dict):
        raise ValueError(f"is a {type(data).__name__}, not a JSON object")
    unsupported = "adapter-not-supported"
    if data.get("peft_type") != "LORA":
        raise CheckpointError(
            f"peft_type is {data.get('peft_type')!r}, but only adapters of type LORA can be read", code=unsupported
        )
    start = data.get("init_lora_weights", True)
    if start not in _STARTS:
        raise CheckpointError(
            f"init_lora_weights is {sanitized(start)}, which changes the base weights themselves", code=unsupported
        )
    names = {field.name for field in fields(config_class)}
    for key, value in data.items():
        if value and key not in READ | IGNORED | {"init_lora_weights"}:
            problem = "is not supported" if key in names else f"is an unknown key{nearest(key, names)}"
            raise CheckpointError(f"{key!r} {problem}; its value is {sanitized(value)}", code=unsupported)
    for rank in (data.get("r", 8), *(data.get("rank_pattern") or {}).values()):
        if not is_integer(rank, 1) or rank >= 2**31:
            raise ValueError(f"its rank is {sanitized(rank)}; give an integer of 1 or more")
    return {key: value for key, value in data.items() if key in READ}


_ERRORS = (ValueError, RuntimeError, KeyError, IndexError, NotImplementedError, TypeError, AttributeError, re.error)
"""Types of the errors that peft raises for an adapter that does not fit the model."""


def _expert(name: str, layer: Any, parameters: Mapping[str, torch.Tensor]) -> Expert:
    """Return the change of a LoRA layer. A DoRA computes diag(g) W0 + diag(g) s B A with g = m / |W0 + s B A|."""
    module = layer.get_base_layer()
    if getattr(module, "groups", 1) != 1 or isinstance(module, nn.MultiheadAttention):
        raise CheckpointError(
            f"{name}: peft's adapter of a {type(module).__name__} with groups, or of a complete attention, is not a "
            "change of its weight",
            code="adapter-not-supported",
        )
    weight = parameters[name]
    width = torch.float64 if weight.dtype == torch.float64 else torch.float32
    factors = pair_in(layer, weight.shape, width)
    if ADAPTER not in layer.lora_magnitude_vector:
        return Expert(factors.b, factors.a)
    norms = rows_with(weight, factors, is_transposed(layer)).norm(dim=1)
    row_scale = layer.lora_magnitude_vector[ADAPTER].weight.detach().cpu().double().flatten() / norms
    if not torch.isfinite(row_scale).all():
        raise CheckpointError(f"DoRA's magnitudes of {name} belong to a row of zeros", code="non-finite")
    pair = scaled(factors, row_scale, is_transposed(layer))
    return Expert(pair.b.to(width), pair.a.to(width), row_scale=row_scale)


def _rows(layer: Any, weight: torch.Tensor) -> Expert:
    """Return the change of trained rows: `b` [rows, count] selects them, and `a` [count, columns] is their change."""
    rows, base = list(layer.token_indices[ADAPTER]), dense(weight.detach()).cpu()
    width = torch.float64 if weight.dtype == torch.float64 else torch.float32
    b = torch.zeros(len(base), len(rows), dtype=width)
    b[rows, range(len(rows))] = 1
    return Expert(b, layer.trainable_tokens_delta[ADAPTER].detach().cpu().to(width) - base[rows].to(width))


def _full(mirror: Mirror, model: nn.Module) -> dict[str, torch.Tensor]:
    """Return {name: value trained in full}. Raise CheckpointError if another tensor differs from the model."""
    full = {name: value.detach() for name, value in mirror.saved_tensors().items()}
    canonical = named_weights(model).canonical
    for path, module in mirror.modules.items():
        original = model.get_submodule(path)
        for leaf, value in (*module._parameters.items(), *module._buffers.items()):
            before = getattr(original, leaf)
            if value is None or value is before:
                continue  # peft has not loaded it
            name = f"{path}.{leaf}".lstrip(".")
            if canonical.get(name) in mirror.biases:
                full[name] = value.detach()
            elif not torch.equal(value.detach().to(before), dense(before.detach())):
                raise CheckpointError(
                    f"{name!r} differs from the model, so the adapter was trained on another base", code="base-differs"
                )
    return full


def _does_not_fit(problem: str) -> CheckpointError:
    return CheckpointError(problem, code="adapter-does-not-fit")
