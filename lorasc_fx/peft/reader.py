"""Read and check a LoRA or DoRA adapter that peft saved.

The header of the safetensors file is compared with the model before a tensor is read, so that no file makes us allocate
more than the model's own shapes allow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lorasc_fx.checkpoint.layout import plain_bytes, sanitized
from lorasc_fx.checkpoint.manifest import parsed
from lorasc_fx.errors import CheckpointError, SpecError, nearest, path_of
from lorasc_fx.graph import named_weights
from lorasc_fx.options import SCALES
from lorasc_fx.peft.format import (
    CONFIG,
    ENDS,
    IGNORED,
    PREFIX,
    RANKS,
    READ,
    TENSORS,
    UNSUPPORTED,
    AdapterConfig,
    Target,
    keys_of,
    layout_of,
    lora_spec,
    parameter_layout,
)
from lorasc_fx.quantized import dense
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.state import Expert, Factors, scaled
from lorasc_fx.util.decode import decode


def peft_spec(folder: str | PathLike[str], model: nn.Module) -> CascadeSpec:
    """Return a spec that adapts what an adapter does, at its ranks, scales and dropout, and trains what it trained.

    `dataclasses.replace` gives it another pace or noise.

    Raises:
        CheckpointError: as `from_peft` does.
    """
    return spec_of(read_adapter(path_of(folder), model), model)


def spec_of(adapter: Adapter, model: nn.Module) -> CascadeSpec:
    """Return a spec with the ranks, scales and dropout of an adapter that was read."""
    config, canonical = adapter.config, named_weights(model).canonical
    return lora_spec(
        {name: (pair.rank, pair.lora_alpha) for name, pair in adapter.pairs.items()},
        (config.r, float(config.lora_alpha)),
        (canonical[name] for name in adapter.whole if name in canonical),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        dropout=float(config.lora_dropout),
    )


LONGEST = 1 << 24
"""Bytes of a configuration; those of large models have a few hundred thousand."""

_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""What `init_lora_weights` may be: the others change the base weights, or need another layer."""
_FIELDS = READ - {"init_lora_weights"}


def read_config(folder: Path) -> AdapterConfig:
    """Read the configuration of an adapter folder.

    Raises:
        CheckpointError: there is none, it is damaged, or it is not that of a LoRA; says what and why.
    """
    path = folder / CONFIG
    try:
        data = parsed(plain_bytes(path, LONGEST, links=True))
    except OSError as fault:
        raise CheckpointError(
            f"{path}: cannot be read: {fault.strerror}; give the folder of a peft adapter", code="unreadable-file"
        ) from fault
    except ValueError as fault:
        raise CheckpointError(f"{path}: is no JSON: {fault}", code="invalid-adapter") from fault
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: is a {type(data).__name__}, not a table", code="invalid-adapter")
    if data.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path}: peft_type is {data.get('peft_type')!r}; only LORA is a change by factors",
            code="adapter-not-supported",
        )
    for key, value in data.items():
        if key in UNSUPPORTED and value:
            raise CheckpointError(
                f"{path}: {key} is {sanitized(value)}: {UNSUPPORTED[key]}", code="adapter-not-supported"
            )
        if value and key not in {*IGNORED, *READ, *UNSUPPORTED}:
            hint = nearest(key, {*IGNORED, *READ, *UNSUPPORTED})
            raise CheckpointError(
                f"{path}: {key!r} is {sanitized(value)}, a key that this version does not know{hint}; "
                "it may change what the adapter computes",
                code="adapter-not-supported",
            )
    start = data.get("init_lora_weights", True)
    if start not in _STARTS:
        raise CheckpointError(
            f"{path}: init_lora_weights is {sanitized(start)}, which changes the base weights themselves",
            code="adapter-not-supported",
        )
    try:
        config: AdapterConfig = decode(AdapterConfig, {key: value for key, value in data.items() if key in _FIELDS})
    except SpecError as fault:
        raise CheckpointError(f"{path}: {fault}", code="invalid-adapter") from fault
    return config


_HEADS = ("classifier", "score", "qa_outputs")
"""What peft adds to modules_to_save for a task, whether the model has it or not."""


@dataclass(frozen=True)
class Pair:
    """Of one target: rank and lora_alpha as peft has them, and the expert, with the scale in `b`."""

    target: Target
    rank: int
    lora_alpha: float
    expert: Expert


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits a model.

    Args:
        folder: where it lies.
        config: of it.
        pairs: by the name of the weight.
        whole: values of parameters and buffers that were trained in full, by name.
    """

    folder: Path
    config: AdapterConfig
    pairs: Mapping[str, Pair]
    whole: Mapping[str, torch.Tensor]


def read_adapter(folder: Path, model: nn.Module) -> Adapter:
    """Read an adapter folder and hold it against a model.

    Raises:
        CheckpointError: it is damaged, no LoRA, or of another model; names file and tensor.
    """
    config = read_config(folder)
    path = folder / TENSORS
    if not path.is_file():
        other = sorted(file.name for file in folder.glob("adapter_model.*"))
        hint = f"; {other[0]} is a pickle, which can run code: save it anew as safetensors" if other else ""
        hint = hint or "; give the folder of an adapter that peft has saved"
        raise CheckpointError(f"{path}: is not there{hint}", code="unreadable-file")
    try:
        with safe_open(path, framework="pt") as handle:
            shapes = {key: tuple(handle.get_slice(key).get_shape()) for key in list(handle.keys())}
            reader = _Reader(path, config, model, shapes)
            factors, whole, copies = reader.sorted()
            pairs = {
                target.name: reader.pair(target, *(handle.get_tensor(key) for key in keys))
                for target, keys in factors.items()
            }
            values = {name: handle.get_tensor(key) for key, name in whole.items()}
            for key, name in copies.items():
                reader.check_copy(key, name, handle.get_tensor(key))
    except (OSError, SafetensorError) as fault:
        raise CheckpointError(f"{path}: cannot be read: {fault}", code="unreadable-file") from fault
    return Adapter(folder, config, pairs, values)


class _Reader:
    """Holds the keys of a file against those that peft writes for this model."""

    def __init__(
        self, path: Path, config: AdapterConfig, model: nn.Module, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self.path, self.config, self.shapes = path, config, shapes
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.tensors = {**self.parameters, **dict(model.named_buffers(remove_duplicate=False))}
        self.saved = [path for path in self.modules if any(path.endswith(end) for end in config.modules_to_save or ())]
        self.targets = [target for path, module in self.modules.items() for target in self._targets(path, module)]
        self.factors = {
            key: (target, index)
            for target, keys in keys_of(model, self.targets).items()
            for index, key in enumerate(keys[: 3 if config.use_dora else 2])
        }

    def _targets(self, path: str, module: nn.Module) -> list[Target]:
        """Return what peft may adapt of a module's own parameters, under this configuration."""
        parameters = dict(module.named_parameters(recurse=False))
        ends = tuple(f".{name}" for name in self.config.target_parameters or ())
        named = [leaf for leaf in parameters if f".{path}.{leaf}".endswith(ends)]
        if named:
            return [Target(path, leaf, parameter_layout(module, parameters[leaf].dim())) for leaf in named]
        weight = parameters.get("weight")
        layout = layout_of(module, weight.dim()) if weight is not None else None
        return [Target(path, "weight", layout)] if layout is not None else []

    def sorted(self) -> tuple[dict[Target, list[str]], dict[str, str], dict[str, str]]:
        """Return the keys of the factors by target, those of what was trained in full, and those of copies of the base,
        both with names.
        """
        factors: dict[Target, dict[int, str]] = {}
        whole: dict[str, str] = {}
        copies: dict[str, str] = {}
        for key, shape in self.shapes.items():
            if key in self.factors:
                target, index = self.factors[key]
                factors.setdefault(target, {})[index] = key
                continue
            name = self._plain(key)
            if name is None:
                raise self._unknown(key)
            expected = tuple(self.tensors[name].shape)
            if shape != expected:
                raise CheckpointError(
                    f"{self.path}: {key!r} is {list(shape)}, and {name} of the model is {list(expected)}",
                    code="adapter-does-not-fit",
                )
            is_bias = self.config.bias != "none" and name.endswith("bias")
            in_saved = any(name.startswith(f"{module}.") for module in self.saved)
            (whole if is_bias or in_saved else copies)[key] = name
        pairs = {target: [keys[index] for index in sorted(keys)] for target, keys in factors.items()}
        for target, pair in pairs.items():
            self._check(target, pair)
        if not pairs:
            raise CheckpointError(f"{self.path}: holds no factors", code="invalid-adapter")
        self._check_saved(set(whole.values()))
        return pairs, whole, copies

    def pair(
        self, target: Target, lora_a: torch.Tensor, lora_b: torch.Tensor, magnitude: torch.Tensor | None = None
    ) -> Pair:
        """Return a target's expert, in our layout."""
        rank, alpha = self.config.rank_of(target.pattern), self.config.alpha_of(target.pattern)
        scale = SCALES[self.config.use_rslora].scale(rank, alpha)
        weight = self.parameters[target.name]
        for tensor in (lora_a, lora_b, *(() if magnitude is None else (magnitude,))):
            if not tensor.is_floating_point():
                raise CheckpointError(
                    f"{self.path}: the factors of {target.path} are {tensor.dtype}, not floating numbers",
                    code="invalid-adapter",
                )
        width = torch.float64 if torch.float64 in (weight.dtype, lora_a.dtype, lora_b.dtype) else torch.float32
        factors = target.layout.from_peft(lora_a.to(width), lora_b.to(width), weight.shape)
        if not (torch.isfinite(factors.a).all() and torch.isfinite(factors.b).all()):
            raise CheckpointError(f"{self.path}: the factors of {target.path} hold inf or nan", code="non-finite")
        factors = Factors(factors.b * scale, factors.a)
        if magnitude is None:
            return Pair(target, rank, alpha, Expert(factors.b, factors.a))
        row_scale = self._row_scale(target, factors, magnitude.double().flatten())
        pair = scaled(factors, row_scale, target.layout.transposed)
        return Pair(target, rank, alpha, Expert(pair.b.to(width), pair.a.to(width), row_scale=row_scale))

    def _row_scale(self, target: Target, factors: Factors, magnitude: torch.Tensor) -> torch.Tensor:
        """Return g [out] of DoRA (2402.09353): `diag(m / |W0 + s B A|) (W0 + s B A) = diag(g) W0 + diag(g) s B A`."""
        weight = dense(self.parameters[target.name].detach()).cpu().double()
        total = weight + (factors.b.double() @ factors.a.double()).view_as(weight)
        row_scale: torch.Tensor = magnitude / (total.mT if target.layout.transposed else total).flatten(1).norm(dim=1)
        if not torch.isfinite(row_scale).all():
            raise CheckpointError(
                f"{self.path}: DoRA's magnitudes of {target.path} hold inf or nan, or stand beside a row of zeros",
                code="non-finite",
            )
        return row_scale

    def check_copy(self, key: str, name: str, value: torch.Tensor) -> None:
        """Refuse a copy of a base weight that is another: peft writes embeddings along with their adapters."""
        weight = dense(self.tensors[name].detach())
        if not torch.equal(value.to(weight.device, weight.dtype), weight):
            raise CheckpointError(
                f"{self.path}: {key!r} is not what the model holds; the adapter is of another base",
                code="base-differs",
            )

    def _unknown(self, key: str) -> CheckpointError:
        """Return what is wrong with a key that peft does not write for this model."""
        if not key.startswith(PREFIX):
            return CheckpointError(
                f"{self.path}: {key!r} does not start with {PREFIX!r}, as keys of peft do", code="invalid-adapter"
            )
        name = key.removeprefix(PREFIX)
        end = next((end for end in ENDS if name.endswith(f".{end}")), None)
        if end is None:
            of_dora = "DoRA's magnitudes, of nothing that is adapted with use_dora"
            what = of_dora if "lora_magnitude_vector" in name else "nothing of the model, nor factors"
            return CheckpointError(
                f"{self.path}: {key!r} is {what}{nearest(name, self.tensors)}", code="adapter-does-not-fit"
            )
        path = _unwrapped(name.removesuffix(f".{end}"))
        module, parent = self.modules.get(path), self.modules.get(path.rpartition(".")[0])
        if module is None:
            return CheckpointError(
                f"{self.path}: {key!r}: the model has no module {path}{nearest(path, self.modules)}",
                code="adapter-does-not-fit",
            )
        if isinstance(module, nn.MultiheadAttention) or isinstance(parent, nn.MultiheadAttention):
            return CheckpointError(
                f"{self.path}: {key!r} is of an adapter of a whole nn.MultiheadAttention, of which peft itself merges "
                "the change of out_proj twice; train its parameters by target_parameters",
                code="adapter-not-supported",
            )
        if any(target.path == path for target in self.targets):
            return CheckpointError(
                f"{self.path}: {key!r} is not how peft keeps a pair of {path}", code="invalid-adapter"
            )
        grouped = ", whose change mixes the groups" if getattr(module, "groups", 1) != 1 else ""
        return CheckpointError(
            f"{self.path}: {key!r}: {path} is a {type(module).__name__}{grouped}; nothing of it can hold this adapter",
            code="adapter-does-not-fit",
        )

    def _check(self, target: Target, keys: Sequence[str]) -> None:
        if len(keys) != (3 if self.config.use_dora else 2):
            parts = "two factors and DoRA's magnitudes" if self.config.use_dora else "two factors"
            raise CheckpointError(
                f"{self.path}: {target.path} has {' and '.join(map(repr, keys))}, not {parts}", code="invalid-adapter"
            )
        shape = tuple(self.parameters[target.name].shape)
        rank = self.config.rank_of(target.pattern)
        if target.is_parameter and len(shape) not in (2, 3):
            raise CheckpointError(
                f"{self.path}: {keys[0]!r}: {target.name} has {len(shape)} axes; peft adapts 2 or 3",
                code="adapter-not-supported",
            )
        if rank > max(shape[0], math.prod(shape[1:]), RANKS[-1]):
            raise CheckpointError(
                f"{self.path}: {target.name} is {list(shape)}, and rank {rank} is more than it can use",
                code="adapter-does-not-fit",
            )
        shapes = (*target.layout.shapes(shape, rank), target.layout.magnitude_shape(shape))
        for key, wanted in zip(keys, shapes, strict=False):
            if self.shapes[key] != wanted:
                raise CheckpointError(
                    f"{self.path}: {key!r} is {list(self.shapes[key])}; for {target.name} {list(shape)} at rank {rank} "
                    f"of the configuration it is {list(wanted)}",
                    code="adapter-does-not-fit",
                )

    def _plain(self, key: str) -> str | None:
        """Return the model's own name of a tensor that is no factor, or None."""
        name = key.removeprefix(PREFIX)
        names = (name, _unwrapped(name)) if key.startswith(PREFIX) else ()
        return next((plain for plain in names if plain in self.tensors), None)

    def _check_saved(self, names: set[str]) -> None:
        """Refuse an adapter that lacks what its configuration says it trained in full."""
        for end in self.config.modules_to_save or ():
            modules = [path for path in self.saved if path.endswith(end)]
            if not modules and end not in _HEADS:
                raise CheckpointError(
                    f"{self.path.with_name(CONFIG)}: modules_to_save: the model has no module {end}"
                    f"{nearest(end, self.modules)}",
                    code="adapter-does-not-fit",
                )
            for path in modules:
                wanted = [name for name in self.parameters if name.startswith(f"{path}.")]
                lacking = next((name for name in wanted if name not in names), None)
                if lacking is not None:
                    raise CheckpointError(
                        f"{self.path}: has no {lacking}, which modules_to_save says was trained",
                        code="invalid-adapter",
                    )


def _unwrapped(name: str) -> str:
    """Return a name without what peft adds where it has wrapped modules."""
    return ".".join(part for part in name.split(".") if part != "base_layer")
