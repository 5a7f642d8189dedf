"""Each field of a spec refuses what it cannot mean, in one sentence, before there is anything to change."""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import pytest

import lorasc_fx as lx
from lorasc_fx.cli.config import Config, load_config, write_config
from lorasc_fx.plan import SiteOptions
from lorasc_fx.spec import CONFLICTS
from tests.kit.errors import raises
from tests.options import page

FIELDS = (
    "targets, exclude, train, untie, rules, adapter, adapter_options, rank, lora_alpha, use_rslora, dropout, ranks, "
    "train_A, lr_ratio, train_rules, average, placement, pace, "
    "restart, noise, restart_A, restart_pairs, start, carry_rank, optimizer_state, slow_train, on_nonfinite, seed"
)
KINDS = "('linear', 'conv', 'embedding', 'recurrent', 'experts')"

INVALID: dict[str, tuple[Any, ...]] = {
    "rank": (0, -1, True, 2.0, "8", None, 2**31),
    "pace": (0, -0.5, 1.5, math.nan, math.inf, True, "0.5", None, (), (0.5, 0), (0.5, None)),
    "lora_alpha": (math.nan, "16", True, None, 0, -8.0),
    "targets": ((), "linear", (1,)),
    "exclude": ("head",),
    "train": (None,),
    "untie": ("head", (None,)),
    "dropout": (1,),
    "ranks": (4, (4, 0), (4, 2.0)),
    "rules": ("conv", ("conv",)),
    "use_rslora": (1,),
    "train_A": (0,),
    "carry_rank": (0,),
    "lr_ratio": (0, math.nan),
    "average": ("swa",),
    "train_rules": (("head",),),
    "slow_train": ("yes",),
    "restart": (1,),
    "restart_pairs": (0.5, None),
    "adapter": (1, "unknown"),
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
KEPT, REDRAWN = lx.Noise(0.1, keep=True), lx.Noise(0.1, redraw="step")
CONFLICTING: dict[str, dict[str, Any]] = {
    "rank, ranks": {"rank": 6, "ranks": (4, 2)},
    "dropout, placement": {"dropout": 0.1, "placement": "merged"},
    "lr_ratio, train_A": {"lr_ratio": 16, "train_A": False},
    "train_rules, train": {"train_rules": (lx.TrainRule("head", lr=0.1),)},
    "average, noise.keep": {"average": True, "noise": KEPT},
    "start, restart_A": {"start": "olora", "restart_A": "kept"},
    "restart_pairs, start": {"restart_pairs": False, "start": "pissa"},
    "restart_pairs, ranks": {"restart_pairs": False, "ranks": (4, 2)},
    "restart_pairs, optimizer_state": {"restart_pairs": False, "optimizer_state": "kept"},
    "adapter, restart": {"adapter": "dora", "restart": "fast"},
    "adapter, noise.keep, noise.strength": {"adapter": "dora", "noise": KEPT},
    "adapter, noise.redraw, noise.strength": {"adapter": "dora", "noise": REDRAWN},
    "adapter, average": {"adapter": "dora", "average": True},
    "adapter, placement": {"adapter": "dora", "placement": "beside"},
    "adapter, lora_alpha": {"adapter": "vera", "lora_alpha": 4.0},
    "adapter, use_rslora": {"adapter": "vera", "use_rslora": True},
    "adapter, start": {"adapter": "lora-xs", "start": "pissa"},
    "adapter, restart_A": {"adapter": "lora-xs", "restart_A": "kept"},
    "adapter, restart_pairs": {"adapter": "dora", "restart_pairs": False},
    "adapter, train_A": {"adapter": "lora-xs", "train_A": False},
    "adapter, lr_ratio": {"adapter": "lora-xs", "lr_ratio": 2.0},
    "adapter, dropout": {"adapter": "dora", "dropout": 0.1},
}
NOISE: list[tuple[str, Any, str]] = [
    ("strength", -0.1, "-0.1"),
    ("strength", math.nan, "nan"),
    ("strength", "0.1", "'0.1'"),
    ("distribution", "norml", "nearest: 'normal'"),
    ("redraw", "steps", "nearest: 'step'"),
    ("where", "site", "nearest: 'sites'"),
    ("keep", 1, "1"),
]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in INVALID for value in INVALID[name]])
def test_an_invalid_value(name: str, value: Any) -> None:
    shown = "empty" if value == () else repr(value[-1] if isinstance(value, tuple) else value)
    with raises(lx.SpecError, "invalid-value", name, f" is {shown}; "):
        lx.CascadeSpec(**{name: value})


@pytest.mark.parametrize("name", MISSPELT)
def test_a_misspelt_value(name: str) -> None:
    value, nearest = MISSPELT[name]
    with raises(lx.SpecError, "invalid-value", name, repr(value), f"nearest: {nearest!r}"):
        lx.CascadeSpec(**{name: value})


@pytest.mark.parametrize("names", CONFLICTING)
def test_conflicting_options(names: str) -> None:
    """The message names all options of the conflict with their values."""
    settings = [f"{name}=" for name in names.split(", ")]
    with raises(lx.SpecError, "conflicting-options", *settings, " cannot be combined with "):
        lx.CascadeSpec(**CONFLICTING[names])


@pytest.mark.parametrize(("adapter", "name", "value", "told"), [
    ("vera", "d_initial", 0.0, ("invalid-value", "0.0", "other than 0")),
    ("oft", "neumann_terms", 1, ("invalid-value", "2 or more, or 0")),
    ("oft", "neumann_terms", -5, ("invalid-value", "-5")),
    ("oft", "neumann_terms", 2.5, ("invalid-value", "2.5")),
    ("lokr", "decompose_factor", 0, ("invalid-value", "-1")),
    ("delora", "bound", -1.0, ("invalid-value", "above 0")),
    ("delora", "bond", 1.0, ("unknown-name", "nearest: 'bound'", "bound (default 15)")),
    ("lora", "bound", 1.0, ("unknown-name", "its options: none")),
])  # fmt: skip
def test_an_option_of_a_method(adapter: str, name: str, value: float, told: tuple[str, ...]) -> None:
    with raises(lx.SpecError, *told, repr(name), repr(adapter)):
        lx.CascadeSpec(adapter=adapter, adapter_options={name: value})


def test_every_conflict_is_tested() -> None:
    assert list(CONFLICTING) == [", ".join(conflict.fields) for conflict in CONFLICTS]


@pytest.mark.parametrize(("field", "value", "told"), NOISE)
def test_wrong_noise(field: str, value: Any, told: str) -> None:
    noise = {field: value}
    for make in (lambda: lx.Noise(**noise), lambda: lx.CascadeSpec(noise=noise), lambda: from_dict(noise=noise)):
        with raises(lx.SpecError, "invalid-value", f"noise.{field} is {value!r}; ", told):
            make()


@pytest.mark.parametrize("other", [{"redraw": "step"}, {"distribution": "filter"}])
def test_noise_that_cannot_be_kept(other: dict[str, Any]) -> None:
    ((name, value),) = other.items()
    with raises(lx.SpecError, "conflicting-options", f"noise.keep=True cannot be combined with noise.{name}={value!r}"):
        lx.Noise(keep=True, **other)


@pytest.mark.parametrize(
    ("name", "kind", "fields", "told"),
    [
        ("rules", lx.Rule, {"pattern": ""}, ".pattern is empty"),
        ("rules", lx.Rule, {"pattern": 3}, ".pattern is 3"),
        ("rules", lx.Rule, {"pattern": "conv", "rank": 0}, ".rank is 0"),
        ("rules", lx.Rule, {"pattern": "conv", "rank": True}, ".rank is True"),
        ("rules", lx.Rule, {"pattern": "conv", "lora_alpha": -1}, ".lora_alpha is -1"),
        ("train_rules", lx.TrainRule, {"pattern": ""}, ".pattern is empty"),
        ("train_rules", lx.TrainRule, {"pattern": "a", "lr": 0}, ".lr is 0"),
        ("train_rules", lx.TrainRule, {"pattern": "a", "slow": 1}, ".slow is 1"),
    ],
)
def test_wrong_rule(name: str, kind: Any, fields: dict[str, Any], told: str) -> None:
    with raises(lx.SpecError, "invalid-value", name, told):
        kind(**fields)
    with raises(lx.SpecError, "invalid-value", f"spec.{name}[0]{told}; "):
        from_dict(**{name: [fields], "train": ["a"]})


def from_dict(**data: Any) -> lx.CascadeSpec:
    return lx.CascadeSpec.from_dict(data)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"rnak": 4}, ("unknown-name", "rnak", "nearest: 'rank', 'ranks'", f"known: {FIELDS}")),
        ({"noise": {"strenght": 1}}, ("unknown-name", "noise", "strenght", "strength")),
        ({"rules": [{"patern": "conv"}]}, ("unknown-name", "rules", "patern", "pattern")),
        ({"rules": [{"rank": 4}]}, ("invalid-value", "rules", "pattern", KINDS)),
        ({"rules": ["conv"]}, ("invalid-value", "rules[0]", "Rule(...)")),
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


ONE = lx.Site("a.weight", "linear", (3, 2), SiteOptions(1, 2.0))
PLAN = json.loads(lx.Plan(lx.CascadeSpec(), (ONE,)).to_json())


def site(**fields: Any) -> dict[str, Any]:
    """Return the plan with some fields of its site changed; `options` are added to the site's own."""
    (own,) = PLAN["sites"]
    return {"sites": [{**own, **fields, "options": {**own["options"], **fields.get("options", {})}}]}


@pytest.mark.parametrize("text", ["{", "[]", "null"])
def test_no_plan(text: str) -> None:
    with raises(lx.CheckpointError, "invalid-checkpoint"):
        lx.Plan.from_json(text)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"format": None}, ("KeyError", "'format'")),
        ({"stage": 0}, ("stage", "0")),
        ({"stage": "2"}, ("stage", "'2'")),
        ({"spec": {"rank": 0}}, ("SpecError", "rank", "0")),
        ({"spec": {"rules": [{}]}}, ("spec.rules[0].pattern",)),
        ({"sites": [{}]}, ("sites[0].weight is missing",)),
        (site(colour="x"), ("colour",)),
        (site(kind="lstm"), ("kind", "'lstm'")),
        (site(options={"rank": "4"}), ("rank", "'4'")),
        (site(options={"lora_alpha": "x"}), ("lora_alpha",)),
        (site(shape=[3, "2"]), ("shape",)),
        (site(weight=5), ("weight", "5")),
        (site(slices=[1, "2"]), ("slices", "'2'")),
        (site(slices=[3, 0]), ("slices", "0")),
        (site(slices=[1, 1]), ("slices", "(1, 1)")),
        (site(slices=[1, 2], layout="in_out"), ("slices", "(1, 2)")),
    ],
    ids=str,
)
def test_not_a_plan(changes: dict[str, Any], names: tuple[str, ...]) -> None:
    plan = {name: value for name, value in {**PLAN, **changes}.items() if value is not None}
    with raises(lx.CheckpointError, "invalid-checkpoint", *names):
        lx.Plan.from_json(json.dumps(plan))


def test_a_packed_site_is_read_back() -> None:
    site = lx.Site("a.weight", "linear", (3, 2), SiteOptions(2, 2.0), slices=(1, 2))
    assert site.factor_shapes == ((4, 2), (3, 2))
    assert site.parameters == 4 * 2 + 3 * 2
    assert lx.Plan.from_json(lx.Plan(lx.CascadeSpec(), (site,)).to_json()).sites == (site,)
    one = lx.Site("a.weight", "linear", (3, 2), SiteOptions(2, 2.0))
    assert one.factor_shapes == ((2, 2), (3, 2))


RICH = lx.CascadeSpec(
    train=("head.*", "norm.*"),
    train_rules=(lx.TrainRule("head.*", lr=1e-3, slow=False), lx.TrainRule("norm.*")),
    ranks=(8, 4),
    pace=(1.0, 0.5),
    lr_ratio=16.0,
    average=True,
)
FIXED = lx.CascadeSpec(train_A=False, average=True)


@pytest.mark.parametrize("spec", [RICH, FIXED], ids=["rich", "fixed"])
def test_there_and_back(spec: lx.CascadeSpec, tmp_path: Path) -> None:
    assert lx.CascadeSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    write_config(Config(spec=spec), tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml").spec == spec
    assert tomllib.loads((tmp_path / "config.toml").read_text())["spec"]["average"] == spec.average


def test_the_first_of_ranks_is_the_rank() -> None:
    spec = lx.CascadeSpec(ranks=[6, 3])  # type: ignore[arg-type]
    assert (spec.rank, spec.ranks) == (6, (6, 3))
    assert lx.CascadeSpec(rank=6, ranks=(6, 3)) == spec


def test_a_wrong_key_of_a_rule_is_told(tmp_path: Path) -> None:
    text = '[spec]\ntrain = ["head.*"]\n\n[[spec.train_rules]]\npattern = "head.*"\nlearning_rate = 0.1\n'
    (tmp_path / "config.toml").write_text(text)
    with raises(lx.SpecError, "unknown-name", "config.toml", "spec.train_rules[0] has no field 'learning_rate'"):
        load_config(tmp_path / "config.toml")


def test_the_page_has_the_conflicts() -> None:
    """`python -m tests.options.page` writes it anew."""
    assert page.PAGE.read_text(encoding="utf-8") == page.page()
