"""`adapter_config.json` of a LoRA adapter: what the export writes, and what the import accepts.

Patterns are written as `^` and the escaped path: peft matches `(.*\\.)?(PATTERN)$`, where `^` holds at the start only,
so that a module whose path ends like another's keeps its own rank. Source: peft 0.21, `tuners/lora/config.py`,
`utils/other.py: get_pattern_key`, `tuners/tuners_utils.py: check_target_module_exists`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lorasc_fx.adapt.peft_spec import FOREIGN, IDLE, by_pattern
from lorasc_fx.checks import is_integer, is_number
from lorasc_fx.errors import CheckpointError, nearest
from lorasc_fx.export.peft_layout import Conv1d, Place

__all__ = ["CONFIG", "RANKS", "TENSORS", "AdapterConfig", "config_of", "leaking", "read_config"]

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as max_lora_rank, but for 1."""


def config_of(
    model: nn.Module,
    ranks: Mapping[Place, int],
    saved: Sequence[str] = (),
    biases: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Return the configuration of an adapter whose scale is 1 everywhere.

    Args:
        model: its base.
        ranks: by place.
        saved: modules that are saved whole.
        biases: of adapted modules are in the file.
        more: other keys.
    """
    usual = Counter(ranks.values()).most_common(1)[0][0]
    patterns = {f"^{re.escape(place.pattern)}": rank for place, rank in ranks.items() if rank != usual}
    by_name = [place.path for place in ranks if not place.is_parameter]
    config: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "lora_only" if biases else "none",
        "fan_in_fan_out": any(isinstance(place.layout, Conv1d) for place in ranks),
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "modules_to_save": list(saved) or None,
        "peft_type": "LORA",
        "r": usual,
        "rank_pattern": patterns,
        "alpha_pattern": dict(patterns),
        "revision": None,
        "target_modules": _targets(model, by_name),
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }
    if parameters := [place.name for place in ranks if place.is_parameter]:
        config["target_parameters"] = parameters
    return config | more


def _targets(model: nn.Module, paths: Sequence[str]) -> list[str] | str:
    """Return the modules' paths; as one regular expression where peft would take a path for the end of another's."""
    ends = tuple(f".{path}" for path in paths)
    if any(name.endswith(ends) and name not in paths for name, _ in model.named_modules()) if ends else False:
        return "|".join(map(re.escape, paths))
    return list(paths)


def leaking(model: nn.Module, places: Iterable[Place]) -> dict[str, str]:
    """Return the `target_parameters` whose name means another parameter to peft as well, which takes ends of names."""
    wanted = [place.name for place in places if place.is_parameter]
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return {
        name: f"its name means {other} to peft as well"
        for name in wanted
        if (other := next((each for each in names if each.endswith(f".{name}") and each not in wanted), None))
    }


LONGEST = 1 << 24
"""Bytes of a configuration; those of large models have a few hundred thousand."""

_READ = {
    "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "lora_dropout", "modules_to_save", "r", "rank_pattern",
    "target_parameters", "use_rslora",
}  # fmt: skip

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
        if value and key not in {*IDLE, *_READ, *FOREIGN}:
            hint = nearest(key, {*IDLE, *_READ, *FOREIGN})
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
    if not any(value is each or (isinstance(value, str) and value == each) for each in known):
        raise CheckpointError(
            f"{path}: {name} is {_short(value)}, not one of {', '.join(map(str, known))}", code="invalid-adapter"
        )
    return value


def _strings(path: Path, name: str, data: Mapping[str, Any]) -> tuple[str, ...]:
    value = data.get(name) or []
    if not isinstance(value, list) or not all(isinstance(each, str) and each for each in value):
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
