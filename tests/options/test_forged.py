"""What a checkpoint may say of an average, of ranks and of rules: each forgery is one sentence, and loads nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lorasc_fx as lx
from tests.damage.test_forged import forge, forge_tensors
from tests.errors.state import unchanged
from tests.options.test_average import X, stage, wide

SPEC = lx.CascadeSpec(
    exclude=("3.weight",),
    train=("3.*",),
    train_rules=(lx.TrainRule("3.bias", lr=0.1, slow=True),),
    ranks=(2, 1),
    average="ema",
)
BARE = lx.CascadeSpec(exclude=("3.weight",), train=("3.*",), rank=1)


def version(path: Path, spec: lx.CascadeSpec) -> Path:
    cascade = lx.adapt(wide(), (X,), spec=spec, frontend="symbolic")
    for seed in range(3):
        stage(cascade, seed)
        cascade.transition(None)
    return lx.save(cascade, path)


@pytest.mark.parametrize("which", ["slow", "averaged"])
def test_it_loads_as_it_is(which: Any, tmp_path: Path) -> None:
    manifest = json.loads((version(tmp_path, SPEC) / "manifest.json").read_text())
    assert (manifest["averaged"], manifest["rules"]) == (3, {"3.bias": 0})
    cascade = lx.load(tmp_path, wide(), (X,))
    with cascade.weights(which):
        assert cascade(X).isfinite().all()


def test_without_these_options_a_manifest_says_nothing_of_them(tmp_path: Path) -> None:
    manifest = json.loads((version(tmp_path, BARE) / "manifest.json").read_text())
    assert not {"averaged", "rules"} & set(manifest)
    assert all("average" not in state for state in manifest["slow"].values())
    assert all("ranks" not in site and "train_A" not in site for site in manifest["plan"]["sites"])


FORGED: list[tuple[lx.CascadeSpec, Callable[[Any], Any], str]] = [
    (SPEC, lambda each: each.update(averaged=4), "'averaged' is 4, which this plan's stages cannot have made"),
    (SPEC, lambda each: each.update(averaged=-1), "'averaged' is -1, which this plan's stages cannot have made"),
    (SPEC, lambda each: each.update(averaged=True), "'averaged' is bool, not a number of stages"),
    (BARE, lambda each: each.update(averaged=1), "'averaged' is 1, which this plan's stages cannot have made"),
    (SPEC, lambda each: each.update(rules={"3.bias": 1}), "'rules': 3.bias has 1, which is no rule of the spec's"),
    (SPEC, lambda each: each.update(rules={"x": 0}), "'rules': x has 0, which is no rule of the spec's"),
    (BARE, lambda each: each.update(rules={"3.bias": 0}), "'rules': 3.bias has 0, which is no rule of the spec's"),
    (
        SPEC,
        lambda each: each["slow"]["0.weight"]["average"].pop(),
        "'slow': 0.weight has 3 stages, 3 slow, 3 start, 2 average; there is one of each for every expert",
    ),
    (
        SPEC,
        lambda each: each["slow"]["0.weight"]["average"].__setitem__(0, "1"),
        "'slow': 0.weight has coefficients that are no finite numbers",
    ),
    (SPEC, lambda each: each["slow"]["0.weight"].update(average=None), "'slow': 0.weight holds what is no list"),
    (
        BARE,
        lambda each: each["slow"]["0.weight"].update(average=[1.0, 1.0, 1.0]),
        "'slow' holds an average, and the spec keeps none",
    ),
    (
        SPEC,
        lambda each: each["plan"]["sites"][0].update(rank=2),
        "this is not a plan: ValueError: a site has another rank than its ranks say for stage 4",
    ),
    (
        SPEC,
        lambda each: each["plan"]["sites"][0].update(train_A=1),
        "this is not a plan: ValueError: train_A is 1, not true or false",
    ),
    (
        SPEC,
        lambda each: each["plan"]["sites"][0].update(ranks=[2, 0]),
        "this is not a plan: ValueError: rank is 0, not an integer of 1 or more",
    ),
]


@pytest.mark.parametrize(("spec", "change", "sentence"), FORGED, ids=[each[2][:50] for each in FORGED])
def test_a_manifest(spec: lx.CascadeSpec, change: Callable[[Any], Any], sentence: str, tmp_path: Path) -> None:
    path, model = version(tmp_path, spec), wide()
    forge(path, change)
    with unchanged(model), pytest.raises(lx.CheckpointError) as caught:
        lx.load(tmp_path, model, (X,))
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda each: each.update({"trained/3.bias/average": torch.zeros(4).double()}),
            "'trained/3.bias/average' is (4,), the plan says (3,)",
        ),
        (
            lambda each: each.update({"dense/0.weight/average": torch.zeros(24, 20).double()}),
            "has no tensor 'dense/0.weight/slow', which what is dense beside it needs",
        ),
        (
            lambda each: each["dense/2.weight/average"].__setitem__((0, 0), float("nan")),
            "'dense/2.weight/average' holds inf or nan, which no fold takes",
        ),
    ],
)
def test_tensors(change: Callable[[Any], Any], sentence: str, tmp_path: Path) -> None:
    path, model = version(tmp_path, SPEC), wide()
    forge_tensors(path, change)
    with unchanged(model), pytest.raises(lx.CheckpointError) as caught:
        lx.load(tmp_path, model, (X,))
    assert sentence in str(caught.value)
