"""What a cascade sees of the loop that trains it: gradients, optimizer steps, and a wrapper for many processes."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook

from lorasc_fx.errors import StateError, named, warn
from lorasc_fx.plan import Plan
from lorasc_fx.shards import local

_ATTENTION = torch._C._nn.scaled_dot_product_attention
"""What torch.nn.functional has by default."""

_ENGINES = {
    "DeepSpeedEngine": "deepspeed.runtime.engine",
    "FullyShardedDataParallel": "torch.distributed.fsdp.fully_sharded_data_parallel",
}
"""Wrappers that keep the parameters themselves, by the name of the class, with their modules."""


class Fresh:
    """What belongs to one object in one process: a copy of it (deepcopy, pickle) is a new one."""

    def __reduce__(self) -> tuple[type[Fresh], tuple[()]]:
        return (type(self), ())


class Warned(Fresh):
    """Gives each warning once a cascade."""

    def __init__(self) -> None:
        self._codes: set[str] = set()

    def __contains__(self, code: str) -> bool:
        return code in self._codes

    def once(self, code: str, message: str) -> None:
        """Warn, unless the warning of this code was given."""
        if code not in self._codes:
            self._codes.add(code)
            warn(message, code)

    def accept(self, code: str) -> None:
        """Never give the warning of this code: the user asked for what it warns of."""
        self._codes.add(code)


class PendingWatch(Fresh):
    """Detects gradients that no optimizer step has consumed, by comparing version counters, without the optimizer.

    A parameter's version grows when a step writes it. Each accumulation notes the version; a gradient is pending while
    the parameter is still at the noted one.
    """

    STEPS: ClassVar[int] = 64
    """Optimizer steps on one uncleared gradient before the warning: no training wants that."""
    BACKWARDS: ClassVar[int] = 1024
    """Backwards without a step before the warning: gradients of fewer may be accumulated on purpose."""

    def __init__(self) -> None:
        self.at_backward: Callable[[], None] | None = None  # called once, when the next gradient arrives
        self._handles: list[Any] = []
        self._seen: dict[int, int] = {}
        # Weak: a parameter's hook holds this watch, and Python's garbage collector does not look into hooks of tensors.
        self._watched = weakref.WeakValueDictionary[int, nn.Parameter]()
        self._counted = 0  # id of the parameter whose gradient is counted
        self._version = self._steps = self._backwards = 0
        self._check: Any = None
        self._warned = False

    def arm(self, parameters: Iterable[nn.Parameter]) -> None:
        """Watch these parameters as well."""
        for parameter in parameters:
            if id(parameter) not in self._watched:
                self._watched[id(parameter)] = parameter
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._accumulated))

    @property
    def accumulated(self) -> bool:
        """Whether some watched parameter has had a gradient."""
        return bool(self._seen)

    def disarm(self) -> None:
        """Remove all hooks."""
        for handle in (*self._handles, self._check):
            if handle is not None:
                handle.remove()
        self._handles, self._watched, self._seen = [], weakref.WeakValueDictionary(), {}
        self._counted, self._check = 0, None

    def restorer(self) -> Callable[[], None]:
        """Return a function that restores this state: which parameters are watched, and what was noted of them."""
        watched, seen = tuple(self._watched.values()), dict(self._seen)

        def restore() -> None:
            self.disarm()
            self.arm(watched)
            self._seen = dict(seen)

        return restore

    def waiting(self, parameters: Mapping[str, nn.Parameter]) -> list[str]:
        """Return the names of the parameters whose gradient, if it is not zero, no step has used."""
        return [
            name
            for name, parameter in parameters.items()
            if parameter.grad is not None
            and self._seen.get(id(parameter)) == parameter._version
            and bool(local(parameter.grad).any())
        ]

    def note(self, parameter: nn.Parameter) -> None:
        """Note that the gradient that the parameter holds now waits for a step."""
        self._seen[id(parameter)] = parameter._version

    def _accumulated(self, parameter: nn.Parameter) -> None:
        if self.at_backward is not None:
            check, self.at_backward = self.at_backward, None
            check()
        if parameter.grad is not None and self._counted in (0, id(parameter)) and not self._warned:
            self._count(parameter, parameter.grad._version)
        self.note(parameter)

    def _count(self, parameter: nn.Parameter, version: int) -> None:
        """Count how often in a row the gradient of one parameter was added to without being cleared.

        `zero_grad` replaces a gradient by None, so that the next one is a new tensor, of a low version. Clipping and
        `zero_grad(set_to_none=False)` both write it in place; only its value tells them apart, which is read once,
        before the warning.
        """
        before, self._version = self._version, version
        if not self._counted or version <= before:  # this one is cleared; the next that gets a gradient may not be
            self._counted = 0 if self._counted else id(parameter)
            self._steps = self._backwards = 0
            return
        self._backwards += 1
        self._steps += self._seen.get(id(parameter)) != parameter._version
        if self._check is None and (self._steps >= self.STEPS or self._backwards >= self.BACKWARDS):
            self._check = parameter.register_hook(self._check_cleared)

    def _check_cleared(self, _: torch.Tensor) -> None:
        """Warn if the gradient to which a backward is about to add is not zero."""
        self._check.remove()
        parameter, steps, backwards = self._watched.get(self._counted), self._steps, self._backwards
        self._check, self._steps, self._backwards = None, 0, 0
        if parameter is None or parameter.grad is None or not bool(local(parameter.grad).any()):
            return
        self._warned = True
        what = f"{steps} optimizer steps" if steps else f"{backwards} backwards without an optimizer step"
        warn(
            f"gradients of a cascade were not cleared in {what}, so that all of them add up. Call "
            "optimizer.zero_grad() with an optimizer made of cascade.param_groups(lr=...), or cascade.zero_grad(): "
            "zero_grad of the model that was adapted does not reach the branches",
            "gradients-not-cleared",
        )


class StepWatch(Fresh):
    """Calls a method after each step of any optimizer, by torch's global step hook, in any loop, compiled or not.

    One hook serves the whole process and is never removed: torch iterates over its hooks during a step, and would raise
    if garbage collection removed one meanwhile. A step that a loss scaler skips does not count.
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


def callers() -> Iterator[FrameType]:
    """Yield the frames of what has called, innermost first."""
    frame = sys._getframe(1).f_back  # of the one that iterates
    while frame is not None:
        yield frame
        frame = frame.f_back


class Surrounded(Protocol):
    """What `Surroundings` asks of a run."""

    plan: Plan
    branches: nn.ModuleDict
    grouped: bool

    @property
    def is_sharded(self) -> bool:
        """Whether a process holds only its share of the weights."""

    def trainable(self) -> Mapping[str, nn.Parameter]:
        """Return what is trained, by name."""

    def check_ranks(self, call: str, group: Any) -> None:
        """Raise StateError if the ranks of a process group are not alike."""


class Surroundings(Fresh):
    """Checks what is around the calls of a cascade: once for each wrapper, stage, and set of branches.

    DistributedDataParallel averages the gradients of the parameters that it was made with, and of no others. It is
    found while its forward runs, through any number of wrappers.
    """

    def __init__(self) -> None:
        self._checked: dict[bool, tuple[object, ...]] = {}  # by gradient mode
        self._wrapper: Callable[[], Any] = lambda: None
        self._outdated: Callable[[], Any] = lambda: None
        self._compared: Callable[[], Any] = lambda: None

    def check(self, run: Surrounded, kind: type[nn.Module]) -> None:
        """Check what is around a call, unless it was checked in this gradient mode and stage.

        Before the first training call through a DistributedDataParallel the ranks are compared: it has given all of
        them the first one's parameters, but not its W0.

        Args:
            run: of the cascade.
            kind: the class of the cascade.

        Raises:
            StateError: context parallelism, a wrapper that cuts, copies or lacks parameters, or ranks that differ.
        """
        wrapper, grad = DistributedDataParallel._active_ddp_module, torch.is_grad_enabled()
        reference = None if wrapper is None else weakref.ref(wrapper)
        attention = F.scaled_dot_product_attention
        around = (reference, attention, kind, run.plan.stage, len(run.branches), run.grouped)
        if self._checked.get(grad) == around:
            return
        self.check_replicas(run.trainable)
        _check_attention()
        if grad and not run.is_sharded:
            _check_engines(kind)
        self._checked[grad] = around
        if wrapper is not None and grad and self._compared() is not wrapper:
            self._compared = weakref.ref(wrapper)
            run.check_ranks("DistributedDataParallel", wrapper.process_group)

    def check_replicas(self, trainable: Callable[[], Mapping[str, nn.Parameter]]) -> None:
        """Raise StateError if a parameter came after the wrapper whose forward runs, or has another shape since."""
        wrapper = DistributedDataParallel._active_ddp_module
        if wrapper is None:
            return
        if self._outdated() is wrapper:
            raise StateError(
                "DistributedDataParallel wrapped the cascade before a stage changed the ranks of its branches, and "
                "adds up gradients in buffers of the old shapes: wrap it anew",
                code="wrapper-not-supported",
            )
        known = {id(parameter) for parameter in wrapper._module_parameters}
        late = [name for name, parameter in trainable().items() if id(parameter) not in known]
        if late:
            raise StateError(
                f"{named(late)} came with a graph that was made after DistributedDataParallel wrapped "
                "the cascade, which would not average their gradients over the processes: call the cascade once in "
                "each mode and with each kind of arguments before you wrap it, or wrap it anew",
                code="wrapper-not-supported",
            )
        self._wrapper = weakref.ref(wrapper)

    def outdate(self) -> None:
        """Note that parameters have other shapes than the buffers of the present wrapper."""
        self._outdated, self._checked = self._wrapper, {}


def _check_attention() -> None:
    """Refuse torch's context parallelism, which exchanges the attention that Python calls, and not a graph's."""
    attention = F.scaled_dot_product_attention
    if attention is not _ATTENTION and str(getattr(attention, "__module__", "")).startswith("torch.distributed"):
        raise StateError(
            "forward: inside torch's context_parallel, which splits the attention of a running model, and not that of "
            "a graph: each rank would attend to its own part alone. Leave it, "
            "and use activation checkpointing for long sequences",
            code="wrapper-not-supported",
        )


def _check_engines(cascade: type[nn.Module]) -> None:
    """Refuse a training call of a cascade, of this class, whose parameters FSDP or DeepSpeed cuts or copies."""
    engine = "fully_shard" if hasattr(cascade, "_get_fsdp_state") else None
    for frame in callers() if any(name in sys.modules for name in _ENGINES.values()) else ():
        kinds = type(frame.f_locals.get("self")).__mro__ if frame.f_code.co_name == "forward" else ()
        engine = next((kind.__name__ for kind in kinds if _ENGINES.get(kind.__name__) == kind.__module__), engine)
    if engine is not None:
        raise StateError(
            f"forward: {engine} holds the cascade, and has cut or copied its parameters, so that no transition could "
            "write them. Call lorasc_fx.parallel.fsdp.shard(cascade) instead, in a training loop of yours (with "
            "accelerate: prepare the data, not the cascade), or wrap the cascade by DistributedDataParallel",
            code="wrapper-not-supported",
        )
