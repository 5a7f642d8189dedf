"""Stages whose factors start from the weights (`CascadeSpec.start`): computed before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from lorasc_fx.branch import Branch, take_out
from lorasc_fx.branch.init import fresh_a
from lorasc_fx.plan import Plan
from lorasc_fx.runtime.slow import SlowWeights
from lorasc_fx.undo import AllOrNothing

__all__ = ["put_starts", "starts_of"]


def starts_of(plan: Plan, slow: SlowWeights, branches: Mapping[str, Branch]) -> tuple[SlowWeights, dict[str, Branch]]:
    """Return the slow weights with what these branches take out of them, and copies of the branches as they start.

    There are none where the factors start as in LoRA, or where no stage runs.

    Args:
        plan: of the stage that starts.
        slow: that it starts from.
        branches: by weight name.
    """
    if plan.spec.start == "lora" or slow.parked:
        return slow, {}
    states, started = dict(slow.states), {}
    for name, branch in branches.items():
        a = fresh_a(plan.spec.seed, plan.stage, name, tuple(branch.lora_A.shape))
        states[name], started[name] = take_out(states[name], branch, plan.spec.start, a)
    return replace(slow, states=states), started


def put_starts(branches: Mapping[str, Branch], started: Mapping[str, Branch], undo: AllOrNothing) -> None:
    """Let the branches start as their copies do; taken back with the block."""
    with torch.no_grad():
        for name, start in started.items():
            own = branches[name]
            for factor, value in ((own.lora_A, start.lora_A), (own.lora_B, start.lora_B)):
                undo(partial(_set, factor, factor.detach().clone()))
                factor.copy_(value)


def _set(factor: nn.Parameter, value: torch.Tensor) -> None:
    with torch.no_grad():
        factor.copy_(value)
