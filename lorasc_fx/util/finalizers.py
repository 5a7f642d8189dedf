"""Postpones what a finalizer computes with tensors while its thread is tracing or differentiating."""

from __future__ import annotations

import functools
import gc
from collections import deque
from collections.abc import Callable

import torch
import torch._guards
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.utils._python_dispatch import (  # type: ignore[attr-defined]
    _len_torch_dispatch_stack,
    is_in_torch_dispatch_mode,
)

from lorasc_fx.util.undo import PROCESS

POSTPONED: deque[Callable[[], object]] = deque()


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
    POSTPONED.append(action)
    if _after_collection not in gc.callbacks:
        gc.callbacks.append(_after_collection)


def run_postponed() -> None:
    """Run the actions that could not run when they were given, unless this thread is tracing."""
    while POSTPONED and not _is_tracing() and torch._C._current_graph_task_id() == -1:
        _Finalizer(POSTPONED.popleft())  # is garbage at once


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
        if not POSTPONED and _after_collection in gc.callbacks:
            gc.callbacks.remove(_after_collection)


def _is_tracing() -> bool:
    """Whether tensor operations of this thread are observed or compiled."""
    return (
        torch.compiler.is_compiling()  # first: dynamo traces this function, and knows this answer alone
        or is_in_torch_dispatch_mode()  # inside an operation of a mode, when the stack is empty
        or _len_torch_dispatch_stack() + _len_torch_dispatch_stack_pre_dispatch() > 0
        or torch._C._dispatch_tls_is_dispatch_key_included("PythonDispatcher")  # as torch.export traces
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._guards.TracingContext.try_get() is not None
        or PROCESS.is_held
    )
