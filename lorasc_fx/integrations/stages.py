"""Common part of the callbacks for trainers: when a stage ends, and which weights are evaluated."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch

from lorasc_fx.cascade import transition
from lorasc_fx.errors import SpecError
from lorasc_fx.facade import Cascade
from lorasc_fx.schedules import Plateau
from lorasc_fx.util.checks import is_integer

__all__ = ["Evaluated", "StageEnds"]

Evaluated = Literal["slow", "fast", "trained"]


class StageEnds:
    """The cascade of a trainer, the rule that ends its stages, and the weights that the callback has put in place."""

    def __init__(
        self,
        cascade: Cascade,
        *,
        epochs: int | None,
        steps: int | None,
        stages: int | None,
        evaluate: Evaluated | Sequence[Evaluated],
        plateau: Plateau | int | None = None,
    ) -> None:
        rules = {"epochs": epochs, "steps": steps, "stages": stages, "plateau": plateau}
        chosen = [name for name, value in rules.items() if value is not None]
        if len(chosen) > 1:
            raise SpecError(
                f"CascadeCallback: {' and '.join(chosen)} both say when a stage ends. Give only one",
                code="conflicting-options",
            )
        for name, count in (("epochs", epochs), ("steps", steps), ("stages", stages)):
            if count is not None and (not is_integer(count, 1)):
                raise SpecError(f"CascadeCallback: {name} is {count!r}. Give a whole number of 1 or more")
        passes = (evaluate,) if isinstance(evaluate, str) else tuple(evaluate)
        if not passes or len({*passes}) < len(passes) or not {*passes} <= {*get_args(Evaluated)}:
            raise SpecError(f"CascadeCallback: evaluate is {evaluate!r}. Give one of {', '.join(get_args(Evaluated))}")
        cascade._run.check_alive("CascadeCallback")
        self.cascade, self.evaluate, self._passes = cascade, evaluate, passes
        self.epochs, self.steps, self.stages = epochs if chosen else 1, steps, stages
        self._ends: set[int] = set()
        self.plateau = plateau if plateau is None or isinstance(plateau, Plateau) else Plateau(plateau)
        self._needs_loss = cascade.plan.spec.pace_rule.needs_loss
        self._view: str | None = None
        self._placed: contextlib.AbstractContextManager[object] | None = None
        if "trained" in passes:
            cascade._run.warned.accept("evaluated-with-noise")  # the user asks for noise

    def _divide(self, stages: int, total: float) -> None:
        """Divide the optimizer steps of a training into stages, as evenly as possible."""
        if not stages <= total < math.inf:
            raise SpecError(
                f"CascadeCallback: stages is {stages}, but the training has {total:g} optimizer steps. Give fewer "
                "stages, or steps=... if the training has no end"
            )
        self._ends = {round(number * total / stages) for number in range(1, stages + 1)}

    def _ends_after(self, step: int) -> bool:
        """Whether a stage ends after this optimizer step, by `steps` or `stages`."""
        return step in self._ends or (self.steps is not None and step % self.steps == 0)

    @contextlib.contextmanager
    def _placing(self, view: str) -> Iterator[None]:
        """Put weights in place for a `with`. At its end, those that this callback had put in place before are back."""
        before, users = self._view, self._view is None and self.cascade._run.placed is not None
        if view == "trained" or (users and view in get_args(Evaluated)):  # keep the user's own `weights(...)`
            yield
            return
        self._put(view)
        try:
            yield
        finally:
            self._put(before)

    def _put(self, view: str | None) -> None:
        held, self._placed, self._view = self._placed, None, None
        if held is not None:
            held.__exit__(None, None, None)
        if view is not None:
            placed = self.cascade.weights(view)
            placed.__enter__()
            self._placed, self._view = placed, view

    def _loss(self) -> Any:
        """Return the loss of the last optimizer step, the mean over all processes, if the pace needs it."""
        raise NotImplementedError

    def _end_last(self, optimizer: torch.optim.Optimizer) -> None:
        """Fold the stage that is running at the end of the training."""
        transition.next_stage(self.cascade._run, optimizer, idle=True, loss=self._loss())
