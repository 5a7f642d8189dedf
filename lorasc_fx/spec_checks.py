"""Checks of a spec across fields, and the names of peft's options with their counterparts.

They run when the spec is made, before there is a model to change. docs/method.md lists the refused pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lorasc_fx.errors import SpecError, nearest
from lorasc_fx.options import ADAPTERS, AVERAGES, STARTS, one_of
from lorasc_fx.util.decode import Conflict

USUAL_RANK, USUAL_DECAY, USUAL_PENALTY = 8, 0.9, 1.0
"""Defaults: rank of the branches, share that an exponential average keeps at a stage, exponent of pace="loss"."""

OF_PEFT = {
    "r": "rank",
    "alpha": "lora_alpha",
    "target_modules": "targets, globs on weight names: '*.query' for peft's 'query'",
    "target_parameters": "targets",
    "layers_to_transform": "targets, as 'layers.3.*'",
    "layers_pattern": "targets, as 'layers.3.*'",
    "exclude_modules": "exclude, globs on weight names",
    "modules_to_save": "train, globs on parameter names",
    "trainable_token_indices": "rules, as lorasc_fx.Rule('*.embed_tokens.weight', tokens=(5, 7))",
    "bias": "train, as ('*.bias',)",
    "lora_bias": "train, as ('*.bias',)",
    "lora_dropout": "dropout",
    "rank_pattern": "rules, of lorasc_fx.Rule",
    "alpha_pattern": "rules, of lorasc_fx.Rule",
    "init_lora_weights": f"start: {one_of(STARTS)}",
    "loraplus_lr_ratio": "lr_ratio",
    "use_dora": "adapter='dora'",
    "ensure_weight_tying": "nothing: tied weights stay tied",
    "fan_in_fan_out": "nothing: the layout is read off the graph",
    "task_type": "nothing: it is given to export.peft",
    "inference_mode": "nothing: call release() for inference",
}
"""The counterpart of each option of peft's LoraConfig."""

NOISE_CONFLICTS = (
    Conflict(
        ("keep", "redraw"),
        lambda keep, redraw: keep and redraw == "step",
        "a stage has many draws, and none of them is its noise",
        "give keep=False, or redraw='stage'",
    ),
    Conflict(
        ("keep", "distribution"),
        lambda keep, distribution: keep and distribution == "filter",
        "its size differs from row to row, and what is kept has one size a weight",
        "give keep=False, or distribution='normal'",
    ),
)

RULE_CONFLICTS = tuple(
    Conflict(
        ("tokens", option),
        lambda tokens, value: tokens and value is not None,
        "rows are trained as they are, without factors",
        f"give one of the two, or no {option}",
    )
    for option in ("rank", "lora_alpha")
)

OPTIONS: dict[str, Any] = {
    "lora_alpha": 8.0,
    "use_rslora": False,
    "start": "lora",
    "restart_A": "fresh",
    "restart_pairs": 1.0,
    "train_A": True,
    "nearest_full_gradient": False,
    "lr_ratio": 1.0,
    "dropout": 0.0,
}
"""Options that not every adapter method has (`Branch.options`), with their default values."""

CONFLICTS = (
    Conflict(
        ("rank", "ranks"),
        lambda rank, ranks: ranks and rank not in (USUAL_RANK, ranks[0]),
        "ranks begins with another one",
        "give one of the two",
    ),
    Conflict(
        ("dropout", "placement"),
        lambda dropout, placement: dropout and placement in ("merged", "weight"),
        "a branch there sees no input to drop",
        "give placement='beside' or 'auto', or dropout=0",
    ),
    Conflict(
        ("lr_ratio", "train_A"),
        lambda lr_ratio, train_a: lr_ratio != 1 and not train_a,
        "it is a ratio to the learning rate of A, which then has none",
        "give the learning rate of B to param_groups, and lr_ratio=1",
    ),
    Conflict(
        ("nearest_full_gradient", "train_A"),
        lambda nearest, train_a: nearest and train_a,
        "the correction is exact for an A that does not change (LoRA-FA)",
        "give train_A=False",
    ),
    Conflict(
        ("train_rules", "train"),
        lambda rules, train: rules and not train,
        "the rules are for what train names",
        "give train",
    ),
    Conflict(
        ("average", "noise.keep"),
        lambda average, keep: AVERAGES[average].kept and keep,
        "an average of weights would hold a share of each stage's noise, which has no coefficient",
        "give one of the two",
    ),
    Conflict(
        ("average_decay", "average"),
        lambda decay, average: decay != USUAL_DECAY and average != "ema",
        "this average has no decay",
        "give average='ema', or no decay",
    ),
    Conflict(
        ("loss_penalty", "pace"),
        lambda penalty, pace: penalty != USUAL_PENALTY and pace != "loss",
        "this pace does not depend on losses",
        "give pace='loss', or no loss_penalty",
    ),
    Conflict(
        ("start", "restart_A"),
        lambda start, restart_a: STARTS[start].from_weight and restart_a != "fresh",
        "this start computes A from the weight",
        "give restart_A='fresh', or start='lora'",
    ),
    Conflict(
        ("restart_pairs", "start"),
        lambda share, start: share < 1 and start != "lora",
        "this start computes all pairs of a stage from its weight",
        "give restart_pairs=1, or start='lora'",
    ),
    Conflict(
        ("restart_pairs", "ranks"),
        lambda share, ranks: share < 1 and ranks,
        "pairs that are trained on keep their shape",
        "give restart_pairs=1, or one rank for all stages",
    ),
    Conflict(
        ("restart_pairs", "optimizer_state"),
        lambda share, state: share < 1 and state != "reset",
        "the state of pairs that restart is reset, and that of the others is kept",
        "give restart_pairs=1, or optimizer_state='reset'",
    ),
    Conflict(
        ("adapter", "restart"),
        lambda adapter, restart: ADAPTERS[adapter].scales_rows and restart != "slow",
        "the rows of slow and fast weights would be scaled apart, and no one list of experts has both",
        "give restart='slow', or adapter='lora'",
    ),
    Conflict(
        ("adapter", "momentum"),
        lambda adapter, momentum: ADAPTERS[adapter].scales_rows and momentum,
        "rows that were scaled apart have no difference over one list of experts",
        "give momentum=0, or adapter='lora'",
    ),
    Conflict(
        ("adapter", "noise.keep", "noise.strength"),
        lambda adapter, keep, strength: ADAPTERS[adapter].scales_rows and keep and strength,
        "noise that stays would be scaled by every later stage",
        "give keep=False, or adapter='lora'",
    ),
    Conflict(
        ("adapter", "noise.redraw", "noise.strength"),
        lambda adapter, redraw, strength: ADAPTERS[adapter].scales_rows and redraw != "stage" and strength,
        "the norms of a stage would be those of its last draw",
        "give redraw='stage', or adapter='lora'",
    ),
    Conflict(
        ("adapter", "average"),
        lambda adapter, average: ADAPTERS[adapter].scales_rows and AVERAGES[average].kept,
        "an average of weights whose rows were scaled apart has no coefficients over one list of experts",
        "give average='off', or adapter='lora'",
    ),
    Conflict(
        ("adapter", "placement"),
        lambda adapter, placement: placement != "auto" and placement not in ADAPTERS[adapter].placements,
        "this method does not compute there",
        "give placement='auto'",
    ),
    *(
        Conflict(
            ("adapter", option),
            lambda adapter, value, option=option, usual=usual: (
                value != usual and option not in ADAPTERS[adapter].options
            ),
            "this method has no such option",
            f"give adapter='lora', or leave {option} out",
        )
        for option, usual in OPTIONS.items()
    ),
)
"""The conflicts of a `CascadeSpec`. Each field has been checked before."""


def check_adapter_options(adapter: str, options: Iterable[tuple[str, float]]) -> None:
    """Check the options of an adapter method by name and value.

    Raises:
        SpecError: names the options of the method, or the values that one has.
    """
    method = ADAPTERS[adapter]
    for name, value in options:
        if name not in method.defaults:
            known = ", ".join(f"{option} (default {usual:g})" for option, usual in method.defaults.items())
            raise SpecError(
                f"adapter_options has {name!r}, which is no option of adapter={adapter!r}"
                f"{nearest(name, method.defaults)}; its options: {known or 'none'}",
                code="unknown-name",
            )
        check = method.checks.get(name)
        if check is not None and not check.accepts(value):
            raise SpecError(f"adapter_options[{name!r}] is {value!r}, and adapter is {adapter!r}; {check.remedy}")
