"""Nesterov's momentum over stages (SNOO, 2510.15830), against torch's SGD on the slow weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorasc_fx as lx

PACE, MOMENTUM, STAGES = 0.4, 0.6, 4


def net() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5)).double()


def move(cascade: lx.Cascade, stage: int) -> dict[str, Tensor]:
    """Move what trains, and return the fast weights."""
    generator = torch.Generator().manual_seed(stage)
    with torch.no_grad():
        for parameter in cascade.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    with cascade.weights("fast"):
        return {name: value.detach().clone() for name, value in cascade.model.named_parameters()}


def slow_of(cascade: lx.Cascade) -> dict[str, Tensor]:
    with cascade.weights("slow"):
        return {name: value.detach().clone() for name, value in cascade.model.named_parameters()}


@pytest.mark.parametrize("more", [
    {}, {"restart": "fast"}, {"noise": lx.Noise(0.1)}, {"rank": 5}, {"adapter": "hira"}, {"train": ("*.bias",)},
    {"average": "swa"},
], ids=str)  # fmt: skip
def test_the_slow_weights_step_as_sgd_with_nesterov_does(more: dict[str, Any], tmp_path: Path) -> None:
    """SGD's gradient is `S - F`. Halfway the run is resumed from a checkpoint."""
    model, x = net(), torch.randn(3, 7).double()
    spec = lx.CascadeSpec(**{"rank": 2, "pace": PACE, "momentum": MOMENTUM, **more})
    cascade = lx.adapt(copy.deepcopy(model), (x,), spec=spec)
    reference = [nn.Parameter(value.detach().clone()) for value in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    optimizer = torch.optim.SGD(reference, lr=PACE, momentum=MOMENTUM, nesterov=True)
    for stage in range(STAGES):
        fast = move(cascade, stage)
        for name, parameter in zip(names, reference, strict=True):
            parameter.grad = parameter.detach() - fast[name]
        optimizer.step()
        cascade.transition(None)
        slow = slow_of(cascade)
        for name, parameter in zip(names, reference, strict=True):
            torch.testing.assert_close(slow[name], parameter.detach(), rtol=1e-11, atol=1e-11)
        if stage == 1:
            lx.save(cascade, tmp_path / "run")
            cascade = lx.load(tmp_path / "run", copy.deepcopy(model), (x,))
            assert all(torch.equal(value, slow[name]) for name, value in slow_of(cascade).items())


def test_a_rewound_run_starts_without_velocity() -> None:
    cascade = lx.adapt(net(), (torch.randn(3, 7).double(),), spec=lx.CascadeSpec(rank=1, pace=PACE, momentum=MOMENTUM))
    for stage in range(2):
        move(cascade, stage)
        cascade.transition(None)
    cascade.rewind(1, None)
    before, fast = slow_of(cascade), move(cascade, 7)
    cascade.transition(None)
    after = slow_of(cascade)
    for name, value in before.items():
        expected = value + PACE * (1 + MOMENTUM) * (fast[name] - value)
        torch.testing.assert_close(after[name], expected, rtol=1e-11, atol=1e-11)
