"""The examples run, and learn."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch


def test_the_table_names_every_example() -> None:
    folder = Path(__file__).parents[2] / "examples"
    table = (folder / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in folder.glob("*.py")} - {*re.findall(r"\((\w+\.py)\)", table)} == {"__init__.py"}


@pytest.mark.slow
def test_the_plain_loop(capsys: pytest.CaptureFixture[str]) -> None:
    from examples.plain_loop import main

    assert 0 <= main(steps=2, stages=2) <= 1
    said = capsys.readouterr().out
    assert "stage 2: loss" in said
    assert "accuracy of the released model" in said


@pytest.mark.slow
def test_the_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from examples.trainer import main

    before, after = main(str(tmp_path / "run"), epochs=2)
    assert after < before - 2
    assert "the saved model goes on counting: [24, 27, 1, 4, 7, 10, 13, 16, 19, 22]" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "told"),
    [("accelerate", ("ends with the same bits", "stage 3 starts")), ("fabric", ("stage 3: loss",))],
)
def test_loops_of_others(name: str, told: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from examples import accelerate_loop, fabric_loop

    assert {"accelerate": accelerate_loop, "fabric": fabric_loop}[name].main(str(tmp_path)) > 0.6
    said = capsys.readouterr().out
    assert all(each in said for each in told)


def test_many_runs_are_separate_runs(capsys: pytest.CaptureFixture[str]) -> None:
    from examples.many_runs import main

    assert max(main(steps=12).values()) < 1e-10
    assert "large: loss" in capsys.readouterr().out


def test_a_graph_without_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from examples.graph_only import main

    before, after = main(steps=60, stages=2, folder=tmp_path)
    assert after > before + 0.1
    assert "captured by graph" in capsys.readouterr().out
    given, made = (torch.export.load(tmp_path / f"{name}.pt2") for name in ("given", "adapted"))
    targets = [[str(node.target) for node in each.graph.nodes if node.op == "call_function"] for each in (given, made)]
    assert targets[0] == targets[1]
    assert made.module()(torch.randn(5, 12)).shape == (5, 3)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sign"), [("images", 1), ("texts", -1)])
def test_images_and_texts(name: str, sign: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Accuracy rises, loss falls."""
    from examples import causal_lm, image_conv

    before, after = {"images": image_conv, "texts": causal_lm}[name].main()
    assert sign * (after - before) > 0.1
    assert "stage 2: loss" in capsys.readouterr().out
