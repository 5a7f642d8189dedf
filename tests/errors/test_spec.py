"""Each field of a spec refuses what it cannot mean, in one sentence, before there is anything to change."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Any

import peft
import pytest

import lorasc_fx as lx
from tests.kit.errors import raises

FIELDS = (
    "targets, exclude, train, untie, rules, rank, lora_alpha, use_rslora, dropout, ranks, train_A, "
    "nearest_full_gradient, lr_ratio, train_rules, average, average_decay, placement, pace, restart, noise, restart_A, "
    "start, carry_rank, use_dora, optimizer_state, slow_train, on_nonfinite, seed"
)
KINDS = "('linear', 'conv', 'embedding', 'recurrent', 'experts')"

INVALID: dict[str, tuple[Any, ...]] = {
    "rank": (0, -1, True, 2.0, "8", None),
    "pace": (0, -0.5, 1.5, math.nan, math.inf, True, "0.5", None),
    "lora_alpha": (math.nan, "16", True, None, 0, -8.0),
    "targets": ((), "linear", (1,)),
    "exclude": ("head",),
    "train": (None,),
    "untie": ("head", (None,)),
    "dropout": (1,),
    "rules": (({"pattern": "conv"},), "conv"),
    "use_rslora": (1,),
    "slow_train": ("yes",),
    "restart": (1,),
    "use_dora": (1,),
    "noise": (0.1,),
    "optimizer_state": (0.0, 1, -0.2, None),
    "seed": (-1, True, 1.0, 2**63),
}
MISSPELT = {
    "restart": ("fsat", "fast"),
    "restart_A": ("kpet", "kept"),
    "start": ("pisa", "pissa"),
    "on_nonfinite": ("skipp", "skip"),
    "optimizer_state": ("rest", "reset"),
}
CONFLICTING: list[dict[str, Any]] = [
    {"start": "olora", "restart_A": "kept"},
    {"use_dora": True, "restart": "fast"},
    {"use_dora": True, "dropout": 0.1},
    {"use_dora": True, "placement": "beside"},
    {"use_dora": True, "placement": "weight"},
    {"dropout": 0.1, "placement": "merged"},
]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in INVALID for value in INVALID[name]])
def test_an_invalid_value(name: str, value: Any) -> None:
    shown = "empty" if value == () else repr(value)
    with raises(lx.SpecError, "invalid-value", name, shown):
        lx.CascadeSpec(**{name: value})


@pytest.mark.parametrize("name", MISSPELT)
def test_a_misspelt_value(name: str) -> None:
    value, nearest = MISSPELT[name]
    with raises(lx.SpecError, "invalid-value", name, repr(value), f"nearest: {nearest!r}"):
        lx.CascadeSpec(**{name: value})


@pytest.mark.parametrize("fields", CONFLICTING, ids=str)
def test_conflicting_options(fields: dict[str, Any]) -> None:
    """Both are named, with their values, and so is what to give instead."""
    with raises(lx.SpecError, "conflicting-options", *(f"{name} is {value!r}" for name, value in fields.items())):
        lx.CascadeSpec(**fields)


@pytest.mark.parametrize(
    ("noise", "field"), [(lx.Noise(0.1, keep=True), "noise.keep"), (lx.Noise(0.1, redraw="step"), "noise.redraw")]
)
def test_dora_and_noise(noise: lx.Noise, field: str) -> None:
    with raises(lx.SpecError, "conflicting-options", "use_dora", field):
        lx.CascadeSpec(use_dora=True, noise=noise)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"strength": -0.1}, ("invalid-value", "noise.strength", "-0.1")),
        ({"strength": math.nan}, ("invalid-value", "noise.strength")),
        ({"strength": "0.1"}, ("invalid-value", "noise.strength", "0.1")),
        (
            {"distribution": "norml"},
            ("invalid-value", "noise.distribution", "norml", "normal"),
        ),
        ({"redraw": "steps"}, ("invalid-value", "noise.redraw", "steps", "step")),
        (
            {"redraw": "step", "keep": True},
            ("conflicting-options", "noise.keep"),
        ),
        (
            {"distribution": "filter", "keep": True},
            ("conflicting-options", "noise.keep"),
        ),
        ({"where": "site"}, ("invalid-value", "noise.where", "site", "sites")),
        ({"keep": 1}, ("invalid-value", "noise.keep", "1")),
    ],
)
def test_wrong_noise(fields: dict[str, Any], sentence: tuple[str, ...]) -> None:
    with raises(lx.SpecError, *sentence):
        lx.Noise(**fields)
    with raises(lx.SpecError, *sentence):
        lx.CascadeSpec.from_dict({"noise": fields})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"pattern": ""}, ("invalid-value", "pattern")),
        ({"pattern": 3}, ("invalid-value", "pattern", "3")),
        ({"pattern": "conv", "rank": 0}, ("invalid-value", "conv", "0")),
        ({"pattern": "conv", "rank": True}, ("invalid-value", "conv", "True")),
        (
            {"pattern": "conv", "lora_alpha": -1},
            ("invalid-value", "conv", "lora_alpha", "-1"),
        ),
    ],
)
def test_wrong_rule(fields: dict[str, Any], sentence: tuple[str, ...]) -> None:
    with raises(lx.SpecError, *sentence):
        lx.Rule(**fields)
    with raises(lx.SpecError, *sentence):
        lx.CascadeSpec.from_dict({"rules": [fields]})


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"rnak": 4}, ("unknown-name", "rnak", "nearest: 'rank', 'ranks'", f"known: {FIELDS}")),
        ({"noise": {"strenght": 1}}, ("unknown-name", "noise", "strenght", "strength")),
        ({"rules": [{"patern": "conv"}]}, ("unknown-name", "rules", "patern", "pattern")),
        ({"rules": [{"rank": 4}]}, ("invalid-value", "rules", "pattern", KINDS)),
        ({"rules": ["conv"]}, ("invalid-value", "rules", "lorasc_fx.Rule")),
        ({1: 2}, ("unknown-name", "field 1")),
    ],
)
def test_wrong_data(data: dict[Any, Any], sentence: tuple[str, ...]) -> None:
    with raises(lx.SpecError, *sentence):
        lx.CascadeSpec.from_dict(data)


def test_names_of_peft() -> None:
    """All unknown arguments in one error, each with the field that it is here."""
    with raises(lx.SpecError, "unknown-name", "CascadeSpec") as caught:
        lx.CascadeSpec(r=8, target_modules=["query"], lora_dropout=0.1, rnak=3)  # type: ignore[call-arg]
    told = str(caught.value)
    assert "'r' (here rank), 'target_modules' (here targets, globs on weight names: '*.query'" in told
    assert "'lora_dropout' (here dropout), 'rnak'; nearest: 'rank'" in told
    assert told.endswith(f"; known: {FIELDS}")
    with raises(lx.SpecError, "unknown-name", "Noise", "r"):
        lx.Noise(r=1)  # type: ignore[call-arg]
    config = peft_names()
    for name in config - {field.name for field in fields(lx.CascadeSpec)}:
        with raises(lx.SpecError, "unknown-name", repr(name)):
            lx.CascadeSpec(**{name: None})


def peft_names() -> set[str]:
    """The arguments of peft's LoraConfig that people write."""
    found = {
        "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora",
        "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern",
        "alpha_pattern", "task_type", "inference_mode", "fan_in_fan_out", "target_parameters",
    }  # fmt: skip
    assert found <= {field.name for field in fields(peft.LoraConfig)}
    return found


PLAN = json.loads(lx.Plan(lx.CascadeSpec(), (lx.Site("a.weight", "linear", (3, 2), 1, 2.0),)).to_json())
SITE = PLAN["sites"][0]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", ("invalid-checkpoint",)),
        ("[]", ("invalid-checkpoint",)),
        ("null", ("invalid-checkpoint",)),
        ("{}", ("invalid-checkpoint", "KeyError", "'format'")),
        (
            json.dumps({**PLAN, "format": 7}),
            ("format-not-supported", "7", "1"),
        ),
        (json.dumps({**PLAN, "stage": 0}), ("invalid-checkpoint", "stage", "0")),
        (json.dumps({**PLAN, "stage": "2"}), ("invalid-checkpoint", "stage", "'2'")),
        (json.dumps({**PLAN, "spec": {"rank": 0}}), ("invalid-checkpoint", "SpecError", "rank", "0")),
        (json.dumps({**PLAN, "spec": {"rules": [{}]}}), ("invalid-checkpoint", "SpecError", "rules: pattern")),
        (json.dumps({**PLAN, "sites": [{}]}), ("invalid-checkpoint", "KeyError", "'shape'")),
        (json.dumps({**PLAN, "sites": [{**SITE, "colour": "x"}]}), ("invalid-checkpoint",)),
        (json.dumps({**PLAN, "sites": [{**SITE, "kind": "lstm"}]}), ("invalid-checkpoint", "kind", "'lstm'")),
        (json.dumps({**PLAN, "sites": [{**SITE, "rank": "4"}]}), ("invalid-checkpoint", "rank", "'4'")),
        (json.dumps({**PLAN, "sites": [{**SITE, "shape": [3, "2"]}]}), ("invalid-checkpoint", "shape")),
        (json.dumps({**PLAN, "sites": [{**SITE, "weight": 5}]}), ("invalid-checkpoint", "weight", "5")),
        (
            json.dumps({**PLAN, "sites": [{**SITE, "kind": "attention"}]}),
            ("invalid-checkpoint", "kind", "'attention'"),
        ),
        (json.dumps({**PLAN, "sites": [{**SITE, "slices": [1, "2"]}]}), ("invalid-checkpoint", "slices", "'2'")),
        (json.dumps({**PLAN, "sites": [{**SITE, "slices": [3, 0]}]}), ("invalid-checkpoint", "slices", "0")),
        (
            json.dumps({**PLAN, "sites": [{**SITE, "slices": [1, 1]}]}),
            ("invalid-checkpoint", "slices", "(1, 1)"),
        ),
        (
            json.dumps({**PLAN, "sites": [{**SITE, "slices": [1, 2], "layout": "in_out"}]}),
            ("invalid-checkpoint", "slices", "(1, 2)"),
        ),
        (
            json.dumps({**PLAN, "sites": [{**SITE, "lora_alpha": "x"}]}),
            ("invalid-checkpoint", "lora_alpha"),
        ),
    ],
)
def test_not_a_plan(text: str, sentence: tuple[str, ...]) -> None:
    with raises(lx.CheckpointError, *sentence):
        lx.Plan.from_json(text)


def test_a_plan_is_read_back() -> None:
    assert lx.Plan.from_json(json.dumps(PLAN)).sites == (lx.Site("a.weight", "linear", (3, 2), 1, 2.0),)


def test_a_packed_site_is_read_back() -> None:
    site = lx.Site("a.weight", "linear", (3, 2), 2, 2.0, slices=(1, 2))
    assert site.factor_shapes == ((4, 2), (3, 2))
    assert site.parameters == 4 * 2 + 3 * 2
    assert lx.Plan.from_json(lx.Plan(lx.CascadeSpec(), (site,)).to_json()).sites == (site,)
    one = lx.Site("a.weight", "linear", (3, 2), 2, 2.0)
    assert one.factor_shapes == ((2, 2), (3, 2))
