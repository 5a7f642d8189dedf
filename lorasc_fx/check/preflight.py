"""The preflight: run the eager model before a capture, and compare each graph with this run.

A tracer sees neither values nor gradients. It does not notice that the model raises on an input, that Python code sets
an attribute in each call, or that an autograd.Function has a custom backward. It may also miss a write to a buffer, a
tensor hook, an `if` on `requires_grad`, or the type of an output. So the model runs first, and a graph is accepted only
if it computes the same outputs and gradients.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorasc_fx.check.guards import Guards
from lorasc_fx.check.isolation import (
    WRITTEN,
    Attributes,
    fake_mode,
    restored_attributes,
    restored_values,
    written_by,
)
from lorasc_fx.check.observe import Observed, attempt, difference_of, observe, one_line
from lorasc_fx.check.process_state import eager, quiet, seed
from lorasc_fx.errors import CaptureError
from lorasc_fx.signature import copy_inputs
from lorasc_fx.util.environment import OUT_OF_MEMORY
from lorasc_fx.util.undo import Block, isolated


class Disagreement(RuntimeError):
    """Raised if a graph computes something else than its model."""

    def __init__(self, difference: str) -> None:
        super().__init__(f"its graph does something else than the model: {difference}")


RECOMPUTES = (
    "the model uses gradient checkpointing, which recomputes activations in backward, and a traced graph would store "
    "all activations"
)
"""Why a model with gradient checkpointing gets no graph."""


@dataclass
class Preflight:
    """The results of the preflight.

    Args:
        seen: the execution that graphs are compared with. If it lacks gradients, `check_agrees` may replace it.
        changing: paths of the attributes that forward sets to a different value in each call.
        draws: whether forward draws from the random generators of Python or numpy without seeding them.
        assigned: (holder name, key) of each entry that forward sets in each call, even if the new value is equal.
        written: tensors in attributes that forward writes into in each call.
        grad: gradient mode for which a graph is valid. None if the model computes the same in both modes.
    """

    seen: Observed
    changing: tuple[str, ...] = ()
    draws: bool = False
    assigned: frozenset[tuple[str, Any]] = frozenset()
    written: tuple[torch.Tensor, ...] = ()
    grad: bool | None = None

    @property
    def obstacles(self) -> list[str]:
        """The reasons why one graph cannot replace the model."""
        obstacles = [
            f"{name} has a forward hook that returns None, and a graph would not repeat its side effects, such as "
            "storing outputs"
            for name in self.seen.observers
        ]
        obstacles += [
            f"the model sets its attribute {name} in each call, which a graph does not repeat" for name in self.changing
        ]
        if self.draws:
            obstacles.append("the model draws random numbers in Python, which the graph would hold as constants")
        obstacles += [f"the model uses {function}" for function in self.seen.functions]
        return obstacles + [RECOMPUTES] * self.seen.recomputes

    def check(self) -> None:
        """Raise RuntimeError if one graph cannot replace the model."""
        if self.obstacles:
            raise RuntimeError(self.obstacles[0])


@isolated
def trial(undo: Block, model: nn.Module, grad: bool) -> Attributes:
    """Context manager: run the model eagerly, and restore model and process. Returns a snapshot of its attributes."""
    undo.enter(quiet(grad))
    undo.enter(eager())
    undo.enter(fake_mode(model))
    return undo.enter(restored_attributes(model))


def run_preflight(
    model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], grad: bool = True
) -> Preflight:
    """Run the model on example inputs, and observe the executions. The model is left unchanged.

    Args:
        model: the model. The parameters that training changes must require gradients.
        args, kwargs: example inputs.
        grad: gradient mode of the call. It matters only if the model computes something else in the other mode.

    Raises:
        CaptureError: the model itself raises.
    """
    has_executed = model in WRITTEN
    try:
        with trial(model, grad) as attributes:
            guards = Guards(model)
            seen = observe(model, model, args, kwargs)
            if written_by(model):  # only now are these parameters known, so run again to record their values
                attributes.restore()
                seen = observe(model, model, args, kwargs)
            states = generators()
            # Does forward set attributes in each call? The first call may only have filled caches, so run again.
            changing: list[str] = []
            assigned: set[tuple[str, Any]] = set()
            written: list[torch.Tensor] = []
            if guards.changes():
                guards = Guards(model)
                _execute(model, args, kwargs)
                changes, written = guards.changes(), guards.written()
                changing = sorted(change.entry for change in changes if change.is_new)
                assigned = {(change.holder, change.key) for change in changes}
            # Does forward draw from the generators of Python or numpy? If it seeds them itself, their state after the
            # call does not depend on our seed. Then each call draws the same numbers, and they may be constants.
            seed()
            moved = [index for index, state in enumerate(generators()) if state != states[index]]
            draws = False
            if moved:
                _execute(model, args, kwargs, seed_value=1)
                again = generators()
                draws = any(states[index] != again[index] for index in moved)
            # Does the result depend on the gradient mode? An execution without gradients does not show the gradients.
            mode = None
            if seen.asks_grad_mode or not grad:
                attributes.restore()
                with torch.set_grad_enabled(not grad):
                    flipped, _ = attempt(observe, model, model, args, kwargs)  # some models raise in one of the modes
                if flipped is None or difference_of(flipped, seen, gradients=False) is not None:
                    mode = grad
                elif not grad:
                    seen = flipped
            return Preflight(seen, tuple(changing), draws, frozenset(assigned), tuple(written), mode)
    except (*OUT_OF_MEMORY, CaptureError):
        raise
    except Exception as fault:
        if not has_executed:  # the first execution stopped early, so WRITTEN may lack some written parameters
            WRITTEN.pop(model, None)
        raise CaptureError(
            f"{type(model).__name__} itself raises on the example inputs: {one_line(fault)}. "
            f"Pass args and kwargs with which the model runs",
            code="model-refuses-inputs",
        ) from fault


def check_agrees(
    graph: Callable[..., object],
    preflight: Preflight,
    model: nn.Module,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
) -> None:
    """Compare a graph with its model on one call: types, outputs, buffers, arguments after the call, and gradients.

    Raises:
        Disagreement: they differ by more than rounding, although two executions of the model under one seed agree.
    """
    grad = preflight.grad is not False

    def observed(call: Callable[..., Any], **options: Any) -> Observed:
        with trial(model, grad):
            return observe(call, model, args, kwargs, **options)

    try:
        computed = observed(graph, reference=preflight.seen)
    except OUT_OF_MEMORY:
        raise
    except Exception as fault:
        raise Disagreement(f"it raises {one_line(fault)}") from fault
    difference = difference_of(computed, preflight.seen)
    if difference is None and preflight.seen.autograd is not None and computed.autograd != preflight.seen.autograd:
        # The autograd graphs differ, so the graph has run backward, but the model has not. Run its backward too.
        preflight.seen = observed(model, backward=True)
        difference = difference_of(computed, preflight.seen)
    if difference is None:
        return
    # The graph is wrong only if the model is deterministic under one seed.
    again = observed(model, backward=True)
    if difference_of(again, preflight.seen) is None:
        raise Disagreement(difference)


def agrees(
    graph: Callable[..., object], model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> bool:
    """Whether a graph computes the same as its model on one call without gradients. True if the graph raises."""
    with trial(model, grad=False):
        computed, _ = attempt(observe, graph, model, args, kwargs)
    if computed is None:
        return True
    with trial(model, grad=False):
        expected, _ = attempt(observe, model, model, args, kwargs)
    return expected is not None and difference_of(computed, expected, gradients=False) is None


def generators() -> tuple[Any, Any]:
    """Return the states of the random generators of Python and numpy, in a form that can be compared by `==`."""
    numpy = sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy is not None else ()
    return random.getstate(), [part.tolist() if hasattr(part, "tolist") else part for part in state]


def _execute(model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], seed_value: int = 0) -> None:
    """Run the model under a seed. Restores buffers and parameters. Attributes stay as forward has set them."""
    inputs, named = copy_inputs(args, kwargs)
    with restored_values(model):
        seed(seed_value)
        model(*inputs, **named)
