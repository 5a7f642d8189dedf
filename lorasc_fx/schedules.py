"""A learning rate schedule that restarts at each stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from lorasc_fx.errors import SpecError
from lorasc_fx.facade import Cascade
from lorasc_fx.util.decode import is_integer, is_number

__all__ = ["StageSchedule"]


class StageSchedule(LRScheduler):
    """A learning rate scheduler that restarts at each stage: linear warm-up, then decay to a floor.

    Call `step` once per optimizer step. In step k (from 0) of a stage, the learning rate of each group is::

        full * min(1, (k + 1) / (warmup + 1)) * (floor + (1 - floor) * d(k / steps))

    where d decreases from 1 to 0 like half a cosine, and is 0 after `steps`. `full` is the initial learning rate of the
    group. Without `steps` there is no decay, which is the "jagged" schedule of ReLoRA (2307.05695, section 3). After a
    transition or a rewind of the cascade, the schedule restarts before the next optimizer step.

    Args:
        optimizer: the optimizer.
        cascade: cascade whose stages restart the schedule.
        steps: number of optimizer steps of a stage, or a sequence with one number per stage, whose last entry repeats.
            None (default) means no decay.
        warmup: number of warm-up steps, 0 or more. Default: 0.
        floor: share of the full rate at the end of the decay, in [0, 1]. 1 means no decay. Default: 0.0.

    Raises:
        SpecError: a value is invalid.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        cascade: Cascade,
        steps: int | Sequence[int] | None = None,
        *,
        warmup: int = 0,
        floor: float = 0.0,
    ) -> None:
        counts = () if steps is None else tuple(steps) if isinstance(steps, Sequence) else (steps,)
        if steps is not None and not counts:
            raise SpecError("StageSchedule: steps is empty. Give the optimizer steps of a stage, or None for no decay")
        for name, value, minimum in (*(("steps", count, 1) for count in counts), ("warmup", warmup, 0)):
            if not is_integer(value, minimum):
                raise SpecError(f"StageSchedule: {name} is {value!r}; give an integer of {minimum} or more")
        if not is_number(floor) or not 0 <= floor <= 1:
            raise SpecError(f"StageSchedule: floor is {floor!r}; give a share of the full rate in [0, 1]")
        self.steps, self.warmup, self.floor = list(counts), warmup, float(floor)
        self.since, self.stage = 0, cascade.stage
        self._cascade = cascade
        super().__init__(optimizer)
        optimizer.register_step_pre_hook(self._before_step)

    def factor(self, stage: int, step: int) -> float:
        """Return the share of the full learning rate in a step of a stage. Steps start at 0, and stages at 1."""
        warm = min(1.0, (step + 1) / (self.warmup + 1))
        if not self.steps:
            return warm
        progress = min(1.0, step / self.steps[min(stage, len(self.steps)) - 1])
        return warm * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress)))

    def get_lr(self) -> list[float | torch.Tensor]:
        """Return the learning rate of each group for the next optimizer step."""
        # The full rate of a group that was added later is its current rate.
        self.base_lrs += _rates(self.optimizer)[len(self.base_lrs) :]
        factor = self.factor(self.stage, self.since)
        return [rate * factor for rate in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        """Advance by one optimizer step. Call it after `optimizer.step()`."""
        if not self._is_initial:  # the constructor of torch calls `step` once
            self.since += 1
            self._follow()
        super().step(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this scheduler, for `lx.save(scheduler=...)`."""
        return {name: value for name, value in super().state_dict().items() if name != "_cascade"}

    def _follow(self) -> bool:
        """Restart if the stage has changed, and return whether it has."""
        changed = self.stage != self._cascade.stage
        if changed:
            self.stage, self.since = self._cascade.stage, 0
        return changed

    def _before_step(self, _optimizer: torch.optim.Optimizer, _args: object, _kwargs: object) -> None:
        """Restart the schedule if the stage changed after the last `step`. The optimizer calls this."""
        if self._follow():
            for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
            self._last_lr = _rates(self.optimizer)


def _rates(optimizer: torch.optim.Optimizer) -> list[float | torch.Tensor]:
    rates = [group["lr"] for group in optimizer.param_groups]
    return [rate.clone() if isinstance(rate, torch.Tensor) else rate for rate in rates]
