"""The fields of these options: what each refuses, pairs without a meaning, and the way to a dictionary and TOML."""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest

import lorasc_fx as lx
from lorasc_fx.cli.config import Config, load_config, write_config
from tests.kit.errors import raises

WRONG: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"ranks": 4}, ("invalid-value", "ranks", "4")),
    ({"ranks": (4, 0)}, ("invalid-value", "2", "0")),
    ({"ranks": (4, 2.0)}, ("invalid-value", "2", "2.0")),
    ({"rank": 6, "ranks": (4, 2)}, ("conflicting-options", "rank", "6", "4")),
    ({"pace": ()}, ("invalid-value", "pace")),
    (
        {"pace": (0.5, 0)},
        ("invalid-value", "2"),
    ),
    ({"pace": (0.5, None)}, ("invalid-value", "2", "None")),
    ({"train_A": 0}, ("invalid-value", "train_A", "0")),
    ({"nearest_full_gradient": None}, ("invalid-value", "nearest_full_gradient", "None")),
    ({"carry_rank": 0}, ("invalid-value", "carry_rank", "0")),
    ({"lr_ratio": 0}, ("invalid-value", "lr_ratio")),
    ({"lr_ratio": math.nan}, ("invalid-value", "lr_ratio")),
    ({"average": "mean"}, ("invalid-value", "average", "mean", "ema")),
    ({"average_decay": 1.0}, ("invalid-value", "average_decay", "1.0")),
    ({"train_rules": ("head",)}, ("invalid-value", "train_rules", "head")),
    (
        {"lr_ratio": 16, "train_A": False},
        ("conflicting-options", "lr_ratio", "16"),
    ),
    (
        {"nearest_full_gradient": True},
        ("conflicting-options", "nearest_full_gradient"),
    ),
    (
        {"train_rules": (lx.TrainRule("head", lr=0.1),)},
        ("conflicting-options", "train_rules", "head"),
    ),
    (
        {"average": "swa", "noise": lx.Noise(0.1, keep=True)},
        ("conflicting-options", "average", "swa"),
    ),
    *(
        (
            {"average": average, "average_decay": 0.5},
            ("conflicting-options", "average_decay", "0.5", average),
        )
        for average in ("off", "swa")
    ),
    (
        {"use_dora": True, "average": "ema"},
        ("conflicting-options", "use_dora", "ema"),
    ),
    (
        {"use_dora": True, "train_A": False, "nearest_full_gradient": True},
        ("conflicting-options", "use_dora"),
    ),
]


@pytest.mark.parametrize(("fields", "sentence"), WRONG, ids=lambda value: str(value)[:40])
def test_what_a_spec_refuses(fields: dict[str, Any], sentence: tuple[str, ...]) -> None:
    with raises(lx.SpecError, *sentence):
        lx.CascadeSpec(**fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"pattern": ""}, ("invalid-value",)),
        ({"pattern": "a", "lr": 0}, ("invalid-value", "train_rules[")),
        ({"pattern": "a", "slow": 1}, ("invalid-value", "train_rules[", "1")),
    ],
)
def test_what_a_rule_refuses(fields: dict[str, Any], sentence: tuple[str, ...]) -> None:
    with raises(lx.SpecError, *sentence):
        lx.TrainRule(**fields)
    with raises(lx.SpecError, *sentence):
        lx.CascadeSpec.from_dict({"train": ["a"], "train_rules": [fields]})


RICH = lx.CascadeSpec(
    train=("head.*", "norm.*"),
    train_rules=(lx.TrainRule("head.*", lr=1e-3, slow=False), lx.TrainRule("norm.*")),
    ranks=(8, 4),
    pace=(1.0, 0.5),
    lr_ratio=16.0,
    average="ema",
    average_decay=0.8,
)
FIXED = lx.CascadeSpec(train_A=False, nearest_full_gradient=True, average="swa")


@pytest.mark.parametrize("spec", [RICH, FIXED], ids=["rich", "fixed"])
def test_there_and_back(spec: lx.CascadeSpec, tmp_path: Path) -> None:
    assert lx.CascadeSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    write_config(Config(spec=spec), tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml").spec == spec
    assert tomllib.loads((tmp_path / "config.toml").read_text())["spec"]["average"] == spec.average


def test_the_first_of_ranks_is_the_rank() -> None:
    spec = lx.CascadeSpec(ranks=[6, 3])  # type: ignore[arg-type]
    assert (spec.rank, spec.ranks) == (6, (6, 3))
    assert [spec.rank_at(stage) for stage in (1, 2, 3)] == [6, 3, 3]
    assert lx.CascadeSpec(rank=6, ranks=(6, 3)) == spec


def test_a_wrong_key_of_a_rule_is_told_with_its_line(tmp_path: Path) -> None:
    text = '[spec]\ntrain = ["head.*"]\n\n[[spec.train_rules]]\npattern = "head.*"\nlearning_rate = 0.1\n'
    (tmp_path / "config.toml").write_text(text)
    with raises(lx.SpecError, "unknown-name", "config.toml", "6", "spec.train_rules.0.learning_rate"):
        load_config(tmp_path / "config.toml")
