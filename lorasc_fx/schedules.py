"""Helpers for training loops: when to end a stage, learning rates that restart, and the order of the data."""

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
    """Decides when a stage is over: after more than `patience` reports in a row without an improvement.

    The rule is that of torch's ReduceLROnPlateau. Each stage starts without a best value::

        plateau = lx.schedules.Plateau(patience=2)
        for stage in cascade.stages(5, optimizer):
            for epoch in range(20):
                ...
                if plateau.over(validation_loss):
                    break

    Args:
        patience: number of reports without an improvement to accept, 0 or more.
        threshold: the smallest improvement, as a share of the best value (`rel`) or a difference (`abs`).
        mode: `min` if lower is better, `max` if higher is better.
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
        """Report a metric, as a number or a tensor, and return whether the stage is over.

        An inf or nan is not an improvement. When this returns True it has reset itself for the next stage.
        """
        value = float(metric)
        better = self.best is None
        if self.best is not None:
            margin = self.threshold * (self.best if self.threshold_mode == "rel" else 1.0)
            better = value < self.best - margin if self.mode == "min" else value > self.best + margin
        if math.isfinite(value) and better:
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        if self.waited <= self.patience:
            return False
        self.best, self.waited = None, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and the count, for `lx.save(extra=...)`."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.best, self.waited = state["best"], state["waited"]


class StageSchedule(LRScheduler):
    """A torch scheduler for each stage: linear warm-up of the learning rate, then decay to a floor.

    It is stepped once per optimizer step. In step k of a stage (from k = 0) each group's learning rate is::

        full * min(1, (k + 1) / (warmup + 1)) * (floor + (1 - floor) * d(k / steps))

    where d falls from 1 to 0 as a half cosine or a line, and stays 0 after `steps`. Without `steps` there is no decay:
    the "jagged" schedule of ReLoRA (2307.05695, section 3). `full` comes from `base`, or is the group's learning rate
    at the start. A transition or a rewind is noticed before the next optimizer step.

    Args:
        optimizer: the optimizer.
        cascade: the cascade whose stages are followed. None: a stage lasts `steps`, which gives the same cycles for a
            training without restarts.
        steps: optimizer steps of a stage, or a sequence for stage 1, 2, ... whose last entry repeats. None: no decay.
        warmup: steps until the full learning rate, 0 or more.
        floor: share of the full rate at which the decay ends, in [0, 1]. 1 is no decay.
        decay: `cosine` or `linear`.
        base: another scheduler of this optimizer. Only `step` of this scheduler may step it.

    Raises:
        SpecError: an invalid value, or a base that belongs to another optimizer or needs a metric.
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
            raise SpecError("StageSchedule: steps is empty. Give the optimizer steps of a stage, or None for no decay")
        for name, value, least in (*(("steps", count, 1) for count in counts), ("warmup", warmup, 0)):
            if not is_integer(value, least):
                raise SpecError(f"StageSchedule: {name} is {value!r}; give an integer of {least} or more")
        if not is_number(floor) or not 0 <= floor <= 1:
            raise SpecError(f"StageSchedule: floor is {floor!r}; give a share of the full rate in [0, 1]")
        if decay not in ("cosine", "linear"):
            raise SpecError(f"StageSchedule: decay is {decay!r}; give 'cosine' or 'linear'")
        if isinstance(base, ReduceLROnPlateau):
            raise SpecError(
                "StageSchedule: base is a ReduceLROnPlateau, whose step needs a metric. End stages by Plateau, or give "
                "a scheduler that steps without a metric",
                code="conflicting-options",
            )
        if base is not None and base.optimizer is not optimizer:
            raise SpecError(
                "StageSchedule: base belongs to another optimizer. Give both the same one", code="optimizer-differs"
            )
        self.steps, self.warmup, self.floor, self.decay = list(counts), warmup, float(floor), decay
        self.since, self.stage = 0, cascade.stage if cascade is not None else 1
        self.full_lrs = _rates(optimizer)
        self._cascade, self._base = cascade, base
        super().__init__(optimizer)
        optimizer.register_step_pre_hook(self._before_step)

    def factor(self, stage: int, step: int) -> float:
        """Return the share of the full rate in a step (from 0) of a stage (from 1)."""
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
        """Advance by one optimizer step, and `base` too. Call it after the optimizer's step."""
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
        """Return numbers, lists and the state of `base`, for `lx.save(scheduler=...)`."""
        numbers = {name: value for name, value in super().state_dict().items() if name not in ("_cascade", "_base")}
        return numbers | {"base": self._base.state_dict() if self._base is not None else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        numbers = dict(state_dict)
        base = numbers.pop("base")
        if self._base is not None:
            self._base.load_state_dict(base)
        super().load_state_dict(numbers)

    def _full(self) -> list[float | torch.Tensor]:
        """Return the full learning rates. A group that was added later has its initial one."""
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
    """Return an endless DataLoader over a shuffled data set, starting at any step.

    The batch of a step depends only on (seed, step), so a run can be resumed in the middle of an epoch: save the number
    of finished steps as `extra`, and give it as `start`. Workers that read ahead make no difference, and no global
    generator is used. Each epoch has its own order and drops a last short batch.

    Args:
        data: a data set with a length and items by index.
        batch_size: number of examples per batch.
        seed: seed of the orders.
        start: number of finished steps.
        share: (rank, count) if `count` processes share each batch: this one gets every count-th example, beginning at
            its rank. A run can be resumed with the same batches on another number of processes.
        options: further options of DataLoader (num_workers, collate_fn, ...), except those for the order.

    Raises:
        SpecError: an invalid batch size, seed, start or share, or an option for the order.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0), ("start", start, 0)):
        if not is_integer(value, least):
            raise SpecError(f"shuffled_batches: {name} is {value!r}; give an integer of {least} or more")
    taken = [name for name in ("batch_sampler", "sampler", "shuffle", "drop_last", "generator") if name in options]
    if taken:
        raise SpecError(
            f"shuffled_batches: {taken[0]} cannot be given, because the order comes from seed and start",
            code="conflicting-options",
        )
    rank, count = share
    if not 0 <= rank < count or batch_size % count:
        raise SpecError(
            f"shuffled_batches: share is {share!r} for a batch of {batch_size}. Give (rank, number of processes), "
            "where the number divides the batch"
        )
    if len(data) < batch_size:
        raise SpecError(
            f"shuffled_batches: {len(data)} examples are fewer than a batch of {batch_size}", code="invalid-data"
        )
    of_workers = generator(seed, start, "workers", "")  # otherwise the loader would draw from torch's generator
    return DataLoader(
        data, batch_sampler=_Batches(len(data), batch_size, seed, start, share), generator=of_workers, **options
    )


class _Batches:
    """The indices of each batch, or of a share of it, without end. Each iteration begins at `start`."""

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
