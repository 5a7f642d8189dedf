"""Progress of a command: a bar or lines, metrics.jsonl, and scalars read by TensorBoard's reader."""

from __future__ import annotations

import io
import json
import math
from contextlib import closing
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lorasc_fx.cli.progress import Metrics, reporting
from tests.kit.seams import SEAMS


def write(folder: Path) -> None:
    with closing(Metrics(folder)) as metrics:
        for step, loss in ((1, math.inf), (2, 0.5)):
            metrics.log(step=step, stage=1, loss=loss)
        metrics.log(validation=0.25)


def test_a_folder_keeps_every_number(tmp_path: Path) -> None:
    write(tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "stage": 1, "loss": None}, {"step": 2, "stage": 1, "loss": 0.5}, {"validation": 0.25}]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"stage", "loss", "validation"}
    assert [(each.step, each.value) for each in events.Scalars("loss")] == [(1, math.inf), (2, 0.5)]
    assert [(each.step, each.value) for each in events.Scalars("validation")] == [(2, 0.25)]


def test_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*SEAMS["find a package"], lambda name: None)
    write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_shows_stage_step_loss_and_rate(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=120, markup=False, emoji=False, highlight=False)
    monkeypatch.setattr(*SEAMS["console"], lambda: console)
    with reporting() as reporter:
        reporter.begin("mine", 6)
        reporter.step(6, "stage 2/2", 0.25)
        reporter.say("it has ended")
    if not terminal:
        assert capsys.readouterr().out.splitlines() == ["mine: 6 steps", "it has ended"]
        return
    for part in ("mine", "6/6", "stage 2/2", "loss 0.250", "/s", "it has ended"):
        assert part in screen.getvalue()
