"""Views of a run: which weights are written, and which names are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from lorasc_fx.cascade import weights
from tests.errors.state import unchanged
from tests.kit.errors import raises
from tests.kit.models import randomize

X = torch.randn(6, 14, generator=torch.Generator().manual_seed(2))
SPEC = lx.CascadeSpec(rank=2, targets=("0.weight", "3.weight"), train=("4.*",), noise=lx.Noise(0.1))


def base() -> nn.Module:
    torch.manual_seed(0)
    parts = nn.Linear(14, 24), nn.BatchNorm1d(24), nn.Tanh(), nn.Linear(24, 20, bias=False), nn.Linear(20, 3)
    return nn.Sequential(*parts)


def trained(cascade: lx.Cascade, seed: int, stages: int = 2, last: bool = True) -> lx.Cascade:
    """Train some stages, and with `last` a running one. Steps change all trained parameters and running statistics."""
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(cascade.param_groups(lr=0.3))
    for number in range(stages + last):
        for _ in range(2):
            cascade(torch.randn(6, 14) + seed).square().sum().backward()
            nn.utils.clip_grad_norm_(cascade.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if number < stages:
            cascade.transition(optimizer)
    return cascade


def test_a_sum_beyond_the_dtype_of_a_weight() -> None:
    runs = [trained(lx.adapt(base(), (X,), spec=SPEC), seed) for seed in (1, 2)]
    with unchanged(model := base()), raises(lx.SpecError, "invalid-value", "merge", "overflows the dtype", "4.weight"):
        lx.merge(runs, model, (X,), weights=[9e39, 3e39])


@pytest.mark.parametrize("view", ["slwo", "legal", {"slow": 1}, 1, None])
def test_an_unknown_view(view: Any) -> None:
    cascade = lx.adapt(base(), (X,), spec=SPEC)
    with unchanged(cascade), raises(lx.StateError, "unknown-name", "weights", "slow, fast, base, averaged"):
        cascade.weights(view).__enter__()
    with unchanged(cascade), raises(lx.StateError, "unknown-name", "release", "slow, averaged"):
        cascade.release(view=view)


def test_statistics_that_are_estimated_inside_a_view() -> None:
    cascade = trained(lx.adapt(base(), (X,), spec=SPEC), 1)
    before = cascade.model[1].running_mean.clone()
    with unchanged(cascade), cascade.weights("slow"):
        torch.optim.swa_utils.update_bn([X], cascade)
        assert not torch.equal(cascade.model[1].running_mean, before)


PLAIN = replace(SPEC, noise=lx.Noise(), train=())
WRITTEN: dict[str, tuple[lx.CascadeSpec, str, bool]] = {
    "slow": (PLAIN, "slow", False),
    "fast": (PLAIN, "fast", True),
    "slow, noise": (replace(PLAIN, noise=lx.Noise(0.1)), "slow", True),
    "slow, from the fast weights": (replace(PLAIN, restart="fast"), "slow", True),
    "slow, pissa": (replace(PLAIN, start="pissa"), "slow", True),
    "averaged": (replace(PLAIN, average=True), "averaged", True),
    "slow, noise kept": (replace(PLAIN, noise=lx.Noise(0.1, keep=True)), "slow", True),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_weights_with_the_right_values_are_not_written(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, view, writes = WRITTEN[case]
    cascade = trained(lx.adapt(base(), (X,), spec=spec), 1)
    written: list[str] = []
    write = weights.WeightValues.write
    record = lambda self, name, out, *scratch: (written.append(name), write(self, name, out, *scratch))  # noqa: E731
    monkeypatch.setattr(weights.WeightValues, "write", record)
    before = {name: value.clone() for name, value in cascade.model.state_dict().items()}
    with cascade.weights(view):
        same = [torch.equal(value, before[name]) for name, value in cascade.model.named_parameters()]
    assert all(same) == (not writes)
    assert written == (["0.weight", "3.weight"] if writes else [])
    assert all(torch.equal(value, before[name]) for name, value in cascade.model.state_dict().items())


def test_slow_weights_after_a_cast_to_a_wider_dtype() -> None:
    """The weights of the stage were rounded to the dtype of W0, and slow weights are not."""
    model = base().bfloat16()
    cascade = lx.adapt(model, (X.bfloat16(),), spec=PLAIN)
    randomize(cascade, 1)
    cascade.transition(None)
    cascade.float()
    weight = cascade.model.get_parameter("0.weight")
    start = weight.clone()
    with cascade.weights("slow"):
        slow = weight.clone()
    assert torch.equal(slow.bfloat16().float(), start)
    assert not torch.equal(slow, start)
    assert torch.equal(slow, cascade.release().get_parameter("0.weight"))
