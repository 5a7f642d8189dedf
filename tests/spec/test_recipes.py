"""Recipes: their spec, and the learning rate of each step by the formula of the evidence."""

from __future__ import annotations

import math

import pytest
import torch

import lorasc_fx as lx
from tests.kit.errors import raises
from tests.kit.models import batches, mlp, train

X = batches(1, 4, 5)[0]
STEPS = 24
RECIPES = {
    "lora": (lx.recipes.lora, 1, {"pace": 1.0, "restart": "slow", "restart_factors": "both"}),
    "small_data": (lx.recipes.small_data, 3, {"pace": 0.5, "restart": "slow", "restart_factors": "both"}),
    "lora_cycles": (lx.recipes.lora_cycles, 3, {"pace": "mean", "restart": "fast", "restart_factors": "none"}),
    "sequence": (
        lx.recipes.sequence,
        3,
        {"adapter": "shira", "pace": 0.5, "restart": "slow", "restart_factors": "both"},
    ),
}
"""Recipes with their number of stages and the options that they set."""


def rate_factor(name: str, step: int, cycles: int) -> float:
    """The rate by the formula: a warm-up of 5 steps, then one cosine decay, one for each cycle, or none."""
    length = STEPS // cycles if name == "lora_cycles" else STEPS
    warm = min(1.0, (step % length + 1) / 6)
    constant = name in {"small_data", "sequence"}
    return warm if constant else warm * 0.5 * (1 + math.cos(math.pi * (step % length) / length))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_sets_options_and_the_rate_of_each_step(name: str) -> None:
    recipe, stages, options = RECIPES[name]
    usual = {"rank": 2, "targets": ("0.weight", "2.weight"), "train": ("4.*",), "seed": 3}
    spec, schedule = recipe(STEPS, **usual)
    assert spec == lx.CascadeSpec(**usual, **options)

    cascade = lx.adapt(mlp(), (X,), spec=spec)
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.1))
    scheduler = schedule(optimizer, cascade)
    seen: list[float] = []
    optimizer.register_step_pre_hook(lambda stepped, *_: seen.append(stepped.param_groups[0]["lr"]))
    for _ in cascade.stages(stages, optimizer):
        for _ in range(STEPS // stages):
            train(cascade, optimizer, [X])
            scheduler.step()
    expected = [rate_factor(name, step, stages) for step in range(STEPS)]
    assert seen == pytest.approx([0.1 * factor for factor in expected], rel=1e-12)


def test_cycles_are_those_of_one_branch() -> None:
    """In fp64, like LoRA of one stage with the same rates, averaged over the ends of the cycles."""
    rank, calls = {"rank": 2, "lora_alpha": 4.0, "targets": ("linear",)}, batches(STEPS, 4, 5)
    spec, schedule = lx.recipes.lora_cycles(STEPS, 3, **rank)
    cycles = lx.adapt(mlp(), (X,), spec=spec)
    alone = lx.adapt(mlp(), (X,), spec=lx.CascadeSpec(pace=1.0, **rank))
    ours, theirs = (torch.optim.AdamW(cascade.param_groups(lr=0.1)) for cascade in (cycles, alone))
    scheduler, ends = schedule(ours, cycles), list[dict[str, torch.Tensor]]()

    def same_rates(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group, source in zip(theirs.param_groups, optimizer.param_groups, strict=True):
            group["lr"] = source["lr"]

    ours.register_step_pre_hook(same_rates)  # the schedule notices a new stage at its first step
    for stage in cycles.stages(3, ours):
        for call in calls[8 * (stage.index - 1) : 8 * stage.index]:
            losses = train(cycles, ours, [call]), train(alone, theirs, [call])
            torch.testing.assert_close(*losses, rtol=0, atol=1e-11)
            scheduler.step()
        ends.append(alone.folded_state_dict())
    for name, value in cycles.folded_state_dict().items():
        mean = torch.stack([end[name] for end in ends]).mean(0)
        torch.testing.assert_close(value, mean, rtol=0, atol=1e-11)
    assert not torch.equal(ends[0]["0.weight"], ends[2]["0.weight"])


def test_warm_up_and_decay_fit_into_short_stages() -> None:
    cascade = lx.adapt(mlp(), (X,), spec=lx.recipes.lora_cycles(7, 3)[0])
    optimizer = torch.optim.SGD(cascade.param_groups(lr=1.0))
    scheduler = lx.recipes.lora_cycles(7, 3).schedule(optimizer, cascade)
    assert scheduler.steps == [2, 3, 2]
    assert scheduler.warmup == 1
    assert scheduler.factor(2, 1) == pytest.approx(0.5 * (1 + math.cos(math.pi / 3)))


def test_options_that_a_recipe_sets_are_refused() -> None:
    with raises(lx.SpecError, "conflicting-options", "small_data", "pace"):
        lx.recipes.small_data(10, pace=1.0)
    with raises(lx.SpecError, "invalid-value", "adapter", "nearest: 'vera'"):
        lx.recipes.lora(10, adapter="vear")
    with raises(lx.SpecError, "unknown-name", "rnak"):
        lx.recipes.lora(10, rnak=4)
    with raises(lx.SpecError, "invalid-value", "lora", "steps"):
        lx.recipes.lora(0)
    with raises(lx.SpecError, "invalid-value", "stages"):
        lx.recipes.lora_cycles(10, 0)
    with raises(lx.SpecError, "invalid-value", "steps", "2 stages"):
        lx.recipes.small_data(1, 2)
