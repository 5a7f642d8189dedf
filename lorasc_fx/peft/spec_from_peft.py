"""Converts a configuration of peft to a spec. peft's own functions match the modules.

All unsupported options are reported in one error. Source: peft 0.21, `tuners/*/config.py`, `tuners/tuners_utils.py`.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lorasc_fx.errors import SpecError, UnknownTarget
from lorasc_fx.peft.format import IGNORED, READ, UNSUPPORTED, by_pattern, lora_spec, token_rows
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.spec_checks import METHOD_OPTIONS

DEFAULT_ALPHA = float(METHOD_OPTIONS["lora_alpha"])
_UNUSED = (IGNORED - {"ensure_weight_tying", "eva_config", "loftq_config", "lora_ga_config"}) | {
    "projection_prng_key", "random_seed", "save_projection",
}  # fmt: skip
"""Fields that are ignored. The last three only affect the random initial values of VeRA and SHiRA."""


@dataclass(frozen=True)
class MethodConfig:
    """How the fields of one of peft's configurations map to a spec.

    Args:
        adapter: name of the adapter method in the spec.
        size: the field with the rank.
        alpha: the field with lora_alpha, or "" for a method without a scale.
        options: the method's option in `adapter_options`, by field.
    """

    adapter: str
    size: str = "r"
    alpha: str = ""
    options: Mapping[str, str] = field(default_factory=dict)


METHOD_CONFIGS = {
    "VERA": MethodConfig("vera", options={"d_initial": "d_initial"}),
    "HIRA": MethodConfig("hira"),
    "SHIRA": MethodConfig("shira"),
    "MISS": MethodConfig("miss"),
    "OFT": MethodConfig("oft", "oft_block_size", options={"num_cayley_neumann_terms": "neumann_terms"}),
    "LOKR": MethodConfig("lokr", alpha="alpha", options={"decompose_factor": "decompose_factor"}),
    "DELORA": MethodConfig("delora", options={"delora_lambda": "bound"}),
}
"""The mapping by peft_type. LoRA and DoRA have more options and are converted by `_lora_spec_of`."""


def is_config(spec: Any) -> bool:
    """Return whether an object is a configuration of peft that `spec_of` supports."""
    return getattr(spec, "peft_type", None) in ("LORA", "TRAINABLE_TOKENS", *METHOD_CONFIGS)


def spec_of(config: Any, model: nn.Module) -> CascadeSpec:
    """Return a spec with the targets and options of a configuration of peft. The spec's other options are defaults.

    Raises:
        SpecError: some options have no counterpart. The message lists them all.
        UnknownTarget: target_modules match no module.
    """
    values = {option.name: getattr(config, option.name) for option in dataclasses.fields(config)}
    if config.peft_type == "LORA":
        return _lora_spec_of(config, values, model)
    if config.peft_type == "TRAINABLE_TOKENS":
        return _token_spec_of(config, values, model)
    method = METHOD_CONFIGS[config.peft_type]
    read = {method.size, method.alpha, *method.options, "modules_to_save", "bias", "rank_pattern", *_UNUSED}
    refused = _refused(config, values, read)
    if method.adapter == "oft":
        refused = [option for option in refused if not option.startswith("use_cayley_neumann=")]
        if not values["oft_block_size"]:
            refused.append(f"r={values['r']!r} (give the size of the blocks, oft_block_size)")
    _check(refused, values, config)
    train, names = _parts(config, values, model)
    options = {option: values[field_name] for field_name, option in method.options.items()}
    if method.adapter == "oft" and not values["use_cayley_neumann"]:
        options["neumann_terms"] = 0
    alpha, ranks = float(values[method.alpha]) if method.alpha else DEFAULT_ALPHA, values.get("rank_pattern") or {}
    pairs = {name: (by_pattern(ranks, name.removesuffix(".weight"), values[method.size]), alpha) for name in names}
    return lora_spec(pairs, (values[method.size], alpha), train, {}, adapter=method.adapter, adapter_options=options)


def _refused(config: Any, values: Mapping[str, Any], read: Collection[str]) -> list[str]:
    """Return the options that differ from their defaults but are not in `read`, as texts with their values."""
    default = type(config)()
    return [
        f"{name}={value!r}" + (f" ({UNSUPPORTED[name]})" if name in UNSUPPORTED else "")
        for name, value in values.items()
        if name not in read and (value or isinstance(value, bool)) and value != getattr(default, name)
    ]


def _check(refused: list[str], values: Mapping[str, Any], config: Any) -> None:
    if values["target_modules"] is None and not values.get("target_parameters"):
        refused = [*refused, "target_modules=None (name the modules, or give 'all-linear')"]
    if refused:
        raise SpecError(
            f"spec: a cascade does not support these options of {type(config).__name__}: {'; '.join(refused)}",
            code="adapter-not-supported",
        )


def _parts(config: Any, values: Mapping[str, Any], model: nn.Module) -> tuple[list[str], list[str]]:
    """Return the names of the parameters that are trained in full, and of the weights that are adapted."""
    saved = _under(model, values["modules_to_save"] or ())
    targets = [path for path in _targets(config, model) if path not in saved]
    names = [f"{path}.weight" for path in targets]
    if values["target_modules"] is not None and not names:
        raise UnknownTarget(f"spec: target_modules={values['target_modules']!r} match no module with a weight")
    parameters, bias = dict(model.named_parameters()), values.get("bias", "none")
    train = [name for name in parameters if name.rpartition(".")[0] in saved]
    if bias != "none":
        biased = list(parameters) if bias == "all" else [f"{path}.bias" for path in targets]
        train += [name for name in biased if name.endswith("bias") and name in parameters]
    return train, names


def _lora_spec_of(config: Any, values: Mapping[str, Any], model: nn.Module) -> CascadeSpec:
    """Return the spec of a `peft.LoraConfig`."""
    refused = _refused(config, values, {*_UNUSED, *READ})
    start = values["init_lora_weights"]
    initial = start.partition("_niter_")[0] if isinstance(start, str) else "lora"
    if start is not True and initial not in ("pissa", "olora"):
        refused.append(f"init_lora_weights={start!r} (give True, 'pissa' or 'olora')")
    _check(refused, values, config)
    train, names = _parts(config, values, model)
    names += values["target_parameters"] or []
    ranks, alphas = values["rank_pattern"] or {}, values["alpha_pattern"] or {}
    pairs = {}
    for name in names:
        path = name.removesuffix(".weight")
        pairs[name] = by_pattern(ranks, path, values["r"]), by_pattern(alphas, path, values["lora_alpha"])
    return lora_spec(
        pairs,
        (values["r"], values["lora_alpha"]),
        train,
        {f"{path}.weight": rows for path, rows in token_rows(values["trainable_token_indices"], model).items()},
        use_rslora=bool(values["use_rslora"]),
        adapter="dora" if values["use_dora"] else "lora",
        dropout=float(values["lora_dropout"]),
        start=initial,
    )


def _token_spec_of(config: Any, values: Mapping[str, Any], model: nn.Module) -> CascadeSpec:
    """Return the spec of a `peft.TrainableTokensConfig`. Without target_modules it is for the input embedding."""
    targets = values["target_modules"]
    _check(_refused(config, values, {*_UNUSED, "token_indices"}), {**values, "target_modules": targets or ()}, config)
    paths = token_rows(values["token_indices"], model) if targets is None else _targets(config, model)
    if not paths:
        raise UnknownTarget(f"spec: target_modules={targets!r} match no module with a weight")
    return lora_spec({}, (1, DEFAULT_ALPHA), (), {f"{path}.weight": values["token_indices"] for path in paths})


def _targets(config: Any, model: nn.Module) -> list[str]:
    """Return the paths of the modules that match target_modules by peft's own rules, in the model's order."""
    utils = sys.modules["peft.tuners.tuners_utils"]  # already imported, because the configuration is an object of peft
    config = copy.copy(config)
    utils._maybe_include_all_linear_layers(config, model)
    matrices = [
        path
        for path, module in model.named_modules()
        if path and isinstance(weight := getattr(module, "weight", None), nn.Parameter) and weight.dim() >= 2
    ]
    return [path for path in matrices if config.target_modules and utils.check_target_module_exists(config, path)]


def _under(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Return the paths of modules with one of these suffixes (peft's rule), and of all modules inside them."""
    paths = [path for path, _ in model.named_modules()]
    tops = [path for path in paths if path.endswith(tuple(names))]
    return {path for path in paths if any(path == top or path.startswith(f"{top}.") for top in tops)}
