"""Branches of grouped matrix products, for every op and dtype, compared with the formula in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from transformers.integrations import moe

import lorasc_fx as lx
from lorasc_fx.branch.lora import LoraBranch
from lorasc_fx.capture import capture
from lorasc_fx.graph import FORMS, FunctionForm
from tests.kit.compare import Watch, saved_storages
from tests.kit.models import train
from tests.passes.kit import branches_of, fill, insert, same_bits, sites_of, uses_of

SPEC = lx.CascadeSpec(rank=3, lora_alpha=5.0, pace=0.5, seed=11, targets=("stacked",))
ENDS = (2, 2, 7)
GROUPED = getattr(F, "grouped_mm", torch._grouped_mm)  # public since torch 2.10
FALLBACK = torch.ops.transformers.grouped_mm_fallback.default
assert moe.torch is torch  # the module that makes the op
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


class Grouped(nn.Module):
    """Two grouped products of rows [rows, 16]; the first stack is [experts, in, out], the other [experts, out, in]."""

    def __init__(self, product: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.product = product
        self.up, self.down = nn.Parameter(torch.randn(3, 16, 24) / 4), nn.Parameter(torch.randn(3, 16, 24) / 4)
        self.register_buffer("ends", torch.tensor(ENDS, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return self.product(torch.tanh(self.product(x, self.up, offs=self.ends)), self.down.mT, offs=self.ends)


def rows(dtype: torch.dtype) -> Tensor:
    return torch.randn(ENDS[-1], 16, generator=torch.Generator().manual_seed(5)).to(dtype)


def reference(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The output of the model with these stacks, computed expert by expert in their dtype."""
    parts, start = [], 0
    for expert, end in enumerate(ENDS):
        parts.append(torch.tanh(x[start:end] @ up[expert]) @ down[expert].T)
        start = end
    return torch.cat(parts)


ROWS = {
    ("torch._grouped_mm", torch.float32): (GROUPED, fx.symbolic_trace),  # which torch.export does not keep
    ("torch._grouped_mm", torch.bfloat16): (torch._grouped_mm, fx.symbolic_trace),
    ("aten._grouped_mm", torch.bfloat16): (GROUPED, nn.Module.eval),
    ("transformers::grouped_mm_fallback", torch.float32): (FALLBACK, nn.Module.eval),
    ("transformers::grouped_mm_fallback", torch.float64): (FALLBACK, fx.symbolic_trace),
}
"""Row of the table and dtype, with the function that the model calls and the one that prepares the model."""


def test_every_row_of_experts_has_a_case() -> None:
    assert {name for name, _ in ROWS} == {form.name for form in FORMS if form.kind == "stacked"}


@pytest.mark.parametrize(("row", "dtype"), ROWS, ids=str)
def test_the_branch_is_the_formula(row: str, dtype: torch.dtype) -> None:
    product, traced = ROWS[row, dtype]
    model, x = Grouped(product).to(dtype).requires_grad_(False), rows(dtype)
    captured = capture(traced(model), (x,), {}).module
    inserted = insert(captured, SPEC)
    assert {weight: form for weight, ((_, form),) in uses_of(inserted).items()} == {"up": row, "down": row}
    assert {weight: site.layout for weight, site in sites_of(inserted).items()} == {"up": "in_out", "down": "out_in"}
    assert torch.equal(inserted(x), captured(x))  # B = 0

    fill(inserted)
    output = inserted(x)
    branches = branches_of(inserted)
    factors = {
        name: [factor.detach().double().requires_grad_() for factor in (branches[name].lora_A, branches[name].lora_B)]
        for name in ("up", "down")
    }
    (up_a, up_b), (down_a, down_b) = factors.values()
    up = model.up.double() + 5 / 3 * (up_b @ up_a).mT
    down = model.down.double() + 5 / 3 * (down_b @ down_a)
    expected = reference(x.double(), up, down)
    assert_near(output, expected, dtype)
    output.double().square().sum().backward()
    expected.square().sum().backward()
    for name, (a, b) in factors.items():
        assert_near(branches[name].lora_A.grad, a.grad, dtype)
        assert_near(branches[name].lora_B.grad, b.grad, dtype)
        assert not b.grad[1].any()  # the expert without rows
        assert not branches[name].lora_B.grad[1].any()


def test_no_gradient_of_a_frozen_stack_is_computed() -> None:
    """The backward of the op would compute it. The gradient of x has the same bits as from that backward."""
    model = Grouped(FALLBACK).double().requires_grad_(False)
    captured = capture(fx.symbolic_trace(model), (rows(torch.float64),), {}).module
    gradients, shapes = [], []
    backward = torch.ops.transformers.grouped_mm_fallback_backward.default
    for graph_module in (captured, insert(captured, SPEC)):
        x, seen = rows(torch.float64).requires_grad_(), list[tuple[Any, ...]]()
        with Watch(lambda func, args, _, seen=seen: seen.append(tuple(args[1].shape)) if func is backward else None):
            graph_module(x).square().sum().backward()
        gradients.append(x.grad)
        shapes.append(sorted(seen))
    assert shapes[0] == [(3, 16, 24), (3, 24, 16)]
    assert shapes[1] == [(3, 3, 16), (3, 3, 24), (3, 16, 3), (3, 24, 3)]  # of A and B alone
    assert same_bits(*gradients)  # B = 0


def assert_near(actual: Tensor | None, expected: Tensor | None, dtype: torch.dtype) -> None:
    assert actual is not None
    assert expected is not None
    worst = float(((actual.double() - expected).abs().max() / expected.abs().max()).detach())
    assert worst <= TOLERANCE[dtype]


OPS = [("aten::_grouped_mm", torch.float32), ("aten::_grouped_mm", torch.bfloat16)]
OPS += [("transformers::grouped_mm_fallback", torch.float32)]


def branch(dtype: torch.dtype) -> LoraBranch:
    """A branch of three experts [24, 16], B not zero."""
    site = lx.Site("experts", "stacked", (3, 24, 16), lx.plan.SiteOptions(3, 5.0))
    lora = LoraBranch(site, 0, 1, torch.empty(0, dtype=dtype))
    with torch.no_grad():
        lora.lora_B.copy_(torch.randn(lora.lora_B.shape, generator=torch.Generator().manual_seed(7)))
    return lora


@pytest.mark.parametrize(("op", "dtype"), OPS, ids=str)
def test_rows_without_an_expert_have_no_effect(op: str, dtype: torch.dtype) -> None:
    """Rows after the last offset, which expert parallelism leaves uninitialized, and their gradients."""
    lora, ends = branch(dtype), torch.tensor(ENDS, dtype=torch.int32)
    x, base = rows(dtype), torch.zeros(ENDS[-1], 24, dtype=dtype)
    wild = torch.full((4, 24), torch.nan, dtype=dtype)
    gradients = []
    for more in (0, 4):
        lora.zero_grad(set_to_none=True)
        longer = torch.cat([x, wild[:more, :16]]).requires_grad_()
        output = lora(torch.cat([base, wild[:more]]), longer, at="grouped", offs=ends, by=op)
        output.backward(torch.cat([torch.ones_like(base), wild[:more]]))
        assert longer.grad is not None
        gradients.append([output[: ENDS[-1]], longer.grad[: ENDS[-1]], lora.lora_A.grad, lora.lora_B.grad])
    for short, long in zip(*gradients, strict=True):
        assert short.isfinite().all()
        assert short.any()
        assert torch.equal(long, short)


@pytest.mark.parametrize(("op", "dtype"), OPS, ids=str)
def test_only_x_and_a_x_are_saved_for_the_backward(op: str, dtype: torch.dtype) -> None:
    lora, x = branch(dtype), rows(dtype).requires_grad_()
    base, ends = torch.zeros(ENDS[-1], 24, dtype=dtype), torch.tensor(ENDS, dtype=torch.int32)
    saved = saved_storages(lambda: lora(base, x, at="grouped", offs=ends, by=op))
    for given in (x, ends):
        saved.pop(given.untyped_storage().data_ptr(), None)
    rank = 8 if op.startswith("aten") else 3  # padded to strides of 16 bytes
    assert sorted(saved.values()) == [entries * rank * dtype.itemsize for entries in (ENDS[-1], 3 * 16, 3 * 24)]


class Either(nn.Module):
    """A grouped product in one mode, one selected expert in the other."""

    def __init__(self, grouped: bool) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.grouped = grouped
        self.stack = nn.Parameter(torch.randn(3, 5, 7) / 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.training is self.grouped:
            ends = (x[:, 0].sum() > 0) * 2 + torch.tensor([1, 2, 4])
            return FALLBACK(x, self.stack, ends.clamp(max=4).int())
        return x @ self.stack[(x[0, 0] > 0).long()]


@pytest.mark.parametrize("grouped", [True, False])
def test_a_mode_that_chooses_has_the_same_branch(grouped: bool) -> None:
    """Planned beside a grouped product, in its layout, or as the stack is stored: both modes are the formula."""
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = Either(grouped).double().train()
    twin = copy.deepcopy(model)
    cascade = lx.adapt(model, (x,), spec=SPEC)
    (site,) = cascade.sites
    assert site.layout == ("in_out" if grouped else "out_in")
    (only,) = cascade.branches.values()
    with torch.no_grad():
        only.lora_B.normal_(generator=torch.Generator().manual_seed(2))
        delta = only.scale * only.lora_B @ only.lora_A
        twin.stack.add_(delta.mT if grouped else delta)
    for training in (True, False):
        torch.testing.assert_close(cascade.train(training)(x), twin.train(training)(x), rtol=1e-12, atol=1e-12)
    assert cascade.placements == {"stack": "beside" if grouped else "weight"}


STEPS = 3


def trajectory(placement: str, call: Callable[[Any], Any] = lambda cascade: cascade) -> tuple[list[float], Tensor]:
    """Losses of two stages, and the slow weights of both stacks."""
    x = rows(torch.float64)
    spec = lx.CascadeSpec(**{**SPEC.to_dict(), "noise": lx.Noise(0.1), "placement": placement, "rules": ()})
    cascade = lx.adapt(Grouped(FALLBACK).double(), (x,), spec=spec)
    assert set(cascade.placements.values()) == {placement}
    optimizer, run = torch.optim.SGD(cascade.param_groups(lr=0.3)), call(cascade)
    losses = []
    for _ in cascade.stages(2, optimizer):
        losses += train(run, optimizer, [x] * STEPS).tolist()
    slow = cascade.folded_state_dict()
    return losses, torch.stack([slow["up"], slow["down"]])


def test_it_trains_as_on_the_weight_compiled_or_not() -> None:
    expected, slow = trajectory("weight")
    assert len(set(expected)) == 2 * STEPS
    for call in (lambda cascade: cascade, lambda cascade: torch.compile(cascade, fullgraph=True, backend="aot_eager")):
        torch._dynamo.reset()
        losses, weights = trajectory("beside", call)
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(weights, slow, rtol=1e-10, atol=1e-10)
    torch._dynamo.reset()


def test_other_arguments_put_the_branch_on_the_weight() -> None:
    """A bias, or a batch of matrices without ends, is another product."""
    forms = {form.name: form for form in FORMS if isinstance(form, FunctionForm)}
    graph = torch.fx.Graph()
    x, w, ends = (graph.placeholder(name) for name in ("x", "w", "ends"))
    fits = [
        forms["torch._grouped_mm"].fits(graph.call_function(torch._grouped_mm, (x, w), kwargs), w)
        for kwargs in ({"offs": ends}, {}, {"offs": ends, "bias": x}, {"offs": ends, "out_dtype": torch.float32})
    ]
    assert fits == [True, False, False, False]
