"""Helpers of a training loop: when a stage ends, the learning rate after a restart, and the order of the data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader

from lorasc_fx.branch import generator
from lorasc_fx.errors import SpecError
from lorasc_fx.facade import Cascade
from lorasc_fx.util.checks import is_integer, is_number
from lorasc_fx.util.decode import Check, check

__all__ = ["Plateau", "StageSchedule", "shuffled_batches"]


@dataclass(eq=False)
class Plateau:
    """Tells when a stage is over: after more than `patience` reports in a row that were not better than the best.

    By the rule of torch's ReduceLROnPlateau. The stage that follows begins without a best::

        plateau = lx.schedules.Plateau(patience=2)
        for stage in cascade.stages(5, optimizer):
            for epoch in range(20):
                ...
                if plateau.over(validation_loss):
                    break

    Args:
        patience: reports without an improvement that a stage stands, 0 or more.
        threshold: how much better a report has to be: a share of the best (`rel`), or a difference (`abs`).
        mode: `min` for a metric that falls, `max` for one that rises.
        threshold_mode: `rel` or `abs`.

    Raises:
        SpecError: an invalid value.
    """

    patience: Annotated[int, Check(lambda reports: reports >= 0, "give a number of reports, 0 or more")] = 2
    threshold: Annotated[float, Check(lambda share: share >= 0, "give a finite number of 0 or more")] = 1e-4
    mode: Literal["min", "max"] = "min"
    threshold_mode: Literal["rel", "abs"] = "rel"
    best: float | None = field(default=None, init=False)
    waited: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        check(self, "Plateau")

    def over(self, metric: Any) -> bool:
        """Report a metric, a number or a tensor of one; return whether the stage is over.

        An inf or nan is no improvement. After True everything is forgotten, for the next stage.
        """
        value = float(metric)
        if math.isfinite(value) and (self.best is None or self._better(value, self.best)):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        if self.waited <= self.patience:
            return False
        self.best, self.waited = None, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return best and count, for `lx.save(extra=...)`."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.best, self.waited = state["best"], state["waited"]

    def _better(self, value: float, best: float) -> bool:
        margin = self.threshold * (best if self.threshold_mode == "rel" else 1.0)
        return value < best - margin if self.mode == "min" else value > best + margin


class StageSchedule(LRScheduler):
    """A torch scheduler of the learning rate within each stage: linear warm-up, then decay to a floor.

    Its unit is the optimizer step. In step k of a stage (k = 0 is the first) every group's learning rate is::

        full * min(1, (k + 1) / (warmup + 1)) * (floor + (1 - floor) * d(k / steps))

    where d falls from 1 to 0 as a half cosine or a line, and stays 0 after `steps`; without `steps` there is no decay,
    which is the "jagged" schedule of ReLoRA (2307.05695, section 3). `full` is what `base` gives, or without one the
    group's learning rate at the start. A transition or a rewind is seen by itself, before the first step after it.

    Args:
        optimizer: whose groups are scheduled.
        cascade: whose stages are followed. None: a stage is over when its `steps` are done, which gives the same cycles
            to a training without restarts.
        steps: optimizer steps of a stage, over which the rate decays; a sequence is that of stage 1, 2, ..., whose last
            one goes on. None: no decay.
        warmup: steps until the full learning rate, 0 or more.
        floor: share of the full rate at which the decay ends, in [0, 1]; 1 is no decay.
        decay: `cosine` or `linear`.
        base: another scheduler of this optimizer, made before; `step` of this one steps it, and nothing else may.

    Raises:
        SpecError: a value that is no count, share or decay, or base is of another optimizer, or needs a metric.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        cascade: Cascade | None,
        steps: int | Sequence[int] | None = None,
        *,
        warmup: int = 0,
        floor: float = 0.0,
        decay: Literal["cosine", "linear"] = "cosine",
        base: LRScheduler | None = None,
    ) -> None:
        counts = () if steps is None else tuple(steps) if isinstance(steps, Sequence) else (steps,)
        if steps is not None and not counts:
            raise SpecError("StageSchedule: steps is empty; give the optimizer steps of a stage, or None for no decay")
        for name, value, least in (*(("steps", count, 1) for count in counts), ("warmup", warmup, 0)):
            if not is_integer(value, least):
                raise SpecError(f"StageSchedule: {name} is {value!r}; give an integer of {least} or more")
        if not is_number(floor) or not 0 <= floor <= 1:
            raise SpecError(f"StageSchedule: floor is {floor!r}; give a share of the full rate in [0, 1]")
        if decay not in ("cosine", "linear"):
            raise SpecError(f"StageSchedule: decay is {decay!r}; give 'cosine' or 'linear'")
        if isinstance(base, ReduceLROnPlateau):
            raise SpecError(
                "StageSchedule: base is a ReduceLROnPlateau, whose step needs a metric; end stages by Plateau, or give "
                "a scheduler that steps without one",
                code="conflicting-options",
            )
        if base is not None and base.optimizer is not optimizer:
            raise SpecError(
                "StageSchedule: base schedules another optimizer; make both for the same one", code="optimizer-differs"
            )
        self.steps, self.warmup, self.floor, self.decay = list(counts), warmup, float(floor), decay
        self.since, self.stage = 0, cascade.stage if cascade is not None else 1
        self.full_lrs = _rates(optimizer)
        self._cascade, self._base = cascade, base
        super().__init__(optimizer)
        optimizer.register_step_pre_hook(self._before_step)

    def factor(self, stage: int, step: int) -> float:
        """Return the share of the full rate in a step (0 is the first) of a stage (1 is the first)."""
        warm = min(1.0, (step + 1) / (self.warmup + 1))
        if not self.steps:
            return warm
        done = min(1.0, step / self._steps_of(stage))
        left = 0.5 * (1 + math.cos(math.pi * done)) if self.decay == "cosine" else 1 - done
        return warm * (self.floor + (1 - self.floor) * left)

    def get_lr(self) -> list[float | torch.Tensor]:
        """Return the learning rate of each group for the coming step."""
        factor = self.factor(self.stage, self.since)
        return [rate * factor for rate in self._full()]

    def step(self, epoch: int | None = None) -> None:
        """Go on by one optimizer step, `base` as well; called after the optimizer's own."""
        if not self._is_initial:
            self.since += 1
            if not self._same_stage():
                self.since = 0
            if self._base is not None:
                _put(self.optimizer, self._full())
                self._base.step()
                self.full_lrs = _rates(self.optimizer)
        super().step(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return numbers, lists and the state of `base`: what `lx.save(scheduler=...)` keeps."""
        numbers = {name: value for name, value in super().state_dict().items() if name not in ("_cascade", "_base")}
        return numbers | {"base": self._base.state_dict() if self._base is not None else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        numbers = dict(state_dict)
        base = numbers.pop("base")
        if self._base is not None:
            self._base.load_state_dict(base)
        super().load_state_dict(numbers)

    def _full(self) -> list[float | torch.Tensor]:
        """Return the full learning rates; a group that came later has the one that it came with."""
        self.full_lrs += _rates(self.optimizer)[len(self.full_lrs) :]
        return self.full_lrs

    def _steps_of(self, stage: int) -> int:
        return self.steps[min(stage, len(self.steps)) - 1]

    def _same_stage(self) -> bool:
        before = self.stage
        if self._cascade is not None:
            self.stage = self._cascade.stage
        elif self.steps and self.since >= self._steps_of(self.stage):
            self.stage += 1
        return before == self.stage

    def _before_step(self, _optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        if not self._same_stage():
            self.since = 0
            _put(self.optimizer, self.get_lr())
            self._last_lr = _rates(self.optimizer)


def _rates(optimizer: torch.optim.Optimizer) -> list[float | torch.Tensor]:
    rates = [group["lr"] for group in optimizer.param_groups]
    return [rate.clone() if isinstance(rate, torch.Tensor) else rate for rate in rates]


def _put(optimizer: torch.optim.Optimizer, rates: list[float | torch.Tensor]) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def shuffled_batches(
    data: Any, batch_size: int, *, seed: int = 0, start: int = 0, share: tuple[int, int] = (0, 1), **options: Any
) -> DataLoader[Any]:
    """Return a DataLoader over a shuffled data set, epoch after epoch without end, from any step on.

    The batch of a step is a function of (seed, step); one number is the position.

    A run that was killed goes on in the middle of an epoch with the batches that come next: save the number of steps
    that are done, as `extra`, and give it as `start`. Workers that read ahead change nothing, and no global generator
    is read. Each epoch has its own order; a last short batch is left out.

    Args:
        data: a data set with a length whose items are asked for by position.
        batch_size: number of examples of each batch.
        seed: of the orders.
        start: number of steps that are done; the first batch is that of the next one.
        share: (rank, count) of processes that divide each batch between them, `count` of them: this one gets every
            count-th example from its rank on. A run goes on with the same batches on another number of processes.
        options: anything else that DataLoader takes (num_workers, collate_fn, ...) but for what decides on the order.

    Raises:
        SpecError: an invalid batch size, seed, start or share, or an option that decides on the order.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0), ("start", start, 0)):
        if not is_integer(value, least):
            raise SpecError(f"shuffled_batches: {name} is {value!r}; give an integer of {least} or more")
    taken = [name for name in ("batch_sampler", "sampler", "shuffle", "drop_last", "generator") if name in options]
    if taken:
        raise SpecError(
            f"shuffled_batches: {taken[0]} is not yours to give here; the order comes from seed and start",
            code="conflicting-options",
        )
    rank, count = share
    if not 0 <= rank < count or batch_size % count:
        raise SpecError(
            f"shuffled_batches: share is {share!r} of a batch of {batch_size}; give (rank, count of processes), where "
            "the count divides the batch"
        )
    if len(data) < batch_size:
        raise SpecError(
            f"shuffled_batches: {len(data)} examples are less than a batch of {batch_size}", code="invalid-data"
        )
    of_workers = generator(seed, start, "workers", "")  # or the loader would draw from torch's, once an iteration
    return DataLoader(
        data, batch_sampler=_Batches(len(data), batch_size, seed, start, share), generator=of_workers, **options
    )


class _Batches:
    """The positions of each batch, or of a share of it, without end; each iteration begins at `start`."""

    def __init__(self, size: int, batch_size: int, seed: int, start: int, share: tuple[int, int]) -> None:
        self.size, self.batch_size, self.seed, self.start = size, batch_size, seed, start
        self.rank, self.count = share

    def __iter__(self) -> Iterator[list[int]]:
        epoch, position = divmod(self.start, self.size // self.batch_size)
        while True:
            order = torch.randperm(self.size, generator=generator(self.seed, epoch, "order", "")).tolist()
            for first in range(position * self.batch_size, self.size - self.batch_size + 1, self.batch_size):
                yield order[first + self.rank : first + self.batch_size : self.count]
            epoch, position = epoch + 1, 0
