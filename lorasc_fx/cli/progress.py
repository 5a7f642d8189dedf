"""Shows the progress of a training loop (a bar on a terminal, otherwise lines), and writes metrics into a folder."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasc_fx.errors import StateError
from lorasc_fx.util.files import open_plain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

FILE = "metrics.jsonl"
_SECONDS_BETWEEN_LINES = 10.0


def append(path: Path, entry: dict[str, Any]) -> None:
    """Append one line to a file of metrics. inf and nan become null, because JSON does not have them."""
    infinite = {name for name, value in entry.items() if isinstance(value, float) and not math.isfinite(value)}
    plain = {name: None if name in infinite else value for name, value in entry.items()}
    with os.fdopen(open_plain(path, os.O_WRONLY | os.O_APPEND, StateError), "a", encoding="utf-8") as file:
        file.write(json.dumps(plain) + "\n")


class Metrics:
    """Writes `metrics.jsonl` into a folder, and TensorBoard files into `tensorboard/` if that package is installed.

    Args:
        folder: is created if it does not exist. A resumed run appends to the existing lines.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._step = folder, 0
        self._writer: Any = None

    def log(self, **entry: Any) -> None:
        """Append one line. Its numbers become TensorBoard scalars at `step`, or at the last logged step."""
        self._folder.mkdir(parents=True, exist_ok=True)
        append(self._folder / FILE, entry)
        self._step = entry.get("step", self._step)
        if self._writer is None and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder / "tensorboard"))
        for name, value in entry.items() if self._writer is not None else ():
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                self._writer.add_scalar(name, value, self._step)

    def close(self) -> None:
        """Flush and close TensorBoard's files."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class Reporter:
    """Shows the progress of a task with a bar. Without a bar, it prints a line every few seconds."""

    def __init__(self, bar: Progress | None = None) -> None:
        self._bar = bar
        self._task: TaskID | None = None
        self._title, self._steps, self._first = "", 0, 0
        self._started = self._last = 0.0

    def begin(self, title: str, steps: int | None = None, done: int = 0) -> None:
        """Start a task with this many steps in total, some of which may be done. Without `steps`, it counts bytes."""
        self._title, self._steps, self._first = title, steps or 0, done
        self._started = self._last = time.monotonic()
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(title, total=steps, completed=done, text="")
        elif steps is not None:
            self.say(f"{title}: {steps - done} steps")

    def step(self, done: int, stage: str, loss: float) -> None:
        """Show the number of finished steps, the running stage and the last loss."""
        seconds = time.monotonic() - self._started
        rate = (done - self._first) / seconds if seconds else 0.0
        self._show(done, self._steps, f"step {done}/{self._steps} {stage} loss {loss:.3f}, {rate:.1f} steps/s")

    def copied(self, done: int, total: int) -> None:
        """Show the number of finished bytes."""
        self._show(done, total, f"{done / 1e9:.1f} of {total / 1e9:.1f} GB")

    def _show(self, done: int, total: int, text: str) -> None:
        current_time = time.monotonic()
        remaining = (total - done) * (current_time - self._started) / max(1, done - self._first)
        text = f"{text}, {remaining:.0f} s left"
        if self._bar is not None:
            assert self._task is not None
            self._bar.update(self._task, completed=done, total=total, text=text)
        elif current_time - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = current_time
            self.say(f"{self._title}: {text}")

    def say(self, text: str) -> None:
        """Print a line, above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, soft_wrap=True)
        else:
            print(text, file=sys.stdout, flush=True)


def console() -> Console:
    """Return rich's console on standard output."""
    from rich.console import Console

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120  # rich would use 80 columns for a file
    return Console(highlight=False, markup=False, emoji=False, width=width)  # no markup, so that names are unchanged


@contextlib.contextmanager
def reporting() -> Iterator[Reporter]:
    """Yield a reporter on standard output, with a bar on a terminal."""
    screen = console()
    if not screen.is_terminal:
        yield Reporter()
        return
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    title = Column(ratio=1, no_wrap=True, overflow="ellipsis")  # a long path must not push the bar away
    columns = (
        TextColumn("{task.description}", markup=False, table_column=title),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[text]}", markup=False),
    )
    with Progress(*columns, console=screen, transient=True, expand=True) as progress:
        yield Reporter(progress)
