"""Ctrl-C between two steps: the first one is remembered and obeyed when the step is whole, the second one at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

__all__ = ["Interrupt", "on_ctrl_c"]


@dataclass
class Interrupt:
    """Whether Ctrl-C was pressed."""

    asked: bool = False


@contextmanager
def on_ctrl_c() -> Iterator[Interrupt]:
    """Catch Ctrl-C inside the block; a second one raises KeyboardInterrupt as ever."""
    interrupt = Interrupt()

    def remember(number: int, frame: FrameType | None) -> None:
        if interrupt.asked:
            raise KeyboardInterrupt
        interrupt.asked = True

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
