"""Reads and checks a LoRA or DoRA adapter that peft saved.

The header of the safetensors file is checked against the model before a tensor is read. A damaged file therefore cannot
cause an allocation that is larger than the shapes of the model justify.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from lorasc_fx.branch import Factors
from lorasc_fx.checkpoint.layout import parsed, plain_bytes, refusing, sanitized
from lorasc_fx.errors import CheckpointError, nearest, path_of
from lorasc_fx.graph import matches, named_weights
from lorasc_fx.options import scale_of
from lorasc_fx.peft.format import (
    CONFIG,
    EMBEDDING,
    ENDS,
    IGNORED,
    LINEAR,
    PREFIX,
    READ,
    TASKS,
    TENSORS,
    TOKENS,
    UNSUPPORTED,
    AdapterConfig,
    Target,
    keys_of,
    layout_of,
    lora_spec,
    parameter_layout,
    rows_with,
    ties_heads,
    token_rows,
)
from lorasc_fx.quantized import dense
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.state import Expert, scaled
from lorasc_fx.util.decode import decode

MAX_CONFIG_BYTES = 1 << 24
"""Largest accepted configuration. Configurations of large models have a few hundred thousand bytes."""
_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Accepted values of `init_lora_weights`. The others change the base weights, or need another layer."""
_ADVICE = "give the folder of a LoRA adapter that peft saved for this model"


@dataclass(frozen=True)
class Pair:
    """The change that an adapter makes to one target.

    Args:
        target: the adapted parameter.
        rank, lora_alpha: its values in the configuration.
        expert: the change as an expert, with the scale folded into `b`.
        tokens: indices of the trained rows, if the adapter trained rows instead of factors.
    """

    target: Target
    rank: int
    lora_alpha: float
    expert: Expert
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Adapter:
    """An adapter whose tensors have the shapes of a model.

    Args:
        folder: the folder of the adapter.
        config: its configuration.
        pairs: the adapted weights, by parameter name.
        full: values of parameters and buffers that were trained in full, by name.
    """

    folder: Path
    config: AdapterConfig
    pairs: Mapping[str, Pair]
    full: Mapping[str, torch.Tensor]

    def by_weight(self, model: nn.Module, untie: Iterable[str] = ()) -> dict[str, Pair]:
        """Return one pair for each weight, under the first of its tied names.

        Args:
            model: the model that the adapter was read for.
            untie: patterns of names that become separate weights.

        Raises:
            CheckpointError: the adapter changes only one name of a tied weight, or each name differently.
        """
        pairs = {}
        groups: list[list[str]] = []
        for names in named_weights(model).names.values():
            untied = [name for name in names if any(matches(pattern, (name,)) for pattern in untie)]
            tied = [name for name in names if name not in untied]
            groups += [[name] for name in untied] + ([tied] if tied else [])
        for group in groups:
            changes = [self.pairs[name] for name in group if name in self.pairs]
            if not changes:
                continue
            if len(changes) < len(group) or any(not _equal(changes[0], pair) for pair in changes[1:]):
                raise CheckpointError(
                    f"{self.folder}: {' and '.join(group)} are names of one tied weight, but the adapter changes "
                    f"{' and '.join(pair.target.name for pair in changes)} separately. Untie them: for from_peft by "
                    f"CascadeSpec(untie=({group[-1]!r},)), otherwise in the model, by "
                    f"{group[-1]} = torch.nn.Parameter({group[-1]}.detach().clone())",
                    code="tied-weights-differ",
                )
            pairs[group[0]] = changes[0]
        return pairs


def _equal(pair: Pair, other: Pair) -> bool:
    """Return whether two pairs have equal tensors."""
    tensors, others = ((item.expert.b, item.expert.a, item.expert.row_scale) for item in (pair, other))
    return all(
        x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in zip(tensors, others, strict=True)
    )


def peft_spec(folder: str | PathLike[str], model: nn.Module) -> CascadeSpec:
    """Return a spec that trains the same parameters as an adapter, with its ranks, scales and dropout.

    Use `dataclasses.replace` to change the pace, the noise or other options.

    Raises:
        CheckpointError: the adapter is damaged, not a LoRA, or for another model.
    """
    return spec_of(read_adapter(path_of(folder), model), model)


def spec_of(adapter: Adapter, model: nn.Module) -> CascadeSpec:
    """Return a spec that trains the same parameters as an adapter, with its ranks, scales and dropout."""
    config, canonical = adapter.config, named_weights(model).canonical
    return lora_spec(
        {name: (pair.rank, pair.lora_alpha) for name, pair in adapter.pairs.items() if not pair.tokens},
        (config.r, float(config.lora_alpha)),
        (canonical[name] for name in adapter.full if name in canonical),
        {canonical[name]: pair.tokens for name, pair in adapter.pairs.items() if pair.tokens},
        use_rslora=config.use_rslora,
        adapter="dora" if config.use_dora else "lora",
        dropout=float(config.lora_dropout),
    )


def read_adapter(folder: Path, model: nn.Module) -> Adapter:
    """Read the folder of an adapter and check that it fits a model.

    Raises:
        CheckpointError: the adapter is damaged, not a LoRA, or for another model. The message names file and tensor.
    """
    with refusing(folder / CONFIG, _ADVICE, code="invalid-adapter"):
        config = _config(parsed(plain_bytes(folder / CONFIG, MAX_CONFIG_BYTES, links=True)))
    path = folder / TENSORS
    # safetensors raises RuntimeError for a dtype that torch lacks.
    with refusing(path, _ADVICE, code="invalid-adapter", also=(RuntimeError,)):
        if not path.is_file():
            others = sorted(file.name for file in folder.glob("adapter_model.*"))
            hint = f"; {others[0]} is a pickle, which can run code: convert it to safetensors" if others else ""
            raise CheckpointError(f"does not exist{hint}", code="unreadable-file")
        with safe_open(path, framework="pt") as handle:
            shapes = {key: tuple(handle.get_slice(key).get_shape()) for key in list(handle.keys())}
            reader = _Reader(config, model, shapes)
            factors, trained, copies = reader.sorted()
            pairs = {
                target.name: reader.pair(target, [handle.get_tensor(keys[index]) for index in sorted(keys)])
                for target, keys in factors.items()
            }
            pairs |= reader.tokens(handle.get_tensor)
            values = {name: handle.get_tensor(key) for key, name in trained.items()}
            # The copies show whether the adapter was trained on this base.
            for key, name in copies.items():
                weight, value = dense(reader.tensors[name].detach()), handle.get_tensor(key)
                if not torch.equal(value.to(weight.device, weight.dtype), weight):
                    raise CheckpointError(
                        f"{key!r} differs from the model, so the adapter was trained on another base",
                        code="base-differs",
                    )
    return Adapter(folder, config, pairs, values)


def _config(data: object) -> AdapterConfig:
    """Check and decode the configuration of an adapter. It must be of a LoRA with supported options only."""
    if not isinstance(data, dict):
        raise ValueError(f"is a {type(data).__name__}, not a JSON object")
    known_keys, unsupported = {*IGNORED, *READ, *UNSUPPORTED}, "adapter-not-supported"
    if data.get("peft_type") != "LORA":
        raise CheckpointError(
            f"peft_type is {data.get('peft_type')!r}, but only adapters of type LORA can be read", code=unsupported
        )
    for key, value in data.items():
        if value and key in UNSUPPORTED:
            raise CheckpointError(f"{key} is {sanitized(value)}: {UNSUPPORTED[key]}", code=unsupported)
        if value and key not in known_keys:
            raise CheckpointError(
                f"{key!r} is an unknown key with the value {sanitized(value)}, which may change what the adapter "
                f"computes{nearest(key, known_keys)}",
                code=unsupported,
            )
    start = data.get("init_lora_weights", True)
    if start not in _STARTS:
        raise CheckpointError(
            f"init_lora_weights is {sanitized(start)}, which changes the base weights themselves", code=unsupported
        )
    fields = READ - {"init_lora_weights"}
    config: AdapterConfig = decode(AdapterConfig, {key: value for key, value in data.items() if key in fields})
    return config


class _Reader:
    """Matches the keys of an adapter file with the parameters of a model. The caller adds the path to its errors."""

    def __init__(self, config: AdapterConfig, model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.config, self.shapes = config, shapes
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.tensors = {**self.parameters, **dict(model.named_buffers(remove_duplicate=False))}
        self.saved = [path for path in self.modules if any(path.endswith(end) for end in config.modules_to_save or ())]
        self.token_keys = {
            f"{PREFIX}{path}.{TOKENS}": (path, rows)
            for path, rows in token_rows(config.trainable_token_indices, model).items()
        }
        self.tied = named_weights(model).names if ties_heads(model) else {}
        self.targets = [target for path, module in self.modules.items() for target in self._targets(path, module)]
        self.factors = {
            key: (target, index)
            for target, keys in keys_of(model, self.targets).items()
            for index, key in enumerate(keys[: 3 if config.use_dora else 2])
        }

    def _targets(self, path: str, module: nn.Module) -> list[Target]:
        """Return the parameters of a module that peft may adapt with this configuration."""
        parameters = dict(module.named_parameters(recurse=False))
        ends = tuple(f".{name}" for name in self.config.target_parameters or ())
        named = [leaf for leaf in parameters if f".{path}.{leaf}".endswith(ends)]
        if named:
            return [Target(path, leaf, parameter_layout(module, parameters[leaf].dim())) for leaf in named]
        weight = parameters.get("weight")
        layout = layout_of(module, weight.dim()) if weight is not None else None
        return [Target(path, "weight", layout)] if layout is not None else []

    def sorted(self) -> tuple[dict[Target, dict[int, str]], dict[str, str], dict[str, str]]:
        """Sort the keys of the file by their meaning, and check their shapes.

        Returns:
            The keys of A, B and the magnitudes (0, 1 and 2) of each target. Then, by key, the names of the tensors that
            were trained in full, and the names of tensors that are copies of the base.
        """
        factors: dict[Target, dict[int, str]] = {}
        full: dict[str, str] = {}
        copies: dict[str, str] = {}
        for key, shape in self.shapes.items():
            if key in self.token_keys:
                continue
            if key in self.factors:
                target, index = self.factors[key]
                factors.setdefault(target, {})[index] = key
                continue
            plain = key.removeprefix(PREFIX)
            names = (plain, _unwrapped(plain)) if key.startswith(PREFIX) else ()
            name = next((name for name in names if name in self.tensors), None)
            if name is None:
                raise self._unknown(key)
            expected = tuple(self.tensors[name].shape)
            if shape != expected:
                raise _does_not_fit(f"{key!r} is {list(shape)}, but {name} of the model is {list(expected)}")
            is_bias = self.config.bias != "none" and name.endswith("bias")
            in_saved = any(name.startswith(f"{module}.") for module in self.saved)
            (full if is_bias or in_saved else copies)[key] = name
        for target, keys in factors.items():
            self._check(target, keys)
        if not factors and not self.token_keys:
            raise ValueError("has no LoRA factors")
        self._check_saved(set(full.values()))
        return factors, full, copies

    def pair(self, target: Target, tensors: list[torch.Tensor]) -> Pair:
        """Return the expert of a target from A, B and, for DoRA, the magnitudes."""
        lora_a, lora_b, *magnitudes = tensors
        rank, alpha = self.config.rank_of(target.pattern), self.config.alpha_of(target.pattern)
        scale = scale_of(rank, alpha, self.config.use_rslora)
        weight = self.parameters[target.name]
        for tensor in tensors:
            if not tensor.is_floating_point():
                raise ValueError(f"the factors of {target.path} are {tensor.dtype}, not floating-point numbers")
        width = torch.float64 if torch.float64 in (weight.dtype, lora_a.dtype, lora_b.dtype) else torch.float32
        factors = target.layout.from_peft(lora_a.to(width), lora_b.to(width), weight.shape)
        if not (torch.isfinite(factors.a).all() and torch.isfinite(factors.b).all()):
            raise CheckpointError(f"the factors of {target.path} hold inf or nan", code="non-finite")
        factors = Factors(factors.b * scale, factors.a)
        if not magnitudes:
            return Pair(target, rank, alpha, Expert(factors.b, factors.a))
        # DoRA (2402.09353): diag(m / |W0 + s B A|) (W0 + s B A) = diag(g) W0 + diag(g) s B A.
        norms = rows_with(weight, factors, target.layout.transposed).norm(dim=1)
        row_scale = magnitudes[0].double().flatten() / norms
        if not torch.isfinite(row_scale).all():
            raise CheckpointError(
                f"DoRA's magnitudes of {target.path} hold inf or nan, or belong to a row of zeros", code="non-finite"
            )
        pair = scaled(factors, row_scale, target.layout.transposed)
        return Pair(target, rank, alpha, Expert(pair.b.to(width), pair.a.to(width), row_scale=row_scale))

    def tokens(self, read: Callable[[str], torch.Tensor]) -> dict[str, Pair]:
        """Return the experts of trained rows. Their delta is the difference between the trained and the base rows."""
        pairs = {}
        for key, (path, rows) in self.token_keys.items():
            layout, weight = layout_of(self.modules[path], 2), self.parameters.get(f"{path}.weight")
            if weight is None or layout not in (LINEAR, EMBEDDING):
                raise _does_not_fit(f"trainable_token_indices: {path} is neither an embedding nor a linear layer")
            if key not in self.shapes:
                raise ValueError(f"has no {key!r}, but trainable_token_indices says that these rows were trained")
            if max(rows, default=0) >= len(weight) or self.shapes[key] != (len(rows), weight.shape[1]):
                raise _does_not_fit(
                    f"{key!r} is {list(self.shapes[key])}, which does not fit the rows {sanitized(list(rows))} of "
                    f"{path}.weight {list(weight.shape)}"
                )
            values, base = read(key), dense(weight.detach())
            width = torch.float64 if torch.float64 in (values.dtype, base.dtype) else torch.float32
            if not (values.is_floating_point() and bool(torch.isfinite(values).all())):
                raise CheckpointError(f"{key!r} holds inf, nan or integers", code="non-finite")
            # b [rows of the weight, count] selects the trained rows, so that b @ a is their change.
            b = torch.zeros(len(base), len(rows), dtype=width)
            b[list(rows), range(len(rows))] = 1
            expert = Expert(b, values.to(width) - base[list(rows)].cpu().to(width))
            name = f"{path}.weight"
            for alias in next((names for names in self.tied.values() if name in names), (name,)):
                pairs[alias] = Pair(Target(path, "weight", layout), len(rows), 1.0, expert, rows)
        return pairs

    def _unknown(self, key: str) -> Exception:
        """Return the error for a key that peft does not write for this model."""
        if not key.startswith(PREFIX):
            return ValueError(f"{key!r} does not start with {PREFIX!r}, as all keys of peft do")
        name = key.removeprefix(PREFIX)
        end = next((end for end in ENDS if name.endswith(f".{end}")), None)
        if end is None:
            magnitudes = "a DoRA magnitude, but its module is not adapted with use_dora"
            meaning = magnitudes if "lora_magnitude_vector" in name else "neither a tensor of the model nor a factor"
            return _does_not_fit(f"{key!r} is {meaning}{nearest(name, self.tensors)}")
        path = _unwrapped(name.removesuffix(f".{end}"))
        module, parent = self.modules.get(path), self.modules.get(path.rpartition(".")[0])
        if module is None:
            return _does_not_fit(f"{key!r}: the model has no module {path}{nearest(path, self.modules)}")
        if isinstance(module, nn.MultiheadAttention) or isinstance(parent, nn.MultiheadAttention):
            return CheckpointError(
                f"{key!r} adapts a complete nn.MultiheadAttention, where peft merges the change of out_proj twice. "
                "Train its parameters with target_parameters instead",
                code="adapter-not-supported",
            )
        if any(target.path == path for target in self.targets):
            return ValueError(f"{key!r} is not a key that peft uses for the factors of {path}")
        grouped = (
            " (peft's change of a grouped convolution mixes the groups)" if getattr(module, "groups", 1) > 1 else ""
        )
        return _does_not_fit(f"{key!r}: {path} is a {type(module).__name__}, which cannot have this adapter{grouped}")

    def _check(self, target: Target, keys: Mapping[int, str]) -> None:
        """Check the number, rank and shapes of the factors of a target."""
        if len(keys) != (3 if self.config.use_dora else 2):
            parts = "two factors and DoRA's magnitudes" if self.config.use_dora else "two factors"
            raise ValueError(f"{target.path} has only {' and '.join(map(repr, keys.values()))}, but needs {parts}")
        shape = tuple(self.parameters[target.name].shape)
        rank = self.config.rank_of(target.pattern)
        if target.is_parameter and len(shape) not in (2, 3):
            raise CheckpointError(
                f"{keys[0]!r}: {target.name} has {len(shape)} axes, but peft adapts only parameters with 2 or 3",
                code="adapter-not-supported",
            )
        shapes = (*target.layout.shapes(shape, rank), target.layout.magnitude_shape(shape))
        for index, key in keys.items():
            if self.shapes[key] != shapes[index]:
                raise _does_not_fit(
                    f"{key!r} is {list(self.shapes[key])}. It must be {list(shapes[index])} for {target.name} "
                    f"{list(shape)} and the rank {rank} of the configuration"
                )

    def _check_saved(self, names: set[str]) -> None:
        """Raise if the file lacks a parameter that was trained in full according to modules_to_save."""
        for end in self.config.modules_to_save or ():
            modules = [path for path in self.saved if path.endswith(end)]
            if not modules and not any(end in heads for _, heads in TASKS.values()):
                raise _does_not_fit(f"modules_to_save: the model has no module {end}{nearest(end, self.modules)}")
            for path in modules:
                expected = [name for name in self.parameters if name.startswith(f"{path}.")]
                missing = next((name for name in expected if name not in names), None)
                if missing is not None:
                    raise ValueError(f"has no {missing}, but modules_to_save says that it was trained in full")


def _does_not_fit(problem: str) -> CheckpointError:
    return CheckpointError(problem, code="adapter-does-not-fit")


def _unwrapped(name: str) -> str:
    """Remove the parts `base_layer`, which peft adds for wrapped modules, from a name."""
    return ".".join(part for part in name.split(".") if part != "base_layer")
