"""Converts a configuration of peft to a spec. peft itself finds the modules.

All unsupported options are reported in one error. Source: peft 0.21, `tuners/*/config.py`.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from lorasc_fx.errors import SpecError, UnknownTarget
from lorasc_fx.peft.mirror import ADAPTER, IGNORED, READ, Mirror
from lorasc_fx.spec import METHOD_OPTIONS, CascadeSpec, Rule

DEFAULT_ALPHA = float(METHOD_OPTIONS["lora_alpha"])
_KNOWN = READ | IGNORED | {"init_lora_weights", "token_indices"}
_INITIAL = {"projection_prng_key", "random_seed", "save_projection"}
"""Options that only affect the random initial values of VeRA and SHiRA."""


@dataclass(frozen=True)
class MethodConfig:
    """How the fields of one of peft's configurations map to a spec.

    Args:
        adapter: name of the adapter method in the spec.
        size: the field with the rank.
        alpha: the field with lora_alpha, or "" for a method without a scale.
        options: {field: option of the method in `adapter_options`}.
        layer_size: the attribute of peft's layers with the rank, if its name differs from `size`.
    """

    adapter: str
    size: str = "r"
    alpha: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    layer_size: str = ""


METHOD_CONFIGS = {
    "LORA": MethodConfig("lora", alpha="lora_alpha"),
    "TRAINABLE_TOKENS": MethodConfig("lora"),
    "VERA": MethodConfig("vera", options={"d_initial": "d_initial"}),
    "HIRA": MethodConfig("hira"),
    "SHIRA": MethodConfig("shira"),
    "MISS": MethodConfig("miss", layer_size="miss_r"),
    "OFT": MethodConfig("oft", "oft_block_size", options={"num_cayley_neumann_terms": "neumann_terms"}),
    "LOKR": MethodConfig("lokr", alpha="alpha", options={"decompose_factor": "decompose_factor"}),
    "DELORA": MethodConfig("delora", options={"delora_lambda": "bound"}),
}
"""{peft_type: mapping}. DoRA is an option of LORA."""


def is_config(spec: object) -> bool:
    """Return whether an object is a configuration of peft that `spec_of` supports."""
    return getattr(spec, "peft_type", None) in METHOD_CONFIGS


def spec_of(config: Any, model: nn.Module) -> CascadeSpec:
    """Return a spec with the targets and options of a configuration of peft. All other options keep their defaults.

    Raises:
        SpecError: some options have no counterpart. The message lists them all.
        UnknownTarget: target_modules or modules_to_save match no module.
    """
    method = METHOD_CONFIGS[config.peft_type]
    if problems := _problems(config, method):
        raise SpecError(
            f"spec: a cascade does not support these options of {type(config).__name__}: {'; '.join(problems)}",
            code="adapter-not-supported",
        )
    try:
        mirror = Mirror(model, config)
    except ValueError as fault:
        raise UnknownTarget(f"spec: {type(config).__name__} does not fit the model: {fault}") from fault
    return replace(spec_of_mirror(mirror, model), start=_start_of(config))


def spec_of_mirror(mirror: Mirror, model: nn.Module) -> CascadeSpec:
    """Return a spec that adapts and trains the same parameters as peft, with LoRA's initial factors."""
    config = mirror.config
    method, sizes, default = METHOD_CONFIGS[config.peft_type], dict[str, tuple[int, float]](), (1, DEFAULT_ALPHA)
    if config.peft_type != "TRAINABLE_TOKENS":
        rank, alpha = method.layer_size or method.size, method.alpha
        default = getattr(config, method.size), float(getattr(config, alpha)) if alpha else DEFAULT_ALPHA
        for name, layer in mirror.layers.items():
            scale = float(getattr(layer, alpha)[ADAPTER]) if alpha else DEFAULT_ALPHA
            sizes[name] = getattr(layer, rank)[ADAPTER], scale
    tokens = {name: tuple(layer.token_indices[ADAPTER]) for name, layer in mirror.tokens.items()}
    train, untie = mirror.trained(model)
    return CascadeSpec(
        targets=tuple(map(glob.escape, (*sizes, *tokens))),
        train=tuple(map(glob.escape, train)),
        untie=tuple(map(glob.escape, untie)),
        rules=(
            *(Rule(glob.escape(name), tokens=rows) for name, rows in tokens.items()),
            *(Rule(glob.escape(name), *size) for name, size in sizes.items() if size != default),
        ),
        rank=default[0],
        lora_alpha=default[1],
        **_options(config, method),
    )


def _problems(config: Any, method: MethodConfig) -> list[str]:
    """Return the options that a cascade does not support, with their values."""
    default, supported = type(config)(), _KNOWN | _INITIAL | {method.size, method.alpha, *method.options}
    supported |= {"use_cayley_neumann", "r"} if method.adapter == "oft" else set()
    problems = [
        f"{name}={value!r}"
        for name, value in vars(config).items()
        if name not in supported and (value or isinstance(value, bool)) and value != getattr(default, name, None)
    ]
    start = getattr(config, "init_lora_weights", True)
    if start is not True and _start_of(config) != "pissa":
        problems.append(f"init_lora_weights={start!r} (give True or 'pissa')")
    if method.adapter == "oft" and not config.oft_block_size:
        problems.append(f"r={config.r!r} (give the size of the blocks, oft_block_size)")
    named = config.target_modules is not None or getattr(config, "target_parameters", None)
    if config.peft_type != "TRAINABLE_TOKENS" and not named:
        problems.append("target_modules=None (name the modules, or give 'all-linear')")
    return problems


def _options(config: Any, method: MethodConfig) -> dict[str, Any]:
    """Return the fields of the spec other than its weights, ranks and scales."""
    if config.peft_type == "TRAINABLE_TOKENS":
        return {}
    if config.peft_type == "LORA":
        return {
            "use_rslora": bool(config.use_rslora),
            "adapter": "dora" if config.use_dora else "lora",
            "dropout": float(config.lora_dropout),
        }
    options = {option: getattr(config, name) for name, option in method.options.items()}
    if method.adapter == "oft" and not config.use_cayley_neumann:
        options["neumann_terms"] = 0
    return {"adapter": method.adapter, "adapter_options": options}


def _start_of(config: object) -> Any:
    """Return the spec's option `start`, which names the initial factors, for a configuration of peft."""
    start = getattr(config, "init_lora_weights", True)
    return start.partition("_niter_")[0] if isinstance(start, str) else "lora"
