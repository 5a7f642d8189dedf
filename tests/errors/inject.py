"""Faults at the k-th operation of torch or line of ours; and a loop that lets each of them be hit."""

from __future__ import annotations

import contextlib
import linecache
import signal
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lorasc_fx as lx
from tests.errors.state import assert_same, of

ROOT = Path(__file__).parents[2]
EVERY = 200_000
"""More places than any of the calls has."""


class FailAt(TorchDispatchMode):
    """Acts once, before or after the k-th operation."""

    def __init__(self, at: int, act: Callable[[], None], after: bool = False) -> None:
        super().__init__()
        self.at, self.act, self.after, self.count = at, act, after, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        meant = self.count == self.at
        if meant and not self.after:
            self.act()
        result = func(*args, **(kwargs or {}))
        if meant and self.after:
            self.act()
        return result


class LineAt:
    """Acts before the k-th line of ours that runs.

    Lines that begin with `with` are left out: such a line runs again where the `with` ends, and what is raised there
    keeps the manager from being exited. The lines of `undo.py` run before a block and after it.
    """

    def __init__(self, at: int, act: Callable[[], None], files: tuple[str, ...] = ("lorasc_fx", "passes")) -> None:
        self.at, self.act, self.count = at, act, 0
        self.files = tuple(str(ROOT / file) for file in files)
        self.finalizers = 0

    def __enter__(self) -> LineAt:
        self.before = sys.gettrace()
        sys.settrace(self.called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)

    def called(self, frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        by_weakref = frame.f_back is not None and frame.f_back.f_code.co_filename == weakref.__file__
        # Python drops what is raised in a finalizer, or below one.
        if frame.f_code.co_name == "__del__" or by_weakref:
            self.finalizers += 1
            return self.finalizer
        # torch aborts the process if an exception leaves this call, which asks a fake tensor for its device.
        if frame.f_code.co_name == "__torch_dispatch__" and frame.f_locals.get("func") is torch.ops.prim.device.default:
            return None
        if self.finalizers:
            return None
        return self.line if name.startswith(self.files) and not name.endswith("undo.py") else None

    def finalizer(self, frame: FrameType, event: str, _: Any) -> Any:
        self.finalizers -= event == "return"
        return self.finalizer

    def line(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and self.count < self.at:
            text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            self.count += not text.startswith("with ")
            if self.count == self.at:
                self.act()
        return self.line


def failing(fault: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise fault

    return act


def sigint() -> None:
    signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def python_answers() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, whatever the test runner does with it; and does so again afterwards."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "the handler was not restored"
    finally:
        signal.signal(signal.SIGINT, before)


def in_turn(injector: Callable[[int], Any], call: Callable[[], Any], things: tuple[Any, ...], places: Any) -> int:
    """Let `call` fail at one of the places after the other. Each failure changes nothing, and then it succeeds.

    Returns:
        The number of failures.
    """
    before, failures = of(*things), 0
    for at in places:
        mode = injector(at)
        with python_answers():
            try:
                with mode:
                    call()
            except (KeyboardInterrupt, MemoryError, RuntimeError, lx.LorascError):
                if mode.count < at:  # else torch, readers and front ends may report what they caught
                    raise
                failures += 1
            else:  # later calls reuse results of the first one
                return failures
        assert_same(of(*things), before)
    call()
    return failures
