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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointFunction

from lorasc_fx.capture.gradients import PROJECTIONS, backward_nodes, projected, projected_gradients
from lorasc_fx.capture.guards import Guards, attribute_tensors
from lorasc_fx.capture.hollow import computing
from lorasc_fx.capture.live import quiet
from lorasc_fx.capture.signature import copied
from lorasc_fx.capture.untouched import Attributes, same_attributes, same_values, untouched, written_by
from lorasc_fx.errors import CaptureError
from lorasc_fx.undo import Block, grad_mode, isolated, raise_of_handler

__all__ = ["Disagreement", "Trial", "check_agrees", "first_difference", "one_line", "seed", "try_model"]

ROUNDING = 1e4
"""Units in the last place, of the output's scale, by which a graph may differ: torch may take other kernels for it."""
CLOSE = 1e-3
"""Share of its size by which the output of a module may differ from what an op of the graph makes."""
CANCELLED = 1e-3
"""Share of the largest gradient below which a gradient is taken as what rounding leaves of terms that cancel."""
COARSE = 0.1
"""Share of the scale that is no rounding in any dtype, however few bits it has."""


@dataclass(frozen=True)
class Difference:
    """How two runs differ, and the weights (and inputs) whose gradients do."""

    sentence: str
    weights: tuple[str, ...] = ()


class Disagreement(RuntimeError):
    """A graph that does something else than its model."""

    def __init__(self, graph: Callable[..., Any], difference: Difference, grad: bool) -> None:
        super().__init__(f"its graph does something else than the model: {difference.sentence}")
        self.graph, self.weights, self.grad = graph, difference.weights, grad


@dataclass(frozen=True)
class Observed:
    """What a run showed: types and tensors of the output, and of the arguments after the call; the buffers then; which
    modules have hooks that return nothing (`observers`); and projections of the gradients of weights and inputs, None
    where the backward pass raised (`broken`) or none was run.
    """

    output: tuple[Any, list[torch.Tensor]]
    arguments: tuple[Any, list[torch.Tensor]]
    buffers: list[tuple[str, torch.Tensor]]
    functions: tuple[str, ...]
    recomputes: bool
    asks: bool
    observers: tuple[str, ...]
    gradients: Mapping[str, torch.Tensor] | None
    broken: str = ""


@dataclass(frozen=True)
class Trial:
    """What runs of the eager model showed.

    Args:
        seen: the run against which graphs are held.
        restless: attributes that Python sets anew at each call.
        draws: whether its Python draws from the generators of Python or numpy, unless it seeds them itself.
        assigned: place and key of the Python state that forward sets at each call, to whatever value.
        written: tensors of that state into which forward writes at each call.
        grad: whether gradients are on in the calls that the graph is for; None where the model computes the same.
    """

    seen: Observed
    restless: tuple[str, ...] = ()
    draws: bool = False
    assigned: frozenset[tuple[str, Any]] = frozenset()
    written: tuple[torch.Tensor, ...] = ()
    grad: bool | None = None

    @property
    def functions(self) -> tuple[str, ...]:
        """Names of the custom autograd Functions through which gradients go."""
        return self.seen.functions

    @property
    def recomputes(self) -> bool:
        """Whether it saves tensors by hooks of its own, as the regions of torch.utils.checkpoint do."""
        return self.seen.recomputes

    @property
    def asks(self) -> bool:
        """Whether its Python asks tensors whether they require gradients."""
        return self.seen.asks

    @property
    def only_recomputes(self) -> bool:
        """Whether nothing but that speaks against a whole graph."""
        return self.recomputes and not (self.restless or self.functions or self.draws or self.seen.observers)

    def check(self) -> None:
        """Refuse the model for a whole graph.

        Raises:
            RuntimeError: no graph of it would do what it does.
        """
        if self.seen.observers:
            raise RuntimeError(
                f"{self.seen.observers[0]} has a forward hook that returns nothing, and what it does besides, such as "
                "keeping outputs, no graph repeats"
            )
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


def try_model(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], grad: bool = True) -> Trial:
    """Run the model as it is, with gradients and without, and leave it as it was.

    Args:
        model: its parameters require gradients as in training.
        args, kwargs: of the call.
        grad: whether gradients are on in the call, which counts where the model computes something else without them.

    Raises:
        CaptureError: the model itself raises.
    """
    try:
        with quiet(), computing(model), same_attributes(model) as attributes, grad_mode(grad):
            before = Guards(model)
            seen, draws = _observed(model, model, args, kwargs), False
            if written_by(model):  # known after a first run, and looked at from then on
                attributes.restore()
                seen = _observed(model, model, args, kwargs)
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
            attributes.restore()
            with grad_mode(not grad):
                other = _observed_or_none(model, args, kwargs)
            by_mode = other is None or _difference(other, seen, gradients=False) is not None
            if not by_mode and other is not None and not grad:
                seen = other
            return Trial(seen, restless, draws, assigned, written, grad if by_mode else None)
    except MemoryError:
        raise
    except Exception as fault:
        raise_of_handler(fault)
        hollow = any(isinstance(each, FakeTensor) for each in model.parameters())
        advice = ", or give the model its weights before adapt: on the meta device nothing can look at values"
        raise CaptureError(
            f"{type(model).__name__} itself refuses the example inputs: {one_line(fault)}; "
            f"give args and kwargs with which the model runs{advice if hollow else ''}",
            code="model-refuses-inputs",
        ) from fault


def check_agrees(
    graph: Callable[..., Any], trial: Trial, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Hold a graph against its model on one call: types, values, buffers and arguments afterwards (a cache that forward
    writes into), and gradients.

    Raises:
        Disagreement: they differ by more than rounding, though the model repeats itself under one seed.
    """
    grad = trial.grad is not False
    try:
        with quiet(), computing(model), same_attributes(model), grad_mode(grad):
            ours = _observed(graph, model, args, kwargs)
    except MemoryError:
        raise
    except Exception as fault:
        raise_of_handler(fault)
        raise Disagreement(graph, Difference(f"it raises {one_line(fault)}"), grad) from fault
    difference = _difference(ours, trial.seen)
    if difference is None:
        return
    with quiet(), computing(model), same_attributes(model), grad_mode(grad):
        again = _observed(model, model, args, kwargs)
    if _difference(again, trial.seen) is None:
        raise Disagreement(graph, difference, grad)


def first_difference(fault: Disagreement, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Return the first module, in the order of calls, whose output a graph does not compute, or whose weights have
    other gradients in it.
    """
    names = {module: name for name, module in model.named_modules() if name}
    begun: list[str] = []
    ended: list[tuple[str, list[torch.Tensor]]] = []

    def enters(module: nn.Module, _: Any) -> None:
        begun.append(names[module])

    def leaves(module: nn.Module, _: Any, output: Any) -> None:
        floating = [each for each in _tensors(output) if each.is_floating_point() or each.is_complex()]
        ended.append((names[module], [projected(each) for each in floating]))

    handles = [module.register_forward_pre_hook(enters) for module in names]
    handles += [module.register_forward_hook(leaves) for module in names]
    try:
        with quiet(), untouched(model), grad_mode(fault.grad):
            inputs, named = copied(args, kwargs)
            seed()
            model(*inputs, **named)
            calls, made_by = tuple(begun), tuple(ended)  # the lists, which hooks hold, are given back as well
    finally:
        for handle in handles:
            handle.remove()
    if fault.weights:
        owners = {name.rpartition(".")[0] for name in fault.weights}
        first = next((name for name in calls if name in owners), "")
    else:
        made = _Made()
        with quiet(), untouched(model), grad_mode(fault.grad), made:
            inputs, named = copied(args, kwargs)
            seed()
            try:
                fault.graph(*inputs, **named)
            except Exception as raised:  # what it makes before it raises is looked at
                raise_of_handler(raised)
        first = next((name for name, parts in made_by if not all(map(made.has, parts))), "")
    return f"{first} ({type(model.get_submodule(first)).__name__})" if first else type(model).__name__


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


def _observed_or_none(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Observed | None:
    """Return what a run in the other gradient mode shows; None where the model refuses to run in it, as some do that
    differentiate in forward.
    """
    try:
        return _observed(model, model, args, kwargs)
    except MemoryError:
        raise
    except Exception as fault:
        raise_of_handler(fault)
        return None


_ASKS = (torch.Tensor.requires_grad, torch.Tensor.grad_fn, torch.Tensor.is_leaf)


class _AutogradUse(TorchFunctionMode):
    """Sees whether a model computes under hooks on saved tensors that it has set itself (`recomputes`), and whether it
    asks tensors for their gradient state (`asks`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.recomputes = self.asks = False
        self._before = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.recomputes |= torch._C._autograd._top_saved_tensors_default_hooks(True) != self._before
        self.asks |= any(getattr(func, "__self__", None) is each for each in _ASKS)
        return func(*args, **(kwargs or {}))


def _observed(call: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Observed:
    """Run once, in the gradient mode that is on, and where gradients are on backward as well."""
    inputs, named = copied(args, kwargs)
    with same_values(model):
        seed()
        held = attribute_tensors(model)
        with _AutogradUse() as use, _watched_hooks(model) as observers:
            output = call(*inputs, **named)
        tensors = _tensors(output)
        held += [(name, value) for name, value in model.named_parameters() if name in written_by(model)]
        buffers = [(name, value.detach().clone()) for name, value in [*model.named_buffers(), *held]]
        custom = torch.autograd.function.BackwardCFunction
        nodes = [node for node in backward_nodes(tensors) if isinstance(node, custom)]
        reentrant = [node for node in nodes if getattr(node, "_forward_cls", None) is CheckpointFunction]
        names = {type(node).__name__.removesuffix("Backward") for node in nodes if node not in reentrant}
        own = {f"the autograd.Function {name}" for name in names if not name.startswith("GeneratedBackwardFor_")}
        hollow = any(isinstance(each, FakeTensor) for each in model.parameters())
        gradients, broken = (
            _gradients(tensors, model, (inputs, named)) if torch.is_grad_enabled() and not hollow else (None, "")
        )
    output_seen, arguments = (
        (_types(value), [each.detach() for each in _tensors(value)]) for value in (output, (inputs, named))
    )
    recomputes = use.recomputes or bool(reentrant)
    return Observed(
        output_seen,
        arguments,
        buffers,
        tuple(sorted(own)),
        recomputes,
        use.asks,
        tuple(sorted(observers)),
        gradients,
        broken,
    )


_HOOKS_OF = {"torch", "lorasc_fx", "transformers", "timm", "peft", "accelerate", "lightning", "pytorch_lightning"}
"""Packages whose hooks set what the same forward reads (norms of weights, features), or nothing that counts."""


@isolated
def _watched_hooks(undo: Block[Any], model: nn.Module) -> set[str]:
    """Give the names of modules with forward hooks of the user that return nothing; complete after the block."""
    observers: set[str] = set()

    def watched(name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            output = hook(*args, **kwargs)
            if output is None:
                observers.add(name)
            return output

        return call

    for name, module in model.named_modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                source = getattr(hook, "__module__", None) or type(hook).__module__
                if source.partition(".")[0] not in _HOOKS_OF:
                    undo(partial(hooks.__setitem__, key, hook))
                    hooks[key] = watched(name or type(model).__name__, hook)
    return observers


def _gradients(
    outputs: list[torch.Tensor], model: nn.Module, given: Any
) -> tuple[Mapping[str, torch.Tensor] | None, str]:
    """Return projections of the gradients of weights and inputs, or why the backward pass raises: an eager model may
    have none.
    """
    floating = [each for each in outputs if each.is_floating_point() or each.is_complex()]
    try:
        inputs = {f"input {index}": each for index, each in enumerate(_tensors(given))}
        return projected_gradients(floating, inputs | dict(model.named_parameters())), ""
    except MemoryError:
        raise
    except Exception as fault:
        raise_of_handler(fault)
        return None, one_line(fault)


def _difference(ours: Observed, theirs: Observed, gradients: bool = True) -> Difference | None:
    """Return how two observations differ, or None."""
    for what, found, expected in (
        ("an output", ours.output, theirs.output),
        ("an argument after the call", ours.arguments, theirs.arguments),
    ):
        if found[0] != expected[0]:
            return Difference(f"{what} has other types, {found[0]} for {expected[0]}")
        if len(found[1]) != len(expected[1]):
            return Difference(f"{what} holds {len(found[1])} tensors for {len(expected[1])}")
        for one, other in zip(found[1], expected[1], strict=True):
            if (difference := _apart(one, other)) is not None:
                return Difference(f"{what} is {difference}")
    if [name for name, _ in ours.buffers] != [name for name, _ in theirs.buffers]:
        return Difference("other buffers")
    for (name, one), (_, other) in zip(ours.buffers, theirs.buffers, strict=True):
        if (difference := _apart(one, other)) is not None:
            return Difference(f"buffer {name} is {difference} after the call")
    if gradients and theirs.gradients is not None:
        if ours.gradients is None:
            return Difference(f"its backward pass raises {ours.broken}")
        dtypes = {each.dtype for each in theirs.output[1] if each.is_floating_point()}
        return _other_gradients(ours.gradients, theirs.gradients, dtypes)
    return None


def _other_gradients(
    ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], dtypes: set[torch.dtype]
) -> Difference | None:
    """Return which gradients differ by more than rounding, which is of the scale of the largest where terms cancel."""
    none = torch.zeros(PROJECTIONS, dtype=torch.float64)
    allowed = min(ROUNDING * max((torch.finfo(each).eps for each in dtypes), default=0.0), COARSE)
    finite = [float(each.norm()) for each in theirs.values() if bool(each.isfinite().all())]
    least = CANCELLED * max(finite, default=0.0)
    wrong: dict[str, float] = {}
    for name in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get(name, none), theirs.get(name, none)
        gap, scale = float((one - other).norm()), max(float(other.norm()), least)
        if not gap <= allowed * scale and not (one.isfinite().logical_not() & other.isfinite().logical_not()).any():
            wrong[name] = gap / scale if scale else float("inf")
    if not wrong:
        return None
    worst = max(wrong, key=lambda name: wrong[name])
    more = f", and those of {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return Difference(f"the gradient of {worst} is off by {wrong[worst]:.1e} of its scale{more}", tuple(wrong))


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


class _Made(TorchDispatchMode):
    """Notes what the ops of a run have made."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        real = [each for each in _tensors(output) if not isinstance(each, FakeTensor)]  # a graph may hold fakes
        self._made += [projected(each) for each in real if each.is_floating_point() or each.is_complex()]
        return output

    def has(self, value: torch.Tensor) -> bool:
        """Whether an op has made a tensor with these projections."""
        return any(bool((each - value).norm() <= CLOSE * value.norm()) for each in self._made)
