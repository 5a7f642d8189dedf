"""The state of the process during isolated runs: random generators, streams, logs, warnings, and torch's modes."""

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
from torch._compile import _disable_dynamo
from torch._higher_order_ops import utils as higher_order
from torch.backends import mha
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import _pop_mode

from lorasc_fx.util.accelerator import generator_states, seed_generators, set_generator_states
from lorasc_fx.util.undo import PROCESS, Block, isolated

T = TypeVar("T")


class Shared:
    """A process-wide change that several threads may need at once. The last thread that leaves undoes it.

    If each thread restored the state that it found, it could restore what another one had set.

    Args:
        change: returns a context manager that makes the change. It may exit in another thread.
    """

    def __init__(self, change: Callable[[], AbstractContextManager[Any]]) -> None:
        self._change = change
        self._guard = threading.Lock()
        self._threads: list[int] = []  # threads inside; one entry for each time a thread has entered
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
        """Forget the threads that do not exist in a forked process."""
        self._guard = threading.Lock()
        self._threads[:] = [thread for thread in self._threads if thread == threading.get_ident()]
        self._restore()


@contextlib.contextmanager
def _switched(read: Callable[[], T], write: Callable[[T], object], value: T) -> Iterator[None]:
    before = read()
    write(value)
    yield
    write(before)


@contextlib.contextmanager
def _warnings_off() -> Iterator[None]:
    warnings.simplefilter("ignore")
    ignore = warnings.filters[0]
    yield
    if ignore in warnings.filters:  # other threads may still be inside `own_warnings`
        warnings.filters.remove(ignore)  # type: ignore[attr-defined]


no_fastpath = Shared(partial(_switched, mha.get_fastpath_enabled, mha.set_fastpath_enabled, False))
"""Turns off torch's fused path of attention, which has no gradient."""
own_warnings = Shared(warnings.catch_warnings)
"""Drops warning filters at the end that were added inside."""
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
        """Write the text, unless the muted thread does."""
        return len(text) if threading.get_ident() == self.thread else self._stream.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write the lines, unless the muted thread does."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@isolated
def _muted(undo: Block, name: str) -> None:
    """Drop what this thread writes to the standard stream of this name."""
    stream = getattr(sys, name)
    muted = _Muted(stream)

    def unmute() -> None:
        muted.thread = None  # a log handler made inside the block may hold it
        if getattr(sys, name) is muted:
            setattr(sys, name, stream)

    undo(unmute)
    setattr(sys, name, muted)


def _autocast_nesting() -> int:
    """Return the number of autocast blocks around this call."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


@isolated
def _same_torch_stacks(undo: Block) -> None:
    """Restore this thread's torch.func levels, modes, dispatch keys and autocast: a tracer that raises leaves some."""
    keys = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    undo.enter(torch._C._ForceDispatchKeyGuard(*keys))
    refused = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()

    def same_hooks() -> None:  # torch.func disables hooks on saved tensors, which checkpointing needs
        if refused is None:
            torch._C._autograd._saved_tensors_hooks_enable()
        else:
            torch._C._autograd._saved_tensors_hooks_disable(refused, False)

    undo(same_hooks)
    functions, dispatches = torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()
    # A mode sets these when it is entered, and resets them when it exits, which a mode that is popped does not do.
    flags = {name: value for name, value in vars(_python_dispatch).items() if name.startswith("_is_in_")}

    def pop_modes() -> None:
        vars(_python_dispatch).update(flags)
        while torch._C._len_torch_function_stack() > functions:
            torch._C._pop_torch_function_stack()
        while torch._C._len_torch_dispatch_stack() > dispatches:
            _pop_mode()

    accelerator = torch.accelerator.current_accelerator()
    for device in {"cpu", accelerator.type if accelerator is not None else "cpu"}:
        undo(partial(torch.set_autocast_enabled, device, torch.is_autocast_enabled(device)))
        undo(partial(torch.set_autocast_dtype, device, torch.get_autocast_dtype(device)))
    nesting = _autocast_nesting()

    def leave_autocast() -> None:  # whose casts of weights stay until its outermost block ends
        if (left := _autocast_nesting() - nesting) > 0:
            torch.clear_autocast_cache()
            for _ in range(left):
                torch.autocast_decrement_nesting()

    undo(leave_autocast)
    undo(pop_modes)
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    undo(partial(torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth, depth))


@isolated
def quiet(undo: Block, grad: bool = True) -> None:
    """Restore random generators, suppress the output and logs of tracers, and switch gradients on or off.

    Other threads wait until the block ends.
    """
    undo.enter(PROCESS)
    numpy = sys.modules.get("numpy")  # if it is not imported, the model does not draw from it
    undo(partial(random.setstate, random.getstate()))
    if numpy is not None:
        undo(partial(numpy.random.set_state, numpy.random.get_state()))
    # A model that calls `torch.seed()` has to repeat itself, so that its runs can be compared.
    reseed, thread = torch.seed, threading.get_ident()

    @_disable_dynamo  # as torch.seed does
    def seed_from_generator() -> int:
        """Seed all generators with a number drawn from the default one. Other threads call the original function."""
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
    undo.enter(_muted("stdout"))  # a failing export prints its graph; the error has the reason
    undo.enter(_muted("stderr"))
    undo.enter(torch.set_grad_enabled(grad))
    undo.enter(_same_torch_stacks())  # undone first: the other steps would run inside what a tracer has left


@isolated
def eager(undo: Block) -> None:
    """Run code under `torch.compile` eagerly.

    Control flow operators (torch.cond, while_loop, scan) still compile their bodies, because weights that a body reads
    from its closure would get no gradients otherwise.
    """
    undo.enter(torch.compiler.set_stance("force_eager"))
    compile_body = getattr(higher_order, "_hop_compile_and_call", None)
    if compile_body is not None:  # torch 2.9 has none
        undo(partial(setattr, higher_order, "_hop_compile_and_call", compile_body))
        higher_order._hop_compile_and_call = partial(_with_compiler, compile_body)


def _with_compiler(compile_body: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a control flow operator outside the modes of this package, under which dynamo cannot compile its body."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("default"))
        while isinstance(mode := _python_dispatch._get_current_dispatch_mode(), OurMode):
            mode.unseen()
            stack.enter_context(_python_dispatch._pop_mode_temporarily())
        while isinstance(overrides._get_current_function_mode(), OurMode):
            stack.enter_context(overrides._pop_mode_temporarily())
        return compile_body(*args, **kwargs)


class OurMode:
    """Base class of the modes of this package, which only observe."""

    def unseen(self) -> None:
        """Prepare for code that this mode will not see."""


def seed(value: int = 0) -> None:
    """Seed the generators that `quiet` restores."""
    random.seed(value)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(value)
    seed_generators(value)
