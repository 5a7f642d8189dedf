"""Runs whose autograd graphs have equal descriptions have equal gradients, so no backward pass is run for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorasc_fx as lx
from lorasc_fx.check.autograd_graph import describe
from tests.check.test_preflight import SPEC
from tests.kit.errors import raises
from tests.kit.models import TwoLayers, batches, build
from tests.kit.seams import SEAMS, seam

Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def leaves() -> tuple[Tensor, Tensor, Tensor]:
    """Return two equal weights and an input of small integers, for which sums are exact."""
    x = torch.tensor([[2.0, -4.0, 8.0, 1.0], [4.0, 2.0, -2.0, 2.0], [1.0, 1.0, 4.0, -8.0]])
    return torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True), x.requires_grad_()


def described(run: Run) -> tuple[Any, Tensor, list[Tensor]]:
    """Return the description of a run, its output, and its gradients."""
    v, w, x = leaves()
    output = run(v, w, x)
    description = describe([output], {"v": v, "w": w}, {"x": x})
    gradients = torch.autograd.grad(output.sum(), (v, w, x), allow_unused=True, materialize_grads=True)
    return description, output, list(gradients)


ALIKE: dict[str, tuple[Run, Run]] = {
    "a slice of all": (lambda v, w, x: x[:, 1] * v[1], lambda v, w, x: x[:][:, 1] * v[1]),
    "a view of the same shape": (lambda v, w, x: (x * v).tanh(), lambda v, w, x: (x * v).view(3, 4).tanh()),
    "a reshape for an expansion of none": (
        lambda v, w, x: F.layer_norm(F.linear(x, torch.diag(v)), (4,), w, v),
        lambda v, w, x: F.layer_norm(F.linear(x.expand(3, 4), torch.diag(v)), (4,), w, v),
    ),
}
DIFFERENT: dict[str, tuple[Run, Run]] = {
    "a factor that values do not show": (
        lambda v, w, x: (2 * x * v - (2 * x * v).detach()) + x.detach(),
        lambda v, w, x: (4 * x * v - (4 * x * v).detach()) + x.detach(),
    ),
    "another weight of the same values": (lambda v, w, x: x * v, lambda v, w, x: x * w),
    "a part without gradient": (lambda v, w, x: x * v, lambda v, w, x: 0.5 * x * v + (0.5 * x * v).detach()),
    "a mask": (
        lambda v, w, x: torch.where(x > 0, x * v, (x * v).detach()),
        lambda v, w, x: torch.where(x > 1, x * v, (x * v).detach()),
    ),
    "indices": (lambda v, w, x: v[[0, 1]], lambda v, w, x: v[[0, 3]]),
    "a place": (lambda v, w, x: v[0:2], lambda v, w, x: v[1:3]),
    "an exponent": (lambda v, w, x: v**2, lambda v, w, x: v**3),
    "a bound": (lambda v, w, x: v.clamp(max=2.0), lambda v, w, x: v.clamp(max=0.5) + 0.5),
    "one output of several": (lambda v, w, x: (v * w).unbind()[0], lambda v, w, x: (v * w).unbind()[1]),
}
HIDDEN: dict[str, Run] = {
    "a constant before it": lambda v, w, x: torch.cat([torch.zeros(3), v]),
    "strides of its own": lambda v, w, x: v.as_strided((2, 2), (2, 1)),
    "a write into a part": lambda v, w, x: (x * v)[:1].mul_(w)._base,  # type: ignore[return-value]
    "an autograd.Function": lambda v, w, x: Triples.apply(v),  # type: ignore[no-untyped-call]
}


class Triples(torch.autograd.Function):
    """The identity, with a gradient of 3."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return 3 * slope


@pytest.mark.parametrize("name", ALIKE)
def test_equal_descriptions(name: str) -> None:
    (one, _, gradients), (other, _, others) = map(described, ALIKE[name])
    assert one is not None
    assert one == other
    assert described(ALIKE[name][0])[0] == one
    assert all(map(torch.equal, gradients, others))


@pytest.mark.parametrize("name", DIFFERENT)
def test_graphs_with_other_gradients_have_other_descriptions(name: str) -> None:
    (one, output, gradients), (other, same, others) = map(described, DIFFERENT[name])
    assert torch.equal(output, same)
    assert None not in (one, other)
    assert one != other
    assert not all(map(torch.equal, gradients, others))


@pytest.mark.parametrize("name", HIDDEN)
def test_graphs_that_cannot_be_read_have_no_description(name: str) -> None:
    assert described(HIDDEN[name])[0] is None


def test_a_saved_tensor_that_was_written_has_no_description() -> None:
    v, w, x = leaves()
    y = x * v
    output = y * w
    assert describe([output], {"v": v, "w": w}, {"x": x}) is not None
    with torch.no_grad():
        y.mul_(1)
    assert describe([output], {"v": v, "w": w}, {"x": x}) is None


def test_a_hook_on_a_tensor_that_is_saved_by_name_has_no_description() -> None:
    v, w, x = leaves()
    v.register_hook(lambda gradient: -gradient)
    assert describe([x * v], {"v": v, "w": w}, {"x": x}) is None


class Turns(TwoLayers):
    """Negates gradients by a hook on an autograd node, which no tracer sees."""

    def between(self, x: Tensor) -> Tensor:
        node = torch.autograd.graph.get_gradient_edge(x).node if x.requires_grad else None
        if node is not None:
            node.register_prehook(lambda gradients: (-gradients[0],))
        return x


class Slices(TwoLayers):
    """A slice of all rows has a different autograd node in Python than in a graph."""

    def between(self, x: Tensor) -> Tensor:
        return x[:, :]


@pytest.mark.parametrize("frontend", ["export", "symbolic"])
def test_a_hook_on_a_node_is_kept(frontend: str) -> None:
    with raises(lx.CaptureError, "not-captured", f"{frontend}: "):
        lx.adapt(build(Turns), (batches(1, 4, 5)[0],), spec=SPEC, frontend=frontend)


@pytest.mark.parametrize("make", [TwoLayers, Slices])
def test_no_backward_runs_where_graphs_are_the_same(make: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    before = seam("backward")
    monkeypatch.setattr(*SEAMS["backward"], lambda *args: called.append(1) or before(*args))
    for frontend in ("export", "symbolic"):
        lx.adapt(build(make), (batches(1, 4, 5)[0],), spec=SPEC, frontend=frontend)
    assert not called
