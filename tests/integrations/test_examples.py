"""The examples of other people's loops run, and learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lorasc_fx as lx
from tests.kit.models import Breaking


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


def test_a_model_with_graph_breaks_beside_fabric() -> None:
    """Its import wraps torch.compile, whose keywords it copies onto the model; ours are no affair of a model."""
    import lightning_fabric

    assert hasattr(torch.compile, "__wrapped__"), lightning_fabric
    model = Breaking(4)
    cascade = lx.adapt(model, args=(torch.ones(2, 4),), spec=lx.CascadeSpec(rank=2))
    assert cascade.frontend == "graph-breaks"
    assert "_compile_kwargs" not in vars(model)
    assert torch.equal(cascade(-torch.ones(2, 4)), model.linear(torch.ones(2, 4)))
