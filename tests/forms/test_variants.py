"""One model, called in every way: dtypes, autocast, containers, caches, gradients of inputs, modes of autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorasc_fx as lx
from tests.forms.kit import SPEC, Pair, Result, by_formula
from tests.kit.compare import assert_same, loss_of, run, seed
from tests.kit.models import randomize

FRONTENDS = pytest.mark.parametrize("frontend", ["export", "eager"])
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Small(nn.Module):
    """A convolution, a norm with statistics, a table, attention, dropout and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 6, 3, padding=1, groups=2), nn.BatchNorm1d(6)
        self.table, self.qkv, self.head = nn.Embedding(9, 6), nn.Linear(6, 18), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        hidden = F.relu(self.norm(self.conv(x))).mT + self.table(ids)
        q, k, v = self.qkv(hidden).chunk(3, -1)
        hidden = hidden + torch.softmax(q @ k.mT / 6**0.5, -1) @ v
        return self.head(F.dropout(hidden, 0.2, self.training))


def small(dtype: torch.dtype = torch.float64) -> nn.Module:
    seed(0)
    return Small().to(dtype)


def batch(dtype: torch.dtype = torch.float64, size: int = 3, length: int = 5) -> tuple[tuple[Tensor, ...], dict]:
    seed(1)
    x, ids = torch.randn(size, 4, length, dtype=torch.float64), torch.randint(0, 9, (size, length))
    return (x.to(dtype), ids), {}


@FRONTENDS
@pytest.mark.parametrize(("before", "after"), [("float32", "float64"), ("float32", "bfloat16"), ("float64", "float32")])
def test_another_dtype(frontend: str, before: str, after: str) -> None:
    """cascade.to(dtype) computes as the eager model in that dtype, and its branches as the formula there."""
    old, new = getattr(torch, before), getattr(torch, after)
    twin = small(old).requires_grad_(False)
    cascade = lx.adapt(small(old), *batch(old), spec=SPEC, frontend=frontend)
    run(cascade, batch(old))
    run(twin, batch(old))
    cascade, twin = cascade.to(new), twin.to(new)
    for training in (True, False):
        for size in (3, 1):
            call = batch(new, size)
            assert_same(run(cascade.train(training), call), run(twin.train(training), call))
    if new is torch.float64:
        randomize(cascade, size=0.1)
        expected, _ = by_formula(cascade, twin, batch(new))
        assert_same(run(cascade, batch(new)), expected, 1e-12)
    loss_of(cascade(*batch(new)[0]).float()).backward()
    assert all(value.grad.dtype == value.dtype for value in cascade.branches.parameters())
    cascade.zero_grad(set_to_none=True)
    assert cascade.release().head.weight.dtype == new


@FRONTENDS
@pytest.mark.parametrize("around", [True, False], ids=["all_in_autocast", "calls_in_autocast"])
def test_autocast(frontend: str, around: bool) -> None:
    """Under autocast the outputs are the eager model's, bit for bit; with branches, to the precision of bf16."""
    model, twin = small(torch.float32), small(torch.float32).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        cascade = lx.adapt(model, *batch(torch.float32), spec=SPEC, frontend=frontend)
    for training in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            output, expected = (run(model.train(training), batch(torch.float32)) for model in (cascade, twin))
        assert output.dtype == torch.bfloat16
        assert_same(output, expected)
        assert_same(run(cascade, batch(torch.float32)), run(twin, batch(torch.float32)))
    randomize(cascade, size=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = by_formula(cascade, twin, batch(torch.float32))
        output = cascade(*batch(torch.float32)[0])
        assert_same(output, expected, 0.05)
        loss_of(output).backward()
    assert all(value.grad.dtype == value.dtype == torch.float32 for value in cascade.branches.parameters())
    assert all(value.grad.any() for value in cascade.branches.parameters())


@pytest.mark.slow
@FRONTENDS
def test_sizes_strides_and_modes_of_autograd(frontend: str) -> None:
    """Batch 1, other lengths, strided and expanded inputs, no_grad, inference mode."""
    cascade = lx.adapt(small(), *batch(), spec=SPEC, frontend=frontend).eval()
    twin = small().requires_grad_(False).eval()
    randomize(cascade, size=0.1)
    (x, ids), _ = batch(size=4, length=8)
    inputs = [
        (x[:1], ids[:1]),
        (x[::2], ids[::2]),
        (x[..., ::2], ids[:, ::2]),
        (x[:1].expand(3, 4, 8), ids[:3]),
        (x, ids),
    ]
    inputs.append((x.mT.contiguous().mT, ids.T.contiguous().T))
    for call in inputs:
        expected, _ = by_formula(cascade, twin, (call, {}))
        assert_same(run(cascade, (call, {}), grad=True), expected, 1e-12)
        assert_same(run(cascade, (call, {})), expected.detach(), 1e-12)
        with torch.inference_mode():
            assert_same(cascade(*call), expected, 1e-12)


@FRONTENDS
def test_gradients_of_inputs(frontend: str) -> None:
    """First and second gradients of an input equal the gradients of the formula."""
    cascade = lx.adapt(small(), *batch(), spec=SPEC, frontend=frontend).eval()
    twin = small().requires_grad_(False).eval()
    randomize(cascade, size=0.1)
    gradients = []
    for call in (cascade, lambda *args: by_formula(cascade, twin, (args, {}))[0]):
        (x, ids), _ = batch()
        x.requires_grad_()
        (slope,) = torch.autograd.grad(loss_of(call(x, ids)), x, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.square().sum(), x)
        gradients.append((slope.detach(), curvature))
    assert_same(*gradients, 1e-10)


class Takes(nn.Module):
    """Reads tensors from a container by the function of the row."""

    def __init__(self, take: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.body, self.take = nn.Linear(5, 3), take

    def forward(self, container: Any, how: str = "tanh", *, times: int = 1) -> Tensor:
        hidden = self.body(self.take(container)) * times
        return hidden.tanh() if how == "tanh" else hidden.relu()


CONTAINERS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "dict": (lambda x: {"a": x, "b": {"c": 2 * x}}, lambda value: value["a"] + value["b"]["c"]),
    "list": (lambda x: [x, [2 * x]], lambda value: value[0] + value[1][0]),
    "named": (lambda x: Pair(x, None), lambda value: value.output),
    "dataclass": (lambda x: Result(x, [2 * x]), lambda value: value.logits + value.hidden[0]),
    "longer_list": (lambda x: [x] * 3, sum),
}


@pytest.mark.parametrize("frontend", ["auto", "eager"])
@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_of_inputs(name: str, frontend: str) -> None:
    make, take = CONTAINERS[name]
    seed(0)
    twin = Takes(take).double().requires_grad_(False)
    x = torch.randn(4, 5, dtype=torch.float64)
    cascade = lx.adapt(copy.deepcopy(twin).requires_grad_(), (make(x),), spec=SPEC, frontend=frontend)
    randomize(cascade, size=0.1)
    calls: list[Any] = [((make(x),), {}), ((make(x[:1]),), {}), ((make(x), "relu"), {}), ((make(x),), {"times": 3})]
    calls += [((), {"container": make(3 * x), "how": "relu", "times": 2})]
    for call in calls:
        assert_same(run(cascade, call, grad=True), by_formula(cascade, twin, call)[0], 1e-12)


class Cached(nn.Module):
    """Attention with a cache: a tuple of keys and values for each layer, or None."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layers = nn.Embedding(9, 6), nn.ModuleList(nn.Linear(6, 18) for _ in range(2))
        self.head = nn.Linear(6, 9)

    def forward(self, ids: Tensor, past: list[tuple[Tensor, Tensor]] | None = None) -> tuple[Tensor, list[Any]]:
        x, grown = self.table(ids), []
        for index, layer in enumerate(self.layers):
            q, k, v = layer(x).chunk(3, -1)
            if past is not None:
                k, v = torch.cat([past[index][0], k], 1), torch.cat([past[index][1], v], 1)
            grown.append((k, v))
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        return self.head(x), grown


@pytest.mark.parametrize("frontend", ["auto", "eager"])
def test_a_cache_of_the_model(frontend: str) -> None:
    """Steps with a cache equal the eager model, with branches."""
    seed(0)
    twin = Cached().double().requires_grad_(False)
    ids = torch.randint(0, 9, (2, 6))
    cascade = lx.adapt(copy.deepcopy(twin).requires_grad_(), (ids[:, :3],), spec=SPEC, frontend=frontend)
    randomize(cascade, size=0.1)
    output, expected = cascade(ids[:, :3]), by_formula(cascade, twin, ((ids[:, :3],), {}))[0]
    for step in range(3, 6):
        assert_same(output, expected, 1e-12)
        token = ids[:, step : step + 1]
        output = cascade(token, output[1])
        expected, _ = by_formula(cascade, twin, ((token, expected[1]), {}))
    assert_same(output, expected, 1e-12)
