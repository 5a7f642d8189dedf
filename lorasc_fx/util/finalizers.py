"""Runs finalizers that compute with tensors only when their thread is neither tracing nor in a backward."""

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
"""Actions that wait until their thread does not trace."""


def when_idle(action: Callable[[], object]) -> None:
    """Run an action that computes with tensors, now or later. Call this in a finalizer.

    Garbage collection may run a finalizer at any moment, also while the thread traces or runs a backward. The
    operations of the action would become a part of it. In this case the action runs at the end of the backward, or at
    the first garbage collection after the trace.
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
    """Run the postponed actions, unless this thread is tracing or in a backward."""
    while POSTPONED and not _is_tracing() and torch._C._current_graph_task_id() == -1:
        _Finalizer(POSTPONED.popleft())  # not referenced, so it is finalized immediately


class _Finalizer:
    """Runs an action as a finalizer, so that Python reports its exceptions and does not raise them in the caller."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.action = action

    def __del__(self) -> None:
        self.action()


def _after_collection(phase: str, _info: object) -> None:
    """Callback of the garbage collector, which runs often: run the postponed actions."""
    if phase == "stop":
        run_postponed()
        if not POSTPONED and _after_collection in gc.callbacks:
            gc.callbacks.remove(_after_collection)


def _is_tracing() -> bool:
    """Whether a mode, a compiler or a transform records the tensor operations of this thread."""
    return (
        torch.compiler.is_compiling()  # must be first, because dynamo can trace only this call
        or is_in_torch_dispatch_mode()  # also inside __torch_dispatch__, where the stack of modes is empty
        or _len_torch_dispatch_stack() + _len_torch_dispatch_stack_pre_dispatch() > 0
        or torch._C._dispatch_tls_is_dispatch_key_included("PythonDispatcher")  # torch.export
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._guards.TracingContext.try_get() is not None
        or PROCESS.is_held
    )
