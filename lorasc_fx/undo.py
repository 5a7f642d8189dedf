"""All of it or nothing: what was done inside a block is put back, last first, if anything raises, Ctrl-C included.

Python raises KeyboardInterrupt between any two instructions, also while something is being put back. So SIGINT is
watched while the block runs: the first one raises, as ever; one that comes while things are put back, or while the
block ends, waits until that is done.
"""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Callable
from types import CodeType, FrameType, TracebackType
from typing import Any

__all__ = ["AllOrNothing"]


class AllOrNothing:
    """`with AllOrNothing() as undo:` ... `undo(step)` before each write, where `step()` takes the write back.

    A step has to be right also where its write has not happened. One that raises does not keep the others from running,
    and is told in a note on the error that is raised.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []
        self._handler: Any = None  # what answered SIGINT before
        self._held, self._waiting = True, False

    def __call__(self, step: Callable[[], object]) -> None:
        """Run this step, before those that were given earlier, if the block raises."""
        self._steps.append(step)

    def __enter__(self) -> AllOrNothing:
        """Watch SIGINT; other threads than the main one never see it."""
        before = signal.getsignal(signal.SIGINT)
        if callable(before) and threading.current_thread() is threading.main_thread():
            self._handler = before
            signal.signal(signal.SIGINT, self._interrupted)
        self._held = False
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, _: TracebackType | None) -> None:
        """Put back on an error; then answer an interrupt that waited."""
        try:
            if fault is not None:
                self._put_back(fault)
            elif self._waiting:
                self._waiting = False
                try:
                    self._handler(signal.SIGINT, None)
                except BaseException as late:
                    self._put_back(late)
                    raise
        finally:
            if self._handler is not None:
                signal.signal(signal.SIGINT, self._handler)
        if self._waiting:
            self._handler(signal.SIGINT, None)

    def _put_back(self, fault: BaseException) -> None:
        self._held = True
        if isinstance(fault, (MemoryError, RuntimeError)):  # what its frames hold is memory that the steps may need
            traceback.clear_frames(fault.__traceback__)
        while self._steps:
            try:
                self._steps.pop()()
            except BaseException as other:
                fault.add_note(f"and what was written could not be put back: {type(other).__name__}: {other}")

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        if self._held or self._ends(frame):
            self._waiting = True
            return
        self._held = True  # what the answer raises is put back in peace
        self._handler(number, frame)
        self._held = False

    def _ends(self, frame: FrameType | None) -> bool:
        """Whether the interrupt has come while this block begins or ends."""
        while frame is not None:
            if frame.f_code in _EDGES and frame.f_locals.get("self") is self:
                return True
            frame = frame.f_back
        return False


_EDGES: tuple[CodeType, ...] = (AllOrNothing.__enter__.__code__, AllOrNothing.__exit__.__code__)
