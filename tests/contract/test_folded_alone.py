"""What is folded needs nothing of ours: it runs in a process in which lorasc_fx cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MAKE = """
import sys, torch
from torch import nn
import lorasc_fx as lx

folder, placement = sys.argv[1:]
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 6), nn.Linear(6, 5)).double()
x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
cascade = lx.adapt(model, (x,), spec=lx.CascadeSpec(rank=2, placement=placement))
optimizer = torch.optim.SGD(cascade.param_groups(lr=0.1))
for _ in cascade.stages(2, optimizer):
    for _ in range(3):
        cascade(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
graph = cascade.folded_graph()
released = cascade.release()
assert released is model
with torch.no_grad():
    expected = released(x)
torch.save((released, graph, x, expected), f"{folder}/folded.pt")
"""

USE = """
import sys, torch

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lorasc_fx":
            raise ImportError("lorasc_fx is not here")

sys.meta_path.insert(0, Refuse())
released, graph, x, expected = torch.load(f"{sys.argv[1]}/folded.pt", weights_only=False)
with torch.no_grad():
    torch.testing.assert_close(released(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(graph(x), expected, rtol=1e-12, atol=1e-12)
for module in (*released.modules(), *graph.modules()):
    assert not type(module).__module__.startswith("lorasc_fx"), type(module)
    assert not module._forward_hooks and not module._forward_pre_hooks
assert not any("lora" in str(node.target) for node in graph.graph.nodes)
assert "lorasc_fx" not in sys.modules
print("alone")
"""


@pytest.mark.parametrize("placement", ["beside", "merged", "weight"])
def test_a_folded_model_runs_without_us(tmp_path: Path, placement: str) -> None:
    for code in (MAKE, USE):
        run = [sys.executable, "-c", code, str(tmp_path), *([placement] if code is MAKE else [])]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert done.stdout == "alone\n"
