"""Several optimizers in one loop give the results of one, and errors name what is wrong with the list."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from tests.errors.state import assert_same, of_optimizer, unchanged
from tests.kit.errors import raises
from tests.kit.models import batches, mlp

X = batches(1, 4, 5)[0]


def adapted(**options: Any) -> lx.Cascade:
    fields = {"rank": 2, "targets": ("0", "2"), "train": ("4", "0.bias"), **options}
    return lx.adapt(mlp(), (X,), spec=lx.CascadeSpec(**fields))


def split(cascade: lx.Cascade) -> list[torch.optim.Optimizer]:
    """One optimizer per group, so that the pairs of one branch are in two."""
    return [torch.optim.AdamW([group]) for group in cascade.param_groups(lr=1e-2)]


def step(cascade: lx.Cascade, optimizers: list[torch.optim.Optimizer], count: int = 3) -> None:
    for x in batches(count, 4, 5):
        cascade(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize(
    "options",
    [{}, {"optimizer_state": "kept"}, {"optimizer_state": 0.5}, {"restart_factors": "none"}],
)
def test_several_give_the_bits_of_one(options: dict[str, Any]) -> None:
    """AdamW treats each parameter alone, so it does not matter how many optimizers share them."""
    one, many = adapted(**options), adapted(**options)
    single, several = [torch.optim.AdamW(one.param_groups(lr=1e-2))], split(many)
    assert len(several) == 3
    halves = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in several]
    half = torch.optim.lr_scheduler.ExponentialLR(single[0], 0.5)
    stages = zip(one.stages(2, single[0], half), many.stages(2, several, halves), strict=True)
    for _ in stages:
        step(one, single)
        step(many, several)
    assert [optimizer.param_groups[0]["lr"] for optimizer in several] == [2.5e-3] * 3
    one.rewind(0, single)
    many.rewind(0, tuple(several))
    assert not any(optimizer.state for optimizer in (*single, *several))
    for cascade, optimizers in ((one, single), (many, several)):
        step(cascade, optimizers)
        cascade.transition(optimizers)
        step(cascade, optimizers)
    for parameter, twin in zip(one.parameters(), many.parameters(), strict=True):
        assert torch.equal(parameter, twin)
        states = [optimizer.state[twin] for optimizer in several if twin in optimizer.state]
        assert [*single[0].state.get(parameter, {})] == [key for state in states for key in state]
        assert all(torch.equal(value, states[0][key]) for key, value in single[0].state.get(parameter, {}).items())


def test_a_rollback_restores_every_optimizer() -> None:
    cascade = adapted()
    optimizers = split(cascade)

    class Broken:
        def step(self) -> None:
            raise ZeroDivisionError

    stages = cascade.stages(2, optimizers, [torch.optim.lr_scheduler.ConstantLR(optimizers[0]), Broken()])
    next(stages)
    step(cascade, optimizers)
    before = [of_optimizer(optimizer) for optimizer in optimizers]
    with pytest.raises(ZeroDivisionError):
        next(stages)
    for optimizer, state in zip(optimizers[1:], before[1:], strict=True):  # torch's scheduler has changed the first
        assert_same(of_optimizer(optimizer), state)
    assert len(optimizers[0].state) == len(optimizers[0].param_groups[0]["params"])


CALLS = {
    "stages": lambda cascade, optimizer: cascade.stages(2, optimizer),
    "transition": lambda cascade, optimizer: cascade.transition(optimizer),
    "rewind": lambda cascade, optimizer: cascade.rewind(0, optimizer),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_is_refused(call: str) -> None:
    cascade = adapted()
    for_a, for_b, trained = optimizers = split(cascade)
    cases: tuple[tuple[Any, Any, str, str], ...] = (
        (3, lx.SpecError, "invalid-value", "is a int"),
        ([for_a, nn.Linear(1, 1)], lx.SpecError, "invalid-value", "is a Linear"),
        ([*optimizers, for_a], lx.SpecError, "conflicting-options", "twice"),
        ([], lx.SpecError, "conflicting-options", "empty list"),
        ([for_a, for_b], lx.StateError, "optimizer-lacks-parameters", "model.4.weight"),
        ([for_a, trained], lx.StateError, "optimizer-lacks-parameters", "lora_B"),
        ([*optimizers, torch.optim.SGD(for_b.param_groups[0]["params"])], lx.StateError, "conflicting-options", "two"),
    )
    for optimizer, kind, code, name in cases:
        with unchanged(cascade, for_a), raises(kind, code, name):
            CALLS[call](cascade, optimizer)
