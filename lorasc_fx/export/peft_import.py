"""A LoRA adapter of peft as the first expert of a cascade, whose slow weights are then what peft merges.

The header of the safetensors file is compared with the model before a tensor is read, so that no file makes us allocate
more than the model's own shapes allow.
"""

from __future__ import annotations

import glob
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lorasc_fx.adapt import adapt
from lorasc_fx.capture import open_model
from lorasc_fx.checks import is_integer, is_number
from lorasc_fx.errors import CheckpointError, nearest, path_of
from lorasc_fx.graph import matches, named_weights
from lorasc_fx.options import SCALES
from lorasc_fx.peft_format import (
    CONFIG,
    FOREIGN,
    IDLE,
    LAYOUTS,
    PREFIX,
    RANKS,
    TENSORS,
    USED,
    Parameter,
    Place,
    by_pattern,
    layout_of,
)
from lorasc_fx.quantized import dense
from lorasc_fx.runtime import Cascade
from lorasc_fx.runtime.experts import install_experts
from lorasc_fx.spec import CascadeSpec, Rule
from lorasc_fx.state import Factors

__all__ = ["from_peft", "peft_spec"]


def from_peft(
    folder: str | PathLike[str],
    model: nn.Module | torch.export.ExportedProgram | str | PathLike[str],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    spec: CascadeSpec | None = None,
    frontend: str = "auto",
    base: str | PathLike[str] = "memory",
) -> Cascade:
    """Adapt a model, and take a LoRA adapter that peft trained as the first expert, with coefficient 1.

    Plain LoRA, rsLoRA, patterns of ranks and alphas, linears, transformers' Conv1D, convolutions, embeddings,
    parameters (`target_parameters`), `modules_to_save`, biases. JSON and safetensors are read, and nothing else.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        model, args, kwargs, frontend, base: as for `adapt`; the model is the adapter's base.
        spec: what is asked of the training that follows; by default `export.peft_spec(folder, model)`. It has to adapt
            every weight that the adapter does, and to train in full what the adapter did.

    Returns:
        The cascade at stage 1. Its slow weights are the base with the adapter merged, exactly; its branches are new.

    Raises:
        CheckpointError: the adapter is damaged, of another model, or no plain LoRA; or the spec leaves out what it
        holds. And what `adapt` raises. The model is as it was.
    """
    opened = open_model(model)
    adapter = read_adapter(path_of(folder), opened)
    asked = spec if spec is not None else _spec_of(adapter, opened)
    changes = _changes(adapter, opened, asked)
    cascade = adapt(opened, args, kwargs, spec=asked, frontend=frontend, base=base)
    try:
        _install(cascade, adapter, changes)
    except BaseException:
        cascade.release()
        raise
    return cascade


def peft_spec(folder: str | PathLike[str], model: nn.Module) -> CascadeSpec:
    """Return a spec that adapts what an adapter does, at its ranks, scales and dropout, and trains what it trained.

    `dataclasses.replace` gives it another pace or noise.

    Raises:
        CheckpointError: as `from_peft` does.
    """
    return _spec_of(read_adapter(path_of(folder), model), model)


def _spec_of(adapter: Adapter, model: nn.Module) -> CascadeSpec:
    config, canonical = adapter.config, named_weights(model).canonical
    usual = (config.rank, config.lora_alpha)
    rules = [
        Rule(glob.escape(name), pair.rank, pair.lora_alpha)
        for name, pair in adapter.pairs.items()
        if (pair.rank, pair.lora_alpha) != usual
    ]
    return CascadeSpec(
        targets=tuple(glob.escape(name) for name in adapter.pairs),
        train=tuple(dict.fromkeys(glob.escape(canonical[name]) for name in adapter.whole if name in canonical)),
        rules=tuple(rules),
        rank=config.rank,
        lora_alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        dropout=config.dropout,
    )


def _changes(adapter: Adapter, model: nn.Module, spec: CascadeSpec) -> dict[str, Pair]:
    """Return the pairs, one for each weight as it will be tied.

    Raises:
        CheckpointError: of a tied weight the adapter changes one name only, or each in another way.
    """
    changes = {}
    groups: list[list[str]] = []
    for names in named_weights(model).names.values():
        apart = [name for name in names if any(matches(pattern, (name,)) for pattern in spec.untie)]
        rest = [name for name in names if name not in apart]
        groups += [[name] for name in apart] + ([rest] if rest else [])
    for group in groups:
        held = [adapter.pairs[name] for name in group if name in adapter.pairs]
        if not held:
            continue
        if len(held) < len(group) or any(not _same(held[0], pair) for pair in held[1:]):
            raise CheckpointError(
                f"{adapter.folder}: {' and '.join(group)} are one weight, and the adapter changes "
                f"{' and '.join(pair.place.name for pair in held)}, each by itself; untie them: spec with "
                f"untie=({group[-1]!r},)",
                code="tied-weights-differ",
            )
        changes[group[0]] = held[0]
    return changes


def _same(one: Pair, other: Pair) -> bool:
    pairs = ((one.factors.b, other.factors.b), (one.factors.a, other.factors.a))
    return one.scale == other.scale and all(x.shape == y.shape and torch.equal(x, y) for x, y in pairs)


def _install(cascade: Cascade, adapter: Adapter, changes: Mapping[str, Pair]) -> None:
    """Put an adapter into a cascade whose stage has not begun."""
    run, canonical = cascade._run, named_weights(cascade.model).canonical
    reasons = {refusal.weight: f"{refusal.reason.value} ({refusal.sentence})" for refusal in cascade.refusals}
    experts, left_out = {}, []
    for name, pair in changes.items():
        own = canonical[name]
        if run.plan.site(own) is None:
            left_out.append(f"{own} is not adapted here: {reasons.get(own, 'no call has used it yet')}")
            continue
        experts[own] = [(1.0, Factors(pair.factors.b * pair.scale, pair.factors.a))]
    trained, buffers = {}, {}
    for name, value in adapter.whole.items():
        if name not in canonical:
            buffers[name] = value
        elif canonical[name] in run.slow.trained:
            trained[canonical[name]] = value
        else:
            left_out.append(f"{name} was trained in full; add it to spec.train")
    if left_out:
        raise CheckpointError(
            f"{adapter.folder}: the spec leaves out what the adapter holds: {'; '.join(left_out)}",
            code="spec-omits-adapter",
        )
    install_experts(run, experts, trained, buffers)


LONGEST = 1 << 24
"""Bytes of a configuration; those of large models have a few hundred thousand."""

_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""What `init_lora_weights` may be: the others change the base weights, or need another layer."""


@dataclass(frozen=True)
class AdapterConfig:
    """What of a configuration counts.

    Args:
        path: of the file, for messages.
        rank, lora_alpha: where no pattern says otherwise.
        ranks, alphas: by pattern.
        use_rslora, dropout: of all.
        saved: ends of paths of modules that are saved whole.
        parameters: names, or ends of names, of adapted parameters.
        bias: `none`, `all` or `lora_only`.
    """

    path: Path
    rank: int
    lora_alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    use_rslora: bool
    dropout: float
    saved: tuple[str, ...]
    parameters: tuple[str, ...]
    bias: str

    def rank_of(self, name: str) -> int:
        """Return the rank of a module, or parameter, of this name."""
        return by_pattern(self.ranks, name, self.rank)

    def alpha_of(self, name: str) -> float:
        """Return lora_alpha of a module, or parameter, of this name."""
        return by_pattern(self.alphas, name, self.lora_alpha)


def read_config(folder: Path) -> AdapterConfig:
    """Read the configuration of an adapter folder.

    Raises:
        CheckpointError: there is none, it is damaged, or it is not that of a plain LoRA; says what and why.
    """
    path = folder / CONFIG
    try:
        if path.stat().st_size > LONGEST:
            raise CheckpointError(
                f"{path}: is larger than {LONGEST >> 20} MiB, which no adapter's configuration is",
                code="file-too-large",
            )
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as fault:
        raise CheckpointError(
            f"{path}: cannot be read: {fault.strerror}; give the folder of a peft adapter", code="unreadable-file"
        ) from fault
    except (ValueError, RecursionError) as fault:
        raise CheckpointError(f"{path}: is no JSON: {fault}", code="invalid-adapter") from fault
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: is a {type(data).__name__}, not a table", code="invalid-adapter")
    if data.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path}: peft_type is {data.get('peft_type')!r}; only LORA is a change by factors",
            code="adapter-not-supported",
        )
    for key, value in data.items():
        if key in FOREIGN and value:
            raise CheckpointError(f"{path}: {key} is {_short(value)}: {FOREIGN[key]}", code="adapter-not-supported")
        if value and key not in {*IDLE, *USED, *FOREIGN}:
            hint = nearest(key, {*IDLE, *USED, *FOREIGN})
            raise CheckpointError(
                f"{path}: {key!r} is {_short(value)}, a key that this version does not know{hint}; "
                "it may change what the adapter computes",
                code="adapter-not-supported",
            )
    start = data.get("init_lora_weights", True)
    if start not in _STARTS:
        raise CheckpointError(
            f"{path}: init_lora_weights is {_short(start)}, which changes the base weights themselves",
            code="adapter-not-supported",
        )
    return AdapterConfig(
        path,
        _count(path, "r", data.get("r", 8)),
        _positive(path, "lora_alpha", data.get("lora_alpha", 8)),
        {key: _count(path, f"rank_pattern[{key!r}]", value) for key, value in _patterns(path, "rank_pattern", data)},
        {key: _positive(path, f"alpha_pattern[{key!r}]", v) for key, v in _patterns(path, "alpha_pattern", data)},
        _one_of(path, "use_rslora", data.get("use_rslora", False), (False, True)),
        _share(path, data.get("lora_dropout", 0.0)),
        _strings(path, "modules_to_save", data),
        _strings(path, "target_parameters", data),
        _one_of(path, "bias", data.get("bias", "none"), ("none", "all", "lora_only")),
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _count(path: Path, name: str, value: Any) -> int:
    if not is_integer(value, 1):
        raise CheckpointError(
            f"{path}: {name} is {_short(value)}; a rank is an integer of 1 or more", code="invalid-adapter"
        )
    return value


def _positive(path: Path, name: str, value: Any) -> float:
    if not is_number(value) or not 0 < value < 1e30:
        raise CheckpointError(
            f"{path}: {name} is {_short(value)}; it scales the factors: a number above 0", code="invalid-adapter"
        )
    return float(value)


def _share(path: Path, value: Any) -> float:
    if not is_number(value) or not 0 <= value < 1:
        raise CheckpointError(f"{path}: lora_dropout is {_short(value)}, not a share in [0, 1)", code="invalid-adapter")
    return float(value)


def _one_of(path: Path, name: str, value: Any, known: tuple[Any, ...]) -> Any:
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in known):
        raise CheckpointError(
            f"{path}: {name} is {_short(value)}, not one of {', '.join(map(str, known))}", code="invalid-adapter"
        )
    return value


def _strings(path: Path, name: str, data: Mapping[str, Any]) -> tuple[str, ...]:
    value = data.get(name) or []
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise CheckpointError(f"{path}: {name} is {_short(value)}, not a list of names", code="invalid-adapter")
    return tuple(value)


def _patterns(path: Path, name: str, data: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the patterns and their values; one that could keep a search busy for long is refused."""
    value = data.get(name) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {name} is {_short(value)}, not a table", code="invalid-adapter")
    for key in value:
        repeats = re.findall(r"(?<!\\)[*+{]", key)
        try:
            re.compile(key)
        except (re.error, OverflowError, RecursionError) as fault:
            raise CheckpointError(
                f"{path}: {name}: {_short(key)} is no regular expression: {fault}", code="invalid-adapter"
            ) from fault
        if len(repeats) > 3 or re.search(r"\)[*+{]", key):
            raise CheckpointError(
                f"{path}: {name}: {_short(key)} repeats too much to be searched for safely", code="invalid-adapter"
            )
    return list(value.items())


_HEADS = ("classifier", "score", "qa_outputs")
"""What peft adds to modules_to_save for a task, whether the model has it or not."""

_ENDS = {key: index for layout in LAYOUTS for index, key in enumerate(layout.keys)}
"""Whether the last part of a key is that of an A (0) or of a B (1)."""


@dataclass(frozen=True)
class Pair:
    """Of one place: the factors as peft has them, in our layout without the scale, and what scales them."""

    place: Place
    rank: int
    lora_alpha: float
    scale: float
    factors: Factors


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
        CheckpointError: it is damaged, no plain LoRA, or of another model; names file and tensor.
    """
    config = read_config(folder)
    path = folder / TENSORS
    if not path.is_file():
        other = sorted(file.name for file in folder.glob("adapter_model.*"))
        hint = f"; {other[0]} is a pickle, which can run code: save it anew as safetensors" if other else ""
        hint = hint or "; give the folder of an adapter that peft has saved"
        raise CheckpointError(f"{path}: is not there{hint}", code="file-not-found")
    try:
        with safe_open(path, framework="pt") as handle:
            reader = _Reader(
                path, config, model, {key: tuple(handle.get_slice(key).get_shape()) for key in list(handle.keys())}
            )
            pairs, whole, copies = reader.sorted()
            found = {
                place.name: reader.pair(place, *(handle.get_tensor(key) for key in keys))
                for place, keys in pairs.items()
            }
            values = {name: handle.get_tensor(key) for key, name in whole.items()}
            for key, name in copies.items():
                reader.check_copy(key, name, handle.get_tensor(key))
    except (OSError, SafetensorError) as fault:
        raise CheckpointError(f"{path}: cannot be read: {fault}", code="unreadable-file") from fault
    return Adapter(folder, config, found, values)


class _Reader:
    """Says of each key of the file what it is for."""

    def __init__(
        self, path: Path, config: AdapterConfig, model: nn.Module, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self.path, self.config, self.shapes = path, config, shapes
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.held = {**self.parameters, **dict(model.named_buffers(remove_duplicate=False))}
        self.saved = [path for path in self.modules if any(path.endswith(end) for end in config.saved)]

    def sorted(self) -> tuple[dict[Place, tuple[str, str]], dict[str, str], dict[str, str]]:
        """Return the keys of the factors by place, those of what was trained in full, and those of copies of the base,
        both with names.
        """
        factors: dict[Place, dict[int, str]] = {}
        whole: dict[str, str] = {}
        copies: dict[str, str] = {}
        for key, shape in self.shapes.items():
            if not key.startswith(PREFIX):
                raise CheckpointError(
                    f"{self.path}: {key!r} does not start with {PREFIX!r}, as keys of peft do", code="invalid-adapter"
                )
            name = key.removeprefix(PREFIX)
            end = next((key_end for key_end in _ENDS if name.endswith(f".{key_end}")), None)
            if end is not None:
                place = self._place(key, name.removesuffix(f".{end}"))
                if end not in place.layout.keys:
                    raise CheckpointError(
                        f"{self.path}: {key!r} is not how peft keeps a pair of {place.path}", code="invalid-adapter"
                    )
                factors.setdefault(place, {})[_ENDS[end]] = key
                continue
            plain = self._plain(name)
            if plain is None:
                what = "DoRA's magnitudes" if "lora_magnitude_vector" in name else "nothing of the model, nor factors"
                raise CheckpointError(
                    f"{self.path}: {key!r} is {what}{nearest(name, self.held)}", code="adapter-does-not-fit"
                )
            if shape != tuple(self.held[plain].shape):
                raise CheckpointError(
                    f"{self.path}: {key!r} is {list(shape)}, "
                    f"and {plain} of the model is {list(self.held[plain].shape)}",
                    code="adapter-does-not-fit",
                )
            is_bias = self.config.bias != "none" and plain.endswith("bias")
            in_saved = any(plain.startswith(f"{module}.") for module in self.saved)
            (whole if is_bias or in_saved else copies)[key] = plain
        pairs = {}
        for place, keys in factors.items():
            if len(keys) != 2:
                raise CheckpointError(
                    f"{self.path}: {place.path} has one factor, {next(iter(keys.values()))!r}, not two",
                    code="invalid-adapter",
                )
            self._check(place, keys[0], keys[1])
            pairs[place] = (keys[0], keys[1])
        if not pairs:
            raise CheckpointError(f"{self.path}: holds no factors", code="invalid-adapter")
        self._check_saved(set(whole.values()))
        return pairs, whole, copies

    def pair(self, place: Place, lora_a: torch.Tensor, lora_b: torch.Tensor) -> Pair:
        """Return a place's factors in our layout."""
        rank, alpha = self.config.rank_of(place.pattern), self.config.alpha_of(place.pattern)
        scale = SCALES[self.config.use_rslora].scale(rank, alpha)
        weight = self.parameters[place.name]
        if not (lora_a.is_floating_point() and lora_b.is_floating_point()):
            raise CheckpointError(
                f"{self.path}: the factors of {place.path} are {lora_a.dtype}, not floating numbers",
                code="invalid-adapter",
            )
        width = torch.float64 if torch.float64 in (weight.dtype, lora_a.dtype, lora_b.dtype) else torch.float32
        factors = place.layout.from_peft(lora_a.to(width), lora_b.to(width), weight.shape)
        if not (torch.isfinite(factors.a).all() and torch.isfinite(factors.b).all()):
            raise CheckpointError(f"{self.path}: the factors of {place.path} hold inf or nan", code="non-finite-tensor")
        return Pair(place, rank, alpha, scale, factors)

    def check_copy(self, key: str, name: str, value: torch.Tensor) -> None:
        """Refuse a copy of a base weight that is another: peft writes embeddings along with their adapters."""
        held = dense(self.held[name].detach())
        if not torch.equal(value.to(held.device, held.dtype), held):
            raise CheckpointError(
                f"{self.path}: {key!r} is not what the model holds; the adapter is of another base",
                code="checkpoint-other-base",
            )

    def _place(self, key: str, wrapped: str) -> Place:
        """Return the place of a pair, whose path may say how often peft has wrapped its modules."""
        depth = len(re.search(r"(\.base_layer)*$", wrapped)[0]) // len(".base_layer")  # type: ignore[index]
        path = wrapped
        if path not in self.modules:
            path = ".".join(part for part in wrapped.split(".") if part != "base_layer")
            depth = depth if path in self.modules else 0
        else:
            depth = 0
        module = self.modules.get(path)
        if module is None:
            raise CheckpointError(
                f"{self.path}: {key!r}: the model has no module {path}{nearest(path, self.modules)}",
                code="adapter-does-not-fit",
            )
        own = [name for name, _ in module.named_parameters(recurse=False)]
        ends = tuple(f".{name}" for name in self.config.parameters)
        asked = [leaf for leaf in own if f".{path}.{leaf}".endswith(ends)] if ends else []
        if asked:
            if depth >= len(asked):
                raise CheckpointError(
                    f"{self.path}: {key!r}: peft does not wrap {path} so often", code="invalid-adapter"
                )
            leaf = asked[len(asked) - 1 - depth]
            return Place(path, leaf, Parameter.of(module))
        if isinstance(module, nn.MultiheadAttention):
            raise CheckpointError(
                f"{self.path}: {path} is an adapter of a whole nn.MultiheadAttention, of which peft itself merges the "
                "change of out_proj twice; train its parameters by target_parameters",
                code="adapter-not-supported",
            )
        weight = self.parameters.get(f"{path}.weight")
        layout = layout_of(module, "weight", weight.dim()) if weight is not None else None
        if layout is None:
            grouped = ", whose change mixes the groups" if getattr(module, "groups", 1) != 1 else ""
            raise CheckpointError(
                f"{self.path}: {key!r}: {path} is a {type(module).__name__}{grouped}; nothing of it can "
                "hold this adapter",
                code="adapter-does-not-fit",
            )
        return Place(path, "weight", layout)

    def _check(self, place: Place, key_a: str, key_b: str) -> None:
        shape = tuple(self.parameters[place.name].shape)
        rank = self.config.rank_of(place.pattern)
        if len(shape) != 2 and place.is_parameter and len(shape) != 3:
            raise CheckpointError(
                f"{self.path}: {key_a!r}: {place.name} has {len(shape)} axes; peft adapts 2 or 3",
                code="adapter-not-supported",
            )
        if rank > max(shape[0], math.prod(shape[1:]), RANKS[-1]):
            raise CheckpointError(
                f"{self.path}: {place.name} is {list(shape)}, and rank {rank} is more than it can use",
                code="adapter-does-not-fit",
            )
        for key, wanted in zip((key_a, key_b), place.layout.shapes(shape, rank), strict=True):
            if self.shapes[key] != wanted:
                raise CheckpointError(
                    f"{self.path}: {key!r} is {list(self.shapes[key])}; for {place.name} {list(shape)} at rank {rank} "
                    f"of the configuration it is {list(wanted)}",
                    code="adapter-does-not-fit",
                )

    def _plain(self, name: str) -> str | None:
        """Return the model's own name of a tensor that is no factor, or None."""
        without = ".".join(part for part in name.split(".") if part != "base_layer")
        return next((plain for plain in (name, without) if plain in self.held), None)

    def _check_saved(self, found: set[str]) -> None:
        """Refuse an adapter that lacks what its configuration says it trained in full."""
        for end in self.config.saved:
            meant = [path for path in self.saved if path.endswith(end)]
            if not meant and end not in _HEADS:
                raise CheckpointError(
                    f"{self.config.path}: modules_to_save: the model has no module {end}{nearest(end, self.modules)}",
                    code="adapter-does-not-fit",
                )
            for path in meant:
                wanted = [name for name in self.parameters if name.startswith(f"{path}.")]
                lacking = next((name for name in wanted if name not in found), None)
                if lacking is not None:
                    raise CheckpointError(
                        f"{self.path}: has no {lacking}, which modules_to_save says was trained",
                        code="adapter-incomplete",
                    )
