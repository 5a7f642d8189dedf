"""When stages end, and how the learning rate rises after each restart and falls over the run."""

from __future__ import annotations

from dataclasses import dataclass

from lorasc_fx.cli.schema import TrainConfig
from lorasc_fx.errors import SpecError

__all__ = ["Schedule"]


@dataclass(frozen=True)
class Schedule:
    """Steps (0 is the first) divided evenly among stages (1 is the first)."""

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
        """Return the factor in (0, 1] on the learning rate: a rise in each stage (2307.05695), a fall over the run."""
        since = step - self.end(self.stage(step) - 1)
        fall = 1 - step / self.steps if self.decay else 1.0
        return min(1.0, (since + 1) / (self.warmup + 1)) * fall
