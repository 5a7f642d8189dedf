"""The loop that `train` and `compare` share, and evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasc_fx.cli.batches import Batch, Examples, Order, in_turn
from lorasc_fx.cli.interrupt import Interrupt
from lorasc_fx.cli.learners import Learner
from lorasc_fx.cli.schedule import Schedule
from lorasc_fx.errors import SpecError, StateError

__all__ = ["Diverged", "Step", "accuracy", "evaluate", "make_optimizer", "predict", "train_steps"]

EVAL_BATCH = 64


class Diverged(StateError):
    """The loss is not finite."""


@dataclass(frozen=True)
class Step:
    """What one optimizer step did: steps done so far, its stage, its loss, its learning rate, and the clock."""

    done: int
    stage: int
    loss: float
    lr: float
    ends_stage: bool
    seconds: float


def make_optimizer(learner: Learner, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Return AdamW; each group remembers its own full learning rate."""
    groups = [{**group, "full_lr": group.get("lr", lr)} for group in learner.param_groups(lr)]
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)


def train_steps(
    learner: Learner,
    optimizer: torch.optim.Optimizer,
    examples: Examples,
    schedule: Schedule,
    order: Order,
    observe: Callable[[Step], None],
    *,
    interrupt: Interrupt,
    start: int = 0,
    device: str = "cpu",
    before_fold: Callable[[Step], None] = lambda step: None,
) -> bool:
    """Train from a step to the end; return False if Ctrl-C ended it, always between two whole steps.

    Dropout is drawn from the address (seed, step), so that a run that stopped and went on gives the same numbers.
    `before_fold` is told of the last step of each stage before the stage ends, `observe` of every step, after that.

    Raises:
        Diverged: a loss that is inf or nan.
        SpecError: the model does not give one logit a class.
    """
    began = time.monotonic()
    if start < schedule.steps:
        learner.begin(optimizer, schedule.stages - schedule.stage(start) + 1)
    for step in range(start, schedule.steps):
        if interrupt.asked:
            return False
        torch.manual_seed(order.seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * schedule.factor(step)
        batch = examples.batch(order.index(step)).to(device)
        logits = learner.logits(batch)
        if step == start:
            _check(logits, examples)
        loss = F.cross_entropy(logits, batch.labels)
        value = loss.item()
        if not math.isfinite(value):
            raise Diverged(
                f"the loss is {value} at step {step + 1}; a lower learning rate or a longer warm-up may help"
            )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rate = optimizer.param_groups[0]["lr"]
        done = Step(step + 1, schedule.stage(step), value, rate, schedule.ends_stage(step), time.monotonic() - began)
        if done.ends_stage:
            before_fold(done)
            learner.end_stage()
        observe(done)
    return True


def _check(logits: Tensor, examples: Examples) -> None:
    needed = int(examples.labels.max()) + 1
    if logits.dim() != 2 or logits.shape[1] < needed:
        raise SpecError(
            f"the model returns logits {list(logits.shape)}; [batch, classes] is needed, with {needed} classes"
        )


def predict(call: Callable[[Batch], Tensor], examples: Examples, device: str = "cpu") -> Tensor:
    """Return the predicted class of each example, [examples]."""
    with torch.no_grad():
        return torch.cat([call(batch.to(device)).argmax(-1).cpu() for batch in in_turn(examples, EVAL_BATCH)])


def evaluate(call: Callable[[Batch], Tensor], examples: Examples, device: str = "cpu") -> tuple[float, float]:
    """Return the share of right predictions, and the mean loss."""
    with torch.no_grad():
        found = [(call(batch.to(device)).cpu(), batch.labels.cpu()) for batch in in_turn(examples, EVAL_BATCH)]
        logits, labels = (torch.cat(each) for each in zip(*found, strict=True))
        right = (logits.argmax(-1) == labels).double().mean().item()
        return right, F.cross_entropy(logits.float(), labels).item()


def accuracy(predicted: Tensor, examples: Examples) -> float:
    """Return the share of right predictions."""
    return (predicted == examples.labels).double().mean().item()
