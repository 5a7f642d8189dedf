"""What is told while a loop of your own trains: to a person, by a bar or lines; to a folder, by metrics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from os import PathLike
from typing import Any

from lorasc_fx.errors import SpecError, path_of
from lorasc_fx.extras import require
from lorasc_fx.integrations.metrics import Metrics
from lorasc_fx.integrations.reporter import Reporter, reporting
from lorasc_fx.runtime import Stage

require("cli", "rich")

__all__ = ["Told", "telling"]


class Told:
    """Is told of each step of a loop; `telling` makes it."""

    def __init__(self, reporter: Reporter, metrics: Metrics | None, every: int, done: int) -> None:
        self._reporter, self._metrics, self._every = reporter, metrics, every
        self.done = done

    def step(self, stage: Stage, loss: float, **more: float) -> None:
        """One more step is done.

        Args:
            stage: that `cascade.stages` has given.
            loss: of this step.
            more: other numbers for the folder, such as `lr`.
        """
        self.done += 1
        self._reporter.step(self.done, f"stage {stage.index}/{stage.count}", loss)
        if self._metrics is not None and self.done % self._every == 0:
            self._metrics.log(step=self.done, stage=stage.index, loss=loss, **more)

    def log(self, **entry: Any) -> None:
        """Keep other numbers of this step in the folder: a validation."""
        if self._metrics is not None:
            self._metrics.log(step=self.done, **entry)

    def say(self, text: str) -> None:
        """Print a line, above the bar."""
        self._reporter.say(text)


@contextlib.contextmanager
def telling(
    steps: int,
    *,
    title: str = "train",
    folder: str | PathLike[str] | None = None,
    every: int = 1,
    done: int = 0,
) -> Iterator[Told]:
    """Tell of a loop: stage, step, loss, steps a second and time left, as a bar on a terminal, as lines elsewhere.

    Args:
        steps: of the whole training.
        title: stands before the bar.
        folder: gets `metrics.jsonl`, and `tensorboard/` if that package is installed; nothing is kept without one.
        every: so many steps make one line of the metrics.
        done: steps that a run that goes on has done before.

    Raises:
        SpecError: `steps` or `every` is less than 1.
        MissingExtra: rich is not installed (the extra `cli`).
    """
    for name, count in (("steps", steps), ("every", every)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise SpecError(f"telling: {name} is {count!r}; give an integer of 1 or more")
    with contextlib.ExitStack() as held:
        reporter = held.enter_context(reporting())
        metrics = held.enter_context(Metrics(path_of(folder))) if folder is not None else None
        reporter.begin(title, steps, done)
        yield Told(reporter, metrics, every, done)
