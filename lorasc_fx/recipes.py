"""Combinations of a spec and a learning rate schedule, with their results from docs/evidence.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lorasc_fx.errors import SpecError
from lorasc_fx.facade import Cascade
from lorasc_fx.schedules import StageSchedule
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.util.decode import check_names, is_integer

__all__ = ["Recipe", "lora", "sequence"]

WARMUP = 5
"""Number of optimizer steps of a learning rate warm-up, as in the measurements."""


class Recipe(NamedTuple):
    """A spec and a learning rate schedule that belong together::

        spec, schedule = lx.recipes.sequence(steps=300, stages=3, seed=0, rank=8, train=("head.*",))
        model = lx.adapt(model, args=(x,), spec=spec)
        optimizer = torch.optim.AdamW(model.param_groups(lr=1e-2), weight_decay=0.01)
        scheduler = schedule(optimizer, model)  # scheduler.step() after each optimizer.step()
        for stage in model.stages(3, optimizer):
            ...  # 100 steps

    Args:
        spec: the argument `spec` of `adapt`.
        schedule: function of (optimizer, cascade) that returns a new learning rate scheduler.
    """

    spec: CascadeSpec
    schedule: Callable[[torch.optim.Optimizer, Cascade], LRScheduler]


def lora(steps: int, adapter: str = "lora", **options: object) -> Recipe:
    """Plain LoRA, or another adapter method: a single stage with a learning rate that decays to 0.

    Evidence (docs/evidence.md): this is the baseline of the other recipe. It was more accurate than the paper's rule
    on two tasks of images, by 1.8 to 2.6 points. SmolLM2-135M, the last six layers, four tasks, 200 examples and 100
    steps for each, five seeds: it has 76.2 %, and the loss on general text rises by 0.95. With adapter="shira" it is
    78.6 % and 0.42; accuracy at equal forgetting is 9.8 points [0.6, 21.8] above LoRA with a scaled change, undecided,
    because one task carries most of it.

    Rate: of a grid with factor 2, the lowest whose mean validation loss over three seeds is within one standard error
    of the best, for each task. It was 0.0025 and 0.005 for `lora` (rank=8, lora_alpha=16) and 0.01 to 0.04 for `shira`,
    with batches of 4, and gradients clipped to the norm 1.

    Args:
        steps: optimizer steps of the training.
        adapter: adapter method (docs/method.md). `lora` and `shira` were measured.
        options: other fields of CascadeSpec.

    Raises:
        SpecError: an option is set by the recipe, or has an invalid value.
    """
    fixed = {"pace": 1.0, "restart": "slow"}
    return _recipe("lora", fixed, {"adapter": adapter, **options}, steps, 1, decays=True)


def sequence(steps: int, stages: int = 3, adapter: str = "shira", *, seed: int, **options: object) -> Recipe:
    """SHiRA in stages: for one task after another, or to forget little. With adapter="lora", the LoRASC paper's rule.

    Half of each stage is merged, and the next stage starts from the slow weights.

    Each task is trained with this recipe. After its last stage, `model.release()` returns the model that `adapt` takes
    for the next task. The learning rate is constant after a warm-up.

    Evidence (docs/evidence.md): SmolLM2-135M, the last six layers, rank 8, three tasks in three orders, 200 examples
    and 100 steps for each task, five seeds. After the last task the mean accuracy on the three tasks is 72.2 %, with
    adapter="lora" 67.4 %, and 34.3 % with LoRA: +37.9 points [21.3, 53.1] and +33.1 [19.8, 41.8]. LoRA with 0.7 of each
    change has 42.0 %, and SHiRA in one stage 51.5 %. The last task alone has 88.4 %, 82.7 % and, with LoRA, 89.2 %. The
    loss on general text rises by 0.43, 0.32 and 1.52. With 10 examples of old tasks added to the 200 it has 80.1 %, and
    LoRA 77.4 %: +2.8 points [-8.7, 13.5], undecided; the loss on general text rises by 0.44 and 1.05. Not every task is
    kept: of tweets, learned before other tasks, it names the author as well as a guess or worse. On single tasks (the
    mean of four) it has 76.5 %, with adapter="lora" 69.8 %, and LoRA 76.2 %. There the loss on general text rises by
    0.19, 0.16 and 0.95, without tweets by 0.22, 0.18 and 0.34. On nine tasks of encoders and small models, adapter=
    "lora" is not shown to be more accurate than LoRA: +0.22 points [-0.04, 0.47]. Not measured: larger models, and
    lower rates in sequences.

    Rate: of a grid with factor 2, the lowest whose mean validation loss on the task alone, over three seeds, is within
    one standard error of the best. It was 0.01, 0.02 and 0.04 for the three tasks, and with adapter="lora" and
    lora_alpha=16 0.00125 and 0.0025, with batches of 4, and gradients clipped to the norm 1.

    Args:
        steps: optimizer steps of the training of one task.
        stages: number of stages of one task. Each has `steps / stages` steps.
        adapter: adapter method (docs/method.md). `shira` and `lora` were measured.
        seed: another one for each task, as in the measurements, so that each task draws its own positions.
        options: other fields of CascadeSpec.

    Raises:
        SpecError: an option is set by the recipe, or has an invalid value.
    """
    fixed = {"pace": 0.5, "restart": "slow"}
    return _recipe("sequence", fixed, {"adapter": adapter, "seed": seed, **options}, steps, stages, decays=False)


def _recipe(
    name: str, fixed: dict[str, Any], options: dict[str, Any], steps: int, stages: int, *, decays: bool
) -> Recipe:
    if not is_integer(stages, 1):
        raise SpecError(f"recipes.{name}: stages is {stages!r}; give an integer of 1 or more")
    if not is_integer(steps, stages):
        raise SpecError(f"recipes.{name}: steps is {steps!r} for {stages} stages; give an integer of {stages} or more")
    conflict = next((option for option in options if option in fixed), None)
    if conflict is not None:
        raise SpecError(
            f"recipes.{name}: this recipe sets {conflict}={fixed[conflict]!r}. Remove the option, or pass your own "
            "CascadeSpec to `adapt`",
            code="conflicting-options",
        )
    check_names(CascadeSpec, options, ("spec",))
    warmup = min(WARMUP, steps // stages - 1)  # leaves at least one step of a stage at the full rate

    def schedule(optimizer: torch.optim.Optimizer, cascade: Cascade) -> LRScheduler:
        if decays:
            return StageSchedule(optimizer, cascade, steps, warmup=warmup)
        return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (warmup + 1)))

    return Recipe(CascadeSpec(**fixed, **options), schedule)
