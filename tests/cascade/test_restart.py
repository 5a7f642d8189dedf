"""A transition apart from the slow update: optimizer state, the next lora_A, parameters trained in full."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from tests.kit.models import batches, mlp, optimizer_of, train

CALLS = 4


def headed() -> nn.Module:
    """Return a body of two sites, with a norm and a head that are trained in full."""
    torch.manual_seed(61)
    body = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6))
    return nn.Sequential(OrderedDict(body=body, norm=nn.LayerNorm(6), head=nn.Linear(6, 2))).double()


def headed_cascade(model: nn.Module | None = None, **options: Any) -> lx.Cascade:
    spec = lx.CascadeSpec(**{"rank": 2, "targets": ("body",), "train": ("head", "norm"), **options})
    return lx.adapt(headed() if model is None else model, batches(1, 4, 5), spec=spec)


def snapshot(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, dict[str, torch.Tensor]]:
    return {parameter: {k: v.clone() for k, v in state.items()} for parameter, state in optimizer.state.items()}


def owned(cascade: lx.Cascade) -> list[nn.Parameter]:
    return list(cascade.branches.parameters())


def pruned(state: dict[str, torch.Tensor], name: str, ratio: float) -> torch.Tensor:
    """Return zeros where either moment is among the share `ratio` of its smallest in magnitude, found by sorting."""
    value, zero = state[name], torch.zeros_like(state["exp_avg"], dtype=torch.bool)
    for moment in (state["exp_avg"].abs(), state["exp_avg_sq"].abs()):
        zero |= moment < moment.flatten().sort().values[round(ratio * moment.numel())]
    return torch.where(zero, 0.0, value)


@pytest.mark.parametrize("how", ["reset", "kept", 0.25, 0.9])
def test_optimizer_state_of_the_branches_and_of_nothing_else(how: Any) -> None:
    cascade = headed_cascade(optimizer_state=how)
    optimizer = optimizer_of(cascade)
    train(cascade, optimizer, batches(CALLS, 4, 5))
    objects, before = list(cascade.parameters()), snapshot(optimizer)
    groups = copy.deepcopy([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])
    factors = owned(cascade)
    assert all(before[parameter]["exp_avg"].any() for parameter in factors)
    cascade.transition(optimizer)

    assert all(new is old for new, old in zip(cascade.parameters(), objects, strict=True))
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == groups
    assert all(parameter.grad is None for parameter in cascade.parameters())
    for parameter, state in before.items():
        current = optimizer.state.get(parameter, {})
        mine = any(parameter is each for each in factors)
        assert set(current) == (set() if mine and how == "reset" else set(state))
        for name, value in current.items():
            shaped = mine and isinstance(how, float) and value.shape == parameter.shape
            assert torch.equal(value, pruned(state, name, how) if shaped else state[name]), name


def test_no_factor_leaps_on_a_pruned_state() -> None:
    """No parameter makes a large step after pruning.

    lora_A has no gradient in the first step of a stage. If only its second moment were pruned, Adam would step by
    exp_avg / eps.
    """
    calls = batches(2 * CALLS, 4, 5)
    cascade = lx.adapt(mlp(), (calls[0],), spec=lx.CascadeSpec(rank=4, optimizer_state=0.9))
    optimizer = optimizer_of(cascade)
    train(cascade, optimizer, calls[:CALLS])
    cascade.transition(optimizer)
    before = {name: value.detach().clone() for name, value in cascade.branches.named_parameters()}
    train(cascade, optimizer, calls[CALLS : CALLS + 1])
    rate = max(group["lr"] for group in optimizer.param_groups)
    for name, value in cascade.branches.named_parameters():
        assert (value - before[name]).abs().max() <= 10 * rate, name


def test_a_reset_is_a_new_optimizer() -> None:
    """In the next stage the optimizer steps as a new one would. With kept state it does not."""
    calls, losses = batches(2 * CALLS, 4, 5), {}
    for how in ("reset", "kept", "new"):
        cascade = lx.adapt(
            mlp(), (calls[0],), spec=lx.CascadeSpec(rank=2, optimizer_state="kept" if how == "kept" else "reset")
        )
        optimizer = optimizer_of(cascade)
        train(cascade, optimizer, calls[:CALLS])
        cascade.transition(optimizer)
        losses[how] = train(cascade, optimizer if how != "new" else optimizer_of(cascade), calls[CALLS:])
    assert torch.equal(losses["reset"], losses["new"])
    assert not torch.allclose(losses["kept"], losses["new"], rtol=1e-6)


def test_a_scheduler_steps_once_a_stage() -> None:
    cascade = lx.adapt(mlp(), batches(1, 4, 5), spec=lx.CascadeSpec(rank=2))
    optimizer = torch.optim.SGD(cascade.param_groups(lr=1.0))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    rates = []
    for _ in cascade.stages(3, optimizer, scheduler):
        rates.append(optimizer.param_groups[0]["lr"])
        train(cascade, optimizer, batches(1, 4, 5))
    assert rates == [1.0, 0.5, 0.25]
