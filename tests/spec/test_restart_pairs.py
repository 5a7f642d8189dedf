"""Stages without a restart (`restart_factors="none"`): the factors of a branch continue to train."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from tests.kit.models import OPTIMIZERS, batches, branches, by_hand, loss_of, mlp, optimizer_of, randomize, train
from tests.kit.state import weight_states

SPEC = {"rank": 4, "lora_alpha": 6.0, "restart_factors": "none", "targets": ("linear", "conv")}
EXACT = {"rtol": 0, "atol": 1e-11}


def conv() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(5, 6), nn.Unflatten(0, (2, -1)), nn.Conv1d(2, 3, 2), nn.Linear(5, 4)).double()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("more", [
    {}, {"pace": 0.4}, {"pace": 0.4, "restart": "fast"}, {"placement": "merged"},
    {"placement": "weight"},
], ids=str)  # fmt: skip
def test_a_trajectory_is_that_of_the_formula(more: dict[str, Any], optimizer: str) -> None:
    """In fp64. A transition changes neither the outputs of the start weights nor the optimizer's state."""
    calls = batches(3, 4, 5)
    model = conv()
    cascade = lx.adapt(copy.deepcopy(model), (calls[0],), spec=lx.CascadeSpec(**{"pace": 1.0, **SPEC, **more}))
    spec = cascade.plan.spec
    hand = by_hand(model, cascade, pace=spec.pace, restart=spec.restart)
    ours, theirs = optimizer_of(cascade, optimizer), OPTIMIZERS[optimizer](hand.parameters())
    for stage in range(3):
        losses, expected = train(cascade, ours, calls), train(hand, theirs, calls)
        torch.testing.assert_close(losses, expected, **EXACT)
        fast = {name: hand.fast(name).detach() for name in hand.base}
        hand.end()
        hand.start = dict(hand.slow if spec.restart == "slow" else fast)
        started = torch.func.functional_call(
            model, {name: hand.base[name] + start for name, start in hand.start.items()}, (calls[0],)
        )
        cascade.transition(ours)
        torch.testing.assert_close(cascade(calls[0]), started, **EXACT)
        for name, branch in branches(cascade).items():
            pair = hand.branches[name]
            torch.testing.assert_close(branch.lora_A, pair.a, **EXACT)
            torch.testing.assert_close(branch.lora_B, pair.b.view_as(branch.lora_B), **EXACT)
            with torch.no_grad():  # the weight holds the residual
                hand.start[name] = hand.start[name] - hand.scale * (pair.b @ pair.a).view_as(hand.base[name])
        with cascade.weights("slow"):
            for name, value in hand.weights("slow").items():
                torch.testing.assert_close(dict(cascade.model.named_parameters())[name].detach(), value, **EXACT)
        assert stage < 2 or loss_of(cascade(calls[0])) < losses[0]


def test_a_weight_is_rounded_once() -> None:
    """It is computed from W0, its experts and the factors, with a single rounding."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 40)).bfloat16()
    cascade = lx.adapt(model, (torch.randn(4, 48).bfloat16(),), spec=lx.CascadeSpec(pace=1.0, **SPEC))
    for stage in range(3):
        randomize(cascade, stage)
        cascade.transition(None)
    parameters = dict(cascade.model.named_parameters())
    for name, state in weight_states(cascade).items():
        branch = branches(cascade)[name]
        exact = state.base.double() + sum(expert.b.double() @ expert.a.double() for expert in state.experts)
        exact = exact - branch.scale * branch.lora_B.detach().double() @ branch.lora_A.detach().double()
        assert bool(branch.lora_B.any())
        assert bool(((parameters[name].double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all())


def test_a_loop_ends_without_branches() -> None:
    """After the loop, the factors restart, and the optimizer state is reset."""
    calls = batches(2, 4, 5)
    cascade = lx.adapt(mlp(), (calls[0],), spec=lx.CascadeSpec(pace=0.5, **SPEC))
    optimizer = optimizer_of(cascade)
    for _ in cascade.stages(2, optimizer):
        train(cascade, optimizer, calls)
    assert not any(bool(branch.lora_B.any()) for branch in branches(cascade).values())
    assert not any(optimizer.state.get(parameter) for parameter in cascade.branches.parameters())
    with cascade.weights("slow"):
        slow = cascade(calls[0])
    assert torch.equal(cascade(calls[0]), slow)
    for _ in cascade.stages(1, optimizer):
        torch.testing.assert_close(cascade(calls[0]), slow, **EXACT)
        train(cascade, optimizer, calls)
    cascade.transition(optimizer)
    cascade.rewind(0, optimizer)
    assert not any(bool(branch.lora_B.any()) for branch in branches(cascade).values())
