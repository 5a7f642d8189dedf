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
from tests.errors.models import exactly

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"ranks": 4}, "ranks is 4; give a sequence of numbers, one for each stage"),
    ({"ranks": (4, 0)}, "ranks of stage 2 is 0; a rank is an integer of 1 or more"),
    ({"ranks": (4, 2.0)}, "ranks of stage 2 is 2.0; a rank is an integer of 1 or more"),
    ({"rank": 6, "ranks": (4, 2)}, "rank is 6 and ranks begins with 4; give one of the two"),
    ({"pace": ()}, "pace is empty; give a share of the fast weights in (0, 1], or one for each stage"),
    (
        {"pace": (0.5, 0)},
        "pace of stage 2 is 0; it is a share of the fast weights: give a number in (0, 1]",
    ),
    ({"pace": (0.5, None)}, "pace of stage 2 is None; give a finite number"),
    ({"train_A": 0}, "train_A is 0; give true or false"),
    ({"nearest_full_gradient": None}, "nearest_full_gradient is None; give true or false"),
    ({"lr_ratio": 0}, "lr_ratio is 0; it makes a learning rate: give a number above 0"),
    ({"lr_ratio": math.nan}, "lr_ratio is nan; give a finite number"),
    ({"average": "mean"}, "average is 'mean'; give one of off, ema, swa; nearest: 'ema'"),
    ({"average_decay": 1.0}, "average_decay is 1.0; it is what an average keeps: give a number in (0, 1)"),
    ({"train_rules": ("head",)}, "train_rules is ('head',); give a sequence of lorasc_fx.TrainRule"),
    (
        {"lr_ratio": 16, "train_A": False},
        "lr_ratio is 16, a ratio to the learning rate of lora_A, and train_A is false, so that it has none; give the "
        "learning rate of lora_B to param_groups, and lr_ratio=1",
    ),
    (
        {"nearest_full_gradient": True},
        "nearest_full_gradient is true and train_A is true: the correction is exact for a lora_A that stands still "
        "(LoRA-FA); give train_A=False",
    ),
    (
        {"nearest_full_gradient": True, "train_A": False, "restart_A": "gradient"},
        "nearest_full_gradient is true and restart_A is 'gradient', which reads in the gradient of lora_B what "
        "clipping made of it; give restart_A='fresh'",
    ),
    (
        {"train_rules": (lx.TrainRule("head", lr=0.1),)},
        "train_rules has 'head', and train is empty: the rules are for what it names; give train",
    ),
    (
        {"average": "swa", "noise": lx.Noise(0.1, keep=True)},
        "average is 'swa' and noise.keep is true: an average of weights would hold a share of each stage's noise, "
        "which has no coefficient; give one of the two",
    ),
    *(
        (
            {"average": average, "average_decay": 0.5},
            f"average_decay is 0.5 and average is {average!r}, which has none; give average='ema', or no decay",
        )
        for average in ("off", "swa")
    ),
    (
        {"use_dora": True, "average": "ema"},
        "use_dora is True and average is 'ema': an average of weights whose rows were scaled apart has no coefficients "
        "over one list of experts; give average='off', or use_dora=False",
    ),
    (
        {"use_dora": True, "train_A": False, "nearest_full_gradient": True},
        "use_dora is True and nearest_full_gradient is True: the correction is that of a plain branch, whose rows no "
        "magnitude scales; give one of the two",
    ),
]


@pytest.mark.parametrize(("fields", "sentence"), WRONG, ids=lambda value: str(value)[:40])
def test_what_a_spec_refuses(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(lx.SpecError, match=exactly(sentence)):
        lx.CascadeSpec(**fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"pattern": ""}, "train_rules: pattern is ''; give a glob on parameter names"),
        ({"pattern": "a", "lr": 0}, "train_rules['a'].lr is 0; it makes a learning rate: give a number above 0"),
        ({"pattern": "a", "slow": 1}, "train_rules['a'].slow is 1; give true or false"),
    ],
)
def test_what_a_rule_refuses(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(lx.SpecError, match=exactly(sentence)):
        lx.TrainRule(**fields)
    with pytest.raises(lx.SpecError, match=exactly(sentence)):
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
    with pytest.raises(lx.SpecError, match=r"config\.toml:6: unknown key 'spec\.train_rules\.0\.learning_rate'"):
        load_config(tmp_path / "config.toml")
