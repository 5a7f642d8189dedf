"""Protect the process during isolated runs: random generators, standard streams, logs, warnings, and modes of torch."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import overrides
from torch.backends import mha
from torch.utils import _python_dispatch

from lorasc_fx.util.environment import generator_states, seed_generators, set_generator_states
from lorasc_fx.util.torch_private import disable_dynamo, higher_order
from lorasc_fx.util.undo import PROCESS, Block, isolated

T = TypeVar("T")


class Shared:
    """Context manager for a change of global state that several threads need at once.

    The first thread that enters makes the change, and the last one that exits undoes it. If each thread saved and
    restored the state itself, one thread could save the changed state and restore it at the end.

    Args:
        change: returns a context manager that makes the change. Its exit may run in another thread than its enter.
    """

    def __init__(self, change: Callable[[], AbstractContextManager[Any]]) -> None:
        self._change = change
        self._guard = threading.Lock()
        self._threads: list[int] = []  # ids of the threads inside, once for each time that they have entered
        self._manager: AbstractContextManager[Any] | None = None
        os.register_at_fork(after_in_child=self._after_fork)

    def __enter__(self) -> None:
        with self._guard:
            if self._manager is None:
                self._manager = self._change()
                self._manager.__enter__()
            self._threads.append(threading.get_ident())

    def __exit__(self, *_: object) -> None:
        with self._guard:
            self._threads.remove(threading.get_ident())
            self._restore()

    def _restore(self) -> None:
        if not self._threads and self._manager is not None:
            manager, self._manager = self._manager, None
            manager.__exit__(None, None, None)

    def _after_fork(self) -> None:
        """Remove the other threads in a forked process, where they do not exist."""
        self._guard = threading.Lock()
        self._threads[:] = [thread for thread in self._threads if thread == threading.get_ident()]
        self._restore()


@contextlib.contextmanager
def _switched(read: Callable[[], T], write: Callable[[T], object], value: T) -> Iterator[None]:
    """Set a global setting inside the block."""
    before = read()
    write(value)
    yield
    write(before)


@contextlib.contextmanager
def _warnings_off() -> Iterator[None]:
    """Ignore all warnings inside the block."""
    warnings.simplefilter("ignore")
    ignore = warnings.filters[0]
    yield
    if ignore in warnings.filters:  # other threads may still be inside `own_warnings`
        warnings.filters.remove(ignore)  # type: ignore[attr-defined]


no_fastpath = Shared(partial(_switched, mha.get_fastpath_enabled, mha.set_fastpath_enabled, False))
"""Disables the fused kernels of nn.MultiheadAttention and nn.TransformerEncoder, which have no gradient."""
own_warnings = Shared(warnings.catch_warnings)
"""Removes warning filters that were added inside the block."""
_no_warnings = Shared(_warnings_off)
_no_logs = Shared(partial(_switched, lambda: logging.root.manager.disable, logging.disable, logging.CRITICAL))


class _Muted:
    """A standard stream that drops the output of one thread.

    Attributes:
        thread: the muted thread, or None.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.thread: int | None = threading.get_ident()

    def write(self, text: str) -> int:
        """Write the text, unless this thread is muted."""
        return len(text) if threading.get_ident() == self.thread else self._stream.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write the lines, unless this thread is muted."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@isolated
def _muted(undo: Block, name: str) -> None:
    """Context manager: drop the output of this thread to `sys.stdout` or `sys.stderr`."""
    stream = getattr(sys, name)
    muted = _Muted(stream)

    def unmute() -> None:
        muted.thread = None  # a log handler that was created inside the block may keep the muted stream
        if getattr(sys, name) is muted:  # otherwise another thread has replaced it since
            setattr(sys, name, stream)

    undo(unmute)
    setattr(sys, name, muted)


@isolated
def quiet(undo: Block, grad: bool = True) -> None:
    """Context manager: restore random generators, suppress output and logs of tracers, and set the gradient mode.

    Only one thread at a time can be inside such a block.
    """
    undo.enter(PROCESS)
    numpy = sys.modules.get("numpy")  # if it is not imported, the model does not use its generator
    undo(partial(random.setstate, random.getstate()))
    if numpy is not None:
        undo(partial(numpy.random.set_state, numpy.random.get_state()))
    # `torch.seed()` draws a seed from the system. Make it repeatable, so that runs of a model that calls it can be
    # compared.
    reseed, thread = torch.seed, threading.get_ident()

    @disable_dynamo  # as torch.seed does
    def seed_from_generator() -> int:
        """Seed all generators with a number from the default generator. Other threads call the original function."""
        if threading.get_ident() != thread:
            return reseed()
        number = int(torch.randint(1 << 62, ()))
        torch.manual_seed(number)
        return number

    undo(partial(setattr, torch, "seed", reseed))
    torch.seed = seed_from_generator
    undo(partial(set_generator_states, generator_states()))
    for shared in (_no_logs, no_fastpath, own_warnings, _no_warnings):
        undo.enter(shared)
    undo.enter(_muted("stdout"))  # an export that fails prints its graph; the error message contains the reason
    undo.enter(_muted("stderr"))
    undo.enter(torch.set_grad_enabled(grad))


@isolated
def eager(undo: Block) -> None:
    """Context manager: run functions that `torch.compile` has wrapped eagerly.

    Control flow ops (torch.cond, while_loop, scan) still compile their bodies. Without that, weights that a body reads
    from its closure would get no gradients.
    """
    undo.enter(torch.compiler.set_stance("force_eager"))
    compile_body = getattr(higher_order, "_hop_compile_and_call", None)
    if compile_body is not None:  # not in torch 2.9
        undo(partial(setattr, higher_order, "_hop_compile_and_call", compile_body))
        higher_order._hop_compile_and_call = partial(_with_compiler, compile_body)


def _with_compiler(compile_body: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a control flow op outside of the modes of this package, because dynamo cannot compile its body under them."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("default"))
        while isinstance(mode := _python_dispatch._get_current_dispatch_mode(), ObserverMode):
            mode.before_hidden_code()
            stack.enter_context(_python_dispatch._pop_mode_temporarily())
        while isinstance(overrides._get_current_function_mode(), ObserverMode):
            stack.enter_context(overrides._pop_mode_temporarily())
        return compile_body(*args, **kwargs)


class ObserverMode:
    """Base class of the torch modes of this package. They observe calls and do not change them."""

    def before_hidden_code(self) -> None:
        """Called before code runs without this mode. By default, do nothing."""


def seed(value: int = 0) -> None:
    """Seed the generators of Python, numpy and torch, which `quiet` restores."""
    random.seed(value)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(value)
    seed_generators(value)
