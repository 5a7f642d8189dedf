"""Checks of a spec: of single values, and of pairs of fields that have no meaning together.

A pair is refused when the spec is made, before there is a model to change. docs/method.md lists them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

from lorasc_fx.errors import SpecError, nearest
from lorasc_fx.options import PACES, STARTS, one_of
from lorasc_fx.util.checks import is_integer, is_number

USUAL_DECAY = 0.9
"""What an exponential average keeps at a stage, where nothing else is asked."""


_OF_PEFT = {
    "r": "rank",
    "alpha": "lora_alpha",
    "target_modules": "targets, globs on weight names: '*.query' for peft's 'query'",
    "target_parameters": "targets",
    "layers_to_transform": "targets, as 'layers.3.*'",
    "layers_pattern": "targets, as 'layers.3.*'",
    "exclude_modules": "exclude, globs on weight names",
    "modules_to_save": "train, globs on parameter names",
    "trainable_token_indices": "train",
    "bias": "train, as ('*.bias',)",
    "lora_bias": "train, as ('*.bias',)",
    "lora_dropout": "dropout",
    "rank_pattern": "rules, of lorasc_fx.Rule",
    "alpha_pattern": "rules, of lorasc_fx.Rule",
    "init_lora_weights": f"start: {one_of(STARTS)}",
    "loraplus_lr_ratio": "lr_ratio",
    "ensure_weight_tying": "nothing: tied weights stay tied",
    "fan_in_fan_out": "nothing: the layout is read off the graph",
    "task_type": "nothing: it is given to export.peft",
    "inference_mode": "nothing: call release() for inference",
}
"""What a name of peft's LoraConfig is here."""


def check_fields(where: str, given: Iterable[Any], cls: type[Any]) -> None:
    """Refuse fields that a dataclass does not have, all in one error; those of peft are answered with ours."""
    known = [option.name for option in fields(cls)]
    of_peft = _OF_PEFT if "targets" in known else {}
    unknown = [name for name in given if name not in known]
    if unknown:
        unknown = [
            f"{name!r} (here {of_peft[name]})" if name in of_peft else f"{name!r}{nearest(str(name), known)}"
            for name in unknown
        ]
        raise SpecError(f"{where} has no field {', '.join(unknown)}; known: {', '.join(known)}", code="unknown-name")


def known_fields(cls: type[Any]) -> type[Any]:
    """Let the class, a dataclass, answer an unknown argument by `check_fields` and not by a TypeError."""
    init: Callable[..., None] = cls.__init__

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **given: Any) -> None:
        check_fields(cls.__name__, given, cls)
        init(self, *args, **given)

    cls.__init__ = checked
    return cls


def check_pairs(spec: Any) -> None:
    """Refuse valid values that have no meaning together.

    Args:
        spec: a `CascadeSpec` whose fields were checked one by one.

    Raises:
        SpecError: names both fields, and what to give in their place.
    """
    if spec.dropout and spec.placement in ("merged", "weight"):
        raise SpecError(
            f"dropout is {spec.dropout} and placement is {spec.placement!r}, where a branch sees no input to drop; "
            "give placement='beside' or 'auto', or dropout=0",
            code="conflicting-options",
        )
    if spec.lr_ratio != 1 and not spec.train_A:
        raise SpecError(
            f"lr_ratio is {spec.lr_ratio}, a ratio to the learning rate of lora_A, and train_A is false, so that it "
            "has none; give the learning rate of lora_B to param_groups, and lr_ratio=1",
            code="conflicting-options",
        )
    if spec.nearest_full_gradient and spec.train_A:
        raise SpecError(
            "nearest_full_gradient is true and train_A is true: the correction is exact for a lora_A that stands "
            "still (LoRA-FA); give train_A=False",
            code="conflicting-options",
        )
    if spec.train_rules and not spec.train:
        raise SpecError(
            f"train_rules has {spec.train_rules[0].pattern!r}, and train is empty: the rules are for what it names; "
            "give train",
            code="conflicting-options",
        )
    if spec.keeps_average and spec.noise.keep:
        raise SpecError(
            f"average is {spec.average!r} and noise.keep is true: an average of weights would hold a share of each "
            "stage's noise, which has no coefficient; give one of the two",
            code="conflicting-options",
        )
    if spec.average_decay != USUAL_DECAY and spec.average != "ema":
        raise SpecError(
            f"average_decay is {spec.average_decay} and average is {spec.average!r}, which has none; give "
            "average='ema', or no decay",
            code="conflicting-options",
        )
    _check_start(spec)
    if spec.row_scale.trained:
        _check_dora(spec)


def _check_start(spec: Any) -> None:
    """Refuse a rule for lora_A where both factors start from the weight."""
    if spec.factor_start.from_weight and spec.restart_A != "fresh":
        raise SpecError(
            f"start is {spec.start!r}, which takes lora_A out of the weight, and restart_A is {spec.restart_A!r}; "
            "give restart_A='fresh', or start='lora'",
            code="conflicting-options",
        )


def _check_dora(spec: Any) -> None:
    """Refuse what a row scale does not go together with."""
    if spec.restart != "slow":
        raise SpecError(
            f"use_dora is True and restart is {spec.restart!r}: the rows of slow and fast weights would be scaled "
            "apart, and no one list of experts has both; give restart='slow', or use_dora=False",
            code="conflicting-options",
        )
    if spec.dropout:
        raise SpecError(
            f"use_dora is True and dropout is {spec.dropout}: the branch stands in place of its op, whose input is not "
            "dropped; give dropout=0, or use_dora=False",
            code="conflicting-options",
        )
    if spec.placement not in ("auto", "merged"):
        raise SpecError(
            f"use_dora is True and placement is {spec.placement!r}: magnitudes scale the op's own product, so the "
            "branch stands in its place; give placement='auto' or 'merged', or use_dora=False",
            code="conflicting-options",
        )
    if spec.noise.strength and spec.noise.keep:
        raise SpecError(
            "use_dora is True and noise.keep is True: noise that stays would be scaled by every later stage; "
            "give keep=False, or use_dora=False",
            code="conflicting-options",
        )
    if spec.noise.strength and spec.noise.redraw != "stage":
        raise SpecError(
            "use_dora is True and noise.redraw is 'step': the norms of a stage would be those of its last draw; "
            "give redraw='stage', or use_dora=False",
            code="conflicting-options",
        )
    if spec.keeps_average:
        raise SpecError(
            f"use_dora is True and average is {spec.average!r}: an average of weights whose rows were scaled apart "
            "has no coefficients over one list of experts; give average='off', or use_dora=False",
            code="conflicting-options",
        )
    if spec.nearest_full_gradient:
        raise SpecError(
            "use_dora is True and nearest_full_gradient is True: the correction is that of a plain branch, whose rows "
            "no magnitude scales; give one of the two",
            code="conflicting-options",
        )


def check_noise(keep: bool, redraw: str, distribution: str) -> None:
    """Refuse to keep noise of which there is no one draw, or no one size."""
    if keep and redraw == "step":
        raise SpecError(
            "noise.keep is True and noise.redraw is 'step': a stage has many draws, and none of them is its noise; "
            "give keep=False, or redraw='stage'",
            code="conflicting-options",
        )
    if keep and distribution == "filter":
        raise SpecError(
            "noise.keep is True and noise.distribution is 'filter', whose size differs from row to row, and what is "
            "kept has one size a weight; give keep=False, or distribution='normal'",
            code="conflicting-options",
        )


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, (tuple, list)) or any(not isinstance(p, str) for p in value):
        raise SpecError(f"{name} is {value!r}; give a sequence of strings")
    return tuple(value)


def _sequence(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, (tuple, list)):
        raise SpecError(f"{name} is {value!r}; give a sequence of numbers, one for each stage")
    return tuple(value)


def _rank(name: str, value: Any) -> None:
    if not is_integer(value, 1):
        raise SpecError(f"{name} is {value!r}; a rank is an integer of 1 or more")


def _number(name: str, value: Any) -> None:
    if not is_number(value):
        raise SpecError(f"{name} is {value!r}; give a finite number")


def _positive(name: str, value: Any, use: str = "scales the branch") -> None:
    _number(name, value)
    if value <= 0:
        raise SpecError(f"{name} is {value}; it {use}: give a number above 0")


def _ranks(value: Any, rank: int, usual: int) -> tuple[int, ...]:
    """Return ranks by stage, checked against the one rank, which is the usual one or their first."""
    ranks = _sequence("ranks", value)
    for stage, number in enumerate(ranks, start=1):
        _rank(f"ranks of stage {stage}", number)
    if ranks and rank not in (usual, ranks[0]):
        raise SpecError(
            f"rank is {rank} and ranks begins with {ranks[0]}; give one of the two", code="conflicting-options"
        )
    return ranks


def _paces(value: Any) -> Any:
    """Return a pace, the name of one, or paces by stage as a tuple."""
    if isinstance(value, str) and value in PACES:
        return value
    paces = _sequence("pace", value) if isinstance(value, (list, tuple)) else (value,)
    if not paces:
        raise SpecError("pace is empty; give a share of the fast weights in (0, 1], or one for each stage")
    for stage, pace in enumerate(paces, start=1):
        name = "pace" if paces[0] is value else f"pace of stage {stage}"
        _number(name, pace)
        if not 0 < pace <= 1:
            raise SpecError(f"{name} is {pace}; it is a share of the fast weights: give a number in (0, 1]")
    return value if paces[0] is value else paces


def _decay(name: str, value: Any) -> None:
    _number(name, value)
    if not 0 < value < 1:
        raise SpecError(f"{name} is {value}; it is what an average keeps: give a number in (0, 1)")


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise SpecError(f"{name} is {value!r}; give true or false")


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SpecError(f"{name} is {value!r}; give one of {', '.join(allowed)}{nearest(str(value), allowed)}")
