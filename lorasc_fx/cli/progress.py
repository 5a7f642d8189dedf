"""How far a file is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lorasc_fx.integrations.reporter import console

__all__ = ["bytes_told"]

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def bytes_told(title: str) -> Iterator[Callable[[int, int], object]]:
    """Return what is to be told of the bytes that are done, of how many."""
    screen = console()
    if not screen.is_terminal:
        yield _lines(title)
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    title_column = Column(ratio=1, no_wrap=True, overflow="ellipsis")  # a long path leaves the bar its place
    columns = (
        TextColumn("{task.description}", markup=False, table_column=title_column),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=screen, transient=True, expand=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _lines(title: str) -> Callable[[int, int], object]:
    """Say how far it is every few seconds; nothing of what is done sooner."""
    last = time.monotonic()

    def told(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            print(f"{title}: {done / 1e9:.1f} of {total / 1e9:.1f} GB", file=sys.stdout, flush=True)

    return told
