"""Base class of the callbacks for trainers: decides when a stage ends and which weights are evaluated."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

from lorasc_fx.cascade import run_of
from lorasc_fx.errors import SpecError
from lorasc_fx.facade import Cascade
from lorasc_fx.util.decode import is_integer

__all__ = ["Evaluated", "StageEnds"]

Evaluated = Literal["slow", "fast", "trained"]


class StageEnds:
    """The rule that ends the stages of a cascade, and the weights that the callback has placed in the model.

    Args:
        cascade: the cascade that the trainer trains.
        epochs, steps, stages: the rules. At most one is given; the default is epochs=1.
        evaluate: the weights for evaluations, or several of them.

    Raises:
        SpecError: two rules, a count below 1, or unknown weights.
        StateError: the cascade was released.
    """

    def __init__(
        self,
        cascade: Cascade,
        *,
        epochs: int | None,
        steps: int | None,
        stages: int | None,
        evaluate: Evaluated | Sequence[Evaluated],
    ) -> None:
        rules = {"epochs": epochs, "steps": steps, "stages": stages}
        chosen = [name for name, value in rules.items() if value is not None]
        if len(chosen) > 1:
            raise SpecError(
                f"CascadeCallback: {' and '.join(chosen)} cannot be combined, because each decides when a stage ends. "
                "Give only one",
                code="conflicting-options",
            )
        for name, count in rules.items():
            if count is not None and not is_integer(count, 1):
                raise SpecError(f"CascadeCallback: {name} is {count!r}. Give a whole number of 1 or more")
        views = (evaluate,) if isinstance(evaluate, str) else tuple(evaluate)
        if not views or len({*views}) < len(views) or not {*views} <= {*get_args(Evaluated)}:
            raise SpecError(
                f"CascadeCallback: evaluate is {evaluate!r}. Give one of {', '.join(get_args(Evaluated))}, or a tuple "
                "of different ones"
            )
        run_of(cascade).check_alive("CascadeCallback")
        self.cascade, self.evaluate, self._evaluated = cascade, evaluate, views
        self.epochs, self.steps, self.stages = epochs if chosen else 1, steps, stages
        self._last_steps: set[int] = set()
        self._view: str | None = None
        self._placed: contextlib.AbstractContextManager[object] | None = None
        if "trained" in views:
            run_of(cascade).warned.accept("evaluated-with-noise")  # "trained" includes noise, so do not warn about it

    def _divide(self, stages: int, total: float) -> None:
        """Divide `total` optimizer steps into stages, as evenly as possible."""
        if not stages <= total < math.inf:
            raise SpecError(
                f"CascadeCallback: stages is {stages}, but the training has {total:g} optimizer steps. Give fewer "
                "stages, or steps=... if the training has no end"
            )
        self._last_steps = {round(number * total / stages) for number in range(1, stages + 1)}

    def _is_last_step(self, step: int) -> bool:
        """Return whether a stage ends after this optimizer step, by the rule `steps` or `stages`."""
        return step in self._last_steps or (self.steps is not None and step % self.steps == 0)

    @contextlib.contextmanager
    def _placing(self, view: str) -> Iterator[None]:
        """Place weights in the model inside the block, and restore the previous ones afterwards."""
        previous, by_user = self._view, self._view is None and run_of(self.cascade).placed is not None
        if view == "trained" or (by_user and view in get_args(Evaluated)):  # keep the user's own `weights(...)`
            yield
            return
        self._place(view)
        try:
            yield
        finally:
            self._place(previous)

    def _place(self, view: str | None) -> None:
        """Place weights in the model instead of those that this callback has placed. None restores the trained ones."""
        previous, self._placed, self._view = self._placed, None, None
        if previous is not None:
            previous.__exit__(None, None, None)
        if view is not None:
            placed = self.cascade.weights(view)
            placed.__enter__()
            self._placed, self._view = placed, view
