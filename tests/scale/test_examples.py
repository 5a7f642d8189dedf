"""The examples of an image model, of a language model and of a graph without source run, and learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


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
def test_image_classification(capsys: pytest.CaptureFixture[str]) -> None:
    from examples.image_conv import main

    before, after = main()
    assert after > before + 0.1
    assert "stage 2: loss" in capsys.readouterr().out


@pytest.mark.slow
def test_a_causal_language_model(capsys: pytest.CaptureFixture[str]) -> None:
    from examples.causal_lm import main

    before, after = main()
    assert after < before - 0.1
    assert "stage 2: loss" in capsys.readouterr().out
