"""Fields of these options: invalid values, conflicts, and conversion to dictionaries and TOML."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

import lorasc_fx as lx
from lorasc_fx.cli.config import Config, load_config, write_config
from tests.kit.errors import raises

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


def test_a_wrong_key_of_a_rule_is_told(tmp_path: Path) -> None:
    text = '[spec]\ntrain = ["head.*"]\n\n[[spec.train_rules]]\npattern = "head.*"\nlearning_rate = 0.1\n'
    (tmp_path / "config.toml").write_text(text)
    with raises(lx.SpecError, "unknown-name", "config.toml", "spec.train_rules[0] has no field 'learning_rate'"):
        load_config(tmp_path / "config.toml")
