"""The examples of other people's loops run, and learn."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from examples.trainer import main

    before, after = main(str(tmp_path / "run"), epochs=2)
    assert after < before - 2
    assert "the saved model goes on counting: [24, 27, 1, 4, 7, 10, 13, 16, 19, 22]" in capsys.readouterr().out


@pytest.mark.slow
def test_accelerate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from examples.accelerate_loop import main

    assert main(str(tmp_path)) > 0.6
    said = capsys.readouterr().out
    assert "ends with the same bits" in said
    assert "stage 3 starts" in said


@pytest.mark.slow
def test_fabric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from examples.fabric_loop import main

    assert main(str(tmp_path)) > 0.6
    assert "stage 3: loss" in capsys.readouterr().out
