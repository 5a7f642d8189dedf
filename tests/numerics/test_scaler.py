"""GradScaler with skipped steps, against a loop that anybody would write: LoRA by hand, merged after each stage.

fp32 on the CPU. Batches whose loss overflows make the scaler skip; the oracle has a scaler of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lorasc_fx as lx
from tests.errors.models import inputs, loss_of
from tests.kit.state import branches_of

BAD = ({0, 3}, {1}, {0, 1, 2, 3}, {2})
"""By stage, the steps whose loss overflows; in the third stage none is made."""
STEPS = 4
SPEC = lx.CascadeSpec(rank=2, lora_alpha=3.0, pace=1.0)


def mlp() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


class ByHand(nn.Module):
    """`y = W x + b + s B A x`, twice."""

    def __init__(self, starts: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.base = mlp().requires_grad_(False)
        self.a = nn.ParameterDict({name[0]: value.clone() for name, value in starts.items()})
        self.b = nn.ParameterDict({name[0]: torch.zeros(self.base[int(name[0])].weight.shape[0], 2) for name in starts})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for key, act in (("0", torch.tanh), ("2", lambda y: y)):
            x = act(self.base[int(key)](x) + 1.5 * F.linear(F.linear(x, self.a[key]), self.b[key]))
        return x

    @torch.no_grad()
    def restart(self, starts: dict[str, torch.Tensor]) -> None:
        for name, start in starts.items():
            key = name[0]
            self.base[int(key)].weight += 1.5 * self.b[key] @ self.a[key]
            self.a[key].copy_(start)
            self.b[key].zero_()


def scalers() -> Iterator[Any]:
    while True:
        yield torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any, stage: int, how: dict[str, Any]) -> int:
    """A stage; returns how many steps the scaler skipped."""
    skipped = 0
    for place in range(STEPS):
        loss = loss_of(model(inputs(6, 5, seed=10 * stage + place)))
        loss = loss * float("inf") if place in BAD[stage] else loss
        scaler.scale(loss).backward()
        if how["clip"]:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.05)
        scaler.step(optimizer)
        before = scaler.get_scale()
        scaler.update()
        skipped += scaler.get_scale() < before
        optimizer.zero_grad(set_to_none=how["to_none"])
    return skipped


@pytest.mark.parametrize(
    "how", [{"clip": clip, "to_none": to_none} for clip in (False, True) for to_none in (False, True)]
)
@pytest.mark.parametrize("placement", ["beside", "merged", "weight"])
def test_skipped_steps_are_those_of_a_loop_by_hand(placement: Any, how: dict[str, Any]) -> None:
    spec = replace(SPEC, placement=placement)
    cascade = lx.adapt(mlp(), (inputs(6, 5),), spec=spec, frontend="symbolic")

    def starts() -> dict[str, torch.Tensor]:
        return {n: b.lora_A.detach().clone() for n, b in branches_of(cascade).items()}

    hand = ByHand(starts())
    ours = torch.optim.AdamW(cascade.param_groups(lr=0.05))
    parameters = [*hand.a.values(), *hand.b.values()]
    theirs = torch.optim.AdamW(parameters, lr=0.05)
    mine, other = next(scalers()), next(scalers())
    for stage, bad in enumerate(BAD):
        assert train(cascade, ours, mine, stage, how) == train(hand, theirs, other, stage, how) == len(bad)
        assert mine.get_scale() == other.get_scale()
        moved = all(bool(branch.lora_B.any()) for branch in branches_of(cascade).values())
        assert moved == (len(bad) < STEPS)
        cascade.transition(ours)
        hand.restart(starts())
        theirs.state.clear()  # the default: a restart resets the optimizer's state
        for key in ("0", "2"):
            torch.testing.assert_close(
                cascade.model.get_parameter(f"{key}.weight"),
                hand.base.get_parameter(f"{key}.weight"),
                rtol=1e-4,
                atol=1e-5,
            )
    x = inputs(8, 5, seed=99)
    expected = hand(x)
    assert not torch.allclose(expected, mlp()(x), atol=0.05)
    torch.testing.assert_close(cascade.release()(x), expected, rtol=1e-4, atol=1e-4)
