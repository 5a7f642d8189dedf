"""The methods of the protocol, as settings of one training loop."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

import lorasc_fx as lx
from lorasc_fx.spec import ADAPTERS

__all__ = ["METHODS", "Method", "rate_factor", "spec_of"]


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Args:
        about: a phrase for people.
        stages: whether the run has the stages of the protocol; otherwise it is one stage.
        spec: fields of the CascadeSpec.
        targets: globs on the weights with branches.
        noise: whether the stages have noise.
        keep: the weights that are evaluated: the `last` ones, the `mean` over the second half of the run, or those of
            the `best` validation loss of ten.
        scale: in a sequence, the share of the change of each task that is kept.
        replay: in a sequence, the share of examples of the tasks before.
        separate: in a sequence, whether each task has its own adapter on the original model.
        orthogonal: in a sequence, whether a task's lora_A starts orthogonally to those of the tasks before.
        like: the method whose rates are used; otherwise the method has rates of its own.
    """

    about: str
    stages: bool = False
    spec: dict[str, Any] = field(default_factory=lambda: {"pace": 1.0})
    targets: tuple[str, ...] = ("*",)
    noise: bool = False
    keep: Literal["last", "mean", "best"] = "last"
    scale: float = 1.0
    replay: float = 0.0
    separate: bool = False
    orthogonal: bool = False
    like: str = ""


LORA = Method("one branch, pace 1, cosine decay")
PAPER = Method("LoRASC, the paper's rule, our pace 0.5", stages=True, spec={"pace": 0.5, "restart": "slow"})
STAGES = replace(PAPER, about="SHiRA in stages, the same positions in all", spec=PAPER.spec | {"adapter": "shira"})
FRESH = replace(STAGES, about="SHiRA in stages, other positions in each", spec=PAPER.spec | {"adapter": "shira-fresh"})

METHODS: dict[str, Method] = {
    "lora": LORA,
    "lora-mlp": replace(LORA, about="LoRA on the weights of the MLPs", targets=("*.mlp.*",)),
    "lora-early": replace(LORA, about="LoRA, stopped early by validation loss", keep="best", like="lora"),
    "lora-average": replace(LORA, about="LoRA, mean weights of the second half", keep="mean", like="lora"),
    "dora": replace(LORA, about="DoRA", spec={"pace": 1.0, "adapter": "dora"}),
    "shira": replace(LORA, about="SHiRA in one stage", spec={"pace": 1.0, "adapter": "shira"}),
    "paper": PAPER,
    "paper-noise": replace(PAPER, about="the paper's rule with noise", noise=True, like="paper"),
    "stages-1.0": replace(PAPER, about="LoRA in stages, pace 1.0", spec={"pace": 1.0, "restart": "slow"}),
    "stages-0.25": replace(PAPER, about="LoRA in stages, pace 0.25", spec={"pace": 0.25, "restart": "slow"}),
    "shira-stages": STAGES,
    "shira-fresh": replace(FRESH, like="shira-stages"),
    "shira-replay": replace(STAGES, about="SHiRA in stages, 5 % old examples", replay=0.05, like="shira-stages"),
    "lora-scaled": replace(LORA, about="LoRA, 0.7 of the change", scale=0.7, like="lora"),
    "lora-replay": replace(LORA, about="LoRA, 5 % old examples", replay=0.05, like="lora"),
    "lora-each": replace(LORA, about="an adapter for each task (upper bound)", separate=True, like="lora"),
    "lora-orthogonal": replace(LORA, about="LoRA with orthogonal starts", orthogonal=True, like="lora"),
}
"""By name, in the order of the tables."""


class FreshShira(ADAPTERS["shira"]):  # type: ignore[misc]
    """SHiRA whose positions differ from stage to stage."""

    def __init__(self, site: lx.Site, seed: int, stage: int, like: torch.Tensor) -> None:
        super().__init__(site, seed + 1_000_003 * stage, stage, like)


lx.register_branch("shira-fresh", FreshShira)


def spec_of(
    method: Method, training: dict[str, Any], train: tuple[str, ...], exclude: tuple[str, ...], seed: int
) -> Any:
    """Return the spec of a method."""
    options = {"rank": training["rank"], "targets": method.targets, "train": train, "exclude": exclude, "seed": seed}
    if "lora_alpha" in ADAPTERS[method.spec.get("adapter", "lora")].options:
        options["lora_alpha"] = 2.0 * training["rank"]
    noise = lx.Noise(training["noise"]) if method.noise else lx.Noise()
    return lx.CascadeSpec(**options, **method.spec, noise=noise)


def rate_factor(method: Method, step: int, training: dict[str, Any]) -> float:
    """Return the factor on the rate at a step (from 0): a warm-up, then a cosine decay unless there are stages."""
    steps, warmup = training["steps"], training["warmup"]
    warm = min(1.0, (step + 1) / (warmup + 1))
    return warm if method.stages else warm * 0.5 * (1 + math.cos(math.pi * step / steps))
