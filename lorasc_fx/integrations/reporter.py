"""What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

__all__ = ["Reporter", "console", "reporting"]

_SECONDS_BETWEEN_LINES = 10.0


class Reporter(ABC):
    """Told of each task and step."""

    @abstractmethod
    def begin(self, title: str, steps: int, done: int = 0) -> None:
        """Start a task of so many steps, the first ones done already."""

    @abstractmethod
    def step(self, done: int, stage: str, loss: float) -> None:
        """So many steps are done; the stage that runs, and the last loss."""

    @abstractmethod
    def say(self, text: str) -> None:
        """Print a line."""


def console() -> Console:
    """Return rich's console on standard output."""
    from rich.console import Console

    fixed = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120  # rich would take a file for 80 columns
    return Console(highlight=False, markup=False, emoji=False, width=fixed)  # names are shown as they are


@contextmanager
def reporting() -> Iterator[Reporter]:
    """Return the reporter that suits standard output."""
    screen = console()
    if not screen.is_terminal:
        yield _Lines()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[stage]}"),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=screen, transient=True) as progress:
        yield _Bar(progress)


class _Bar(Reporter):
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None, visible=False, stage="", loss="", rate="")

    def begin(self, title: str, steps: int, done: int = 0) -> None:
        self._progress.remove_task(self._task)
        self._task = self._progress.add_task(title, total=steps, completed=done, stage="", loss="", rate="")

    def step(self, done: int, stage: str, loss: float) -> None:
        self._progress.update(self._task, completed=done, stage=stage, loss=f"loss {loss:.3f}")
        speed = self._progress.tasks[0].speed
        self._progress.update(self._task, rate=f"{speed:.1f}/s" if speed else "")

    def say(self, text: str) -> None:
        self._progress.console.print(text, soft_wrap=True)


class _Lines(Reporter):
    def __init__(self) -> None:
        self._title, self._steps, self._first = "", 0, 0
        self._started = self._last = time.monotonic()

    def begin(self, title: str, steps: int, done: int = 0) -> None:
        self._title, self._steps, self._first = title, steps, done
        self._started = self._last = time.monotonic()
        self.say(f"{title}: {steps - done} steps")

    def step(self, done: int, stage: str, loss: float) -> None:
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        seconds = (now - self._started) / max(1, done - self._first)
        rate, left = 1 / seconds if seconds else 0.0, seconds * (self._steps - done)
        told = f"step {done}/{self._steps} {stage} loss {loss:.3f}"
        self.say(f"{self._title}: {told}, {rate:.1f} steps/s, {left:.0f} s left")

    def say(self, text: str) -> None:
        print(text, file=sys.stdout, flush=True)
