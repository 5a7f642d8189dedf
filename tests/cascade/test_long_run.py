"""2,000 transitions of a small model. Memory, handles, objects and calls stay flat; the slow weights are the sum."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import partial

import psutil
import pytest
import torch
from torch import Tensor, nn

import lorasc_fx as lx
from tests.errors.models import inputs
from tests.kit.models import loss_of

TRANSITIONS = 2000
WARM = 100
"""Transitions after which everything is flat: by then every site's experts are one dense delta."""
SPEC = lx.CascadeSpec(rank=2, lora_alpha=3.0, pace=0.5, noise=lx.Noise(0.1))


@dataclass
class Census:
    """Resources of the process, at every hundredth transition."""

    resident: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    tensors: list[int] = field(default_factory=list)
    objects: list[int] = field(default_factory=list)

    def take(self) -> None:
        process = psutil.Process()
        gc.collect()
        self.resident.append(process.memory_info().rss)
        self.files.append(process.num_fds())
        self.threads.append(process.num_threads())
        objects = gc.get_objects()
        self.objects.append(len(objects))
        self.tensors.append(sum(issubclass(type(item), Tensor) for item in objects))


def note_call(calls: Counter[int], count: int, frame: object, event: str, argument: object) -> None:
    calls[count] += "call" in event


def model_of() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def spacing(value: Tensor) -> Tensor:
    """The distance between neighbours in fp32 at each value: 2^e eps."""
    return torch.exp2(value.abs().clamp_min(1e-30).log2().floor()) * torch.finfo(torch.float32).eps


@pytest.mark.slow
def test_two_thousand_transitions() -> None:
    """Each stage trains one step; the reference adds pace * s * B A in fp64 from the factors that were trained."""
    x = inputs(4, 5, seed=3)
    cascade = lx.adapt(model_of(), (x,), spec=SPEC)
    optimizer = torch.optim.SGD(cascade.param_groups(lr=0.3))
    branches = {site.weight: cascade.branches[site.key] for site in cascade.sites}
    parameters = dict(cascade.model.named_parameters())
    exact = {name: parameter.detach().double() for name, parameter in model_of().named_parameters()}
    census, calls = Census(), Counter[int]()
    for count in range(1, TRANSITIONS + 1):
        loss_of(cascade(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, branch in branches.items():
            exact[name] += SPEC.pace * 1.5 * branch.lora_B.detach().double() @ branch.lora_A.detach().double()
        if count in (WARM, TRANSITIONS):
            sys.setprofile(partial(note_call, calls, count))
        cascade.transition(optimizer)
        sys.setprofile(None)
        if count % WARM == 0:
            census.take()

    assert census.resident[-1] <= 1.05 * census.resident[0]
    assert max(census.files) == census.files[0]
    assert max(census.threads) == census.threads[0]
    assert census.tensors[-1] <= census.tensors[0]  # what earlier tests left may go meanwhile
    # The history has one entry for each stage. One more object a stage would be 1,900.
    assert census.objects[-1] - census.objects[0] - (TRANSITIONS - WARM) < TRANSITIONS / 10
    assert 0 < calls[TRANSITIONS] < 1.1 * calls[WARM]  # functions that a transition calls: one a stage would be 1,900

    with cascade.weights("slow"):
        slow = {name: parameter.detach().double() for name, parameter in parameters.items()}
    for name in branches:
        moved = (exact[name] - model_of().get_parameter(name).double()).abs().mean()
        assert moved > 0.01  # the stages did something
        off = (slow[name] - exact[name]).abs() / spacing(exact[name])
        assert off.max() <= 1.0
