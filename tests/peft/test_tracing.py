"""The adapted model, traced once more: torch.fx, torch.export (both ways) and torch.compile(fullgraph=True)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.kit.models import loss_of
from tests.peft.kit import EXACT, Case, buffers_of, by_formula, eager, normal, ours_of, seeded
from tests.peft.models import Attends, Chosen

Traced = Callable[[nn.Module, tuple[Any, ...]], Callable[..., Any]]


def symbolic(model: nn.Module, args: tuple[Any, ...]) -> Callable[..., Any]:
    return torch.fx.symbolic_trace(model)


def export(model: nn.Module, args: tuple[Any, ...]) -> Callable[..., Any]:
    return torch.export.export(model, args).module()


def strict(model: nn.Module, args: tuple[Any, ...]) -> Callable[..., Any]:
    return torch.export.export(model, args, strict=True).module()


def compiled(model: nn.Module, args: tuple[Any, ...]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="eager")


def linears() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Dropout(0.2), nn.Linear(7, 5))


def convs() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, (3, 5), padding="same"), nn.BatchNorm2d(8), nn.Tanh(), nn.Conv2d(8, 4, 3, stride=2)
    )


def layer() -> nn.Module:
    return nn.TransformerEncoderLayer(6, 2, 10, batch_first=True)


def rows() -> tuple[Any, ...]:
    return (normal(3, 4, 6),)


def images() -> tuple[Any, ...]:
    return (normal(3, 4, 9, 8),)


EXPERTS = ("body.gate_up", "body.down")
CASES = {
    "linears": Case(linears, rows, ("0", "3"), ("0.weight", "3.weight")),
    "convs": Case(convs, images, ("0", "3"), ("0.weight", "3.weight")),
    "attention": Case(Attends, rows, ("attn", "head"), ("attn.in_proj_weight", "attn.out_proj.weight", "head.weight")),
    "layer": Case(layer, rows, ("linear1", "linear2"), ("linear1.weight", "linear2.weight")),
    "experts": Case(Chosen, rows, (*EXPERTS, "head"), (*EXPERTS, "head.weight")),
}


def assert_traced_is_right(case: Case, tracer: Traced) -> None:
    """The cascade itself is traced, in both modes: outputs and every branch's gradient, to rounding; what a tracer gets
    is the plain formula, whose sums run in another order than those of the hand-written one.
    """
    model, args = case.model(), case.inputs()
    cascade = ours_of(model, args, case.targets)
    assert tuple(site.weight for site in cascade.sites) == case.weights
    reference = by_formula(model, cascade)
    names = [f"branches.{site.key}.lora_{factor}" for site in cascade.sites for factor in "AB"]
    start = buffers_of(model)
    for mode in (True, False):
        reference.model.train(mode)
        expected, own = seeded(reference, args), seeded(cascade.train(mode), args)
        right = torch.autograd.grad(loss_of(expected), reference.parameters())
        cascade.model.load_state_dict(start, strict=False)
        traced = tracer(cascade, args)
        found = seeded(traced, args)
        torch.testing.assert_close(found, own, rtol=1e-13, atol=1e-14, msg=str(tracer))
        torch.testing.assert_close(found, expected, rtol=0, atol=EXACT)
        held = {name.removeprefix("_orig_mod."): value for name, value in traced.named_parameters()}
        gradients = torch.autograd.grad(loss_of(found), [held[name] for name in names])
        for name, gradient, value in zip(names, gradients, right, strict=True):
            assert value.abs().max() > 1e-4
            torch.testing.assert_close(gradient, value, rtol=0, atol=EXACT, msg=name)
        for each in (cascade.model, reference.model):
            each.load_state_dict(start, strict=False)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tracer", [symbolic, export, compiled, pytest.param(strict, marks=pytest.mark.slow)])
def test_ours(name: str, tracer: Traced) -> None:
    """Strict export traces as the compiler does, before it exports what came of that."""
    assert_traced_is_right(CASES[name], tracer)


@pytest.mark.parametrize("name", CASES)
def test_ours_folded(name: str) -> None:
    case = CASES[name]
    model, args = case.model().eval(), case.inputs()
    cascade = ours_of(model, args, case.targets)
    right = eager(model, by_formula(model, cascade).weights("fast"), args)
    folded = cascade.folded_graph()
    for tracer in (symbolic, export, compiled):
        torch.testing.assert_close(seeded(tracer(folded, args), args), right, rtol=0, atol=EXACT)
