"""A learning rate schedule that restarts at each stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lorasc_fx.errors import SpecError
from lorasc_fx.facade import Cascade
from lorasc_fx.util.decode import is_integer, is_number

__all__ = ["StageSchedule"]


class StageSchedule(LRScheduler):
    """A learning rate scheduler that restarts at each stage: linear warm-up, then decay to a floor.

    Call `step` once per optimizer step. In step k = 0, 1, ... of a stage, the learning rate of each group is::

        full * min(1, (k + 1) / (warmup + 1)) * (floor + (1 - floor) * d(k / steps))

    where d falls from 1 to 0 as a half cosine or a line, and stays 0 after `steps`. `full` is the learning rate of the
    group when the scheduler is created, or the one that `base` sets. Without `steps` there is no decay, which is the
    "jagged" schedule of ReLoRA (2307.05695, section 3). After a transition or a rewind of the cascade, the schedule
    restarts before the next optimizer step.

    Args:
        optimizer: the optimizer.
        cascade: cascade whose stages restart the schedule. None: the schedule restarts after `steps`, for a comparison
            run without stages.
        steps: number of optimizer steps of a stage, or a sequence for stage 1, 2, ...; its last entry repeats. None
            (default): no decay.
        warmup: number of warm-up steps, 0 or more. Default: 0.
        floor: share of the full rate at the end of the decay, in [0, 1]. 1 means no decay. Default: 0.0.
        decay: `cosine` (default) or `linear`.
        base: another scheduler of this optimizer that sets the full rates. This scheduler steps it, so do not step it
            yourself. It cannot be a ReduceLROnPlateau. Default: None.

    Raises:
        SpecError: a value is invalid, or `base` belongs to another optimizer or needs a metric.
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
        for name, value, minimum in (*(("steps", count, 1) for count in counts), ("warmup", warmup, 0)):
            if not is_integer(value, minimum):
                raise SpecError(f"StageSchedule: {name} is {value!r}; give an integer of {minimum} or more")
        if not is_number(floor) or not 0 <= floor <= 1:
            raise SpecError(f"StageSchedule: floor is {floor!r}; give a share of the full rate in [0, 1]")
        if decay not in ("cosine", "linear"):
            raise SpecError(f"StageSchedule: decay is {decay!r}; give 'cosine' or 'linear'")
        if isinstance(base, ReduceLROnPlateau):
            raise SpecError(
                "StageSchedule: base is a ReduceLROnPlateau, whose step needs a metric. Give a "
                "scheduler that needs no metric",
                code="conflicting-options",
            )
        if base is not None and base.optimizer is not optimizer:
            raise SpecError(
                "StageSchedule: base belongs to another optimizer. Create both with the same one",
                code="optimizer-differs",
            )
        self.steps, self.warmup, self.floor, self.decay = list(counts), warmup, float(floor), decay
        self.since, self.stage = 0, cascade.stage if cascade is not None else 1
        self.full_lrs = _rates(optimizer)
        self._cascade, self._base = cascade, base
        super().__init__(optimizer)
        optimizer.register_step_pre_hook(self._before_step)

    def factor(self, stage: int, step: int) -> float:
        """Return the share of the full learning rate in a step of a stage. Steps count from 0, and stages from 1."""
        warm = min(1.0, (step + 1) / (self.warmup + 1))
        if not self.steps:
            return warm
        progress = min(1.0, step / self._steps_of(stage))
        decayed = 0.5 * (1 + math.cos(math.pi * progress)) if self.decay == "cosine" else 1 - progress
        return warm * (self.floor + (1 - self.floor) * decayed)

    def get_lr(self) -> list[float | torch.Tensor]:
        """Return the learning rate of each group for the next optimizer step."""
        factor = self.factor(self.stage, self.since)
        return [rate * factor for rate in self._full()]

    def step(self, epoch: int | None = None) -> None:
        """Advance this scheduler and `base` by one optimizer step. Call it after `optimizer.step()`."""
        if not self._is_initial:  # torch's constructor calls this once
            self.since += 1
            if not self._same_stage():
                self.since = 0
            if self._base is not None:
                # `base` may compute the next rates from the current ones, so give it its own.
                _put(self.optimizer, self._full())
                self._base.step()
                self.full_lrs = _rates(self.optimizer)
        super().step(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this scheduler and of `base`, for `lx.save(scheduler=...)`."""
        state = {name: value for name, value in super().state_dict().items() if name not in ("_cascade", "_base")}
        return state | {"base": self._base.state_dict() if self._base is not None else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        state = dict(state_dict)
        base = state.pop("base")
        if self._base is not None:
            self._base.load_state_dict(base)
        super().load_state_dict(state)

    def _full(self) -> list[float | torch.Tensor]:
        """Return the full learning rate of each group. For a group that was added later, it is its current one."""
        self.full_lrs += _rates(self.optimizer)[len(self.full_lrs) :]
        return self.full_lrs

    def _steps_of(self, stage: int) -> int:
        return self.steps[min(stage, len(self.steps)) - 1]

    def _same_stage(self) -> bool:
        """Update `stage`, and return whether it is unchanged."""
        before = self.stage
        if self._cascade is not None:
            self.stage = self._cascade.stage
        elif self.steps and self.since >= self._steps_of(self.stage):
            self.stage += 1
        return before == self.stage

    def _before_step(self, _optimizer: torch.optim.Optimizer, _args: object, _kwargs: object) -> None:
        """Restart the schedule if the stage changed after the last `step`. A hook of the optimizer."""
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
