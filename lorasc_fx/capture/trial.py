"""What a run of the eager model shows that a tracer does not see, and whether a graph computes what the model computes.

A tracer sees no values and no gradients: it lets pass what the model refuses, keeps no attribute that Python sets from
call to call, inlines the forward of a custom autograd.Function, and may leave out a write to a buffer, a hook, or the
type of an output. So the model runs first, and each whole graph is held against it before it is taken.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from lorasc_fx.branch import is_quantized
from lorasc_fx.capture.guards import Guards, attribute_tensors
from lorasc_fx.capture.hollow import computing
from lorasc_fx.capture.live import quiet
from lorasc_fx.capture.signature import copied
from lorasc_fx.capture.untouched import Attributes, same_attributes, same_values, untouched, written_by
from lorasc_fx.errors import CaptureError
from lorasc_fx.undo import Block, isolated, raise_of_handler

__all__ = ["Trial", "check_agrees", "one_line", "seed", "try_model"]

ROUNDING = 1e4
"""Units in the last place, of the output's scale, by which a graph may differ: torch may take other kernels for it."""
COARSE = 0.1
"""Share of the scale that is no rounding in any dtype, however few bits it has."""


@dataclass(frozen=True)
class Trial:
    """What a run showed.

    Args:
        restless: attributes that Python sets anew at each call.
        functions: names of the custom autograd Functions through which gradients go.
        draws: whether its Python draws from the generators of Python or numpy, unless it seeds them itself.
        recomputes: whether it saves tensors by hooks of its own, as the regions of torch.utils.checkpoint do.
        assigned: place and key of the Python state that forward sets at each call, to whatever value.
        written: tensors of that state into which forward writes at each call.
    """

    restless: tuple[str, ...] = ()
    functions: tuple[str, ...] = ()
    draws: bool = False
    recomputes: bool = False
    assigned: frozenset[tuple[str, Any]] = frozenset()
    written: tuple[torch.Tensor, ...] = ()

    @property
    def only_recomputes(self) -> bool:
        """Whether nothing but that speaks against a whole graph."""
        return self.recomputes and not (self.restless or self.functions or self.draws)

    def check(self) -> None:
        """Refuse the model for a whole graph.

        Raises:
            RuntimeError: no graph of it would do what it does.
        """
        if self.restless:
            raise RuntimeError(f"the model sets its attribute {self.restless[0]} at each call, which no graph repeats")
        if self.draws:
            raise RuntimeError("the model draws random numbers in Python, which the graph would hold as constants")
        if self.functions:
            raise RuntimeError(f"the model uses {self.functions[0]}, whose backward a traced graph does not keep")
        if self.recomputes:
            raise RuntimeError(
                "the model recomputes in backward what it does not keep (gradient checkpointing), and a traced graph "
                "would keep it all"
            )


def try_model(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Trial:
    """Run the model as it is, with gradients, and leave it as it was.

    Raises:
        CaptureError: the model itself raises.
    """
    try:
        with quiet(), computing(model), same_attributes(model), _all_trained(model):
            hooks, before = _SavedTensorHooks(), Guards(model)
            with hooks:
                output, draws = _run(model, args, kwargs), False
            functions, reentrant = _functions(_tensors(output))
            drawn = _generators()
            restless, assigned, written = tuple[str, ...](), frozenset[tuple[str, Any]](), tuple[torch.Tensor, ...]()
            if before.changes():
                once, held = Attributes.of(model), Guards(model)  # what only a first call sets, a cache, is not meant
                _run(model, args, kwargs)
                restless, written = tuple(once.moved()), tuple(held.written())
                assigned = frozenset((change.place, change.key) for change in held.changes())
            seed()
            moved = [index for index, state in enumerate(_generators()) if state != drawn[index]]
            if moved:
                _run(model, args, kwargs, start=1)
                again = _generators()  # a model that seeds them itself draws the same each time
                draws = any(drawn[index] != again[index] for index in moved)
            return Trial(restless, functions, draws, hooks.seen or reentrant, assigned, written)
    except MemoryError:
        raise
    except Exception as fault:
        raise_of_handler(fault)
        hollow = any(isinstance(each, FakeTensor) for each in model.parameters())
        advice = ", or give the model its weights before adapt: on the meta device nothing can look at values"
        raise CaptureError(
            f"{type(model).__name__} itself refuses the example inputs: {one_line(fault)}; "
            f"give args and kwargs with which the model runs{advice if hollow else ''}"
        ) from fault


def check_agrees(graph: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Hold a graph against its model on one call: types, values, and buffers and arguments afterwards (a cache that
    forward writes into).

    Raises:
        RuntimeError: they differ by more than rounding, though the model repeats itself under one seed.
    """
    theirs = _observed(model, model, args, kwargs)
    try:
        ours = _observed(graph, model, args, kwargs)
    except MemoryError:
        raise
    except Exception as fault:
        raise_of_handler(fault)
        raise RuntimeError(f"its graph does something else than the model: it raises {one_line(fault)}") from fault
    difference = _fault(ours, theirs)
    if difference is not None and _fault(_observed(model, model, args, kwargs), theirs) is None:
        raise RuntimeError(f"its graph does something else than the model: {difference}")


def seed(value: int = 0) -> None:
    """Seed the generators that `quiet` gives back; torch.manual_seed would reach those of an idle accelerator too."""
    random.seed(value)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(value)
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)


def one_line(fault: Exception) -> str:
    """Return type and first line of an exception."""
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    return f"{type(fault).__name__}: {lines[0] if lines else 'no message'}"


def _generators() -> tuple[Any, Any]:
    """Return the states of the generators of Python and numpy."""
    numpy = sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy is not None else ()
    return random.getstate(), [part.tolist() if hasattr(part, "tolist") else part for part in state]


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], start: int = 0) -> Any:
    inputs, named = copied(args, kwargs)
    with same_values(model):
        seed(start)
        return model(*inputs, **named)


@isolated
def _all_trained(undo: Block[Any], model: nn.Module) -> None:
    """Let every weight need a gradient, so that the run shows what gradients go through."""
    frozen = [
        each
        for each in model.parameters()
        if not each.requires_grad and each.is_floating_point() and not is_quantized(each)
    ]
    for each in frozen:
        undo(partial(each.requires_grad_, False))
        each.requires_grad_(True)


class _SavedTensorHooks(TorchFunctionMode):
    """Sees whether a model computes under hooks on saved tensors that it has set itself."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False
        self._before = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= torch._C._autograd._top_saved_tensors_default_hooks(True) != self._before
        return func(*args, **(kwargs or {}))


def _functions(outputs: list[torch.Tensor]) -> tuple[tuple[str, ...], bool]:
    """Return the names of the custom Functions behind outputs, and whether torch's reentrant checkpoint is among them.

    What that one recomputes is looked into by its backward alone, and a front end may keep it.
    """
    found: set[str] = set()
    reentrant = False
    waiting = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        name = type(node).__name__.removesuffix("Backward")
        own = isinstance(node, torch.autograd.function.BackwardCFunction)
        if own and getattr(node, "_forward_cls", None) is CheckpointFunction:
            reentrant = True
        elif own and not name.startswith("GeneratedBackwardFor_"):  # of a custom op, which a graph keeps
            found.add(f"the autograd.Function {name}")
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                waiting.append(after)
    return tuple(sorted(found)), reentrant


@dataclass(frozen=True)
class _Observed:
    """Types and tensors of an output, and of the arguments after the call; and the buffers then."""

    output: tuple[Any, list[torch.Tensor]]
    arguments: tuple[Any, list[torch.Tensor]]
    buffers: list[tuple[str, torch.Tensor]]


def _observed(
    call: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> _Observed:
    inputs, named = copied(args, kwargs)
    with quiet(), computing(model), untouched(model), torch.no_grad():
        seed()
        held = attribute_tensors(model)
        output = call(*inputs, **named)
        held += [(name, value) for name, value in model.named_parameters() if name in written_by(model)]
        buffers = [(name, value.detach().clone()) for name, value in [*model.named_buffers(), *held]]
    seen = [(_types(value), [each.detach() for each in _tensors(value)]) for value in (output, (inputs, named))]
    return _Observed(seen[0], seen[1], buffers)


def _fault(ours: _Observed, theirs: _Observed) -> str | None:
    """Return how two observations differ, or None."""
    for what, found, expected in (
        ("an output", ours.output, theirs.output),
        ("an argument after the call", ours.arguments, theirs.arguments),
    ):
        if found[0] != expected[0]:
            return f"{what} has other types, {found[0]} for {expected[0]}"
        if len(found[1]) != len(expected[1]):
            return f"{what} holds {len(found[1])} tensors for {len(expected[1])}"
        for one, other in zip(found[1], expected[1], strict=True):
            if (difference := _apart(one, other)) is not None:
                return f"{what} is {difference}"
    if [name for name, _ in ours.buffers] != [name for name, _ in theirs.buffers]:
        return "other buffers"
    for (name, one), (_, other) in zip(ours.buffers, theirs.buffers, strict=True):
        if (difference := _apart(one, other)) is not None:
            return f"buffer {name} is {difference} after the call"
    return None


def _apart(one: torch.Tensor, other: torch.Tensor) -> str | None:
    if one.shape != other.shape or one.dtype != other.dtype:
        return f"{one.dtype} {tuple(one.shape)} for {other.dtype} {tuple(other.shape)}"
    hollow = isinstance(one, FakeTensor) and isinstance(other, FakeTensor)
    if hollow or one.is_nested or one.is_sparse or one.numel() == 0 or torch.equal(one, other):
        return None
    if not (one.is_floating_point() or one.is_complex()):
        return "another"
    finite = one.isfinite() & other.isfinite()
    if not torch.equal(one.isfinite(), other.isfinite()):
        return "not finite in the same places"
    scale = float(other[finite].abs().max()) if bool(finite.any()) else 0.0
    gap = float((one - other)[finite].abs().max()) if bool(finite.any()) else 0.0
    allowed = min(ROUNDING * torch.finfo(one.dtype).eps, COARSE)
    return f"off by {gap / scale:.1e} of its scale" if gap > allowed * scale else None


def _types(value: Any) -> Any:
    """Return the types of a value and of what it holds, as far as containers go."""
    if isinstance(value, Mapping):
        return (type(value).__name__, tuple((str(key), _types(item)) for key, item in value.items()))
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, tuple(map(_types, value)))
    return "Tensor" if isinstance(value, torch.Tensor) else type(value).__name__


def _tensors(value: Any) -> list[torch.Tensor]:
    """Return the tensors of an output, of whatever type, each object once."""
    found: list[torch.Tensor] = []
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, torch.Tensor):
            found.append(each)
        elif isinstance(each, Mapping):
            waiting.extend(reversed(list(each.values())))
        elif isinstance(each, (list, tuple)):
            waiting.extend(reversed(each))
        elif hasattr(each, "__dict__") and not isinstance(each, (type, nn.Module)) and not callable(each):
            waiting.extend(reversed(list(vars(each).values())))
    return found
