"""Transactions: what a block writes stays as a whole, or not at all.

- `AllOrNothing`: a long block. Whatever raises in it rolls it back, Ctrl-C included.
- `commit`: a short block that writes. Ctrl-C is deferred to its end, and then rolls it back.
- `isolated`: changes that are undone at the end in any case. Ctrl-C is deferred while they are made.

Ctrl-C is also deferred while changes are undone. The handlers of other signals are called at once.
"""

from __future__ import annotations

import _thread
import functools
import os
import signal
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

T = TypeVar("T")
P = ParamSpec("P")

Undo = Callable[[Callable[[], object]], None]
"""Takes a step that undoes a write, before the write."""


class Block:
    """Steps that undo changes: `undo(step)` before each change, where `step()` takes it back.

    A step must also be right if its change has not happened.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def __call__(self, step: Callable[[], object]) -> None:
        """Add a step, which runs before those that were added earlier."""
        self._steps.append(step)

    def enter(self, manager: AbstractContextManager[T]) -> T:
        """Enter a context manager; a step exits it."""
        value = manager.__enter__()
        self(functools.partial(manager.__exit__, None, None, None))
        return value

    def roll_back(self, fault: BaseException | None = None) -> None:
        """Run all steps, last first, also if one raises: that is a note on the fault, or is raised if there is none."""
        if isinstance(fault, (MemoryError, RuntimeError)):  # its frames hold memory that the steps may need
            traceback.clear_frames(fault.__traceback__)
        raised = fault
        with interrupts_deferred():
            while self._steps:
                try:
                    self._steps.pop()()
                except BaseException as other:
                    if raised is None:
                        raised = other
                    else:
                        raised.add_note(f"and the rollback raised {type(other).__name__}: {other}")
        if raised is not None and raised is not fault:
            raise raised


class AllOrNothing(Block):
    """`with AllOrNothing() as undo:` a block that is rolled back if anything raises in it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, fault: BaseException | None, _traceback: object) -> None:
        if fault is not None:
            self.roll_back(fault)


@contextmanager
def commit() -> Iterator[Undo]:
    """`with commit() as undo:` a short block that writes. Ctrl-C waits for its end, and then rolls it back."""
    undo = Block()
    with interrupts_deferred() as answer:
        try:
            yield undo
            answer()
        except BaseException as fault:
            undo.roll_back(fault)
            raise


@contextmanager
def interrupts_deferred() -> Iterator[Callable[[], None]]:
    """Defer SIGINT to the end of the block. Yields a function that calls its handler at once if it came.

    Only the main thread gets signals. A nested block hands SIGINT on to the outer block, which defers it in turn.
    """
    handler = signal.getsignal(signal.SIGINT)
    received: deque[tuple[Any, ...]] = deque()

    def answer() -> None:
        while received and callable(handler):
            handler(*received.popleft())

    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield answer
        return
    signal.signal(signal.SIGINT, lambda *arguments: received.append(arguments))
    try:
        yield answer
    finally:
        signal.signal(signal.SIGINT, handler)
        answer()


class _Isolated(Block, Generic[P, T]):
    def __init__(self, setup: Callable[Concatenate[Block, P], T], *args: P.args, **kwargs: P.kwargs) -> None:
        super().__init__()
        self._setup, self._args, self._kwargs = setup, args, kwargs

    def __enter__(self) -> T:
        try:
            with interrupts_deferred():
                return self._setup(self, *self._args, **self._kwargs)
        except BaseException as fault:
            self.roll_back(fault)
            raise

    def __exit__(self, _kind: object, fault: BaseException | None, _traceback: object) -> None:
        self.roll_back(fault)


def isolated(setup: Callable[Concatenate[Block, P], T]) -> Callable[P, AbstractContextManager[T]]:
    """Make a context manager of a function that changes state and adds the steps that restore it.

    The function gets a `Block` first, calls `undo(step)` before each change, and returns what `with ... as` gets.
    """

    @functools.wraps(setup)
    def block(*args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[T]:
        return _Isolated(setup, *args, **kwargs)

    return block


# ---- locks


class Lock(_thread.RLock):  # type: ignore[misc]  # not final at runtime
    """A re-entrant lock. A copy (deepcopy, pickle) is a new one, and in a forked process it is free if another thread
    held it: that thread does not exist there, and weights that it had half written are found by their checksums.
    """

    def __init__(self) -> None:
        _LOCKS.add(self)

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return (Lock, ())

    @property
    def is_held(self) -> bool:
        """Whether this thread holds the lock."""
        return bool(self._is_owned())  # type: ignore[attr-defined]  # as threading.Condition asks it


_LOCKS: weakref.WeakSet[Lock] = weakref.WeakSet()

PROCESS = Lock()
"""Held while a capture changes state of the whole process: standard streams, random generators, stances of torch.

A thread that needs this lock and that of a cascade takes this one first.
"""


def _after_fork() -> None:
    for lock in list(_LOCKS):
        if not lock.is_held:
            lock._at_fork_reinit()  # type: ignore[attr-defined]  # as threading does itself


os.register_at_fork(after_in_child=_after_fork)
