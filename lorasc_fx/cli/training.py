"""The training loop of `train` and `compare`, what it needs before it starts, and predictions.

Two kinds of model are trained: a cascade, or a plain module of which some parameters are trained.
"""

from __future__ import annotations

import itertools
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorasc_fx as lx
from lorasc_fx.cli.config import Config, TrainConfig
from lorasc_fx.cli.data import Batch, Examples, Splits, load_data
from lorasc_fx.cli.models import build_model, logits_of, set_mode, tokenizer_of
from lorasc_fx.errors import SpecError, StateError, UnknownTarget, listed, nearest
from lorasc_fx.graph import matches
from lorasc_fx.spec import CascadeSpec

__all__ = [
    "Diverged",
    "Interrupt",
    "Order",
    "Schedule",
    "Setup",
    "Step",
    "accuracy",
    "channels_last",
    "make_optimizer",
    "on_ctrl_c",
    "predict",
    "train_parameters",
    "train_steps",
    "trained_entries",
]

EVAL_BATCH = 64


class Diverged(StateError):
    """The loss is not finite."""

    code = "loss-not-finite"


@dataclass(frozen=True)
class Order:
    """The examples of each step, a function of (seed, step) alone: every epoch is shuffled, a short batch left out."""

    examples: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one pass."""
        return max(1, self.examples // self.batch_size)

    def index(self, step: int) -> Tensor:
        """Return the positions [batch] of a step (0 is the first)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        shuffled = torch.randperm(self.examples, generator=generator)
        return shuffled[place * self.batch_size : (place + 1) * self.batch_size]


@dataclass(frozen=True)
class Schedule:
    """Steps (0 is the first) divided evenly among stages (1 is the first), and the learning rate of each step."""

    steps: int
    stages: int
    warmup: int
    decay: bool = False

    @classmethod
    def of(cls, config: TrainConfig, steps_per_epoch: int, stages: int) -> Schedule:
        """Return the schedule that a configuration asks for.

        Raises:
            SpecError: there are more stages than steps.
        """
        steps = config.steps or max(1, round(config.epochs * steps_per_epoch))
        if stages > steps:
            raise SpecError(
                f"train.stages is {stages}, more than the {steps} steps; lengthen train.epochs or train.steps"
            )
        return cls(steps, stages, config.warmup, config.decay)

    def stage(self, step: int) -> int:
        """Return the stage that a step belongs to."""
        return next(stage for stage in range(1, self.stages + 1) if step < self.end(stage))

    def end(self, stage: int) -> int:
        """Return the first step after a stage."""
        return round(stage * self.steps / self.stages)

    def ends_stage(self, step: int) -> bool:
        """Return whether this step is the last one of its stage."""
        return step + 1 == self.end(self.stage(step))

    def factor(self, step: int) -> float:
        """Return the factor in (0, 1] on the learning rate: warm-up in each stage (2307.05695), decay over the run."""
        since = step - self.end(self.stage(step) - 1)
        decay = 1 - step / self.steps if self.decay else 1.0
        return min(1.0, (since + 1) / (self.warmup + 1)) * decay


@dataclass(frozen=True)
class Setup:
    """A configuration with its data loaded; models are built from it as often as they are needed."""

    config: Config
    splits: Splits

    @classmethod
    def of(cls, config: Config) -> Setup:
        """Load the data, and set the threads that are asked for.

        Raises:
            SpecError: the device is not there, or what `load_data` raises.
        """
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        _check_device(config.train.device)
        return cls(config, load_data(config.data, tokenizer_of(config.model)))

    def model(self, seed: int) -> nn.Module:
        """Return a fresh model with a new head from this seed, in the mode in which it is trained."""
        model = build_model(self.config.model, len(self.splits.classes), seed).to(self.config.train.device)
        if self.splits.train.images:
            channels_last(model)
        return set_mode(model, self.train_mode(model))

    def train_mode(self, model: nn.Module) -> bool:
        """Return whether the model is in train mode while it trains; see `TrainConfig.frozen_norm`."""
        norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
        return not (self.config.train.frozen_norm and norm)

    def adapt(self, seed: int, spec: CascadeSpec) -> lx.Cascade:
        """Return a fresh cascade."""
        sample = self.sample(seed)
        return lx.adapt(self.model(seed), args=sample.args, kwargs=sample.kwargs, spec=spec)

    def order(self, seed: int) -> Order:
        """Return the order of examples of this seed."""
        return Order(len(self.splits.train), min(self.config.train.batch_size, len(self.splits.train)), seed)

    def schedule(self, stages: int) -> Schedule:
        """Return the schedule for so many stages."""
        return Schedule.of(self.config.train, self.order(0).steps_per_epoch, stages)

    def sample(self, seed: int) -> Batch:
        """Return the batch that a model is captured with: the first one that it will see."""
        return self.splits.train.batch(self.order(seed).index(0)).to(self.config.train.device)


def _check_device(device: str) -> None:
    known = ["cpu"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        known += [f"{kind}:{index}" for index in range(torch.accelerator.device_count())]
    try:
        given = torch.empty(0, device=device).device
        reason = "this device holds no numbers" if given.type == "meta" else ""
    except (RuntimeError, AssertionError) as fault:
        reason = str(fault).partition(". ")[0].splitlines()[0]
    if reason:
        raise SpecError(
            f"train.device is {device!r}: {reason}; this machine has {', '.join(known)}", code="unknown-device"
        )


def channels_last(model: nn.Module) -> nn.Module:
    """Put the weights of 2d convolutions in channels-last order, which is faster, and return the model."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.contiguous(memory_format=torch.channels_last)
    return model


def train_parameters(model: nn.Module, patterns: Sequence[str], exclude: Sequence[str] = ()) -> nn.Module:
    """Let the parameters that match a pattern require gradients, and no others; return the model.

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
    """Return AdamW; each group remembers its own full learning rate."""
    if isinstance(model, lx.Cascade):
        groups = list(model.param_groups(lr=lr))
    else:
        groups = [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}]
    groups = [{**group, "full_lr": group.get("lr", lr)} for group in groups]
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)


def trained_entries(optimizer: torch.optim.Optimizer) -> int:
    """Return the number of entries that an optimizer moves."""
    return sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])


@dataclass
class Interrupt:
    """Whether Ctrl-C was pressed."""

    asked: bool = False


@contextmanager
def on_ctrl_c() -> Iterator[Interrupt]:
    """Note a first Ctrl-C inside the block, to be obeyed between two steps; a second one raises KeyboardInterrupt."""
    interrupt = Interrupt()

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupt.asked:
            raise KeyboardInterrupt
        interrupt.asked = True

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass(frozen=True)
class Step:
    """One optimizer step: steps done so far, its stage, its loss, its learning rate, the seconds since the start."""

    done: int
    stage: int
    loss: float
    lr: float
    ends_stage: bool
    seconds: float


def train_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    setup: Setup,
    schedule: Schedule,
    order: Order,
    observe: Callable[[Step], None],
    *,
    interrupt: Interrupt,
    start: int = 0,
    before_fold: Callable[[Step], None] = lambda step: None,
) -> bool:
    """Train from a step to the end; return False if Ctrl-C ended it, always between two whole steps.

    Dropout is seeded by (seed, step), so that a run that stopped and went on gives the same numbers. `before_fold` is
    called with the last step of each stage before the stage ends, `observe` with every step, after that.

    Raises:
        Diverged: a loss that is inf or nan.
        SpecError: the model does not give one logit a class.
    """
    examples, began = setup.splits.train, time.monotonic()
    stages: Iterator[object] = itertools.repeat(None)
    if isinstance(model, lx.Cascade) and start < schedule.steps:
        stages = model.stages(schedule.stages - schedule.stage(start) + 1, optimizer)
        next(stages)
    for step in range(start, schedule.steps):
        if interrupt.asked:
            return False
        torch.manual_seed(order.seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * schedule.factor(step)
        batch = examples.batch(order.index(step)).to(setup.config.train.device)
        logits = logits_of(model(*batch.args, **batch.kwargs))
        if step == start:
            _check_logits(logits, examples)
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
            next(stages, None)
        observe(done)
    return True


def _check_logits(logits: Tensor, examples: Examples) -> None:
    needed = int(examples.labels.max()) + 1
    if logits.dim() != 2 or logits.shape[1] < needed:
        raise SpecError(
            f"the model returns logits {list(logits.shape)}; [batch, classes] is needed, with {needed} classes",
            code="wrong-model-output",
        )


def predict(model: nn.Module, examples: Examples, device: str = "cpu") -> Tensor:
    """Return the logits of all examples, [examples, classes]."""
    with torch.no_grad():
        batches = (batch.to(device) for batch in examples.batches(EVAL_BATCH))
        return torch.cat([logits_of(model(*batch.args, **batch.kwargs)).float().cpu() for batch in batches])


def accuracy(logits: Tensor, examples: Examples) -> float:
    """Return the share of right predictions."""
    return (logits.argmax(-1) == examples.labels).double().mean().item()
