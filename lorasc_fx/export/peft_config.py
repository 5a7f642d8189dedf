"""`adapter_config.json`: which modules are adapted, at which rank, by patterns that mean one module each.

A pattern is `^` and the escaped path: peft matches `(.*\\.)?(PATTERN)$`, where `^` holds at the start only, so that a
module whose path ends like another's keeps its own rank. Source: peft 0.21, `utils/other.py: get_pattern_key`,
`tuners/tuners_utils.py: check_target_module_exists`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lorasc_fx.export.peft_layout import Place

__all__ = ["CONFIG", "RANKS", "TENSORS", "config_of", "leaking"]

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
    by_name = [place.path for place in ranks if place.form != "parameter"]
    config: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "lora_only" if biases else "none",
        "fan_in_fan_out": any(place.form == "conv1d" for place in ranks),
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
    if parameters := [place.name for place in ranks if place.form == "parameter"]:
        config["target_parameters"] = parameters
    return config | more


def _targets(model: nn.Module, paths: Sequence[str]) -> list[str] | str:
    """Return the modules' paths; as one regular expression where peft would take a path for the end of another's."""
    ends = tuple(f".{path}" for path in paths)
    if any(name.endswith(ends) and name not in paths for name, _ in model.named_modules()) if ends else False:
        return "|".join(map(re.escape, paths))
    return list(paths)


def leaking(model: nn.Module, places: Iterable[Place]) -> dict[str, str]:
    """Return the parameters of `parameter` places that mean another one to peft as well, which takes ends of names."""
    wanted = [place.name for place in places if place.form == "parameter"]
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return {
        name: f"its name means {other} to peft as well"
        for name in wanted
        if (other := next((each for each in names if each.endswith(f".{name}") and each not in wanted), None))
    }
