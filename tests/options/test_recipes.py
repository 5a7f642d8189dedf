"""Recipes: their spec, and the learning rate of each step by the formula of the evidence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import lorasc_fx as lx
from experiments.evidence.methods import METHODS, rate_factor, spec_of
from lorasc_fx.branch import METHODS as ADAPTERS
from tests.kit.errors import raises
from tests.kit.models import batches, mlp, train

X = batches(1, 4, 5)[0]
STEPS = 24
RECIPES = {
    "lora": (lx.recipes.lora, 1),
    "paper": (lx.recipes.small_data, 3),
    "lora-cycles": (lx.recipes.lora_cycles, 3),
}
"""Recipes with their name in the evidence and their number of stages."""


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_what_the_evidence_measured(name: str) -> None:
    recipe, stages = RECIPES[name]
    spec, schedule = recipe(STEPS, rank=2, targets=("0.weight", "2.weight"), train=("4.*",), lora_alpha=4.0, seed=3)
    measured = spec_of(METHODS[name], 2, 3, ("4.*",), 3)
    if METHODS[name].average == "ends":  # the evidence takes the mean over the ends of stages itself
        assert measured.pace == 1.0
        assert METHODS[name].stages == (measured.restart == "fast")
        measured = replace(measured, pace="mean", restart="fast")
    fields = ("pace", "restart", "rank", "lora_alpha", "train", "noise", "restart_A", "optimizer_state", "seed")
    assert [getattr(spec, field) for field in fields] == [getattr(measured, field) for field in fields]

    cascade = lx.adapt(mlp(), (X,), spec=spec)
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.1))
    scheduler = schedule(optimizer, cascade)
    seen: list[float] = []
    optimizer.register_step_pre_hook(lambda held, *_: seen.append(held.param_groups[0]["lr"]))
    for _ in cascade.stages(stages, optimizer):
        for _ in range(STEPS // stages):
            train(cascade, optimizer, [X])
            scheduler.step()
    expected = [rate_factor(METHODS[name], step, STEPS, 3, 5) for step in range(STEPS)]
    assert seen == pytest.approx([0.1 * factor for factor in expected], rel=1e-12)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("recipe", [lx.recipes.lora, lx.recipes.small_data])
def test_a_recipe_of_another_method(recipe: Callable[..., lx.recipes.Recipe], adapter: str) -> None:
    spec, schedule = recipe(6, adapter=adapter, rank=2)
    assert spec.adapter == adapter
    cascade = lx.adapt(mlp(), (X,), spec=spec)
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=1e-4))
    scheduler = schedule(optimizer, cascade)
    before = train(cascade, optimizer, [X])
    scheduler.step()
    assert train(cascade, optimizer, [X]) != before


def test_cycles_are_those_of_one_branch() -> None:
    """In fp64, like LoRA of one stage with the same rates, averaged over the ends of the cycles."""
    rank, calls = {"rank": 2, "lora_alpha": 4.0, "targets": ("linear",)}, batches(STEPS, 4, 5)
    spec, schedule = lx.recipes.lora_cycles(STEPS, 3, **rank)
    cycles = lx.adapt(mlp(), (X,), spec=spec)
    alone = lx.adapt(mlp(), (X,), spec=lx.CascadeSpec(pace=1.0, **rank))
    ours, theirs = (torch.optim.AdamW(each.param_groups(lr=0.1)) for each in (cycles, alone))
    scheduler, ends = schedule(ours, cycles), list[dict[str, torch.Tensor]]()

    def same_rates(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group, other in zip(theirs.param_groups, optimizer.param_groups, strict=True):
            group["lr"] = other["lr"]

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
