"""The methods of the protocol as settings of one training loop, so that each part has its own effect."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import lorasc_fx as lx
from lorasc_fx import branch

__all__ = ["METHODS", "Method", "ends_of", "rate_factor", "spec_of"]

Average = Literal["none", "ends", "tail", "loss"]
Schedule = Literal["decay", "cycles", "constant"]


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Args:
        about: a phrase for people.
        stages: whether each cycle is a stage of the cascade; otherwise the run is one stage.
        ends: shares of the run at which its cycles end, 1.0 the last; as many equal ones as the protocol says where
            empty.
        schedule: of the learning rate after a warm-up: one cosine `decay` to 0 over the run, one in each of the
            `cycles`, or `constant`.
        average: of the weights that are evaluated: the last ones (`none`), the mean over the `ends` of cycles, this
            mean weighted by 1 / the mean training `loss` of the cycle, or the mean over the `tail`, the second half of
            the run.
        stop_early: evaluate the weights with the lowest validation loss of ten looks.
        full: every weight of the trained part is trained, without branches.
        untrained: the model is measured as it is.
        rank_factor: rank and lora_alpha over those of the task; 0 stands for the number of cycles.
        growing: of a branch of the rank of all cycles together, a cycle trains the rank of the cycles up to it.
        spec: other fields of the CascadeSpec.
        noise: standard deviations of noise on the frozen weights, redrawn at each step.
    """

    about: str
    stages: bool = False
    ends: tuple[float, ...] = ()
    schedule: Schedule = "decay"
    average: Average = "none"
    stop_early: bool = False
    full: bool = False
    untrained: bool = False
    rank_factor: int = 1
    growing: bool = False
    spec: dict[str, Any] = field(default_factory=dict)
    noise: float = 0.0

    @property
    def training(self) -> Method:
        """What is trained, whatever weights are evaluated: methods that agree in it need one run of training."""
        return replace(self, about="", average="none", stop_early=False)

    def moments(self, ends: tuple[int, ...], steps: int) -> tuple[int, ...]:
        """Return after which steps weights are kept, to average or to choose from; none where the last ones count.

        Args:
            ends: of the cycles.
            steps: of the run.
        """
        looks = tuple(round(look * steps / LOOKS) for look in range(1, LOOKS + 1))
        tail = tuple(step for step in looks if 2 * step > steps)
        return looks if self.stop_early else {"none": (), "ends": ends, "loss": ends, "tail": tail}[self.average]


LOOKS = 10
"""How often early stopping looks, and how many weights the average over a tail has twice over."""
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


ADAPTERS = ("dora", "lora-xs", "vera", "hira", "shira", "miss", "oft", "lokr", "delora")
"""Values of `CascadeSpec.adapter`, each a method in one stage with its default options."""


STAGED = ("dora", "hira", "shira", "miss", "oft", "lora-xs")
"""Those that are also trained in stages, by the paper's rule."""
MOMENTA = (0.3, 0.6, 0.9)


def _recipe(about: str, **spec: Any) -> Method:
    return replace(RECIPE, about=about, spec=RECIPE.spec | spec)


def _paper(about: str, **spec: Any) -> Method:
    return replace(PAPER, about=about, spec=PAPER.spec | spec)


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
    **{name: replace(LORA, about=f"adapter={name!r}", spec={"adapter": name}) for name in ADAPTERS},
    "base": Method("the model before training", untrained=True),
    "rslora": replace(LORA, about="LoRA with the scale of rsLoRA", spec={"use_rslora": True}),
    **{
        f"momentum-{momentum}": _paper(f"LoRASC with Nesterov momentum {momentum} over stages", momentum=momentum)
        for momentum in MOMENTA
    },
    **{f"{name}-stages": _paper(f"LoRASC with adapter={name!r}", adapter=name) for name in STAGED},
    "loss-average": replace(RECIPE, about="the recipe, mean weighted by 1 / the loss of the stage", average="loss"),
    "partial-restart": replace(
        RECIPE,
        about="the recipe's stages, half of the pairs of each branch restart, the last weights",
        average="none",
        spec=RECIPE.spec | {"restart_pairs": 0.5},
    ),
    "full": Method("full fine-tuning of the same layers", full=True),
    "paper": PAPER,
    "paper-noise": replace(PAPER, about="LoRASC as the paper reads, with noise", noise=NOISE),
    "recipe": RECIPE,
    "recipe-noise": replace(RECIPE, about="the recipe with noise", noise=NOISE),
    "lora-noise": replace(LORA, about="LoRA with noise", noise=NOISE),
    # the recipe with one part changed, to find what a restart costs
    "recipe-last": replace(RECIPE, about="the weights at the end, no mean", average="none"),
    "recipe-kept-A": _recipe("lora_A goes on", restart_A="kept"),
    "recipe-gradient-A": _recipe("lora_A from the gradient", restart_A="gradient"),
    "recipe-pruned-state": _recipe("0.9 of the optimizer state pruned", optimizer_state=0.9),
    "recipe-kept-state": _recipe("lora_A and the optimizer state go on", restart_A="kept", optimizer_state="kept"),
    "recipe-long-first": replace(RECIPE, about="a first stage of 0.6 of the run", ends=(0.6, 0.8, 1.0)),
    "recipe-growing": replace(
        RECIPE, about="no restart: the rank grows by that of a stage", stages=False, rank_factor=0, growing=True
    ),
}
"""By name, in the order of the tables."""

RECORDED = {"recipe-gradient-A", "partial-restart", *(f"momentum-{momentum}" for momentum in MOMENTA)}
"""Methods in the results whose option was removed after their runs, because it gained nothing. They do not run."""

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

for _stages in (2, 3, 6):
    for _noise_of in (0.0, NOISE):
        for _pace in (0.5, 1.0, "mean"):
            METHODS[f"map+pace={_pace}+stages={_stages}+noise={_noise_of}"] = Method(
                f"sensitivity map: pace {_pace}, {_stages} stages, noise {_noise_of}",
                stages=True,
                ends=tuple((_stage + 1) / _stages for _stage in range(_stages)),
                schedule="cycles",
                noise=_noise_of,
                spec={"restart": "fast" if _pace == "mean" else "slow", "pace": _pace},
            )


def ends_of(method: Method, cycles: int, steps: int) -> tuple[int, ...]:
    """Return after how many steps each cycle ends."""
    shares = method.ends or tuple((cycle + 1) / cycles for cycle in range(cycles))
    return tuple(round(share * steps) for share in shares)


def spec_of(method: Method, rank: int, cycles: int, train: tuple[str, ...], seed: int) -> lx.CascadeSpec:
    """Return the spec of a method with branches."""
    factor = method.rank_factor or cycles
    base: dict[str, Any] = {"pace": 1.0, **method.spec}
    # The recorded runs drew the noise of a weight from one stream, and not by blocks as today.
    noise = lx.Noise(method.noise, redraw="step") if method.noise else lx.Noise()
    if "lora_alpha" in branch.METHODS[base.get("adapter", "lora")].options:
        base["lora_alpha"] = 2.0 * rank * factor
    return lx.CascadeSpec(rank=rank * factor, train=train, noise=noise, seed=seed, **base)


def rate_factor(method: Method, step: int, steps: int, cycles: int, warmup: int) -> float:
    """Return the factor in (0, 1] on the learning rate of a step (0 is the first)."""
    starts = (0,)
    if method.schedule == "cycles":
        starts += ends_of(method, cycles, steps)
    start = max(first for first in starts if first <= step)
    length = min([first for first in starts if first > step], default=steps) - start
    warm = min(1.0, (step - start + 1) / (warmup + 1))
    decay = 1.0 if method.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * (step - start) / length))
    return warm * decay
