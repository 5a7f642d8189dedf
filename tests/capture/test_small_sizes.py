"""Calls with an axis of size 0 or 1 agree with the eager model, although graphs are captured at larger sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from lorasc_fx.compile import Compiler
from tests.kit.errors import warns
from tests.kit.state import variant_count

SPEC = lx.CascadeSpec(rank=2)
Forward = Callable[[nn.Module, torch.Tensor], torch.Tensor]


class Model(nn.Module):
    """A linear layer and a batch norm. A function of the module and x is its forward."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.norm, self.function = nn.Linear(4, 3), nn.BatchNorm1d(3), forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def one_row(model: Any, x: torch.Tensor) -> torch.Tensor:
    return model.layer(x) * 2 if x.shape[0] == 1 else model.layer(x)


def one_step(model: Any, x: torch.Tensor) -> torch.Tensor:
    return model.layer(x).cumsum(1) if x.shape[1] > 1 else -model.layer(x)


def a_product(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Computes something else if the product of two sizes is 3, so only if one of them is 1."""
    return model.layer(x) * (2 if x.shape[0] * x.shape[1] == 3 else 1)


def nothing(model: Any, x: torch.Tensor) -> torch.Tensor:
    return model.layer(x).mean() if x.numel() else model.layer.bias.sum() * 0


def squeezed(model: Any, x: torch.Tensor) -> torch.Tensor:
    y = model.layer(x).squeeze(0)
    return y.sum(0) if y.dim() == 2 else y.sum(1)


def normed(model: Any, x: torch.Tensor) -> torch.Tensor:
    return model.norm(model.layer(x).mean(1))


def raising(model: Any, x: torch.Tensor) -> torch.Tensor:
    if x.shape[0] < 2:
        raise ValueError("give two rows")
    return model.layer(x)


def asserting_by_torch(model: Any, x: torch.Tensor) -> torch.Tensor:
    torch._assert(x.shape[0] != 1, "give two rows")
    return model.layer(x)


def checking(model: Any, x: torch.Tensor) -> torch.Tensor:
    torch._check(x.shape[0] > 1)
    return model.layer(x)


AGREE: list[Forward] = [one_row, one_step, a_product, nothing, squeezed, normed]
RAISE: list[Forward] = [raising, asserting_by_torch, checking]
SIZES = [(1, 5), (5, 1), (1, 1), (1, 3), (0, 5), (4, 5), (1, 7), (7, 1)]


def outcome(call: Callable[[], torch.Tensor]) -> Any:
    """Return the output, or the type of the exception."""
    try:
        return call().detach()
    except Exception as fault:
        return type(fault)


def check(cascade: lx.Cascade, x: torch.Tensor) -> bool:
    """Assert that the cascade agrees with the model before training. Return whether both raise."""
    before = {name: value.clone() for name, value in cascade.model.named_buffers()}
    torch.manual_seed(0)
    computed, buffers = outcome(lambda: cascade(x)), [value.clone() for value in cascade.model.buffers()]
    for name, value in cascade.model.named_buffers():
        value.copy_(before[name])
    with torch.no_grad():
        expected = outcome(lambda: cascade.model(x))
    if isinstance(expected, type):
        assert computed is expected, (tuple(x.shape), computed)
        for name, value in cascade.model.named_buffers():
            value.copy_(before[name])
        return True
    torch.testing.assert_close(computed, expected, equal_nan=True)
    torch.testing.assert_close(buffers, list(cascade.model.buffers()), equal_nan=True)
    return False


CASES = [(function, "auto", True) for function in AGREE + RAISE]
CASES += [(one_row, "export", False), (normed, "auto", False)]
CASES += [(raising, "eager", True)]


@pytest.mark.parametrize(("function", "frontend", "training"), CASES)
def test_small_sizes_agree_with_the_model(
    function: Forward, frontend: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each size is captured once. If the model raises on a size, nothing is captured, and each call runs the model."""
    cascade = lx.adapt(Model(function).train(training), (torch.randn(6, 5, 4),), spec=SPEC, frontend=frontend)
    for size in SIZES:
        check(cascade, torch.randn(*size, 4))
    count, makes, make = variant_count(cascade), list[Any](), Compiler.make
    assert count <= 8
    monkeypatch.setattr(Compiler, "make", lambda *args: (makes.append(args), make(*args))[1])
    refused = [check(cascade, torch.randn(*size, 4)) for size in SIZES]
    assert variant_count(cascade) == count
    assert len(makes) <= sum(refused)


@pytest.mark.parametrize(("function", "axis", "least"), [(one_row, 0, 2), (one_step, 1, 2), (nothing, 0, 1)])
@pytest.mark.parametrize("folded", [True, False])
def test_exports_refuse_sizes_at_which_they_would_be_wrong(
    function: Forward, axis: int, least: int, folded: bool, tmp_path: Path
) -> None:
    """At the other sizes of 0 and 1, they agree with the model."""
    cascade = lx.adapt(Model(function).eval(), (torch.randn(6, 5, 4),), spec=SPEC)
    path = lx.export.pt2(cascade, tmp_path / "model.pt2", folded=folded)
    graphs = [torch.export.load(path).module(), *([cascade.folded_graph()] if folded else [])]
    for graph in graphs:
        for size in range(4):
            sizes = [3, 3]
            sizes[axis] = size
            x, small_elsewhere = torch.randn(*sizes, 4), torch.randn(*reversed([1, 3][:: 1 - 2 * axis]), 4)
            if size >= least:
                torch.testing.assert_close(graph(x), cascade.model(x))
            else:
                with pytest.raises(RuntimeError, match=f"axis {axis} of x must be {least} or more"):
                    graph(x)
            torch.testing.assert_close(graph(small_elsewhere), cascade.model(small_elsewhere), equal_nan=True)


def test_an_onnx_file_records_its_smallest_sizes(tmp_path: Path) -> None:
    import onnx

    cascade = lx.adapt(Model(one_row), (torch.randn(6, 5, 4),), spec=SPEC)
    with warns("smaller-sizes-not-refused", '{"x": {"0": 2}}'):
        path = lx.export.onnx(cascade, tmp_path / "model.onnx")
    assert {entry.key: entry.value for entry in onnx.load(path).metadata_props}["least_sizes"] == '{"x": {"0": 2}}'


@pytest.mark.parametrize("frontend", ["export", "eager"])
def test_a_batch_norm_that_sees_one_value_raises_what_the_model_raises(frontend: str) -> None:
    """Images of 5 pixels shrink to one pixel, and images of 9 pixels do not. Buffers stay finite."""
    model = nn.Sequential(nn.Conv2d(2, 3, 5), nn.BatchNorm2d(3), nn.ReLU())
    cascade = lx.adapt(model, (torch.randn(4, 2, 5, 5),), spec=SPEC, frontend=frontend)
    calls = [(4, 5), (1, 9), (1, 5), (1, 7), (1, 5), (4, 9)]
    assert [check(cascade, torch.randn(batch, 2, pixels, pixels)) for batch, pixels in calls] == [
        pixels == 5 and batch == 1 for batch, pixels in calls
    ]
    assert all(bool(buffer.isfinite().all()) for buffer in model.buffers())
