"""Stages whose factors start from the weights (`CascadeSpec.start`): computed before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from lorasc_fx.branch import Branch
from lorasc_fx.plan import Plan
from lorasc_fx.runtime.slow import SlowWeights
from lorasc_fx.state import begin_stage
from lorasc_fx.undo import Undo

__all__ = ["put_starts", "starts_of"]


def starts_of(
    plan: Plan,
    slow: SlowWeights,
    branches: Mapping[str, Branch],
    starts: Mapping[str, torch.Tensor] | None = None,
) -> tuple[SlowWeights, dict[str, Branch]]:
    """Return the slow weights with what these branches take out of them, and copies of the branches as they start.

    There are none where the factors start as in LoRA, or no stage runs; but magnitudes always start from the weight.

    Args:
        plan: of the stage that starts.
        slow: that it starts from.
        branches: by weight name.
        starts: lora_A by weight name, as LoRA starts it; by default as it is.
    """
    spec = plan.spec
    if not spec.use_dora and (spec.start == "lora" or slow.parked):
        return slow, {}
    states, started = dict(slow.states), {}
    for name, branch in branches.items():
        a = starts[name] if starts is not None else branch.lora_A.detach()
        site = plan.by_weight[name]
        states[name], started[name] = begin_stage(states[name], branch, site, spec, plan.stage, a, not slow.parked)
    return replace(slow, states=states), started


def put_starts(branches: Mapping[str, Branch], started: Mapping[str, Branch], undo: Undo) -> None:
    """Let the branches start as their copies do; taken back with the block."""
    with torch.no_grad():
        for name, start in started.items():
            for factor, value in zip(branches[name].parameters(), start.parameters(), strict=True):
                undo(partial(_set, factor, factor.detach().clone()))
                factor.copy_(value)


def _set(factor: nn.Parameter, value: torch.Tensor) -> None:
    with torch.no_grad():
        factor.copy_(value)
