"""The slow update with a pace of mean, and combinations of options, each compared with its formula in fp64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorasc_fx as lx
from tests.kit.models import batches, branches, train

X = torch.randn(3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
EXACT = {"rtol": 1e-11, "atol": 1e-11}
Values = dict[str, Tensor]


def net() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5)).double()


def adapted(**fields: Any) -> lx.Cascade:
    return lx.adapt(net(), (X,), spec=lx.CascadeSpec(**{"rank": 2, **fields}))


def placed(cascade: lx.Cascade, view: Any) -> Values:
    with cascade.weights(view):
        return {name: value.detach().clone() for name, value in cascade.model.named_parameters()}


def move(cascade: lx.Cascade, stage: int) -> Values:
    """Change all trainable parameters, and return the fast weights."""
    generator = torch.Generator().manual_seed(stage)
    with torch.no_grad():
        for parameter in cascade.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return placed(cascade, "fast")


RULES: list[dict[str, Any]] = [
    {}, {"rank": 5}, {"adapter": "hira"}, {"restart": "fast"}, {"noise": lx.Noise(0.1)}, {"train": ("*.bias",)},
    {"average": True},
]  # fmt: skip


@pytest.mark.parametrize("fields", RULES, ids=str)
def test_a_pace_of_mean(fields: dict[str, Any], tmp_path: Path) -> None:
    """The slow weights are the mean of the fast weights. The run is resumed from a checkpoint halfway."""
    cascade, ends = adapted(pace="mean", **fields), list[Values]()
    for stage in range(4):
        ends.append(move(cascade, stage))
        cascade.transition(None)
        slow = placed(cascade, "slow")
        for name, value in slow.items():
            torch.testing.assert_close(value, torch.stack([end[name] for end in ends]).mean(0), **EXACT)
        if stage == 1:
            lx.save(cascade, tmp_path / "run")
            cascade = lx.load(tmp_path / "run", net(), (X,))
            assert all(torch.equal(value, slow[name]) for name, value in placed(cascade, "slow").items())


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_pace_of_mean_after_a_rewind(kept: int, tmp_path: Path) -> None:
    """The mean is over the remaining stages. Their numbers have gaps, also after a save and a second rewind."""
    cascade, ends = adapted(rank=1, pace="mean", restart="fast", train=("*.bias",)), dict[int, Values]()
    for stage in range(3):
        ends[cascade.stage] = move(cascade, stage)
        cascade.transition(None)
    cascade.rewind(3, None)
    cascade.rewind(kept, None)
    ends = {number: end for number, end in ends.items() if number <= kept}
    lx.save(cascade, tmp_path / "run")
    cascade = lx.load(tmp_path / "run", net(), (X,))
    for stage in (5, 6):
        ends[cascade.stage] = move(cascade, stage)
        cascade.transition(None)
        for name, value in placed(cascade, "slow").items():
            torch.testing.assert_close(value, torch.stack([end[name] for end in ends.values()]).mean(0), **EXACT)


EYE = torch.eye(12, dtype=torch.float64)
INPUT = batches(1, 6, 12)[0]
PACES = (1.0, 0.5)
SPECS: dict[str, dict[str, Any]] = {
    "fixed, plus, dora": {"rank": 2, "train_A": False, "lr_ratio": 4.0, "adapter": "dora"},
    "average, pissa": {"rank": 2, "average": True, "start": "pissa"},
    "pissa, dora": {"rank": 1, "start": "pissa", "adapter": "dora"},
    "all": {"rank": 3, "average": True, "train_A": False, "start": "pissa", "noise": lx.Noise(0.1)},
}


def computed(cascade: lx.Cascade) -> torch.Tensor:
    """Return the weight that the cascade computes with now, from its outputs without the bias."""
    with torch.no_grad():
        return (cascade(EYE) - cascade(0 * EYE)).t()


@pytest.mark.parametrize("name", SPECS)
def test_stages_are_the_recursion(name: str, tmp_path: Path) -> None:
    options = SPECS[name]
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 9)).double()
    original = copy.deepcopy(model)
    cascade = lx.adapt(model, (INPUT,), spec=lx.CascadeSpec(**{"lora_alpha": 3.0, "pace": PACES} | options))
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=3e-2))
    with cascade.weights("base"):
        slow = cascade.model[0].weight.detach().clone()
    ends = []
    for number in (1, 2, 3):
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
            cascade = lx.load(tmp_path, original, (INPUT,))
            optimizer = torch.optim.AdamW(cascade.param_groups(lr=3e-2))
            cascade.resume(optimizer)
    if options.get("average"):
        with cascade.weights("averaged"):
            torch.testing.assert_close(cascade.model[0].weight.detach(), torch.stack(ends).mean(0), rtol=0, atol=1e-11)
    model = cascade.release()
    torch.testing.assert_close(model[0].weight.detach(), slow, rtol=0, atol=1e-11)
