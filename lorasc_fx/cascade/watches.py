"""Watches the loop that trains a cascade: gradients, optimizer steps, and DistributedDataParallel."""

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
    """State of one object in one process. A deep copy or a pickle of it starts empty."""

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
        """Suppress warnings with this code: the user asked for what they warn about."""
        self._codes.add(code)


class PendingWatch(Fresh):
    """Detects gradients that no optimizer step has consumed, by comparing version counters.

    An optimizer step writes a parameter in place, which increments its version. Each accumulation records the version.
    A gradient is pending while the parameter still has the recorded version.
    """

    def __init__(self) -> None:
        self.at_backward: Callable[[], None] | None = None  # called once, when the next gradient arrives
        self._handles: list[Any] = []
        self._versions: dict[int, int] = {}  # of parameters, when their last gradient arrived
        # Weak references: a parameter's hook refers to this watch, and the garbage collector does not see such hooks.
        self._watched = weakref.WeakValueDictionary[int, nn.Parameter]()

    def arm(self, parameters: Iterable[nn.Parameter]) -> None:
        """Watch these parameters too."""
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
    """Calls a method after each step of any optimizer, in any loop, compiled or not. Steps that a loss scaler skips do
    not count.

    One global hook of torch serves the whole process and is never removed. torch iterates over its hooks during a step
    and would raise if garbage collection removed one meanwhile.
    """

    _armed: ClassVar[weakref.WeakKeyDictionary[StepWatch, weakref.WeakMethod[Any]]] = weakref.WeakKeyDictionary()
    """The watches in the order in which they were armed, which is the same on all ranks."""
    _hook: ClassVar[Any] = None

    def arm(self, method: Callable[[torch.optim.Optimizer], None]) -> None:
        """Call this method after each optimizer step, as long as its object lives."""
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
    """Checks that DistributedDataParallel knows all trained parameters: it averages the gradients of no others.

    The wrapper is found while its forward runs, through any number of other wrappers.
    """

    def __init__(self) -> None:
        self._wrapper: Callable[[], Any] = lambda: None  # weak references
        self._outdated: Callable[[], Any] = lambda: None
        self._compared: Callable[[], Any] = lambda: None

    def check(self, trainable: Callable[[], Mapping[str, nn.Parameter]]) -> None:
        """Raise StateError if a parameter was added or changed its shape after the model was wrapped."""
        wrapper = DistributedDataParallel._active_ddp_module
        if wrapper is None:
            return
        if self._outdated() is wrapper:
            raise StateError(
                "DistributedDataParallel wrapped the cascade before a stage changed the ranks of its branches, so its "
                "gradient buffers have the old shapes. Wrap the cascade again",
                code="wrapper-not-supported",
            )
        known = {id(parameter) for parameter in wrapper._module_parameters}
        late = [name for name, parameter in trainable().items() if id(parameter) not in known]
        if late:
            raise StateError(
                f"{named(late)} came with a graph that was captured after DistributedDataParallel wrapped the cascade, "
                "so their gradients would not be averaged over the processes. Before wrapping it, call the cascade "
                "once in each mode and with each kind of arguments, or wrap it again",
                code="wrapper-not-supported",
            )
        self._wrapper = weakref.ref(wrapper)

    def new_group(self) -> Any:
        """Return the process group of the running wrapper, once per wrapper; None otherwise."""
        wrapper = DistributedDataParallel._active_ddp_module
        if wrapper is None or self._compared() is wrapper:
            return None
        self._compared = weakref.ref(wrapper)
        return wrapper.process_group

    def restorer(self) -> Callable[[], None]:
        """Return a function that restores whether the wrapper is outdated."""
        return partial(setattr, self, "_outdated", self._outdated)

    def outdate(self) -> None:
        """Record that parameters no longer fit the buffers of the current wrapper."""
        self._outdated = self._wrapper
