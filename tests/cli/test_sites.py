"""`lorasc-fx sites` lists every weight matrix, and the reasons for the weights that are not adapted."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorasc_fx.cli import main


def test_sites_refusals_and_counts(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["sites", "python:tiny_model:build", "--input", "2", "3", "12", "12", "--targets", "conv", "--rank", "3"]
    assert main([*asked, "--train", "7.*"]) == 0
    said = capsys.readouterr().out
    assert "2 sites of python:tiny_model:build" in said
    assert "6 × 3 × 3 × 3" in said  # [out, in, height, width]
    assert "99" in said  # 3 * (6 + 27)
    assert "trained-in-full" in said
    assert "141 trainable parameters in branches" in said  # 99 + 3 * (8 + 6)


SPARE = """
from torch import Tensor, nn

class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)
"""


def test_weights_that_no_graph_uses_are_listed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "spare_model.py").write_text(SPARE)
    assert main(["sites", "python:spare_model:Net", "--input", "2", "4"]) == 0
    said = capsys.readouterr().out
    assert "1 sites of python:spare_model:Net" in said
    assert "not reached by this graph: spare.weight" in said
