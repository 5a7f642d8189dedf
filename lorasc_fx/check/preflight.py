"""The preflight: run the eager model, observe what a tracer misses, and compare a graph with it.

A tracer sees neither values nor gradients. It misses that the model refuses an input, that Python sets an attribute in
each call, and that a custom autograd.Function has its own backward. It may also miss a write to a buffer, a tensor
hook, a branch on `requires_grad`, or the type of an output. So the model runs first, and each whole graph is compared
with it, in outputs and gradients, before it is accepted.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorasc_fx.check.guards import Guards
from lorasc_fx.check.isolation import (
    WRITTEN,
    Attributes,
    call_recorder,
    fake_mode,
    isolation,
    same_attributes,
    same_values,
    written_by,
)
from lorasc_fx.check.observe import Difference, Observed, difference_of, observe, observe_or_none, one_line, tensors_in
from lorasc_fx.check.process_state import eager, quiet, seed
from lorasc_fx.check.projections import projected
from lorasc_fx.errors import CaptureError
from lorasc_fx.signature import copy_inputs
from lorasc_fx.util.undo import Block, isolated

MAX_MODULE_ERROR = 1e-3
"""Relative difference between a module's output and that of an op of the graph that are taken as the same."""


class Disagreement(RuntimeError):
    """A graph that computes something else than its model."""

    def __init__(self, graph: Callable[..., Any], difference: Difference, grad: bool) -> None:
        super().__init__(f"its graph does something else than the model: {difference.sentence}")
        self.graph, self.weights, self.grad = graph, difference.weights, grad


RECOMPUTES = (
    "the model recomputes in backward what it does not keep (gradient checkpointing), and a traced graph would keep it "
    "all"
)


@dataclass
class Preflight:
    """What runs of the eager model showed.

    Args:
        seen: the run that graphs are compared with. A later run replaces it if gradients or values are needed.
        restless: names of attributes that Python sets to new values in each call.
        draws: whether its Python draws from the generators of Python or numpy without seeding them.
        assigned: holder and key of the Python state that forward sets in each call, to whatever value.
        written: tensors of that state that forward writes into in each call.
        grad: gradient mode that the graph is for; None if the model computes the same in both modes.
    """

    seen: Observed
    restless: tuple[str, ...] = ()
    draws: bool = False
    assigned: frozenset[tuple[str, Any]] = frozenset()
    written: tuple[torch.Tensor, ...] = ()
    grad: bool | None = None

    @property
    def obstacles(self) -> list[str]:
        """Why a whole graph cannot replace the model."""
        obstacles = [
            f"{name} has a forward hook that returns nothing, and what it does besides, such as keeping outputs, no "
            "graph repeats"
            for name in self.seen.observers
        ]
        obstacles += [
            f"the model sets its attribute {name} at each call, which no graph repeats" for name in self.restless
        ]
        if self.draws:
            obstacles.append("the model draws random numbers in Python, which the graph would hold as constants")
        obstacles += [f"the model uses {function}" for function in self.seen.functions]
        return obstacles + [RECOMPUTES] * self.seen.recomputes

    def check(self) -> None:
        """Raise RuntimeError if a whole graph cannot replace the model."""
        if self.obstacles:
            raise RuntimeError(self.obstacles[0])


@isolated
def _trial(undo: Block, model: nn.Module, grad: bool = True) -> Attributes:
    """Leave the model and the process unchanged by runs in the block. Returns a snapshot of its Python state."""
    undo.enter(quiet(grad))
    undo.enter(eager())
    undo.enter(fake_mode(model))
    return undo.enter(same_attributes(model))


def run_preflight(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], grad: bool = True) -> Preflight:
    """Run the model and observe what it does. The model is left unchanged.

    Args:
        model: its parameters require gradients as in training.
        args, kwargs: of the call.
        grad: gradient mode of the call. It matters only if the model computes something else in the other mode.

    Raises:
        CaptureError: the model itself raises.
    """
    known = model in WRITTEN
    try:
        with _trial(model, grad) as attributes:
            guards = Guards(model)
            seen = observe(model, model, args, kwargs)
            if written_by(model):  # known only now, and observed from the next run on
                attributes.restore()
                seen = observe(model, model, args, kwargs)
            states = _generators()
            restless: list[str] = []
            assigned: set[tuple[str, Any]] = set()
            written: list[torch.Tensor] = []
            if guards.changes():
                guards = Guards(model)  # again, because a first call may fill caches
                _run(model, args, kwargs)
                changes, written = guards.changes(), guards.written()
                restless = sorted(change.entry for change in changes if change.is_new)
                assigned = {(change.holder, change.key) for change in changes}
            seed()  # what a run that draws from the generators of Python or numpy has moved
            moved = [index for index, state in enumerate(_generators()) if state != states[index]]
            draws = False
            if moved:  # a model that seeds them itself leaves the same state under another seed
                _run(model, args, kwargs, start=1)
                again = _generators()
                draws = any(states[index] != again[index] for index in moved)
            attributes.restore()
            with torch.set_grad_enabled(not grad):
                other = observe_or_none(model, args, kwargs)
            if other is not None and not seen.is_whole and difference_of(other, seen, gradients=False) is not None:
                seen = observe(model, model, args, kwargs, whole=True)  # the digests differ: compare the values
                with torch.set_grad_enabled(not grad):
                    other = observe_or_none(model, args, kwargs, whole=True)
            depends = other is None or difference_of(other, seen, gradients=False) is not None
            if not depends and other is not None and not grad:
                seen = other  # it has gradients
            mode = grad if depends else None
            return Preflight(seen, tuple(restless), draws, frozenset(assigned), tuple(written), mode)
    except (MemoryError, CaptureError):
        raise
    except Exception as fault:
        if not known:  # the first run has not seen everything that forward writes
            WRITTEN.pop(model, None)
        without_values = any(isinstance(parameter, FakeTensor) for parameter in model.parameters())
        advice = ", or give the model its weights before adapt: on the meta device nothing can look at values"
        raise CaptureError(
            f"{type(model).__name__} itself refuses the example inputs: {one_line(fault)}; "
            f"give args and kwargs with which the model runs{advice if without_values else ''}",
            code="model-refuses-inputs",
        ) from fault


def check_agrees(
    graph: Callable[..., Any], preflight: Preflight, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Compare a graph with its model on one call: types, outputs, buffers, arguments after the call, and gradients.

    Raises:
        Disagreement: they differ by more than rounding, and the model repeats itself under one seed.
    """
    grad = preflight.grad is not False

    def run(call: Callable[..., Any], whole: bool, **options: Any) -> Observed:
        with _trial(model, grad):
            return observe(call, model, args, kwargs, whole=whole, **options)

    try:
        ours = run(graph, preflight.seen.is_whole, like=preflight.seen)
    except MemoryError:
        raise
    except Exception as fault:
        raise Disagreement(graph, Difference(f"it raises {one_line(fault)}"), grad) from fault
    difference = difference_of(ours, preflight.seen)
    if difference is not None and not (ours.is_whole and preflight.seen.is_whole):
        # The digests differ. Compare the values, which may differ by rounding.
        preflight.seen = run(model, True)
        ours = run(graph, True, like=preflight.seen)
        difference = difference_of(ours, preflight.seen)
    if difference is None and preflight.seen.autograd is not None and ours.autograd != preflight.seen.autograd:
        # The graph ran a backward pass, because its autograd graph is another one. The model has to do so too.
        preflight.seen = run(model, ours.is_whole, backward=True)
        difference = difference_of(ours, preflight.seen)
    if difference is None:
        return
    again = run(model, preflight.seen.is_whole, backward=True)
    if difference_of(again, preflight.seen) is None:
        raise Disagreement(graph, difference, grad)


def agrees(graph: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a graph raises, or computes what its model computes, on one call without gradients."""
    try:
        with _trial(model, grad=False):
            ours = observe(graph, model, args, kwargs, whole=True)
    except MemoryError:
        raise
    except Exception:
        return True
    with _trial(model, grad=False):
        theirs = observe_or_none(model, args, kwargs, whole=True)
    return theirs is not None and difference_of(ours, theirs, gradients=False) is None


def first_difference(fault: Disagreement, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Return the first module called whose output the graph does not compute, or whose weights have other gradients.

    Returns the model's class if that module cannot be found.
    """
    try:
        first = _first_difference(fault, model, args, kwargs)
    except MemoryError:
        raise
    except Exception:  # for example, dynamo compiles a call of a module, and cannot trace the hooks
        first = ""
    return f"{first} ({type(model.get_submodule(first)).__name__})" if first else type(model).__name__


def _first_difference(fault: Disagreement, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Return the path of that module, or ""."""
    entered: list[str] = []
    outputs: list[tuple[str, list[torch.Tensor]]] = []

    def enters(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        entered.append(path)

    def leaves(path: str, module: nn.Module, output: Any) -> None:
        floating = [value for value in tensors_in(output) if value.is_floating_point() or value.is_complex()]
        outputs.append((path, [projected(value) for value in floating]))

    with isolation(model, args, kwargs, call_recorder(model, enters, leaves), grad=fault.grad) as (inputs, named):
        model(*inputs, **named)
    if fault.weights:
        owners = {name.rpartition(".")[0] for name in fault.weights}
        return next((name for name in entered if name and name in owners), "")
    results = _OpOutputs()
    observed = isolation(model, args, kwargs, results, grad=fault.grad)
    with observed as (inputs, named), contextlib.suppress(Exception):  # what it computes before it raises counts
        fault.graph(*inputs, **named)
    return next((name for name, parts in outputs if name and not all(map(results.has, parts))), "")


def _generators() -> tuple[Any, Any]:
    """Return the states of the generators of Python and numpy."""
    numpy = sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy is not None else ()
    return random.getstate(), [part.tolist() if hasattr(part, "tolist") else part for part in state]


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], start: int = 0) -> Any:
    inputs, named = copy_inputs(args, kwargs)
    with same_values(model):
        seed(start)
        return model(*inputs, **named)


class _OpOutputs(TorchDispatchMode):
    """Records projections of the outputs of all ops of a run."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._projections: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        real = [tensor for tensor in tensors_in(output) if not isinstance(tensor, FakeTensor)]  # a graph may hold fakes
        self._projections += [projected(value) for value in real if value.is_floating_point() or value.is_complex()]
        return output

    def has(self, value: torch.Tensor) -> bool:
        """Whether an op has computed a tensor with these projections."""
        return any(bool((other - value).norm() <= MAX_MODULE_ERROR * value.norm()) for other in self._projections)
