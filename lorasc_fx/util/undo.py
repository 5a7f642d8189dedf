"""Blocks that nothing leaves half done: neither an exception inside, nor Ctrl-C, nor any other signal's handler.

Python runs signal handlers in the main thread, between two bytecodes, and what they raise is raised there. While one of
these blocks is open, a recorder answers in place of every handler written in Python. Where a signal must wait, the
recorder keeps it, and the handler is called as soon as it may be; everywhere else it is called at once.

- `AllOrNothing`: a long block. Signals wait while it begins, while it ends, and while it takes back.
- `Commit`: a short block that writes. Signals wait for all of it; if a handler then raises, it is taken back.
- `isolated`: state that is always given back. Signals wait while it begins and while it ends.

What cannot be held: exceptions that another thread injects (PyThreadState_SetAsyncExc), and foreign code that is itself
interrupted in the middle of its `finally`.
"""

from __future__ import annotations

import functools
import gc
import os
import signal
import sys
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import CodeType, FrameType, TracebackType
from typing import Any, ClassVar, Concatenate, Generic, ParamSpec, TypeVar

import torch
import torch._guards
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.utils._python_dispatch import _len_torch_dispatch_stack  # type: ignore[attr-defined]

T = TypeVar("T")
P = ParamSpec("P")

Undo = Callable[[Callable[[], object]], None]
"""Takes a step that undoes a write, before the write."""


class Lock:
    """A re-entrant lock; a copy (deepcopy, pickle) is a new one.

    A forked process has only the thread that forked. A lock that another thread held is free there.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _LOCKS.add(self)

    def acquire(self, seconds: float) -> bool:
        """Wait so long at most; return whether the lock is this thread's."""
        return self._lock.acquire(timeout=seconds)

    def release(self) -> None:
        """Give it back."""
        self._lock.release()

    @property
    def is_held(self) -> bool:
        """Whether this thread holds the lock."""
        return bool(self._lock._is_owned())  # type: ignore[attr-defined]  # as threading.Condition asks it

    def after_fork(self) -> None:
        """Free the lock in a forked process if a thread held it that does not exist there.

        Weights that this thread had half written are found by their checksums (`Run.check_weights`).
        """
        if self._lock.acquire(blocking=False):  # free, or held by the thread that forked, which goes on to release it
            self._lock.release()
        else:
            self._lock = threading.RLock()

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return (Lock, ())


_LOCKS: weakref.WeakSet[Lock] = weakref.WeakSet()

PROCESS = Lock()
"""Held while a capture changes state of the whole process: standard streams, random generators, stances of torch.

A thread that needs this lock and that of a cascade takes this one first.
"""


_POSTPONED: deque[Callable[[], object]] = deque()


def when_idle(action: Callable[[], object]) -> None:
    """Run an action that computes with tensors, now or later.

    Garbage collection may call it at any moment. If this thread is tracing or differentiating, the action would become
    a part of that. It then waits for the end of the backward, or for the first garbage collection after the trace.
    """
    if torch._C._current_graph_task_id() != -1:
        torch.autograd.Variable._execution_engine.queue_callback(functools.partial(_run_or_postpone, action))
    else:
        _run_or_postpone(action)


def _run_or_postpone(action: Callable[[], object]) -> None:
    if not _is_tracing():
        action()
        return
    _POSTPONED.append(action)
    if _after_collection not in gc.callbacks:
        gc.callbacks.append(_after_collection)


def run_postponed() -> None:
    """Run the actions that could not run when they were given, unless this thread is tracing."""
    while _POSTPONED and not _is_tracing() and torch._C._current_graph_task_id() == -1:
        _Finalizer(_POSTPONED.popleft())  # is garbage at once


class _Finalizer:
    """Runs an action as a finalizer: what it raises is reported, and does not end the call that happens to run it."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.action = action

    def __del__(self) -> None:
        self.action()


def _after_collection(phase: str, _info: object) -> None:
    """Run what was postponed soon after the trace: Python collects garbage all the time."""
    if phase == "stop":
        run_postponed()
        if not _POSTPONED and _after_collection in gc.callbacks:
            gc.callbacks.remove(_after_collection)


def _is_tracing() -> bool:
    """Whether tensor operations of this thread are observed or compiled."""
    return (
        _len_torch_dispatch_stack() + _len_torch_dispatch_stack_pre_dispatch() > 0
        or torch._C._dispatch_tls_is_dispatch_key_included("PythonDispatcher")  # as torch.export traces
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._guards.TracingContext.try_get() is not None
        or torch.compiler.is_compiling()
        or PROCESS.is_held
    )


class Block(Generic[T]):
    """A block with steps that undo it: `undo(step)` before each write, where `step()` takes the write back.

    A step must also be right where its write has not happened. One that raises does not keep the others from running,
    and is a note on the exception that is raised. Grad mode is afterwards as it was before.

    Args:
        lock: is held from the beginning to the end.
    """

    deferring: ClassVar[bool] = False
    """Whether signals wait for the whole block."""
    always: ClassVar[bool] = False
    """Whether the steps run in any case."""

    def __init__(self, lock: Lock | None = None) -> None:
        self._steps: list[Callable[[], object]] = []
        self._lock = lock
        self._locked = False
        self._grad: bool | None = None
        self.place: tuple[CodeType, int] | None = None  # of the with statement, where the block also begins and ends
        self.busy = False  # while it begins or ends
        self.thread = threading.get_ident()

    def __call__(self, step: Callable[[], object]) -> None:
        """Run this step, before those that were given earlier, when the block is undone."""
        self._steps.append(step)

    def enter(self, manager: AbstractContextManager[Any]) -> Any:
        """Enter a context manager, which is left when the block is undone."""
        value = manager.__enter__()
        self(functools.partial(manager.__exit__, None, None, None))
        return value

    def _begin(self) -> T:
        raise NotImplementedError

    def __enter__(self) -> T:
        """Begin; whatever raises here is undone here."""
        self.busy = True
        if _in_main_thread():
            _record_signals()
            caller = sys._getframe(1)
            self.place = caller.f_code, caller.f_lineno
            _OPEN.append(self)
        try:
            while self._lock is not None and not self._locked:
                self._locked = self._lock.acquire(seconds=0.05)
                if not self._locked:
                    _answer(self)  # waiting for another thread can be interrupted
            self._grad = torch.is_grad_enabled()
            value = self._begin()
            if not self.deferring:
                _answer(self)
        except BaseException as fault:
            self._take_back(fault)
            self._end()
            raise
        self.busy = False
        return value

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, _: TracebackType | None) -> None:
        """Take back if anything raised, or in any case; then call the handlers of signals that have waited."""
        self.busy = True
        failed: BaseException | None = None
        try:
            if fault is None and not self.always:
                _answer(self)
        except BaseException as late:
            failed = late
        if fault is not None or failed is not None or self.always:
            failed = self._take_back(fault or failed) or failed
        try:
            self._end()
        finally:
            if failed is not None:
                raise failed

    def _end(self) -> None:
        """Give back grad mode, lock and handlers; then call those handlers that still wait."""
        try:
            if self._grad is not None and torch.is_grad_enabled() != self._grad:
                torch._C._set_grad_enabled(self._grad)
            if self._locked and self._lock is not None:
                self._locked = False
                self._lock.release()
        finally:
            if self in _OPEN:
                _OPEN.remove(self)
            try:
                if not _OPEN and _in_main_thread():
                    _give_handlers_back()
            finally:
                _answer()

    def _take_back(self, fault: BaseException | None) -> BaseException | None:
        """Run the steps, last first; return the first exception of one where there is no fault to add a note to."""
        first: BaseException | None = None
        if isinstance(fault, (MemoryError, RuntimeError)):  # what its frames hold is memory that the steps may need
            traceback.clear_frames(fault.__traceback__)
        while self._steps:
            try:
                self._steps.pop()()
            except BaseException as other:
                raised_before = fault or first
                if raised_before is None:
                    first = other
                else:
                    raised_before.add_note(f"and taking back raised {type(other).__name__}: {other}")
        return first


class AllOrNothing(Block["AllOrNothing"]):
    """`with AllOrNothing() as undo:` a long block, which a signal may leave; all that was done is then taken back."""

    def _begin(self) -> AllOrNothing:
        return self


class Commit(Block["Commit"]):
    """`with Commit() as undo:` a short block. A signal waits for its end; if its handler raises, all is taken back."""

    deferring = True

    def _begin(self) -> Commit:
        return self


class _Isolated(Block[T]):
    always = True

    def __init__(self, begin: Callable[[Block[Any]], T]) -> None:
        super().__init__()
        self._setup = begin

    def _begin(self) -> T:
        return self._setup(self)


def isolated(setup: Callable[Concatenate[Block[Any], P], T]) -> Callable[P, Block[T]]:
    """Make a context manager of a function that changes state and says how to give it back.

    The function gets the block first, calls `undo(step)` before each change, and returns what `with ... as` gets. The
    steps run at the end of the `with`, whatever happens in it.
    """

    @functools.wraps(setup)
    def block(*args: P.args, **kwargs: P.kwargs) -> Block[T]:
        return _Isolated(lambda undo: setup(undo, *args, **kwargs))

    return block


@isolated
def grad_mode(undo: Block[Any], enabled: bool) -> None:
    """Compute with gradients or without, as torch.set_grad_enabled; for interrupts see `no_grad`."""
    torch._C._set_grad_enabled(enabled)


@isolated
def no_grad(undo: Block[Any]) -> None:
    """Compute without gradients, as torch.no_grad, which leaves them off if it is interrupted where it ends."""
    torch._C._set_grad_enabled(False)


@isolated
def no_inference_mode(undo: Block[Any]) -> None:
    """Make tensors that can be trained, also where the caller is in inference mode."""
    undo.enter(torch.inference_mode(False))


def raise_of_handler(fault: BaseException) -> None:
    """Raise the exception of a signal's handler, if it is what this exception stands for.

    A handler may raise any exception (a timeout by SIGALRM); it says nothing of the code that it has interrupted.
    """
    waiting: list[Any] = [fault]
    seen: set[int] = set()
    while waiting:
        error = waiting.pop()
        if not isinstance(error, BaseException) or id(error) in seen:
            continue
        if getattr(error, _MARK, False):
            raise error
        seen.add(id(error))
        waiting += [error.__context__, error.__cause__, getattr(error, "inner_exception", None)]


# ---- signals

_MARK = "_lorasc_fx_raised_by_handler"
_OPEN: list[Block[Any]] = []
"""The open blocks of the main thread."""


class _Recorder:
    """Answers a signal in place of `before`; passes it on unless it must wait.

    One that stays installed (somebody else has put a handler over it, or a handler raised while they were exchanged)
    only passes on.
    """

    def __init__(self, number: int, before: Callable[[int, FrameType | None], object]) -> None:
        self.number, self.before = number, before

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if _must_wait(frame):
            _WAITING.append(self)
        else:
            self.answer(frame)

    def answer(self, frame: FrameType | None) -> None:
        """Call the handler, and mark what it raises."""
        try:
            self.before(self.number, frame)
        except BaseException as fault:
            setattr(fault, _MARK, True)
            raise


_INSTALLED: list[_Recorder] = []
_WAITING: list[_Recorder] = []
_SIGNALS = sorted(map(int, signal.valid_signals()))
_handler_of: Callable[[int], Any] = signal._signal.getsignal  # type: ignore[attr-defined]
"""C's own function: signal.getsignal turns each answer into an enum, 0.3 ms for all signals, at each block."""


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _record_signals() -> None:
    """Put a recorder in the place of every handler that is not one."""
    try:
        for number in _SIGNALS:
            handler = _handler_of(number)
            if callable(handler) and not isinstance(handler, _Recorder):
                recorder = _Recorder(number, handler)
                _INSTALLED.append(recorder)
                signal.signal(number, recorder)
    except BaseException:  # of a handler that has no recorder yet
        if not _OPEN:
            _give_handlers_back()
        raise


def _give_handlers_back() -> None:
    """Put the handlers back, but over no other that has come since; all of them, also where one that is back raises."""
    try:
        while _INSTALLED:
            last = _INSTALLED[-1]
            now: object = _handler_of(last.number)
            if now is last:
                signal.signal(last.number, last.before)
            _INSTALLED.pop()
    finally:
        if _INSTALLED:
            _give_handlers_back()


def _answer(asking: Block[Any] | None = None) -> None:
    """Call the handlers of signals that have waited, unless another block still defers them.

    Raises:
        BaseException: the first that a handler raises; all handlers have been called.
    """
    raised: BaseException | None = None
    if not _in_main_thread() or any(block.deferring or block.busy for block in _OPEN if block is not asking):
        return
    while _WAITING:
        try:
            _WAITING.pop(0).answer(sys._getframe(1))
        except BaseException as fault:
            raised = raised or fault
    if raised is not None:
        raise raised


def _must_wait(frame: FrameType | None) -> bool:
    """Whether a signal must wait: for a commit, or for a block that begins or ends at this moment."""
    if any(block.deferring or block.busy for block in _OPEN):
        return True
    nearest = (frame, frame.f_back) if frame is not None and sys.gettrace() is not None else (frame,)
    places = {(frame.f_code, frame.f_lineno) for frame in nearest if frame is not None}
    if any(block.place in places for block in _OPEN):
        return True
    while frame is not None:
        if frame.f_code in _EDGES:
            return True
        frame = frame.f_back
    return False


_EDGES: tuple[CodeType, ...] = (Block.__enter__.__code__, Block.__exit__.__code__)


def _after_fork() -> None:
    """Drop in a forked process what belongs to threads that do not exist there."""
    here = threading.get_ident()
    for lock in list(_LOCKS):
        lock.after_fork()
    _WAITING.clear()  # a signal is not pending in the new process
    _OPEN[:] = [block for block in _OPEN if block.thread == here]
    if not _OPEN:
        _give_handlers_back()


os.register_at_fork(after_in_child=_after_fork)
