"""The methods of the protocol as settings of one training loop, so that each part has its own effect."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import lorasc_fx as lx

__all__ = ["METHODS", "Method", "spec_of"]

Average = Literal["none", "ends", "tail"]
Schedule = Literal["decay", "cycles", "constant"]


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Args:
        about: a phrase for people.
        stages: whether the cascade has as many stages as the budget has cycles; otherwise one.
        schedule: of the learning rate after a warm-up: one cosine `decay` to 0 over the run, one in each of the
            budget's `cycles`, or `constant`.
        average: of the weights that are evaluated: the last ones (`none`), the mean over the `ends` of cycles, or the
            mean over the `tail`, the second half of the run.
        stop_early: evaluate the weights with the lowest validation loss of ten looks.
        full: every weight of the trained part is trained, without branches.
        rank_factor: rank and lora_alpha over those of the task; 0 stands for the number of cycles.
        spec: other fields of the CascadeSpec.
        noise: standard deviations of noise on the frozen weights, redrawn at each step.
    """

    about: str
    stages: bool = False
    schedule: Schedule = "decay"
    average: Average = "none"
    stop_early: bool = False
    full: bool = False
    rank_factor: int = 1
    spec: dict[str, Any] = field(default_factory=dict)
    noise: float = 0.0


NOISE = 0.3
LORA = Method("one branch, pace 1, cosine decay")
PAPER = Method(
    "LoRASC as the paper reads: slow restart, pace 0.5",
    stages=True,
    schedule="constant",
    spec={"restart": "slow", "pace": 0.5},
)
RECIPE = Method(
    "restart from the fast weights, rate re-warmed and decayed in each stage, mean of the ends of stages",
    stages=True,
    schedule="cycles",
    average="ends",
    spec={"restart": "fast", "pace": 1.0},
)

METHODS: dict[str, Method] = {
    "lora": LORA,
    "lora-early": replace(LORA, about="LoRA, stopped early by validation loss", stop_early=True),
    "lora-average": replace(LORA, about="LoRA, mean of the weights of the second half", average="tail"),
    "lora-cycles": replace(
        LORA, about="LoRA with the recipe's cycles and average, no restart", schedule="cycles", average="ends"
    ),
    "lora-summed": replace(LORA, about="LoRA of the rank of all stages together, same scale", rank_factor=0),
    "relora": Method(
        "ReLoRA: restarts, pruned optimizer state, jagged schedule",
        stages=True,
        schedule="cycles",
        spec={"restart": "fast", "pace": 1.0, "optimizer_state": 0.9},
    ),
    "cola": Method(
        "COLA: restarts, optimizer reset, one decay",
        stages=True,
        spec={"restart": "fast", "pace": 1.0},
    ),
    "dora": replace(LORA, about="DoRA", spec={"use_dora": True}),
    "full": Method("full fine-tuning of the same layers", full=True),
    "paper": PAPER,
    "paper-noise": replace(PAPER, about="LoRASC as the paper reads, with noise", noise=NOISE),
    "recipe": RECIPE,
    "recipe-noise": replace(RECIPE, about="the recipe with noise", noise=NOISE),
}
"""By name, in the order of the tables."""

for _restart in (False, True):
    for _cycles in (False, True):
        for _average in (False, True):
            for _noise in (False, True):
                _parts = [
                    name
                    for name, on in (
                        ("restart", _restart),
                        ("cycles", _cycles),
                        ("average", _average),
                        ("noise", _noise),
                    )
                    if on
                ]
                METHODS["+".join(["design", *_parts])] = Method(
                    f"factorial design: {', '.join(_parts) or 'none'}",
                    stages=_restart,
                    schedule="cycles" if _cycles else "decay",
                    average="ends" if _average else "none",
                    noise=NOISE if _noise else 0.0,
                    spec={"restart": "fast", "pace": 1.0},
                )


def spec_of(method: Method, rank: int, cycles: int, train: tuple[str, ...], seed: int) -> lx.CascadeSpec:
    """Return the spec of a method with branches."""
    factor = method.rank_factor or cycles
    base: dict[str, Any] = {"pace": 1.0, **method.spec}
    noise = lx.Noise(method.noise, redraw="step") if method.noise else lx.Noise()
    return lx.CascadeSpec(
        rank=rank * factor, lora_alpha=2.0 * rank * factor, train=train, noise=noise, seed=seed, **base
    )


def rate_factor(method: Method, step: int, steps: int, cycles: int, warmup: int) -> float:
    """Return the factor in (0, 1] on the learning rate of a step (0 is the first)."""
    if method.schedule == "cycles":
        cycle = step * cycles // steps
        start, end = math.ceil(cycle * steps / cycles), math.ceil((cycle + 1) * steps / cycles)
    else:
        start, end = 0, steps
    since, length = step - start, end - start
    warm = min(1.0, (since + 1) / (warmup + 1))
    decay = 1.0 if method.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * since / length))
    return warm * decay
