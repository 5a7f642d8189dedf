"""A bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lorasc_fx.integrations import progress
from tests.kit.seams import SEAMS


def tell(to: progress.Reporter) -> None:
    to.begin("first [bold]", 10)
    to.step(4, "stage 1/3", 0.25)
    to.say("a line: hf:package:x [bold]")
    to.begin("second", 10, 8)
    to.step(10, "stage 3/3", 0.125)


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, markup=False, emoji=False, highlight=False)
    monkeypatch.setattr(*SEAMS["console"], lambda: console)
    with progress.reporting() as shown:
        tell(shown)
    said = screen.getvalue()
    for part in ("10/10", "stage 3/3", "loss 0.125", "second", "a line: hf:package:x [bold]"):
        assert part in said


def test_a_file_gets_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    with progress.reporting() as shown:
        tell(shown)
    assert capsys.readouterr().out.splitlines() == [
        "first [bold]: 10 steps",
        "first [bold]: step 4/10 stage 1/3 loss 0.250, 0.2 steps/s, 30 s left",  # 20 s for 4 steps
        "a line: hf:package:x [bold]",
        "second: 2 steps",
        "second: step 10/10 stage 3/3 loss 0.125, 0.1 steps/s, 0 s left",
    ]


def test_lines_are_not_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.reporting() as shown:
        tell(shown)
    assert len(capsys.readouterr().out.splitlines()) == 3
