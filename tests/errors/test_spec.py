"""Each field of a spec refuses wrong values, and each table of a file wrong keys."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest

import lorasc_fx as lx
from lorasc_fx.cli.config import Config, load_config, write_config
from lorasc_fx.plan import SiteOptions
from lorasc_fx.spec import CONFLICTS
from tests.kit.errors import raises
from tests.spec import page

INVALID: dict[str, tuple[Any, ...]] = {
    "rank": (0, True, 2.0, "8", 2**31, (4, 2)),
    "pace": (0, 1.5, math.nan, True, "0.5", (), (0.5, 0)),
    "lora_alpha": (math.nan, "16", None, 0),
    "targets": ((), "linear", (1,)),
    "exclude": ("head",),
    "train": (None,),
    "untie": ("head",),
    "dropout": (1,),
    "rules": (("conv",),),
    "use_rslora": (1,),
    "lr_ratio": (0,),
    "restart": (1,),
    "adapter": (1, "unknown"),
    "noise": (0.1,),
    "optimizer_state": (0.0, 1, None),
    "seed": (-1, 2**63),
}
MISSPELT = {
    "restart": ("fsat", "fast"),
    "restart_factors": ("bth", "both"),
    "start": ("pisa", "pissa"),
    "optimizer_state": ("rest", "reset"),
}
KEPT = lx.Noise(0.1, keep=True)
CONFLICTING: dict[str, dict[str, Any]] = {
    "dropout, placement": {"dropout": 0.1, "placement": "merged"},
    "average, noise.keep": {"average": True, "noise": KEPT},
    "restart_factors, start": {"restart_factors": "B", "start": "pissa"},
    "restart_factors, adapter": {"restart_factors": "none", "adapter": "dora"},
    "adapter, restart": {"adapter": "dora", "restart": "fast"},
    "adapter, noise.keep, noise.strength": {"adapter": "dora", "noise": KEPT},
    "adapter, average": {"adapter": "dora", "average": True},
    "adapter, placement": {"adapter": "dora", "placement": "beside"},
    "grid, placement": {"grid": "bfloat16", "placement": "beside"},
    "grid, dropout": {"grid": "bfloat16", "dropout": 0.1},
    "grid, start": {"grid": "bfloat16", "start": "pissa"},
    "grid, restart_factors": {"grid": "bfloat16", "restart_factors": "none"},
    "grid, noise.keep": {"grid": "bfloat16", "noise": {"keep": True}},
    "adapter, lora_alpha": {"adapter": "vera", "lora_alpha": 4.0},
    "adapter, use_rslora": {"adapter": "vera", "use_rslora": True},
    "adapter, start": {"adapter": "lora-xs", "start": "pissa"},
    "adapter, restart_factors": {"adapter": "lora-xs", "restart_factors": "B"},
    "adapter, train_A": {"adapter": "lora-xs", "train_A": False},
    "adapter, lr_ratio": {"adapter": "lora-xs", "lr_ratio": 2.0},
    "adapter, dropout": {"adapter": "dora", "dropout": 0.1},
}
METHODS: list[tuple[str, str, float, str, tuple[str, ...]]] = [
    ("vera", "d_initial", 0.0, "invalid-value", ("0.0",)),
    ("oft", "neumann_terms", 2.5, "invalid-value", ("2.5",)),
    ("lokr", "decompose_factor", 0, "invalid-value", ("-1",)),
    ("delora", "bound", -1.0, "invalid-value", ("-1.0",)),
    ("delora", "bond", 1.0, "unknown-name", ("nearest: 'bound'",)),
    ("lora", "bound", 1.0, "unknown-name", ("none",)),
]
DATA: list[tuple[dict[Any, Any], str, tuple[str, ...]]] = [
    ({"rnak": 4}, "unknown-name", ("rnak", "nearest: 'rank'", "lora_alpha")),
    ({"noise": {"strenght": 1}}, "unknown-name", ("noise", "strenght", "strength")),
    ({"noise": {"strength": math.nan}}, "invalid-value", ("noise.strength", "nan")),
    ({"noise": {"strength": "0.1"}}, "invalid-value", ("noise.strength", "'0.1'")),
    ({"noise": {"distribution": "norml"}}, "invalid-value", ("noise.distribution", "nearest: 'normal'")),
    ({"noise": {"keep": 1}}, "invalid-value", ("noise.keep", "1")),
    ({"rules": [{"patern": "conv"}]}, "unknown-name", ("rules", "patern", "pattern")),
    ({"rules": [{"rank": 4}]}, "invalid-value", ("rules", "pattern", "'linear'")),
    ({"rules": [{"pattern": ""}]}, "invalid-value", ("spec.rules[0].pattern",)),
    ({"rules": [{"pattern": "conv", "rank": 0}]}, "invalid-value", ("spec.rules[0].rank",)),
    ({"rules": ["conv"]}, "invalid-value", ("rules[0]",)),
    ({1: 2}, "unknown-name", ("1",)),
]
Refusal = tuple[Callable[[], Any], str, tuple[str, ...]]
Spec = lx.CascadeSpec


def refusals() -> Iterator[Refusal]:
    """Yield calls that a spec refuses, with the code and parts of the message."""
    for name, value in ((name, value) for name, values in INVALID.items() for value in values):
        shown = "empty" if value == () else repr(value[-1] if isinstance(value, tuple) else value)
        yield partial(Spec, **{name: value}), "invalid-value", (name, shown)
    for name, (value, nearest) in MISSPELT.items():
        yield partial(Spec, **{name: value}), "invalid-value", (name, repr(value), f"nearest: {nearest!r}")
    for names, options in CONFLICTING.items():
        settings = [f"{name}=" for name in names.split(", ")]
        yield partial(Spec, **options), "conflicting-options", (*settings,)
    for adapter, name, value, code, names in METHODS:
        yield partial(Spec, adapter=adapter, adapter_options={name: value}), code, (*names, repr(name), repr(adapter))
    for data, code, names in DATA:
        yield partial(Spec.from_dict, data), code, names
    yield partial(lx.Noise, r=1), "unknown-name", ("Noise", "r")


@pytest.mark.parametrize(("call", "code", "names"), list(refusals()))
def test_it_is_refused(call: Callable[[], Any], code: str, names: tuple[str, ...]) -> None:
    with raises(lx.SpecError, code, *names):
        call()


def test_every_conflict_is_tested() -> None:
    assert list(CONFLICTING) == [", ".join(conflict.fields) for conflict in CONFLICTS]


@pytest.mark.parametrize("options", [{"placement": "weight"}, {"restart_factors": "B"}], ids=str)
def test_what_a_grid_can_be_combined_with(options: dict[str, Any]) -> None:
    assert lx.CascadeSpec(grid="bfloat16", **options).grid == "bfloat16"


def test_names_of_peft() -> None:
    """All unknown arguments are in one error, each with the field that it is here."""
    names = {"r": "rank", "target_modules": "targets", "lora_dropout": "dropout"}
    assert {field.name for field in fields(peft.LoraConfig)} >= names.keys()
    expected = [f"'{name}' (here {field}" for name, field in names.items()]
    with raises(lx.SpecError, "unknown-name", "CascadeSpec", *expected, "'rnak'; nearest: "):
        lx.CascadeSpec(r=8, target_modules=["query"], lora_dropout=0.1, rnak=3)  # type: ignore[call-arg]


ONE = lx.Site("a.weight", "linear", (3, 2), SiteOptions(1, 2.0))
PLAN = json.loads(lx.Plan(lx.CascadeSpec(), (ONE,)).to_json())


def site(**fields: Any) -> dict[str, Any]:
    """Return the plan with some fields of its site changed; `options` are added to its options."""
    (planned,) = PLAN["sites"]
    return {"sites": [{**planned, **fields, "options": {**planned["options"], **fields.get("options", {})}}]}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"format": None}, ("'format'",)),
        ({"stage": 0}, ("stage", "0")),
        ({"spec": {"rank": 0}}, ("rank", "0")),
        ({"sites": [{}]}, ("sites[0].weight",)),
        (site(colour="x"), ("colour",)),
        (site(kind="lstm"), ("kind", "'lstm'")),
        (site(options={"rank": "4"}), ("rank", "'4'")),
        (site(shape=[3, "2"]), ("shape",)),
    ],
    ids=str,
)
def test_not_a_plan(changes: dict[str, Any], names: tuple[str, ...]) -> None:
    plan = {name: value for name, value in {**PLAN, **changes}.items() if value is not None}
    with raises(lx.CheckpointError, "invalid-checkpoint", *names):
        lx.Plan.from_json(json.dumps(plan))
    with raises(lx.CheckpointError, "invalid-checkpoint"):
        lx.Plan.from_json("[]")


def test_a_site_is_read_back() -> None:
    site = lx.Site("a.weight", "linear", (3, 2), SiteOptions(2, 2.0), layout="in_out")
    assert site.factor_shapes == ((2, 3), (2, 2))
    assert site.parameters == 2 * 3 + 2 * 2
    assert lx.Plan.from_json(lx.Plan(lx.CascadeSpec(), (site,)).to_json()).sites == (site,)


@pytest.mark.parametrize(
    "options",
    [{"train": ("head.*", "norm.*"), "pace": (1.0, 0.5), "lr_ratio": 16.0, "average": True}, {"train_A": False}],
)
def test_a_spec_is_read_again(options: dict[str, Any], tmp_path: Path) -> None:
    spec = lx.CascadeSpec(**options)
    assert lx.CascadeSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    write_config(Config(spec=spec), tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml").spec == spec


def test_the_page_has_the_conflicts() -> None:
    """`python -m tests.spec.page` writes it."""
    assert page.PAGE.read_text(encoding="utf-8") == page.page()
