"""Hooks into the training loop of a cascade: gradients, optimizer steps, and DistributedDataParallel."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook

from lorasc_fx.errors import StateError, named, warn
from lorasc_fx.shards import local


class Fresh:
    """Base class for state that belongs to one object in one process. A deep copy or a pickle starts empty."""

    def __reduce__(self) -> tuple[type[Fresh], tuple[()]]:
        return (type(self), ())


class Warned(Fresh):
    """Gives each warning at most once per cascade."""

    def __init__(self) -> None:
        self._codes: set[str] = set()

    def __contains__(self, code: str) -> bool:
        return code in self._codes

    def once(self, code: str, message: str) -> None:
        """Warn, unless a warning with this code was given or accepted before."""
        if code not in self._codes:
            self._codes.add(code)
            warn(message, code)

    def forget(self, code: str) -> None:
        """Allow this warning once more."""
        self._codes.discard(code)

    def accept(self, code: str) -> None:
        """Never give warnings with this code: they do not apply to this cascade."""
        self._codes.add(code)


class PendingWatch(Fresh):
    """Detects gradients that no optimizer step has consumed, by comparing version counters.

    An optimizer step writes a parameter in place, which increments its version counter. When a gradient is accumulated,
    the version of the parameter is recorded. The gradient is pending while the parameter has the recorded version.
    """

    def __init__(self) -> None:
        self.at_backward: Callable[[], None] | None = None  # called once, when the next gradient is accumulated
        self._handles: list[Any] = []
        self._versions: dict[int, int] = {}  # recorded versions, by the id of the parameter
        # Weak references, because a parameter's hook refers to this watch, and Python cannot collect such a cycle.
        self._watched = weakref.WeakValueDictionary[int, nn.Parameter]()

    def arm(self, parameters: Iterable[nn.Parameter]) -> None:
        """Start watching these parameters. Parameters that are watched already stay watched."""
        for parameter in parameters:
            if id(parameter) not in self._watched:
                self._watched[id(parameter)] = parameter
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._accumulated))

    @property
    def accumulated(self) -> bool:
        """Whether a watched parameter has ever received a gradient."""
        return bool(self._versions)

    def disarm(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._watched, self._versions = [], weakref.WeakValueDictionary(), {}

    def restorer(self) -> Callable[[], None]:
        """Return a function that restores which parameters are watched and the versions recorded for them."""
        watched, versions = tuple(self._watched.values()), dict(self._versions)

        def restore() -> None:
            self.disarm()
            self.arm(watched)
            self._versions = dict(versions)

        return restore

    def waiting(self, parameters: Mapping[str, nn.Parameter]) -> list[str]:
        """Return the names of the parameters with a nonzero gradient that no step has consumed."""
        return [
            name
            for name, parameter in parameters.items()
            if parameter.grad is not None
            and self._versions.get(id(parameter)) == parameter._version
            and bool(local(parameter.grad).any())
        ]

    def _accumulated(self, parameter: nn.Parameter) -> None:
        if self.at_backward is not None:
            check, self.at_backward = self.at_backward, None
            check()
        self.note(parameter)

    def note(self, parameter: nn.Parameter) -> None:
        """Record that the current gradient of a parameter waits for a step."""
        self._versions[id(parameter)] = parameter._version


class StepWatch(Fresh):
    """Calls a method after each step of any optimizer in the process, compiled or not.

    A step that a loss scaler skips does not count. One global hook serves the whole process and is never removed: torch
    iterates over its hooks during a step, and would raise if garbage collection removed one meanwhile.
    """

    _armed: ClassVar[weakref.WeakKeyDictionary[StepWatch, weakref.WeakMethod[Any]]] = weakref.WeakKeyDictionary()
    """The method of each watch, in the order of `arm`: the same on all ranks, because methods communicate."""
    _hook: ClassVar[Any] = None

    def arm(self, method: Callable[[torch.optim.Optimizer], None]) -> None:
        """Call this bound method after each optimizer step, until its object is garbage collected."""
        StepWatch._hook = StepWatch._hook or register_optimizer_step_post_hook(StepWatch._step)
        StepWatch._armed[self] = weakref.WeakMethod(method)

    def disarm(self) -> None:
        """Stop calling the method."""
        StepWatch._armed.pop(self, None)

    @staticmethod
    def _step(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        for method in tuple(StepWatch._armed.values()):
            if (call := method()) is not None:
                call(optimizer)


class Replicas(Fresh):
    """Checks that DistributedDataParallel knows all trained parameters. It averages the gradients of no others.

    The wrapper is found while its forward runs, even if there are other wrappers around it.
    """

    def __init__(self) -> None:
        # Weak references to wrappers.
        self._wrapper: Callable[[], Any] = lambda: None  # the wrapper of the last call
        self._outdated: Callable[[], Any] = lambda: None  # a wrapper whose buffers no longer fit
        self._compared: Callable[[], Any] = lambda: None  # the wrapper whose ranks were compared

    def check(self, trainable: Callable[[], Mapping[str, nn.Parameter]]) -> None:
        """Raise StateError if a parameter was added or changed its shape after the model was wrapped."""
        wrapper = DistributedDataParallel._active_ddp_module
        if wrapper is None:
            return
        if self._outdated() is wrapper:
            raise StateError(
                "DistributedDataParallel wrapped the cascade before a stage changed the ranks of its branches, so its "
                "gradient buffers have the old shapes. Wrap the cascade again: DistributedDataParallel(cascade)",
                code="wrapper-not-supported",
            )
        wrapped = {id(parameter) for parameter in wrapper._module_parameters}
        late = [name for name, parameter in trainable().items() if id(parameter) not in wrapped]
        if late:
            raise StateError(
                f"{named(late)} came with a graph that was captured after DistributedDataParallel had wrapped the "
                "cascade, so their gradients would not be averaged over the processes. Wrap the cascade again. Or call "
                "it once in each mode and with each kind of arguments before you wrap it",
                code="wrapper-not-supported",
            )
        self._wrapper = weakref.ref(wrapper)

    def new_group(self) -> Any:
        """Return the process group of the running wrapper the first time it is seen, otherwise None."""
        wrapper = DistributedDataParallel._active_ddp_module
        if wrapper is None or self._compared() is wrapper:
            return None
        self._compared = weakref.ref(wrapper)
        return wrapper.process_group

    def restorer(self) -> Callable[[], None]:
        """Return a function that undoes `outdate`."""
        return partial(setattr, self, "_outdated", self._outdated)

    def outdate(self) -> None:
        """Record that parameters no longer have the shapes of the current wrapper's gradient buffers."""
        self._outdated = self._wrapper
