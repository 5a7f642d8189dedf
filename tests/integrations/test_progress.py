"""What a loop of one's own tells: a bar or lines, metrics.jsonl, and what TensorBoard's own reader finds."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import lorasc_fx as lx
from lorasc_fx.integrations.progress import track
from tests.kit.errors import raises
from tests.kit.seams import SEAMS
from tests.kit.state import Stage


def train(**how: Any) -> list[float]:
    """Two stages of three steps."""
    torch.manual_seed(0)
    cascade = lx.adapt(nn.Linear(5, 3), args=(torch.ones(2, 5),), spec=lx.CascadeSpec(rank=2), frontend="symbolic")
    optimizer = torch.optim.SGD(cascade.param_groups(lr=0.1))
    losses = []
    with track(steps=6, **how) as progress:
        for stage in cascade.stages(2, optimizer):
            for _ in range(3):
                loss = cascade(torch.randn(4, 5)).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
                progress.step(stage, loss.item(), lr=0.1)
            progress.say(f"stage {stage.index} has ended")
            progress.log(validation=0.25 * stage.index)
    return losses


def test_a_folder_keeps_every_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = train(folder=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["stage"] for line in steps] == [1, 1, 1, 2, 2, 2]
    assert [line["transition"] for line in steps] == [0, 0, 0, 1, 0, 0]
    assert [line["loss"] for line in steps] == losses
    assert [line for line in lines if "loss" not in line] == [
        {"step": 3, "validation": 0.25}, {"step": 6, "validation": 0.5},
    ]  # fmt: skip
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"stage", "transition", "loss", "lr", "validation"}
    assert [each.step for each in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [each.value for each in events.Scalars("loss")] == pytest.approx(losses)
    assert [(each.step, each.value) for each in events.Scalars("validation")] == [(3, 0.25), (6, 0.5)]
    assert capsys.readouterr().out.splitlines() == ["train: 6 steps", "stage 1 has ended", "stage 2 has ended"]


def test_without_tensorboard_and_every_second_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*SEAMS["find a package"], lambda name: None)
    train(folder=tmp_path, every=2, title="mine")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train()
    assert not list(tmp_path.iterdir())


def test_a_terminal_shows_stage_step_loss_and_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, markup=False, emoji=False, highlight=False)
    monkeypatch.setattr(*SEAMS["console"], lambda: console)
    losses = train(title="mine", done=0)
    said = screen.getvalue()
    for part in ("mine", "6/6", "stage 2/2", f"loss {losses[-1]:.3f}", "/s", "stage 1 has ended"):
        assert part in said


def test_a_run_that_goes_on_and_numbers_that_json_has_not(tmp_path: Path) -> None:
    for done, stage in ((0, 1), (2, 2)):
        with track(steps=4, folder=tmp_path, done=done) as progress:
            for loss in (math.inf, 0.5):
                progress.step(Stage(stage, stage, 2), loss)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, None), (2, 0.5), (3, None), (4, 0.5)]
    assert [line["transition"] for line in lines] == [0, 0, 1, 0]


@pytest.mark.parametrize("how", [{"steps": 0}, {"steps": 5, "every": 0}], ids=str)
def test_counts(how: dict[str, int]) -> None:
    name, count = list(how.items())[-1]
    with (
        raises(lx.SpecError, "invalid-value", name, count),
        track(**how),  # type: ignore[arg-type]
    ):
        pass
