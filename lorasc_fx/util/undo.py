"""Transactions: all changes of a block remain, or none.

- `AllOrNothing`: for a long block. Any exception rolls it back, including KeyboardInterrupt.
- `commit`: for a short block that writes. SIGINT (Ctrl-C) is deferred to the end, and then rolls the block back.
- `isolated`: for changes that are always undone at the end of a block. SIGINT is deferred while they are made.

SIGINT is also deferred during a rollback. Handlers of other signals run immediately.
"""

from __future__ import annotations

import _thread
import functools
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

T = TypeVar("T")
P = ParamSpec("P")

Undo = Callable[[Callable[[], object]], None]
"""Function that registers a step. The step undoes a write, and must be registered before the write."""


class Block:
    """A stack of undo steps. Call `undo(step)` before each change, where `step()` undoes the change.

    A step must have no effect if its change did not happen, because an exception may occur between the two.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def __call__(self, step: Callable[[], object]) -> None:
        """Add a step. Steps run in reverse order."""
        self._steps.append(step)

    def enter(self, manager: AbstractContextManager[T]) -> T:
        """Enter a context manager, and add a step that exits it."""
        value = manager.__enter__()
        self(functools.partial(manager.__exit__, None, None, None))
        return value

    def roll_back(self, fault: BaseException | None = None) -> None:
        """Run all steps in reverse order, even if some of them raise.

        Args:
            fault: the exception that caused the rollback. It gets a note for each exception of a step. Without a fault,
                the first exception of a step is raised at the end.
        """
        if isinstance(fault, (MemoryError, RuntimeError)):
            # The frames of the traceback refer to tensors, whose memory the steps may need.
            traceback.clear_frames(fault.__traceback__)
        raised = fault
        with interrupts_deferred():
            while self._steps:
                try:
                    self._steps.pop()()
                except BaseException as step_fault:
                    if raised is None:
                        raised = step_fault
                    else:
                        raised.add_note(f"and the rollback raised {type(step_fault).__name__}: {step_fault}")
        if raised is not None and raised is not fault:
            raise raised


class AllOrNothing(Block):
    """`with AllOrNothing() as undo:` rolls back if the block raises."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, fault: BaseException | None, _traceback: object) -> None:
        if fault is not None:
            self.roll_back(fault)


@contextmanager
def commit() -> Iterator[Undo]:
    """`with commit() as undo:` rolls back if the block raises, or if SIGINT arrived during the block."""
    undo = Block()
    with interrupts_deferred() as handle_now:
        try:
            yield undo
            handle_now()
        except BaseException as fault:
            undo.roll_back(fault)
            raise


@contextmanager
def interrupts_deferred() -> Iterator[Callable[[], None]]:
    """Context manager: defer SIGINT to the end of the block.

    Yields a function that calls the handler of a deferred SIGINT immediately. Only the main thread receives signals, so
    this does nothing in other threads. A nested block calls the handler of the outer block, which defers the signal
    again.
    """
    handler = signal.getsignal(signal.SIGINT)
    received: deque[tuple[Any, ...]] = deque()

    def handle_now() -> None:
        while received and callable(handler):
            handler(*received.popleft())

    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield handle_now
        return
    signal.signal(signal.SIGINT, lambda *arguments: received.append(arguments))
    try:
        yield handle_now
    finally:
        signal.signal(signal.SIGINT, handler)
        handle_now()


def isolated(setup: Callable[Concatenate[Block, P], T]) -> Callable[P, AbstractContextManager[T]]:
    """Decorate a function that changes state: it becomes a context manager that restores the state at the end.

    The first argument of the function is a `Block`, named `undo`. The function calls `undo(step)` before each change,
    and returns the value for `with ... as`.
    """

    @contextmanager
    @functools.wraps(setup)
    def block(*args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        with AllOrNothing() as undo:
            with interrupts_deferred():
                value = setup(undo, *args, **kwargs)
            yield value
            undo.roll_back()  # inside the `with`, so that an interrupt before the first step rolls back as well

    return block


# ---- Locks


class Lock(_thread.RLock):  # type: ignore[misc]  # not final at runtime
    """A re-entrant lock whose copy (deepcopy, pickle) is a new lock."""

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return (Lock, ())


PROCESS = Lock()
"""Held while a capture changes parameters of its model or state of the process, such as random generators.

A thread that needs this lock and the lock of a cascade must acquire this lock first.
"""
