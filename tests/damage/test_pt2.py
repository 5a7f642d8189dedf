"""A .pt2 path: what would be run from the file is refused or left out; what an export writes opens as before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from lorasc_fx.capture import open_model
from tests.damage.pt2_runner import hostile
from tests.errors.models import exactly, inputs, mlp

ROOT = Path(__file__).parents[2]
X = inputs(2, 5)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.damage.pt2_runner", str(tmp_path_factory.mktemp("pt2"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_attack_is_one(told: dict[str, Any]) -> None:
    """Or the tests below would show nothing: torch's own loader runs what the example inputs hold."""
    assert told["whole"] == "GraphModule"
    assert told["torch itself runs it"]


@pytest.mark.parametrize("name", hostile(""))
def test_nothing_from_the_file_runs(told: dict[str, Any], name: str) -> None:
    assert not told[name]["ran"]
    assert not told[name]["seen"]
    if name == "pickled example inputs":  # an export always has some; they are left out
        assert told[name]["came"] == "GraphModule"
    else:
        assert told[name]["came"].startswith("refused: PATH: ")
        assert told[name]["came"].endswith("give the program itself: adapt(torch.export.load(path), ...)")


class Sizes(nn.Module):
    """Dynamic sizes, a table of inputs, a buffer, a constant, an op with text."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)
        self.register_buffer("shift", torch.linspace(0, 1, 7))

    def forward(self, x: torch.Tensor, more: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        hidden = torch.einsum("bi,oi->bo", x + more["shift"].mean(), self.first.weight) + self.shift
        hidden = hidden.view(x.shape[0], -1) * torch.tensor([2.0])
        return {"out": self.second(torch.nn.functional.gelu(hidden, approximate="tanh"))}


def test_what_an_export_writes_opens_as_before(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", min=2, max=64)
    model, args = Sizes(), (X, {"shift": X})
    shapes = {"x": {0: batch}, "more": {"shift": {0: batch}}}
    torch.export.save(torch.export.export(model, args, dynamic_shapes=shapes), tmp_path / "sizes.pt2")
    opened = open_model(tmp_path / "sizes.pt2")
    larger = inputs(9, 5)
    for given in (X, larger):
        ours, theirs = opened(given, {"shift": given}), model(given, {"shift": given})
        assert torch.equal(ours["out"], theirs["out"])
    with pytest.raises((AssertionError, RuntimeError)):  # the guards of the export stay
        opened(inputs(80, 5), {"shift": inputs(80, 5)})
    with pytest.raises((AssertionError, RuntimeError)):
        opened(inputs(2, 6), {"shift": inputs(2, 6)})


def test_a_pt2_is_adapted(tmp_path: Path) -> None:
    path = tmp_path / "mlp.pt2"
    torch.export.save(torch.export.export(mlp(), (X,)), path)
    cascade = lx.adapt(path, args=(X,), spec=lx.CascadeSpec(rank=2))
    assert len(cascade.sites) == 3
    assert torch.equal(cascade(X), mlp()(X))


def test_a_compressed_archive(tmp_path: Path) -> None:
    import zipfile

    torch.export.save(torch.export.export(mlp(), (X,)), tmp_path / "whole.pt2")
    path = tmp_path / "small.pt2"
    with zipfile.ZipFile(tmp_path / "whole.pt2") as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as small:
        for info in whole.infolist():
            small.writestr(info.filename, whole.read(info))
        first = whole.infolist()[0].filename.partition("/")[2]
    sentence = (
        f"{path}: its {first!r} is compressed, which can do more than describe a model, and is not opened. "
        "If you trust the file, give the program itself: adapt(torch.export.load(path), ...)"
    )
    with pytest.raises(lx.CaptureError, match=exactly(sentence)):
        lx.adapt(path, args=(X,))
