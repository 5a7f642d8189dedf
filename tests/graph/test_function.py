"""`as_function` computes the same as its graph, sees replaced weights, and calls hooks."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree
from transformers.pytorch_utils import Conv1D

import lorasc_fx as lx
from lorasc_fx.graph.function import as_function
from tests.kit.models import batches, mlp, randomize, seeded


class ManyArguments(nn.Module):
    """A model whose graph has arguments of many types: slices, lists, infinities, dtypes, defaults and None."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(5, 4).double(), nn.LayerNorm(4).double()
        self.register_buffer("shift", torch.linspace(0, 1, 4, dtype=torch.float64))

    def forward(self, x: torch.Tensor, scale: float = 2.0, *, more: Any = None) -> Any:
        hidden = self.norm(self.layer(x)) * scale + self.shift
        hidden = hidden.masked_fill(hidden > 1, float("-inf"))[..., 1:, None].clamp(min=-9.0)
        part = torch.cat([hidden, hidden], dim=-1).to(dtype=torch.float32)
        torch.ops.aten.normal_(part, 0.0, generator=None)  # its result is not used
        return {"parts": [part, (hidden.sum(), None)], "none": None}


def test_a_function_computes_what_its_graph_computes() -> None:
    (x,), model = batches(1, 3, 5), ManyArguments()
    traced = fx.symbolic_trace(model)
    exported = torch.export.export(model, (x, 3.0)).module()
    for module, args in ((traced, (x, 3.0)), (traced, (x,)), (exported, (x, 3.0))):
        actual, expected = (seeded(call, *args) for call in (as_function(module), module))
        torch.testing.assert_close(pytree.tree_leaves(actual), pytree.tree_leaves(expected), rtol=0, atol=0)
        assert pytree.tree_structure(actual) == pytree.tree_structure(expected)


def test_a_value_is_freed_after_its_last_use() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def seen(x: torch.Tensor) -> torch.Tensor:
        alive.append(weakref.ref(x))
        return x + 1

    def ended(x: torch.Tensor) -> torch.Tensor:
        assert alive[-1]() is None
        return x

    graph = fx.Graph()
    x = graph.placeholder("x")
    negative = graph.call_function(torch.neg, (x,))
    graph.output(graph.call_function(ended, (graph.call_function(seen, (negative,)),)))
    assert torch.equal(as_function(fx.GraphModule(nn.Module(), graph))(torch.ones(2)), torch.zeros(2))
    assert len(alive) == 1


def test_a_replaced_parameter_is_used_in_the_next_call() -> None:
    model, (x,) = mlp(), batches(1, 4, 5)
    cascade = lx.adapt(model, (x,), spec=lx.CascadeSpec(rank=2))
    before = cascade(x)
    state = {f"model.{name}": value + 1 for name, value in model.named_parameters()}
    weights = {name.removeprefix("model."): value for name, value in state.items()}
    expected = torch.func.functional_call(model, weights, x)
    assert not torch.allclose(before, expected)
    torch.testing.assert_close(torch.func.functional_call(cascade, state, x), expected, rtol=0, atol=1e-14)
    assert torch.equal(cascade(x), before)


def test_dropout_is_applied() -> None:
    x = torch.randn(2, 180, 384, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(384, 768), nn.Sigmoid(), Conv1D(384, 768)).double()
    cascade = lx.adapt(model, (x,), spec=lx.CascadeSpec(rank=2, dropout=0.5))
    randomize(cascade)
    module = cascade.train().graph_module
    assert torch.equal(*(seeded(call, x) for call in (as_function(module), module)))


@pytest.mark.parametrize(
    ("model", "shape", "dtype", "placement"),
    [
        (nn.Linear(256, 256), (1024, 256), torch.float32, "merged"),  # 2 * 1024 * 256 entries over 256 * 256: 8.0
        (nn.Linear(512, 512), (510, 512), torch.float32, "beside"),  # 1.99
        (nn.Linear(512, 512), (520, 512), torch.float32, "merged"),  # 2.03
        (nn.Linear(256, 256), (1024, 256), torch.bfloat16, "beside"),  # W + s B A would be rounded
        (nn.Linear(64, 64), (512, 64), torch.float32, "beside"),  # 2^21 multiply-adds
        (nn.Conv2d(128, 128, 3, padding=1), (1, 128, 32, 32), torch.float32, "beside"),  # 1.78
        (nn.Conv2d(128, 128, 3, padding=1), (1, 128, 36, 36), torch.float32, "merged"),  # 2.25
        (nn.Conv2d(128, 128, 3, padding=1), (128, 36, 36), torch.float32, "beside"),  # no axis of batches
    ],
)
def test_placement_by_shape(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, placement: str) -> None:
    cascade = lx.adapt(nn.Sequential(model).to(dtype), (torch.randn(shape, dtype=dtype),), spec=lx.CascadeSpec(rank=2))
    assert cascade.placements == {"0.weight": placement}


def test_under_autocast_the_placement_is_beside() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        cascade = lx.adapt(nn.Sequential(nn.Linear(256, 256)), (torch.randn(1024, 256),), spec=lx.CascadeSpec(rank=2))
    assert cascade.placements == {"0.weight": "beside"}
