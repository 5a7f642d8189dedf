"""A spec with a learning rate schedule, as measured in docs/evidence.md. `make evidence` runs the measurements."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lorasc_fx.errors import SpecError
from lorasc_fx.facade import Cascade
from lorasc_fx.schedules import StageSchedule
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.util.checks import is_integer
from lorasc_fx.util.decode import check_names

__all__ = ["Recipe", "long_training", "lora", "small_data"]

WARMUP = 5
"""Steps of each warm-up, as measured."""


class Recipe(NamedTuple):
    """The result of a recipe::

        spec, schedule = lx.recipes.small_data(steps=300, stages=3, rank=8, train=("head.*",))
        model = lx.adapt(model, args=(x,), spec=spec)
        optimizer = torch.optim.AdamW(model.param_groups(lr=1e-3), weight_decay=0.01)
        scheduler = schedule(optimizer, model)  # scheduler.step() after each optimizer.step()
        for stage in model.stages(3, optimizer):
            ...  # 100 steps

    Args:
        spec: for `adapt`.
        schedule: makes the learning rate scheduler for an optimizer and a cascade.
    """

    spec: CascadeSpec
    schedule: Callable[[torch.optim.Optimizer, Cascade], StageSchedule]


def lora(steps: int, adapter: str = "lora", **options: Any) -> Recipe:
    """LoRA, or another method: one stage, whose weights are the result, and a rate that decays to 0 over the training.

    Evidence: what the others are measured against (docs/evidence.md). It is the better one on images, by about 2
    points, and on sentiment by up to one; over tasks it is 3.2 and 2.6 points better than `long_training` under shift.

    Args:
        steps: optimizer steps of the training.
        adapter: method of the branches (docs/method.md). Measured was LoRA.
        options: other fields of the CascadeSpec.

    Raises:
        SpecError: an option that the recipe sets, or a value that the spec refuses.
    """
    return _recipe("lora", {"pace": 1.0, "restart": "slow"}, adapter, options, steps, 1, decays=True)


def small_data(steps: int, stages: int = 3, adapter: str = "lora", **options: Any) -> Recipe:
    """The paper's rule: slow weights take half of each stage, the next one starts from them, and the rate stays.

    Evidence (docs/evidence.md, `paper`): points of test accuracy less LoRA, 500 examples, 3 stages, 10 seeds, for 60
    and for 300 steps. R8 +2.3 and +1.2, 20 Newsgroups +3.7 and +2.8, authors of tweets -0.1 and +3.0; Rotten Tomatoes
    -0.3 and -0.5, IMDB -1.2 and -0.4; characters of tales +0.2 and +0.1; MNIST -2.4 and -2.1, digits -1.8 and -2.6; a
    teacher of rank 4 +0.6 and +1.5. Over these nine +0.13 [-0.43, 0.61] and +0.22 [-0.04, 0.47]: undecided.

    Args:
        steps: optimizer steps of the training.
        stages: of `steps / stages` steps each.
        adapter: method of the branches (docs/method.md). Measured was LoRA.
        options: other fields of the CascadeSpec.

    Raises:
        SpecError: an option that the recipe sets, or a value that the spec refuses.
    """
    return _recipe("small_data", {"pace": 0.5, "restart": "slow"}, adapter, options, steps, stages, decays=False)


def long_training(steps: int, stages: int = 3, adapter: str = "lora", **options: Any) -> Recipe:
    """Stages that go on from the fast weights, a decay to 0 in each; the slow weights are the mean of their ends.

    Evidence (docs/evidence.md, `recipe`): points of test accuracy less LoRA, 500 examples, 3 stages of 100 steps, 10
    seeds. R8 +0.3, 20 Newsgroups +1.6, authors of tweets +0.4, characters of tales +0.2, Rotten Tomatoes -0.1, IMDB
    -0.3, digits -1.5, MNIST -2.2, a teacher of rank 4 -3.3; over these nine -0.27 [-0.44, -0.10], with a lower test
    loss on the six of texts. Stages of 20 steps lose up to 6 points (MNIST).

    Args:
        steps: optimizer steps of the training.
        stages: of `steps / stages` steps each.
        adapter: method of the branches (docs/method.md). Measured was LoRA.
        options: other fields of the CascadeSpec.

    Raises:
        SpecError: an option that the recipe sets, or a value that the spec refuses.
    """
    return _recipe("long_training", {"pace": "mean", "restart": "fast"}, adapter, options, steps, stages, decays=True)


def _recipe(
    name: str, fixed: dict[str, Any], adapter: str, options: dict[str, Any], steps: int, stages: int, *, decays: bool
) -> Recipe:
    if not is_integer(stages, 1):
        raise SpecError(f"recipes.{name}: stages is {stages!r}; give an integer of 1 or more")
    if not is_integer(steps, stages):
        raise SpecError(f"recipes.{name}: steps is {steps!r}, of {stages} stages; give an integer of {stages} or more")
    taken = next((option for option in options if option in fixed), None)
    if taken is not None:
        raise SpecError(
            f"recipes.{name}: {taken} is {fixed[taken]!r} in this recipe. Leave it out, or give `adapt` your own "
            "CascadeSpec",
            code="conflicting-options",
        )
    check_names(CascadeSpec, options, ("spec",))
    ends = [round(stage * steps / stages) for stage in range(stages + 1)]
    lengths = [end - start for start, end in itertools.pairwise(ends)]
    warmup = min(WARMUP, min(lengths) - 1)

    def schedule(optimizer: torch.optim.Optimizer, cascade: Cascade) -> StageSchedule:
        if decays:
            return StageSchedule(optimizer, cascade, lengths, warmup=warmup)
        return StageSchedule(optimizer, None, warmup=warmup)

    return Recipe(CascadeSpec(**fixed, adapter=adapter, **options), schedule)
