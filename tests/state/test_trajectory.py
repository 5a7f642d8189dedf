"""One stage with pace 1 and no noise follows LoRA step by step (algorithm.md, "Facts that hold exactly").

The oracle is peft with the same A. Both compute the same sums in another order, so fp64 losses differ by about 1e-15
per step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from tests.kit.models import (
    OPTIMIZERS,
    PLAIN,
    SCALE,
    batches,
    branches,
    lora_of,
    mlp,
    optimizer_of,
    train,
    trainable_parameters,
)

STEPS = 20

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's call


@dataclass(frozen=True)
class Case:
    """A model, its training inputs, and the modules that both packages adapt."""

    build: Callable[[], nn.Module]
    calls: Callable[[], list[torch.Tensor]]
    targets: tuple[str, ...]


def conv_net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 4, (3, 2), stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.SiLU(),
        nn.Conv2d(4, 6, 1, bias=False),
        nn.Flatten(2),
        nn.Conv1d(6, 5, 3, padding=1),
        nn.Unflatten(2, (2, 2, -1)),
        nn.Conv3d(5, 2, (2, 1, 2)),
    ).double()


CASES = {
    "mlp": Case(mlp, lambda: batches(STEPS, 4, 5), ("0", "2", "4")),
    "conv": Case(conv_net, lambda: batches(STEPS, 3, 3, 8, 7), ("0", "3", "5", "7")),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", CASES)
def test_one_stage_is_pefts_lora(name: str, optimizer: str) -> None:
    case, make = CASES[name], OPTIMIZERS[optimizer]
    calls = case.calls()
    model = case.build().train()
    original = copy.deepcopy(model)
    cascade = lx.adapt(model, (calls[0],), spec=lx.CascadeSpec(targets=case.targets, **PLAIN))
    assert len(cascade.sites) == len(case.targets)
    assert cascade.sites[0].scale == SCALE
    theirs = lora_of(cascade, original, case.targets).train()

    ours = train(cascade, optimizer_of(cascade, optimizer), calls)
    expected = train(theirs, make(trainable_parameters(theirs)), calls)

    assert all(branch.lora_B.any() for branch in branches(cascade).values())
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    merged = theirs.merge_and_unload().state_dict()
    released = cascade.release().state_dict()
    assert released.keys() == merged.keys()
    for key, value in released.items():
        torch.testing.assert_close(value, merged[key], rtol=0, atol=1e-9, msg=key)


def test_fresh_factors_are_loras() -> None:
    """A is U(-1/sqrt(in), 1/sqrt(in)), which is Kaiming uniform with a = sqrt(5). B is 0. Each stage has another A."""
    model = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 3)).double()
    cascade = lx.adapt(model, (torch.randn(2, 50).double(),), spec=lx.CascadeSpec(rank=30))
    seen = []
    for _ in range(2):
        for name, fan in (("0.weight", 50), ("1.weight", 40)):
            branch = branches(cascade)[name]
            bound = fan**-0.5
            assert branch.lora_A.abs().max() <= bound
            assert branch.lora_A.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
            assert abs(branch.lora_A.mean().item()) < 4 * bound / 3**0.5 / branch.lora_A.numel() ** 0.5
            assert not branch.lora_B.any()
            seen.append(branch.lora_A.detach().clone()[:, :40])
        cascade.transition(None)
    for index, one in enumerate(seen):
        for other in seen[index + 1 :]:
            assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].abs() < 0.15
