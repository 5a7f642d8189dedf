"""A learning rate that rises anew after each restart, as ReLoRA's (2307.05695, section 3, "jagged" schedule)."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lorasc_fx.errors import SpecError
from lorasc_fx.runtime.cascade import Cascade

__all__ = ["Rewarmed"]


class Rewarmed(LRScheduler):
    """A torch scheduler whose unit is the optimizer step: linear warm-up at the start and after each transition.

    In step k of a stage (k = 0 is the first) every group's learning rate is `full * min(1, (k + 1) / (warmup + 1))`,
    where `full` is what `base` gives, or without one the group's learning rate at the start. A transition or a rewind
    is seen by itself, before the first step after it.

    Args:
        optimizer: whose groups are scheduled.
        cascade: whose stages are looked at.
        warmup: steps until the full learning rate, 1 or more.
        base: another scheduler of this optimizer, made before; it is stepped by this one's `step`, and by nobody else.

    Raises:
        SpecError: warmup is no count, or base is of another optimizer, or needs a metric.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, cascade: Cascade, *, warmup: int, base: LRScheduler | None = None
    ) -> None:
        if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 1:
            raise SpecError(f"Rewarmed: warmup is {warmup!r}; give a number of steps, an integer of 1 or more")
        if isinstance(base, ReduceLROnPlateau):
            raise SpecError(
                "Rewarmed: base is a ReduceLROnPlateau, whose step needs a metric; end stages by lx.Plateau, or give a "
                "scheduler that steps without one"
            )
        if base is not None and base.optimizer is not optimizer:
            raise SpecError("Rewarmed: base schedules another optimizer; make both for the same one")
        self.warmup, self.since, self.stage = warmup, 0, cascade.stage
        self.full_lrs = _rates(optimizer)
        self._cascade, self._base = cascade, base
        super().__init__(optimizer)
        optimizer.register_step_pre_hook(self._before_step)

    def get_lr(self) -> list[float | torch.Tensor]:
        """Return the learning rate of each group for the coming step."""
        factor = min(1.0, (self.since + 1) / (self.warmup + 1))
        return [rate * factor for rate in self._full()]

    def step(self, epoch: int | None = None) -> None:
        """Go on by one optimizer step, `base` as well; called after the optimizer's own."""
        if not self._is_initial:
            self.since = self.since + 1 if self._same_stage() else 0
            if self._base is not None:
                _put(self.optimizer, self._full())
                self._base.step()
                self.full_lrs = _rates(self.optimizer)
        super().step(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return numbers, lists and the state of `base`: what `lx.save(scheduler=...)` keeps."""
        own = {name: value for name, value in super().state_dict().items() if name not in ("_cascade", "_base")}
        return own | {"base": self._base.state_dict() if self._base is not None else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        own = dict(state_dict)
        base = own.pop("base")
        if self._base is not None:
            self._base.load_state_dict(base)
        super().load_state_dict(own)

    def _full(self) -> list[float | torch.Tensor]:
        """Return the full learning rates; a group that came later has the one that it came with."""
        self.full_lrs += _rates(self.optimizer)[len(self.full_lrs) :]
        return self.full_lrs

    def _same_stage(self) -> bool:
        before, self.stage = self.stage, self._cascade.stage
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
