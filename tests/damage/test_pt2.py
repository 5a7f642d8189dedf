"""A .pt2 path: what would be run from the file is refused or left out; what an export writes opens as before."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from lorasc_fx.capture import open_model
from lorasc_fx.capture.pt2 import sanitized
from tests.damage.pt2_runner import WEIGHTS, edited, hostile, packed, parts_of, strides_of_0
from tests.errors.models import inputs, mlp
from tests.kit.errors import raises

ROOT = Path(__file__).parents[2]
X = inputs(2, 5)
LEFT_OUT = ("pickled example inputs", "a guard that is code", "a guard that asks for more")
"""Attacks on parts that the sanitized copy leaves out."""


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
    if name in LEFT_OUT:
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


class Levels(nn.Module):
    """All positions of seven feature maps of a square image in one axis, as a detector has them: seven squares."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(2, 2, 3, padding=1, stride=2) for _ in range(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps, x = [], x + x.transpose(2, 3)
        for layer in self.layers:
            x = layer(x)
            maps.append(x.flatten(2))
        return torch.cat(maps, 2)


def test_a_size_with_many_squares_is_no_tower(tmp_path: Path) -> None:
    side, image = torch.export.Dim.AUTO, torch.randn(1, 2, 256, 256)
    program = torch.export.export(Levels(), (image,), dynamic_shapes=({2: side, 3: side},))
    torch.export.save(program, tmp_path / "levels.pt2")
    assert torch.equal(open_model(tmp_path / "levels.pt2")(image), program.module()(image))


def test_parts_that_share_their_bytes(tmp_path: Path) -> None:
    """Such a file has any size once it is read."""
    path = tmp_path / "shared.pt2"
    torch.export.save(torch.export.export(mlp(), (X,)), path)
    with zipfile.ZipFile(path, "a") as archive:
        large = next(info for info in archive.infolist() if info.filename.endswith("/weight_0"))
        for number in range(100, 400):
            archive.filelist.append(again := copy.copy(large))
            again.filename = again.orig_filename = large.filename.replace("weight_0", f"weight_{number}")
        archive._didModify = True  # type: ignore[attr-defined]
    with raises(lx.CaptureError, "unsafe-pt2", path):
        lx.adapt(path, args=(X,))


@pytest.mark.parametrize(("width", "opens"), [(1024, True), (2048, False)])
def test_views_of_strides_of_0(width: int, opens: bool, tmp_path: Path) -> None:
    """Expanded buffers are usual; 2**22 entries may be claimed beyond the bytes of the file."""
    path = tmp_path / "views.pt2"
    torch.export.save(torch.export.export(mlp(), (X,)), path)
    parts = parts_of(path)
    edited(WEIGHTS, partial(strides_of_0, size=width))(parts, path)
    size = packed(path, parts).stat().st_size
    if opens:
        assert sanitized(path).getbuffer().nbytes < 2 * size
        return
    with raises(lx.CaptureError, "unsafe-pt2", path, size):
        lx.adapt(path, args=(X,))


def test_tied_weights_count_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*[nn.Linear(512, 512)] * 30), inputs(2, 512)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "tied.pt2")
    assert torch.equal(open_model(tmp_path / "tied.pt2")(x), model(x))


def test_a_compressed_archive(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(mlp(), (X,)), tmp_path / "whole.pt2")
    path = tmp_path / "small.pt2"
    with zipfile.ZipFile(tmp_path / "whole.pt2") as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as small:
        for info in whole.infolist():
            small.writestr(info.filename, whole.read(info))
        first = whole.infolist()[0].filename.partition("/")[2]
    with raises(lx.CaptureError, "unsafe-pt2", path, first):
        lx.adapt(path, args=(X,))
