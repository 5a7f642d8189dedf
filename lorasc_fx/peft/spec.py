"""Turns a `peft.LoraConfig` into a spec. What it names is looked up in the model. Unsupported options are one error.

Source: peft 0.21, `tuners/lora/config.py`, `tuners/tuners_utils.py: check_target_module_exists,
_maybe_include_all_linear_layers`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lorasc_fx.errors import SpecError, UnknownTarget
from lorasc_fx.peft.format import IGNORED, READ, UNSUPPORTED, by_pattern, lora_spec
from lorasc_fx.spec import CascadeSpec

_UNUSED = IGNORED - {"ensure_weight_tying", "eva_config", "loftq_config", "lora_ga_config"}


def spec_of(config: Any, model: nn.Module) -> CascadeSpec:
    """Return the spec that adapts a model as a `peft.LoraConfig` says. Other options are those of `CascadeSpec()`.

    Raises:
        SpecError: names all options without a counterpart. UnknownTarget: target_modules match no module.
    """
    values = {option.name: getattr(config, option.name) for option in dataclasses.fields(config)}
    usual = type(config)()
    refused = [
        f"{name}={value!r}" + (f" ({UNSUPPORTED[name]})" if name in UNSUPPORTED else "")
        for name, value in values.items()
        if name not in {*_UNUSED, *READ} and value and value != getattr(usual, name)
    ]
    start = values["init_lora_weights"]
    starts = {"pissa": "pissa", "olora": "olora", "loftq": "loftq"}
    if start == "loftq":
        loftq = dict(values["loftq_config"])
        refused = [option for option in refused if not option.startswith("loftq_config=")]
        if loftq.get("loftq_iter", 1) != 1:
            refused.append(f"loftq_config={loftq!r} (the weights are quantized before adapt: one iteration)")
    if start is not True and (not isinstance(start, str) or start.partition("_niter_")[0] not in starts):
        refused.append(f"init_lora_weights={start!r} (give True, 'pissa', 'olora' or 'loftq')")
    if values["target_modules"] is None and not values["target_parameters"]:
        refused.append("target_modules=None (name the modules, or give 'all-linear')")
    if refused:
        raise SpecError(
            f"spec: a cascade does not support these options of the LoraConfig: {'; '.join(refused)}",
            code="adapter-not-supported",
        )
    saved = _under(model, values["modules_to_save"] or ())
    targets = [path for path in _targets(values, model) if path not in saved]
    names = [f"{path}.weight" for path in targets]
    if values["target_modules"] is not None and not names:
        raise UnknownTarget(f"spec: target_modules={values['target_modules']!r} match no module with a weight")
    names += values["target_parameters"] or []
    ranks, alphas = values["rank_pattern"] or {}, values["alpha_pattern"] or {}
    pairs = {}
    for name in names:
        path = name.removesuffix(".weight")
        pairs[name] = by_pattern(ranks, path, values["r"]), by_pattern(alphas, path, values["lora_alpha"])
    parameters = dict(model.named_parameters())
    train = [name for name in parameters if name.rpartition(".")[0] in saved]
    if values["bias"] != "none":
        biased = [f"{path}.bias" for path in targets] if values["bias"] == "lora_only" else list(parameters)
        train += [name for name in biased if name.endswith("bias") and name in parameters]
    return lora_spec(
        pairs,
        (values["r"], values["lora_alpha"]),
        train,
        use_rslora=bool(values["use_rslora"]),
        use_dora=bool(values["use_dora"]),
        dropout=float(values["lora_dropout"]),
        start=starts[start.partition("_niter_")[0]] if isinstance(start, str) else "lora",
    )


def _targets(values: Mapping[str, Any], model: nn.Module) -> list[str]:
    """Return the paths of the modules that target_modules match, in the model's order."""
    wanted, excluded = values["target_modules"], values["exclude_modules"] or ()
    layers, pattern = values["layers_to_transform"], values["layers_pattern"]
    layers = [layers] if isinstance(layers, int) else layers
    output = getattr(model, "get_output_embeddings", lambda: None)()
    paths = []
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not path or not isinstance(weight, nn.Parameter) or weight.dim() < 2 or _matches(excluded, path):
            continue
        if isinstance(wanted, str) and wanted.lower() == "all-linear":
            if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and module is not output:
                paths.append(path)
        elif (wanted is not None and _matches(wanted, path)) and (
            layers is None or isinstance(wanted, str) or _layer_of(path, pattern) in layers
        ):
            paths.append(path)
    return paths


def _matches(patterns: str | Iterable[str], path: str) -> bool:
    """Whether a regular expression matches the complete path, or the path ends with one of several names."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, path) is not None
    return any(path == end or path.endswith(f".{end}") for end in patterns)


def _layer_of(path: str, patterns: str | Iterable[str] | None) -> int | None:
    """Return the number of the layer that a module is in."""
    if not patterns:
        match = re.match(r".*\.[^.]*\.(\d+)\.", path)
        return int(match[1]) if match else None
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if match := re.match(rf".*\.{pattern}\.(\d+)\.", path):
            return int(match[1])
    return None


def _under(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Return the paths of the modules whose paths end with these names, as in peft, and of all modules inside them."""
    paths = [path for path, _ in model.named_modules()]
    tops = [path for path in paths if path.endswith(tuple(names))]
    return {path for path in paths if any(path == top or path.startswith(f"{top}.") for top in tops)}
