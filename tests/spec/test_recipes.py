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
    "sequence": (
        lx.recipes.sequence,
        3,
        {"adapter": "shira", "pace": 0.5, "restart": "slow", "restart_factors": "both"},
    ),
}
"""Recipes with their number of stages and the options that they set."""


def rate_factor(name: str, step: int) -> float:
    """The rate by the formula: a warm-up of 5 steps, then a cosine decay or none."""
    warm = min(1.0, (step + 1) / 6)
    return warm * 0.5 * (1 + math.cos(math.pi * step / STEPS)) if name == "lora" else warm


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
    expected = [rate_factor(name, step) for step in range(STEPS)]
    assert seen == pytest.approx([0.1 * factor for factor in expected], rel=1e-12)


def test_cycles_are_those_of_one_branch() -> None:
    """In fp64, like LoRA of one stage with the same rates, averaged over the ends of the cycles."""
    rank, calls = {"rank": 2, "lora_alpha": 4.0, "targets": ("linear",)}, batches(STEPS, 4, 5)
    spec = lx.CascadeSpec(pace="mean", restart="fast", restart_factors="none", **rank)
    cycles = lx.adapt(mlp(), (X,), spec=spec)
    alone = lx.adapt(mlp(), (X,), spec=lx.CascadeSpec(pace=1.0, **rank))
    ours, theirs = (torch.optim.AdamW(cascade.param_groups(lr=0.1)) for cascade in (cycles, alone))
    scheduler = lx.StageSchedule(ours, cycles, STEPS // 3, warmup=5)
    ends = list[dict[str, torch.Tensor]]()

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


def test_a_warm_up_fits_into_short_stages() -> None:
    """Of 7 steps in 3 stages the shortest has 2: one of warm-up, one at the full rate."""
    cascade = lx.adapt(mlp(), (X,), spec=lx.recipes.sequence(7, 3, seed=0)[0])
    optimizer = torch.optim.SGD(cascade.param_groups(lr=1.0))
    scheduler = lx.recipes.sequence(7, 3, seed=0).schedule(optimizer, cascade)
    assert scheduler.get_last_lr() == [0.5]
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [1.0]


def test_options_that_a_recipe_sets_are_refused() -> None:
    with raises(lx.SpecError, "conflicting-options", "sequence", "pace"):
        lx.recipes.sequence(10, seed=1, pace=1.0)
    assert lx.recipes.sequence(10, adapter="lora", seed=1).spec.adapter == "lora"
    with raises(lx.SpecError, "invalid-value", "adapter", "nearest: 'vera'"):
        lx.recipes.lora(10, adapter="vear")
    with raises(lx.SpecError, "unknown-name", "rnak"):
        lx.recipes.lora(10, rnak=4)
    with raises(lx.SpecError, "invalid-value", "lora", "steps"):
        lx.recipes.lora(0)
    with raises(lx.SpecError, "invalid-value", "stages"):
        lx.recipes.sequence(10, 0, seed=1)
    with raises(lx.SpecError, "invalid-value", "steps", "2 stages"):
        lx.recipes.sequence(1, 2, seed=1)
