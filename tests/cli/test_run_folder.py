"""The run folder: atomic files, and no run is overwritten without a request."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorasc_fx.cli.config import Config, load_config
from lorasc_fx.cli.run_folder import RunFolder, effective_rank
from lorasc_fx.errors import StateError
from tests.kit.errors import raises


def test_begin_writes_config_and_environment(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    config = Config(output=str(folder.path))
    folder.begin(config, resume=False)
    assert load_config(folder.config) == config
    environment = json.loads((folder.path / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert str(tmp_path) not in json.dumps(environment)


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(Config(), resume=False)
    folder.begin(Config(output="other"), resume=False)  # nothing was done yet
    folder.log(step=1)
    with raises(StateError, "path-in-the-way"):
        folder.begin(Config(), resume=False)
    folder.begin(Config(output="elsewhere"), resume=True)


def test_tied_weights_are_written_under_each_name(tmp_path: Path) -> None:
    weight = torch.randn(3, 2)
    path = RunFolder(tmp_path).write_weights({"a": weight, "b": weight, "c": weight.t()})
    found = load_file(path)
    assert torch.equal(found["a"], weight)
    assert torch.equal(found["b"], weight)
    assert torch.equal(found["c"], weight.t())


def test_effective_rank_is_the_exponential_of_the_entropy() -> None:
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0]).double()) == pytest.approx(3)
    assert effective_rank(torch.tensor([5.0, 0.0]).double()) == pytest.approx(1)
    assert effective_rank(torch.zeros(4).double()) == 0
    values = torch.tensor([3.0, 1.0]).double()
    rank = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(values) == pytest.approx(rank)
    assert effective_rank(torch.stack([values, torch.ones(2).double()])) == pytest.approx((rank + 2) / 2)
