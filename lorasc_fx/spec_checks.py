"""Combinations of options that a `CascadeSpec` refuses, and the counterparts of peft's options.

The checks run when a spec is created, before any model is changed. docs/method.md explains the options.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lorasc_fx.errors import SpecError, nearest
from lorasc_fx.options import ADAPTERS, STARTS
from lorasc_fx.util.decode import Conflict

DEFAULT_RANK = 8
"""Default of `rank`. A check below needs it to see that the option was set."""

PEFT_OPTIONS = {
    "r": "rank",
    "alpha": "lora_alpha",
    "target_modules": "targets, globs on weight names: '*.query' for peft's 'query'",
    "target_parameters": "targets",
    "layers_to_transform": "targets, such as 'layers.3.*'",
    "layers_pattern": "targets, such as 'layers.3.*'",
    "exclude_modules": "exclude, globs on weight names",
    "modules_to_save": "train, globs on parameter names",
    "trainable_token_indices": "rules, such as lorasc_fx.Rule('*.embed_tokens.weight', tokens=(5, 7))",
    "bias": "train, such as ('*.bias',)",
    "lora_bias": "train, such as ('*.bias',)",
    "lora_dropout": "dropout",
    "rank_pattern": "rules, of lorasc_fx.Rule",
    "alpha_pattern": "rules, of lorasc_fx.Rule",
    "init_lora_weights": f"start: {', '.join(map(repr, STARTS))}",
    "loraplus_lr_ratio": "lr_ratio",
    "use_dora": "adapter='dora'",
    "ensure_weight_tying": "nothing: tied weights stay tied",
    "fan_in_fan_out": "nothing: the layout of the weight is inferred from the graph",
    "task_type": "nothing: pass it to export.peft",
    "inference_mode": "nothing: call release() for inference",
}
"""The counterpart of each option of peft's LoraConfig, for the error about an unknown option."""

NOISE_CONFLICTS = (
    Conflict(
        ("keep", "redraw"),
        lambda keep, redraw: keep and redraw == "step",
        "a stage has several draws, so there is no single noise to keep",
        "Set keep=False or redraw='stage'",
    ),
    Conflict(
        ("keep", "distribution"),
        lambda keep, distribution: keep and distribution == "filter",
        "kept noise is stored with one scale per weight, but this distribution has one scale per row",
        "Set keep=False or distribution='normal'",
    ),
)
"""Conflicts between options of `Noise`."""

RULE_CONFLICTS = tuple(
    Conflict(
        ("tokens", option),
        lambda tokens, value: tokens and value is not None,
        "these rows are trained directly, without low-rank factors",
        f"Remove tokens or {option}",
    )
    for option in ("rank", "lora_alpha")
)
"""Conflicts between options of `Rule`."""

METHOD_OPTIONS: dict[str, Any] = {
    "lora_alpha": 8.0,
    "use_rslora": False,
    "start": "lora",
    "restart_A": "fresh",
    "restart_pairs": True,
    "train_A": True,
    "lr_ratio": 1.0,
    "dropout": 0.0,
}
"""Default values of the options that only some adapter methods support (see `Branch.options`)."""

CONFLICTS = (
    Conflict(
        ("rank", "ranks"),
        lambda rank, ranks: ranks and rank not in (DEFAULT_RANK, ranks[0]),
        "rank must be the first entry of ranks",
        "Remove rank",
    ),
    Conflict(
        ("dropout", "placement"),
        lambda dropout, placement: dropout and placement in ("merged", "weight"),
        "a branch has an input to drop only beside its op",
        "Set placement='beside' or 'auto', or dropout=0",
    ),
    Conflict(
        ("lr_ratio", "train_A"),
        lambda lr_ratio, train_a: lr_ratio != 1 and not train_a,
        "lr_ratio is relative to the learning rate of A, and A is not trained",
        "Set lr_ratio=1 and pass the learning rate of B to param_groups",
    ),
    Conflict(
        ("train_rules", "train"),
        lambda rules, train: rules and not train,
        "train_rules apply only to parameters that train names",
        "Set train to globs on these parameters",
    ),
    Conflict(
        ("average", "noise.keep"),
        lambda average, keep: average and keep,
        "the average would contain a share of the noise of each stage, and only experts have coefficients for shares",
        "Set average=False or noise.keep=False",
    ),
    Conflict(
        ("start", "restart_A"),
        lambda start, restart_a: STARTS[start].from_weight and restart_a != "fresh",
        "this start computes A from the weight",
        "Set restart_A='fresh' or start='lora'",
    ),
    Conflict(
        ("restart_pairs", "start"),
        lambda restarts, start: not restarts and start != "lora",
        "this start computes the factors of a branch from the weight at each stage",
        "Set restart_pairs=True or start='lora'",
    ),
    Conflict(
        ("restart_pairs", "ranks"),
        lambda restarts, ranks: not restarts and ranks,
        "factors that do not restart need the same rank in all stages",
        "Set restart_pairs=True or remove ranks",
    ),
    Conflict(
        ("restart_pairs", "optimizer_state"),
        lambda restarts, state: not restarts and state != "reset",
        "restart_pairs already decides that the state is kept",
        "Set restart_pairs=True or optimizer_state='reset'",
    ),
    Conflict(
        ("adapter", "restart"),
        lambda adapter, restart: ADAPTERS[adapter].magnitude and restart != "slow",
        "slow and fast weights would have different row scales, which one list of experts cannot represent",
        "Set restart='slow' or adapter='lora'",
    ),
    Conflict(
        ("adapter", "noise.keep", "noise.strength"),
        lambda adapter, keep, strength: ADAPTERS[adapter].magnitude and keep and strength,
        "later stages would rescale the kept noise",
        "Set keep=False or adapter='lora'",
    ),
    Conflict(
        ("adapter", "noise.redraw", "noise.strength"),
        lambda adapter, redraw, strength: ADAPTERS[adapter].magnitude and redraw != "stage" and strength,
        "the row norms of a stage would depend on its last draw only",
        "Set redraw='stage' or adapter='lora'",
    ),
    Conflict(
        ("adapter", "average"),
        lambda adapter, average: ADAPTERS[adapter].magnitude and average,
        "the averaged weights have different row scales, which one list of experts cannot represent",
        "Set average=False or adapter='lora'",
    ),
    Conflict(
        ("adapter", "placement"),
        lambda adapter, placement: placement != "auto" and placement not in ADAPTERS[adapter].placements,
        "this adapter method does not support the placement",
        "Set placement='auto'",
    ),
    *(
        Conflict(
            ("adapter", option),
            lambda adapter, value, option=option, default=default: (
                value != default and option not in ADAPTERS[adapter].options
            ),
            "this adapter method has no such option",
            f"Set adapter='lora' or remove {option}",
        )
        for option, default in METHOD_OPTIONS.items()
    ),
)
"""Conflicts between options of `CascadeSpec`. The value of each field has been checked before."""


def check_adapter_options(adapter: str, options: Iterable[tuple[str, float]]) -> None:
    """Check names and values of the options of an adapter method (`CascadeSpec.adapter_options`).

    Raises:
        SpecError: the method has no such option, or the option has an invalid value.
    """
    method = ADAPTERS[adapter]
    for name, value in options:
        if name not in method.defaults:
            options_text = ", ".join(f"{option} (default {default:g})" for option, default in method.defaults.items())
            raise SpecError(
                f"adapter_options: {name!r} is not an option of adapter={adapter!r}"
                f"{nearest(name, method.defaults)}; its options: {options_text or 'none'}",
                code="unknown-name",
            )
        check = method.checks.get(name)
        if check is not None and not check.accepts(value):
            raise SpecError(f"adapter_options[{name!r}] is {value!r} with adapter={adapter!r}; {check.remedy}")
