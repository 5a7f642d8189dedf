"""Turns a `peft.LoraConfig` into a spec. peft itself finds the modules. Unsupported options are one error.

Source: peft 0.21, `tuners/lora/config.py`, `tuners/tuners_utils.py`.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

from lorasc_fx.errors import SpecError, UnknownTarget
from lorasc_fx.peft.format import IGNORED, READ, UNSUPPORTED, by_pattern, lora_spec
from lorasc_fx.spec import CascadeSpec

_UNUSED = IGNORED - {"ensure_weight_tying", "eva_config", "loftq_config", "lora_ga_config"}


def spec_of(config: Any, model: nn.Module) -> CascadeSpec:
    """Return the spec that adapts a model as a `peft.LoraConfig` says. Other options have their defaults.

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
    targets = [path for path in _targets(config, model) if path not in saved]
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
        adapter="dora" if values["use_dora"] else "lora",
        dropout=float(values["lora_dropout"]),
        start=starts[start.partition("_niter_")[0]] if isinstance(start, str) else "lora",
    )


def _targets(config: Any, model: nn.Module) -> list[str]:
    """Return the paths of the modules that target_modules match by peft's own rules, in the model's order."""
    utils = sys.modules["peft.tuners.tuners_utils"]  # loaded, because the configuration is an object of peft
    config = copy.copy(config)
    utils._maybe_include_all_linear_layers(config, model)
    matrices = [
        path
        for path, module in model.named_modules()
        if path and isinstance(weight := getattr(module, "weight", None), nn.Parameter) and weight.dim() >= 2
    ]
    return [path for path in matrices if config.target_modules and utils.check_target_module_exists(config, path)]


def _under(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Return the paths of the modules whose paths end with these names, as in peft, and of all modules inside them."""
    paths = [path for path, _ in model.named_modules()]
    tops = [path for path in paths if path.endswith(tuple(names))]
    return {path for path in paths if any(path == top or path.startswith(f"{top}.") for top in tops)}
