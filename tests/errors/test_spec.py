"""Each field of a spec refuses what it cannot mean, in one sentence, before there is anything to change."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Any

import peft
import pytest

import lorasc_fx as lx
from tests.errors.models import exactly

FIELDS = (
    "targets, exclude, train, untie, rules, rank, lora_alpha, use_rslora, dropout, ranks, train_A, "
    "nearest_full_gradient, lr_ratio, train_rules, average, average_decay, placement, pace, restart, noise, restart_A, "
    "start, use_dora, optimizer_state, slow_train, on_nonfinite, seed"
)
KINDS = "('linear', 'conv', 'embedding', 'recurrent', 'experts')"

WRONG: list[tuple[dict[str, Any], str]] = [
    *(({"rank": bad}, f"rank is {bad!r}; a rank is an integer of 1 or more") for bad in (0, -1, True, 2.0, "8", None)),
    *(
        ({"pace": bad}, f"pace is {bad}; it is a share of the fast weights: give a number in (0, 1]")
        for bad in (0, -0.5, 1.5)
    ),
    *(({"pace": bad}, f"pace is {bad!r}; give a finite number") for bad in (math.nan, math.inf, True, "0.5", None)),
    *(({"lora_alpha": bad}, f"lora_alpha is {bad!r}; give a finite number") for bad in (math.nan, "16", True, None)),
    *(({"lora_alpha": bad}, f"lora_alpha is {bad}; it scales the branch: give a number above 0") for bad in (0, -8.0)),
    ({"targets": ()}, f"targets is empty; give kinds {KINDS} or globs on weight names"),
    ({"targets": "linear"}, "targets is 'linear'; give a sequence of strings"),
    ({"targets": (1,)}, "targets is (1,); give a sequence of strings"),
    ({"exclude": "head"}, "exclude is 'head'; give a sequence of strings"),
    ({"train": None}, "train is None; give a sequence of strings"),
    ({"untie": "head"}, "untie is 'head'; give a sequence of strings"),
    ({"untie": (None,)}, "untie is (None,); give a sequence of strings"),
    ({"rules": ({"pattern": "conv"},)}, "rules is ({'pattern': 'conv'},); give a sequence of lorasc_fx.Rule"),
    ({"rules": "conv"}, "rules is 'conv'; give a sequence of lorasc_fx.Rule"),
    ({"use_rslora": 1}, "use_rslora is 1; give true or false"),
    ({"slow_train": "yes"}, "slow_train is 'yes'; give true or false"),
    ({"restart": "fsat"}, "restart is 'fsat'; give one of slow, fast; nearest: 'fast'"),
    ({"restart": 1}, "restart is 1; give one of slow, fast"),
    ({"restart_A": "gradeint"}, "restart_A is 'gradeint'; give one of fresh, kept, gradient; nearest: 'gradient'"),
    ({"start": "pisa"}, "start is 'pisa'; give one of lora, pissa, olora, milora; nearest: 'pissa'"),
    *(
        (
            {"start": "olora", "restart_A": bad},
            f"start is 'olora', which takes lora_A out of the weight, and restart_A is {bad!r}; "
            "give restart_A='fresh', or start='lora'",
        )
        for bad in ("kept", "gradient")
    ),
    ({"use_dora": 1}, "use_dora is 1; give true or false"),
    *(
        ({"use_dora": True, **other}, f"use_dora is True and {sentence}, or use_dora=False")
        for other, sentence in (
            (
                {"restart": "fast"},
                "restart is 'fast': the rows of slow and fast weights would be scaled apart, and no one list of "
                "experts has both; give restart='slow'",
            ),
            (
                {"restart_A": "gradient"},
                "restart_A is 'gradient', whose first step is known for plain LoRA only; give restart_A='fresh' "
                "or 'kept'",
            ),
            (
                {"dropout": 0.1},
                "dropout is 0.1: the branch stands in place of its op, whose input is not dropped; give dropout=0",
            ),
            *(
                (
                    {"placement": bad},
                    f"placement is {bad!r}: magnitudes scale the op's own product, so the branch stands in its place; "
                    "give placement='auto' or 'merged'",
                )
                for bad in ("beside", "weight")
            ),
            (
                {"noise": lx.Noise(0.1, keep=True)},
                "noise.keep is True: noise that stays would be scaled by every later stage; give keep=False",
            ),
            (
                {"noise": lx.Noise(0.1, redraw="step")},
                "noise.redraw is 'step': the norms of a stage would be those of its last draw; give redraw='stage'",
            ),
        )
    ),
    ({"on_nonfinite": "skipp"}, "on_nonfinite is 'skipp'; give one of raise, skip; nearest: 'skip'"),
    ({"noise": 0.1}, "noise is 0.1; give lorasc_fx.Noise(strength)"),
    ({"optimizer_state": "rest"}, "optimizer_state is 'rest'; give one of reset, kept; nearest: 'reset', 'kept'"),
    *(
        ({"optimizer_state": bad}, f"optimizer_state is {bad}; give 'reset', 'kept' or a ratio in (0, 1) to prune")
        for bad in (0.0, 1, -0.2)
    ),
    ({"optimizer_state": None}, "optimizer_state is None; give a finite number"),
    *(({"seed": bad}, f"seed is {bad!r}; give an integer from 0 to 2**63 - 1") for bad in (-1, True, 1.0, 2**63)),
]


@pytest.mark.parametrize(("fields", "sentence"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_value(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(lx.SpecError, match=exactly(sentence)):
        lx.CascadeSpec(**fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"strength": -0.1}, "noise.strength is -0.1; it scales a standard deviation: give 0 (off) or more"),
        ({"strength": math.nan}, "noise.strength is nan; give a finite number"),
        ({"strength": "0.1"}, "noise.strength is '0.1'; give a finite number"),
        (
            {"distribution": "norml"},
            "noise.distribution is 'norml'; give one of uniform, normal, filter; nearest: 'normal', 'uniform'",
        ),
        ({"redraw": "steps"}, "noise.redraw is 'steps'; give one of stage, step; nearest: 'step', 'stage'"),
        (
            {"redraw": "step", "keep": True},
            "noise.keep is True and noise.redraw is 'step': a stage has many draws, and none of them is its noise; "
            "give keep=False, or redraw='stage'",
        ),
        (
            {"distribution": "filter", "keep": True},
            "noise.keep is True and noise.distribution is 'filter', whose size differs from row to row, and what is "
            "kept has one size a weight; give keep=False, or distribution='normal'",
        ),
        ({"where": "site"}, "noise.where is 'site'; give one of sites, all; nearest: 'sites'"),
        ({"keep": 1}, "noise.keep is 1; give true or false"),
    ],
)
def test_wrong_noise(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(lx.SpecError, match=exactly(sentence)):
        lx.Noise(**fields)
    with pytest.raises(lx.SpecError, match=exactly(sentence)):
        lx.CascadeSpec.from_dict({"noise": fields})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"pattern": ""}, f"rules: pattern is ''; give a kind {KINDS} or a glob on weight names"),
        ({"pattern": 3}, f"rules: pattern is 3; give a kind {KINDS} or a glob on weight names"),
        ({"pattern": "conv", "rank": 0}, "rules['conv'].rank is 0; a rank is an integer of 1 or more"),
        ({"pattern": "conv", "rank": True}, "rules['conv'].rank is True; a rank is an integer of 1 or more"),
        (
            {"pattern": "conv", "lora_alpha": -1},
            "rules['conv'].lora_alpha is -1; it scales the branch: give a number above 0",
        ),
    ],
)
def test_wrong_rule(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(lx.SpecError, match=exactly(sentence)):
        lx.Rule(**fields)
    with pytest.raises(lx.SpecError, match=exactly(sentence)):
        lx.CascadeSpec.from_dict({"rules": [fields]})


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"rnak": 4}, f"spec has no field 'rnak'; nearest: 'rank', 'ranks'; known: {FIELDS}"),
        ({"noise": {"strenght": 1}}, "noise has no field 'strenght'; nearest: 'strength'; "),
        ({"rules": [{"patern": "conv"}]}, "rules has no field 'patern'; nearest: 'pattern'; known: pattern, rank, "),
        ({"rules": [{"rank": 4}]}, f"rules: pattern is ''; give a kind {KINDS} or a glob on weight names"),
        ({"rules": ["conv"]}, "rules is ('conv',); give a sequence of lorasc_fx.Rule"),
        ({1: 2}, "spec has no field 1; known: "),
    ],
)
def test_wrong_data(data: dict[Any, Any], sentence: str) -> None:
    with pytest.raises(lx.SpecError, match=exactly(sentence).removesuffix("$")):
        lx.CascadeSpec.from_dict(data)


def test_names_of_peft() -> None:
    """All unknown arguments in one error, each with the field that it is here."""
    with pytest.raises(lx.SpecError, match=r"^CascadeSpec has no field ") as caught:
        lx.CascadeSpec(r=8, target_modules=["query"], lora_dropout=0.1, rnak=3)  # type: ignore[call-arg]
    told = str(caught.value)
    assert "'r' (here rank), 'target_modules' (here targets, globs on weight names: '*.query'" in told
    assert "'lora_dropout' (here dropout), 'rnak'; nearest: 'rank'" in told
    assert told.endswith(f"; known: {FIELDS}")
    with pytest.raises(lx.SpecError, match=r"^Noise has no field 'r'; known: strength"):
        lx.Noise(r=1)  # type: ignore[call-arg]
    config = peft_names()
    for name in config - {each.name for each in fields(lx.CascadeSpec)}:
        with pytest.raises(lx.SpecError, match=f"'{name}' "):
            lx.CascadeSpec(**{name: None})


def peft_names() -> set[str]:
    """The arguments of peft's LoraConfig that people write."""
    found = {
        "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora",
        "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern",
        "alpha_pattern", "task_type", "inference_mode", "fan_in_fan_out", "target_parameters",
    }  # fmt: skip
    assert found <= {each.name for each in fields(peft.LoraConfig)}
    return found


PLAN = json.loads(lx.Plan(lx.CascadeSpec(), (lx.Site("a.weight", "linear", (3, 2), 1, 2.0),)).to_json())
SITE = PLAN["sites"][0]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "this is not a plan: JSONDecodeError: "),
        ("[]", "this is not a plan: "),
        ("null", "this is not a plan: "),
        ("{}", "this is not a plan: KeyError: 'format'"),
        (
            json.dumps({**PLAN, "format": 7}),
            "plan has format 7, this version reads 2; read it by the lorasc-fx that wrote it",
        ),
        (json.dumps({**PLAN, "stage": 0}), "this is not a plan: ValueError: stage is 0"),
        (json.dumps({**PLAN, "stage": "2"}), "this is not a plan: ValueError: stage is '2'"),
        (json.dumps({**PLAN, "spec": {"rank": 0}}), "this is not a plan: SpecError: rank is 0; "),
        (json.dumps({**PLAN, "spec": {"rules": [{}]}}), "this is not a plan: SpecError: rules: pattern is ''; "),
        (json.dumps({**PLAN, "sites": [{}]}), "this is not a plan: KeyError: 'shape'"),
        (json.dumps({**PLAN, "sites": [{**SITE, "colour": "x"}]}), "this is not a plan: TypeError: "),
        (json.dumps({**PLAN, "sites": [{**SITE, "kind": "lstm"}]}), "this is not a plan: ValueError: kind is 'lstm'"),
        (json.dumps({**PLAN, "sites": [{**SITE, "rank": "4"}]}), "this is not a plan: ValueError: rank is '4'"),
        (json.dumps({**PLAN, "sites": [{**SITE, "shape": [3, "2"]}]}), "this is not a plan: ValueError: shape is "),
        (json.dumps({**PLAN, "sites": [{**SITE, "weight": 5}]}), "this is not a plan: ValueError: weight is 5"),
        (
            json.dumps({**PLAN, "sites": [{**SITE, "kind": "attention"}]}),
            "this is not a plan: ValueError: kind is 'attention'",
        ),
        (json.dumps({**PLAN, "sites": [{**SITE, "parts": [1, "2"]}]}), "this is not a plan: ValueError: parts is '2'"),
        (json.dumps({**PLAN, "sites": [{**SITE, "parts": [3, 0]}]}), "this is not a plan: ValueError: parts is 0"),
        (
            json.dumps({**PLAN, "sites": [{**SITE, "parts": [1, 1]}]}),
            "this is not a plan: ValueError: parts is (1, 1), which are not the rows of a weight of shape (3, 2)",
        ),
        (
            json.dumps({**PLAN, "sites": [{**SITE, "parts": [1, 2], "layout": "in_out"}]}),
            "this is not a plan: ValueError: parts is (1, 2), which are not the rows of a weight of shape (3, 2)",
        ),
        (
            json.dumps({**PLAN, "sites": [{**SITE, "lora_alpha": "x"}]}),
            "this is not a plan: ValueError: lora_alpha is ",
        ),
    ],
)
def test_not_a_plan(text: str, sentence: str) -> None:
    with pytest.raises(lx.CheckpointError, match=exactly(sentence).removesuffix("$")):
        lx.Plan.from_json(text)


def test_a_plan_is_read_back() -> None:
    assert lx.Plan.from_json(json.dumps(PLAN)).sites == (lx.Site("a.weight", "linear", (3, 2), 1, 2.0),)


def test_a_packed_site_is_read_back() -> None:
    site = lx.Site("a.weight", "linear", (3, 2), 2, 2.0, parts=(1, 2))
    assert site.factor_shapes == ((4, 2), (3, 2))
    assert site.parameters == 4 * 2 + 3 * 2
    assert lx.Plan.from_json(lx.Plan(lx.CascadeSpec(), (site,)).to_json()).sites == (site,)
    one = lx.Site("a.weight", "linear", (3, 2), 2, 2.0)
    assert one.factor_shapes == ((2, 2), (3, 2))
