"""Combinations of these options with others: every stage is compared with dense algebra in fp64.

At the end of a stage the slow weight is `W_{t-1} + pace_t (W_fast - W_{t-1})`, where `W_fast` is what the eager model
would have to hold to compute what the cascade computes: read off the cascade's outputs, not off its factors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from tests.kit.models import batches, branches, train

EYE = torch.eye(12, dtype=torch.float64)
X = batches(1, 6, 12)[0]
PACES = (1.0, 0.5)
SPECS: dict[str, dict[str, Any]] = {
    "ranks, pissa": {"ranks": (3, 2), "start": "pissa"},
    "ranks, olora": {"ranks": (3, 2), "start": "olora"},
    "ranks, dora": {"ranks": (3, 2), "adapter": "dora"},
    "ranks, fixed": {"ranks": (3, 2), "train_A": False, "nearest_full_gradient": True},
    "ranks, plus": {"ranks": (3, 2), "lr_ratio": 4.0},
    "ranks, redrawn": {"ranks": (3, 2), "noise": lx.Noise(0.1, redraw="step")},
    "fixed, pissa": {"rank": 2, "train_A": False, "start": "pissa"},
    "fixed, dora": {"rank": 2, "train_A": False, "adapter": "dora"},
    "average, pissa": {"rank": 2, "average": "swa", "start": "pissa"},
    "plus, dora": {"rank": 2, "lr_ratio": 4.0, "adapter": "dora"},
    "olora, dora, ranks": {"ranks": (1, 3), "start": "olora", "adapter": "dora"},
    "olora, average": {"rank": 2, "start": "olora", "average": "ema"},
    "all": {"ranks": (3, 2), "average": "ema", "train_A": False, "start": "olora", "noise": lx.Noise(0.1)},
}


def made(options: dict[str, Any]) -> tuple[lx.Cascade, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 9)).double()
    spec = lx.CascadeSpec(**{"lora_alpha": 3.0, "pace": PACES} | options)
    cascade = lx.adapt(model, (X,), spec=spec, frontend="symbolic")
    return cascade, torch.optim.AdamW(cascade.param_groups(lr=3e-2))


def computed(cascade: lx.Cascade) -> torch.Tensor:
    """Return the weight that the cascade computes with now, from its outputs without the bias."""
    with torch.no_grad():
        return (cascade(EYE) - cascade(0 * EYE)).t()


@pytest.mark.parametrize("name", SPECS)
def test_stages_are_the_recursion(name: str, tmp_path: Path) -> None:
    options = SPECS[name]
    cascade, optimizer = made(options)
    slow = cascade.model[0].weight.new_zeros(9, 12)
    with cascade.weights("base"):
        slow = cascade.model[0].weight.detach().clone()
    ends = []
    for number in (1, 2, 3):
        rank = options.get("ranks", (2, 2))[min(number, 2) - 1]
        assert branches(cascade)["0.weight"].rank == rank
        a = branches(cascade)["0.weight"].lora_A.detach().clone()
        train(cascade, optimizer, batches(3, 6, 12, seed=number))
        assert torch.equal(branches(cascade)["0.weight"].lora_A, a) == (not options.get("train_A", True))
        with cascade.weights("fast"):
            fast = computed(cascade)
        if "noise" not in options:
            torch.testing.assert_close(computed(cascade), fast, rtol=0, atol=1e-12)
        assert (fast - slow).abs().max() > 1e-3
        slow = slow + PACES[min(number, 2) - 1] * (fast - slow)
        cascade.transition(optimizer)
        ends.append(slow)
        with cascade.weights("slow"):
            torch.testing.assert_close(cascade.model[0].weight.detach(), slow, rtol=0, atol=1e-11)
        if number == 2:
            lx.save(cascade, tmp_path, optimizer=optimizer)
            torch.manual_seed(3)
            cascade = lx.load(tmp_path, nn.Sequential(nn.Linear(12, 9)).double(), (X,))
            optimizer = torch.optim.AdamW(cascade.param_groups(lr=3e-2))
            cascade.resume(optimizer)
    if options.get("average", "off") != "off":
        first, second, third = ends
        expected = (first + second + third) / 3 if options["average"] == "swa" else None
        if expected is None:
            expected = 0.9 * (0.9 * first + 0.1 * second) + 0.1 * third
        with cascade.weights("averaged"):
            torch.testing.assert_close(cascade.model[0].weight.detach(), expected, rtol=0, atol=1e-11)
    model = cascade.release()
    torch.testing.assert_close(model[0].weight.detach(), slow, rtol=0, atol=1e-11)
