"""Setup, training loop and predictions of `train` and `compare`.

Two kinds of model are trained: a cascade, or some parameters of a plain module.
"""

from __future__ import annotations

import bisect
import itertools
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Event
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorasc_fx as lx
from lorasc_fx.cli.config import Config
from lorasc_fx.cli.data import Batch, Examples, Splits, load_data, short_name
from lorasc_fx.cli.models import (
    build_model,
    check_name,
    logits_of,
    name_classes,
    set_mode,
    tokenizer_of,
    warn_of_random_weights,
)
from lorasc_fx.errors import SpecError, StateError, UnknownTarget, listed, named, nearest
from lorasc_fx.graph import matches
from lorasc_fx.spec import CascadeSpec

EVAL_BATCH = 64
SHORT_STAGE = 50
"""Steps of a stage below which `note_short_stages` says something. Measured were 20 and 100 (docs/evidence.md)."""
RARE = 2
"""Smallest number of training examples of a class without a warning."""


class Diverged(StateError):
    """The loss is not finite."""

    code = "non-finite"


@dataclass(frozen=True)
class Setup:
    """A configuration with its data loaded. It builds models as often as they are needed.

    Args:
        config: of the run.
        splits: the data.
        tokenizer: of a text model.
    """

    config: Config
    splits: Splits
    tokenizer: Any = None

    @classmethod
    def of(cls, config: Config) -> Setup:
        """Load the data and set the number of threads.

        Raises:
            SpecError: unknown device, or an error of `load_data`.
        """
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        check_device(config.train.device)
        check_name(config.model)  # before the data, because the kind of model decides whether it takes texts
        tokenizer = tokenizer_of(config.model)
        return cls(config, load_data(config.data, tokenizer), tokenizer)

    def model(self, seed: int) -> nn.Module:
        """Return a new model with a new head from this seed, in the mode in which it is trained."""
        classes = self.splits.classes
        model = name_classes(build_model(self.config.model, len(classes), seed), classes).to(self.config.train.device)
        if self.splits.train.images:
            channels_last(model)
        return set_mode(model, self.train_mode(model))

    def train_mode(self, model: nn.Module) -> bool:
        """Return whether the model is in train mode while it trains; see `TrainConfig.frozen_norm`."""
        norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
        return not (self.config.train.frozen_norm and norm)

    def adapt(self, seed: int, spec: CascadeSpec) -> lx.Cascade:
        """Return a new cascade."""
        sample = self.sample()
        return lx.adapt(self.model(seed), args=sample.args, kwargs=sample.kwargs, spec=spec)

    @property
    def batch_size(self) -> int:
        """Examples in a step."""
        return min(self.config.train.batch_size, len(self.splits.train))

    def batches(self, seed: int, start: int = 0) -> Iterator[Batch]:
        """Yield batches on the device without end, one for each optimizer step, after the first `start` ones."""
        loader = lx.schedules.shuffled_batches(
            self.splits.train, self.batch_size, seed=seed, start=start, collate_fn=lambda batch: batch
        )
        return (batch.to(self.config.train.device) for batch in loader)

    def sample(self) -> Batch:
        """Return a batch to capture the model with."""
        return self.splits.train.batch(torch.arange(self.batch_size)).to(self.config.train.device)

    def stage_steps(self, stages: int) -> list[int]:
        """Return the number of optimizer steps of each stage, if this many stages divide the run evenly.

        Raises:
            SpecError: there are more stages than steps.
        """
        config = self.config.train
        steps = config.steps or max(1, round(config.epochs * (len(self.splits.train) // self.batch_size)))
        if stages > steps:
            raise SpecError(
                f"train.stages is {stages}, more than the {steps} steps; lengthen train.epochs or train.steps"
            )
        return [
            after - before for before, after in itertools.pairwise(round(n * steps / stages) for n in range(stages + 1))
        ]

    def schedule(
        self, optimizer: torch.optim.Optimizer, cascade: lx.Cascade | None, steps: Sequence[int]
    ) -> lx.StageSchedule:
        """Return the schedule of the learning rate, for stages or (without a cascade) cycles of these steps."""
        config = self.config.train
        return lx.StageSchedule(optimizer, cascade, steps, warmup=config.warmup, floor=config.floor, decay=config.decay)


def describe(setup: Setup) -> None:
    """Print the splits and the classes, and warn about random weights and classes with hardly any example."""
    splits = setup.splits
    warn_of_random_weights(setup.config.model)
    parts = {"train": splits.train, "validation": splits.validation, **splits.test_sets}
    sizes = ", ".join(f"{name} {len(examples)}" for name, examples in parts.items())
    counts = dict(
        zip(splits.classes, splits.train.labels.bincount(minlength=len(splits.classes)).tolist(), strict=True)
    )
    print(f"examples of {short_name(setup.config.data.name)}: {sizes}")
    print(
        f"{len(counts)} classes in train: {named((f'{name} {count}' for name, count in counts.items()), 10)}",
        flush=True,
    )
    rare = [f"{name!r} ({count})" for name, count in counts.items() if count < RARE]
    if rare:
        print(
            f"lorasc-fx: WARNING: fewer than {RARE} training examples of the classes {named(rare, 5)}: they are hardly "
            "learned. Add examples, or remove these classes",
            file=sys.stderr,
        )


def note_short_stages(setup: Setup, rates: str) -> None:
    """Say that short stages need another learning rate than LoRA, if the stages are short.

    Args:
        setup: of the run.
        rates: the key of the configuration that sets the learning rate.
    """
    config = setup.config.train
    steps = setup.stage_steps(config.stages)
    if config.stages == 1 or max(steps) >= SHORT_STAGE or config.floor == 1:
        return
    print(
        f"Note: stages of {max(steps)} steps are short: each begins with new branches and a warm-up, and its learning "
        f"rate decays. LoRA's rate is often too low for that: try 3 times as much, too ({rates}), or the recipe for "
        "small data: --train.floor 1 --spec.pace 0.5 --spec.restart slow (docs/evidence.md)",
        flush=True,
    )


def check_device(device: str) -> None:
    """Refuse a device that this machine lacks."""
    available = ["cpu"]
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        available += [f"{accelerator}:{index}" for index in range(torch.accelerator.device_count())]
    try:
        kind = torch.empty(0, device=device).device.type
        reason = "tensors on this device have no values" if kind == "meta" else ""
    except (RuntimeError, AssertionError) as fault:
        reason = str(fault).partition(". ")[0].splitlines()[0]
    if reason:
        raise SpecError(
            f"train.device is {device!r}: {reason}; this machine has {', '.join(available)}", code="unknown-name"
        )


def channels_last(model: nn.Module) -> nn.Module:
    """Put the weights of 2d convolutions in channels-last order, which is faster; return the model."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.contiguous(memory_format=torch.channels_last)
    return model


def train_parameters(model: nn.Module, patterns: Sequence[str], exclude: Sequence[str]) -> nn.Module:
    """Let only the parameters that match a pattern require gradients, and return the model.

    Raises:
        UnknownTarget: a pattern matches no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not matches(pattern, names):
            raise UnknownTarget(f"train: {pattern!r} matches no parameter{nearest(pattern, names) or listed(names)}")
    for name, parameter in model.named_parameters():
        wanted = any(matches(pattern, (name,)) for pattern in patterns)
        parameter.requires_grad_(wanted and not any(matches(pattern, (name,)) for pattern in exclude))
    return model


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Return AdamW for the parameters that train."""
    if isinstance(model, lx.Cascade):
        groups = list(model.param_groups(lr=lr))
    else:
        groups = [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}]
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)


@contextmanager
def on_ctrl_c() -> Iterator[Event]:
    """Set an event at the first Ctrl-C inside the block. A second one raises KeyboardInterrupt."""
    interrupt = Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupt.is_set():
            raise KeyboardInterrupt
        interrupt.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass(frozen=True)
class Step:
    """An optimizer step, or the transition after it.

    Args:
        done: optimizer steps done so far.
        stage: the stage of this step, counted from 1.
        loss, lr: of this step.
        seconds: since the training started or continued.
        ends_stage: whether it is the last step of its stage, whose branches still exist.
        folded: whether its stage has ended: the step is yielded again after the transition.
    """

    done: int
    stage: int
    loss: float
    lr: float
    seconds: float
    ends_stage: bool = False
    folded: bool = False


def train_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: lx.StageSchedule,
    setup: Setup,
    seed: int,
    stage_steps: Sequence[int],
    *,
    interrupt: Event,
    start: int = 0,
) -> Iterator[Step]:
    """Train from a step to the end, and yield each step and each transition. Stop early after Ctrl-C.

    Batches and dropout are functions of (seed, step), so that a stopped and resumed run gives the same numbers.

    Args:
        model: a cascade, or a module whose parameters are trained directly, in one stage.
        optimizer, schedule: of its parameters. The schedule is stepped here.
        setup: the data and the device.
        seed: of the order of the examples, and of dropout.
        stage_steps: number of optimizer steps of each stage.
        interrupt: if set, training stops before the next step.
        start: number of steps that are done.

    Raises:
        Diverged: the loss is inf or nan.
        SpecError: the model does not return one logit per class.
    """
    examples, began = setup.splits.train, time.monotonic()
    ends = list(itertools.accumulate(stage_steps))
    stage = bisect.bisect_right(ends, start) + 1
    stages: Iterator[Any] = itertools.repeat(None)
    if isinstance(model, lx.Cascade) and start < ends[-1]:
        stages = model.stages(len(ends) - stage + 1, optimizer)
    running = next(stages)
    for done, batch in zip(range(start + 1, ends[-1] + 1), setup.batches(seed, start), strict=False):
        if interrupt.is_set():
            return
        torch.manual_seed(seed * 1_000_003 + done - 1)
        logits = logits_of(model(*batch.args, **batch.kwargs))
        if done == start + 1:
            _check_logits(logits, examples)
        loss = F.cross_entropy(logits, batch.labels)
        value = loss.item()
        if not math.isfinite(value):
            raise Diverged(f"the loss is {value} at step {done}; a lower learning rate or a longer warm-up may help")
        loss.backward()
        if setup.config.train.max_grad_norm:
            trained = (parameter for group in optimizer.param_groups for parameter in group["params"])
            nn.utils.clip_grad_norm_(trained, setup.config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        rate = optimizer.param_groups[0]["lr"]
        schedule.step()
        step = Step(done, stage, value, rate, time.monotonic() - began, ends_stage=done == ends[stage - 1])
        yield step
        if step.ends_stage:
            if running is not None:
                running.loss = value
            running = next(stages, None)
            yield replace(step, seconds=time.monotonic() - began, ends_stage=False, folded=True)
            stage += 1


def _check_logits(logits: Tensor, examples: Examples) -> None:
    needed = len(examples.classes)
    if logits.dim() != 2 or logits.shape[1] < needed:
        raise SpecError(
            f"the model returns logits {list(logits.shape)}; it must return [batch, classes], with {needed} classes",
            code="wrong-function-result",
        )


def predict(model: nn.Module, examples: Examples, device: str = "cpu") -> Tensor:
    """Return the logits of all examples, [examples, classes].

    Raises:
        SpecError: the model does not return one logit per class.
    """
    with torch.no_grad():
        batches = (batch.to(device) for batch in examples.batches(EVAL_BATCH))
        logits = torch.cat([logits_of(model(*batch.args, **batch.kwargs)).float().cpu() for batch in batches])
    _check_logits(logits, examples)
    return logits


def accuracy(logits: Tensor, examples: Examples) -> float:
    """Return the share of correct predictions."""
    return (logits.argmax(-1) == examples.labels).double().mean().item()
