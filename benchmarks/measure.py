"""Rivals, and the clock: each rival's steps are taken in turn, so that what the machine does meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import lorasc_fx as lx

from .models import Work, loss_of

RANK = 8


@dataclass(frozen=True)
class Times:
    """CPU seconds of a step."""

    minimum: float
    median: float


def rivals(work: Work) -> dict[str, Callable[[], None]]:
    """Return a training step (forward, backward, no optimizer) of each rival, over the same weights and batch."""
    import peft

    batch = work.batch()
    state = work.build().state_dict()

    def fresh() -> nn.Module:
        model = work.build()
        model.load_state_dict(state)
        return model

    def step(model: nn.Module) -> Callable[[], None]:
        inputs = {
            name: value.clone().requires_grad_(True) if value.is_floating_point() else value
            for name, value in batch.items()
        }

        def run() -> None:
            for parameter in model.parameters():
                parameter.grad = None
            loss_of(model(**inputs)).backward()

        return run

    frozen = fresh().requires_grad_(False)
    if not any(value.is_floating_point() for value in batch.values()):  # the gradient has to flow to the bottom
        next(module for module in frozen.modules() if isinstance(module, nn.Embedding)).weight.requires_grad_(True)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=work.peft_targets)
    ours = lx.adapt(fresh(), kwargs=batch, spec=lx.CascadeSpec(targets=work.targets, rank=RANK))
    theirs = peft.get_peft_model(fresh(), config)
    sizes = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, theirs)]
    if sizes[0] != sizes[1]:
        raise RuntimeError(f"{work.name}: ours trains {sizes[0]} entries, peft {sizes[1]}: not the same work")
    return {
        "frozen": step(frozen),
        "ours": step(ours),
        "peft": step(theirs),
        "full": step(fresh()),
    }


def measure(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, Times]:
    """Return CPU seconds of each step, over rounds that run every rival once."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for each in steps.values():
        each()
    for _ in range(rounds):
        for name, each in steps.items():
            start = time.process_time()
            each()
            seconds[name].append(time.process_time() - start)
    return {name: Times(min(each), statistics.median(each)) for name, each in seconds.items()}


def pin(threads: int) -> None:
    """Use so many threads, and the same random numbers every time."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
