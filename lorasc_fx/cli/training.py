"""The setup, the training loop and the predictions of `lorasc-fx train` and `lorasc-fx compare`.

The trained model is either a cascade, or a plain module of which some parameters are trained directly.
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
)
from lorasc_fx.errors import SpecError, StateError, UnknownTarget, listed, named, nearest
from lorasc_fx.graph import matches

EVAL_BATCH = 64
SHORT_STAGE = 50
"""`note_short_stages` prints its note for stages with fewer steps. 20 and 100 were measured (docs/evidence.md)."""
MIN_EXAMPLES = 2
"""Classes with fewer training examples cause a warning."""


class Diverged(StateError):
    """The loss is not finite."""

    code = "non-finite"


@dataclass(frozen=True)
class Setup:
    """A configuration with its loaded data. Its methods build a new model, cascade or schedule at each call.

    Args:
        config: the configuration of the run.
        splits: the data.
        tokenizer: the tokenizer of a text model.
    """

    config: Config
    splits: Splits
    tokenizer: Any = None

    @classmethod
    def of(cls, config: Config) -> Setup:
        """Load the data and set the number of threads.

        Raises:
            SpecError: the device or the kind of the model is unknown, or an error of `load_data`.
        """
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        check_device(config.train.device)
        check_name(config.model)  # check this before the data, because it decides whether the model takes texts
        tokenizer = tokenizer_of(config.model)
        return cls(config, load_data(config.data, tokenizer), tokenizer)

    def model(self, seed: int) -> nn.Module:
        """Build the model with a new head from this seed, in the mode in which it is trained."""
        classes = self.splits.classes
        model = name_classes(build_model(self.config.model, len(classes), seed), classes).to(self.config.train.device)
        channels_last(model)
        has_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
        return set_mode(model, not (self.config.train.frozen_norm and has_norm))

    def call(self, seed: int) -> dict[str, Any]:
        """Return the model and example inputs of a batch, as the arguments of `lorasc_fx.adapt` and `load`."""
        sample = self.splits.train.batch(torch.arange(self.batch_size)).to(self.config.train.device)
        return {"model": self.model(seed), "args": sample.args, "kwargs": sample.kwargs}

    @property
    def batch_size(self) -> int:
        """Number of examples in an optimizer step."""
        return min(self.config.train.batch_size, len(self.splits.train))

    def batches(self, seed: int, start: int = 0) -> Iterator[Batch]:
        """Yield batches on the device endlessly, one for each optimizer step. The first `start` batches are skipped."""
        loader = lx.schedules.shuffled_batches(
            self.splits.train, self.batch_size, seed=seed, start=start, collate_fn=lambda batch: batch
        )
        return (batch.to(self.config.train.device) for batch in loader)

    def stage_steps(self, stages: int) -> list[int]:
        """Divide the optimizer steps of the run evenly into this many stages, and return the steps of each stage.

        Raises:
            SpecError: there are more stages than steps.
        """
        config = self.config.train
        steps = config.steps or max(1, round(config.epochs * (len(self.splits.train) // self.batch_size)))
        if stages > steps:
            raise SpecError(
                f"train.stages is {stages}, but the run has only {steps} steps; increase train.epochs or train.steps"
            )
        return [end - start for start, end in itertools.pairwise(round(n * steps / stages) for n in range(stages + 1))]

    def schedule(
        self, optimizer: torch.optim.Optimizer, cascade: lx.Cascade | None, steps: Sequence[int]
    ) -> lx.StageSchedule:
        """Return the learning-rate schedule. `steps` are the steps of the stages, or of cycles without a cascade."""
        config = self.config.train
        return lx.StageSchedule(optimizer, cascade, steps, warmup=config.warmup, floor=config.floor, decay=config.decay)


def describe(setup: Setup) -> None:
    """Print the splits and the classes. Warn about random weights and about classes with too few examples."""
    splits, source = setup.splits, setup.config.model
    if source.name.startswith("timm:") and not source.weights:
        print(
            f"lorasc-fx: WARNING: {source.name} starts from RANDOM weights, because model.weights is empty and nothing "
            "is downloaded; give --model.weights FILE.safetensors",
            file=sys.stderr,
        )
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
    rare = [f"{name!r} ({count})" for name, count in counts.items() if count < MIN_EXAMPLES]
    if rare:
        print(
            f"lorasc-fx: WARNING: these classes have fewer than {MIN_EXAMPLES} training examples and can hardly be "
            f"learned: {named(rare, 5)}. Add examples, or remove these classes",
            file=sys.stderr,
        )


def note_short_stages(setup: Setup, rates: str) -> None:
    """If the stages are short, print a note that they need another learning rate than LoRA.

    Args:
        setup: the setup of the run.
        rates: key in the configuration that sets the learning rate.
    """
    config = setup.config.train
    steps = setup.stage_steps(config.stages)
    if config.stages == 1 or max(steps) >= SHORT_STAGE or config.floor == 1:
        return
    print(
        f"Note: stages of {max(steps)} steps are short. Each stage starts with new branches and a warm-up, and its "
        f"learning rate decays, so a good learning rate for LoRA is often too low. Also try a 3 times higher one "
        f"({rates}), or the recipe for small data: --train.floor 1 --spec.pace 0.5 --spec.restart slow "
        "(docs/evidence.md)",
        flush=True,
    )


def check_device(device: str) -> None:
    """Raise SpecError if this machine does not have the device."""
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
    """Convert the weights of 2d convolutions to the channels-last format, which is faster, and return the model."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.contiguous(memory_format=torch.channels_last)
    return model


def train_parameters(model: nn.Module, patterns: Sequence[str], exclude: Sequence[str]) -> nn.Module:
    """Set `requires_grad` of the parameters that match a pattern, and only of those, and return the model.

    Raises:
        UnknownTarget: a pattern matches no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not matches(pattern, names):
            raise UnknownTarget(f"train: {pattern!r} matches no parameter{nearest(pattern, names) or listed(names)}")
    for name, parameter in model.named_parameters():
        selected = any(matches(pattern, (name,)) for pattern in patterns)
        parameter.requires_grad_(selected and not any(matches(pattern, (name,)) for pattern in exclude))
    return model


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Return AdamW for the trained parameters."""
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

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)


@dataclass(frozen=True)
class Step:
    """An optimizer step, or the transition after it.

    Args:
        done: number of optimizer steps done so far.
        stage: the stage of this step, counted from 1.
        loss, lr: loss and learning rate of this step.
        seconds: time since the training was started or resumed.
        ends_stage: whether it is the last step of its stage. The branches of the stage still exist.
        folded: whether the transition after the step is done. The last step of a stage is yielded again after it.
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
    """Train to the end, and yield each step and each transition. Stop early after Ctrl-C.

    Batches and dropout depend only on the seed and the step, so a resumed run gives the same numbers.

    Args:
        model: a cascade, or a module whose parameters are trained directly in one stage.
        optimizer, schedule: optimizer of the parameters, and its schedule, which is stepped here.
        setup: the data and the device.
        seed: seed of the order of the examples, and of dropout.
        stage_steps: number of optimizer steps of each stage.
        interrupt: if it is set, training stops before the next step.
        start: number of steps that are already done.

    Raises:
        Diverged: the loss is inf or nan.
        SpecError: the model does not return one logit per class.
    """
    examples, start_time = setup.splits.train, time.monotonic()
    ends = list(itertools.accumulate(stage_steps))
    stage = bisect.bisect_right(ends, start) + 1
    stages: Iterator[Any] = itertools.repeat(None)
    if isinstance(model, lx.Cascade) and start < ends[-1]:
        stages = model.stages(len(ends) - stage + 1, optimizer)
    next(stages)
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
            parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
            nn.utils.clip_grad_norm_(parameters, setup.config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        rate = optimizer.param_groups[0]["lr"]
        schedule.step()
        step = Step(done, stage, value, rate, time.monotonic() - start_time, ends_stage=done == ends[stage - 1])
        yield step
        if step.ends_stage:
            next(stages, None)
            yield replace(step, seconds=time.monotonic() - start_time, ends_stage=False, folded=True)
            stage += 1


def _check_logits(logits: Tensor, examples: Examples) -> None:
    classes = len(examples.classes)
    if logits.dim() != 2 or logits.shape[1] < classes:
        raise SpecError(
            f"the model returns logits {list(logits.shape)}; it must return [batch, classes] with {classes} classes",
            code="wrong-function-result",
        )


def predict(model: nn.Module, examples: Examples, device: str = "cpu") -> Tensor:
    """Return the logits for all examples, [examples, classes].

    Raises:
        SpecError: the model does not return one logit per class.
    """
    with torch.no_grad():
        batches = (batch.to(device) for batch in examples.batches(EVAL_BATCH))
        logits = torch.cat([logits_of(model(*batch.args, **batch.kwargs)).float().cpu() for batch in batches])
    _check_logits(logits, examples)
    return logits


def accuracy(logits: Tensor, examples: Examples) -> float:
    """Return the fraction of correct predictions."""
    return (logits.argmax(-1) == examples.labels).double().mean().item()
