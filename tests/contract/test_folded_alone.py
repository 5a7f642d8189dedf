"""Folded models and graphs run in a process in which lorasc_fx cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from tests.kit.models import train

ALONE = """
import sys, torch

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lorasc_fx":
            raise ImportError("lorasc_fx is not here")

sys.meta_path.insert(0, Refuse())
"""


def make(folder: Path, placement: Any) -> None:
    """Write the folded model and graph, with an input and its output, and the exported program."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 6), nn.Linear(6, 5)).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    cascade = lx.adapt(model, (x,), spec=lx.CascadeSpec(rank=2, placement=placement))
    optimizer = torch.optim.SGD(cascade.param_groups(lr=0.1))
    for _ in cascade.stages(2, optimizer):
        train(cascade, optimizer, [x] * 3)
    graph = cascade.folded_graph()
    lx.export.pt2(cascade, folder / "model.pt2")
    released = cascade.release()
    assert released is model
    with torch.no_grad():
        expected = released(x)
    torch.save((released, graph, x, expected), folder / "folded.pt")


def run_alone(folder: Path, *codes: str) -> None:
    """Run each in a process in which lorasc_fx cannot be imported. The last one prints `alone` at its end."""
    for code in codes:
        run = [sys.executable, "-c", ALONE + code, str(folder)]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert done.stdout == "alone\n"


USE = """
released, graph, x, expected = torch.load(f"{sys.argv[1]}/folded.pt", weights_only=False)
with torch.no_grad():
    torch.testing.assert_close(released(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(graph(x), expected, rtol=1e-12, atol=1e-12)
    program = torch.export.load(f"{sys.argv[1]}/model.pt2")
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-12, atol=1e-12)
    more = torch.randn(5, *x.shape[1:], dtype=x.dtype)
    torch.testing.assert_close(program.module()(more), released(more), rtol=1e-12, atol=1e-12)
for module in (*released.modules(), *graph.modules()):
    assert not type(module).__module__.startswith("lorasc_fx"), type(module)
    assert not module._forward_hooks and not module._forward_pre_hooks
for nodes in (graph.graph.nodes, program.graph.nodes):
    assert not any("lora" in str(node.target) for node in nodes)
assert "lorasc_fx" not in sys.modules
print("alone")
"""


@pytest.mark.parametrize(
    "placement", ["beside", *(pytest.param(name, marks=pytest.mark.slow) for name in ("merged", "weight"))]
)
def test_a_folded_model_runs_without_us(tmp_path: Path, placement: Any) -> None:
    make(tmp_path, placement)
    run_alone(tmp_path, USE)
