"""Arguments of public functions that no other test gives: each does what its docstring says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

import lorasc_fx as lx
from tests.kit.models import train


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.head = nn.Linear(6, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        y = self.head(torch.tanh(self.first(x)))
        return y if shift is None else y + shift


X, SHIFT = torch.linspace(-1, 1, 30).view(5, 6), torch.linspace(0, 2, 20).view(5, 4)


def loop(cascade: lx.Cascade, **call: Tensor) -> tuple[torch.optim.Optimizer, StepLR]:
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.05))
    scheduler = StepLR(optimizer, 1)
    for _ in cascade.stages(2, optimizer, scheduler):
        train(cascade, optimizer, [call])
    return optimizer, scheduler


@pytest.fixture(scope="module")
def run() -> tuple[lx.Cascade, torch.optim.Optimizer, StepLR]:
    """A cascade whose slow and averaged weights differ, with its optimizer and scheduler."""
    cascade = lx.adapt(Net(), args=(X,), spec=lx.CascadeSpec(rank=2, average=True))
    return cascade, *loop(cascade, x=X)


def test_w0_on_the_device_and_other_inputs(run: Any, tmp_path: Path) -> None:
    cascade = run[0]
    lx.save(cascade, tmp_path / "run")
    lx.export.peft(cascade, tmp_path / "adapter")
    with cascade.weights("slow"):
        expected = cascade(X)
    merged = lx.merge([tmp_path / "run"], Net(), args=(X,), base_memory="device")
    imported = lx.from_peft(tmp_path / "adapter", Net(), args=(X,), kwargs={"shift": SHIFT}, base_memory="device")
    assert imported.example[1].keys() == {"shift"}
    for result, call, added in ((merged, {}, 0.0), (imported, {"shift": SHIFT}, SHIFT)):
        with result.weights("slow"):
            torch.testing.assert_close(result(X, **call), expected + added, atol=1e-6, rtol=0)


def test_graphs_of_other_inputs(run: Any, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    cascade = run[0]
    with cascade.weights("averaged"):
        expected = cascade(X, shift=SHIFT).detach()
    file = lx.export.onnx(cascade, tmp_path / "net.onnx", (X,), {"shift": SHIFT}, view="averaged")
    session = onnxruntime.InferenceSession(str(file))
    assert [entry.name for entry in session.get_inputs()] == ["x", "shift"]
    (output,) = session.run(None, {"x": X.numpy(), "shift": SHIFT.numpy()})
    assert np.abs(output - expected.numpy()).max() < 1e-5
    program = torch.export.load(lx.export.pt2(cascade, tmp_path / "net.pt2", (X,), {"shift": SHIFT}, view="averaged"))
    torch.testing.assert_close(program.module()(X, shift=SHIFT), expected, atol=1e-6, rtol=0)
