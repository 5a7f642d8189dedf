"""The preflight: runs of the eager model that observe what a tracer misses, and the comparison of a graph with it.

A tracer sees no values and no gradients: it lets pass what the model refuses, keeps no attribute that Python sets from
call to call, inlines the forward of a custom autograd.Function, and may leave out a write to a buffer, a tensor hook, a
branch of Python on `requires_grad`, or the type of an output. So the model runs first, and each whole graph is compared
with it, in values and gradients, before it is taken.

Each gradient is reduced to a few random projections as soon as it is there, so that none is kept. Projections are
linear, so that a weight whose gradient comes in several parts (reentrant checkpoints) is handled as well. Where the
autograd graphs of both runs are the same, so are the gradients, and no backward pass is run.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointFunction

from lorasc_fx.check.autograd_graph import Description, describe
from lorasc_fx.check.guards import Guards, attribute_tensors
from lorasc_fx.check.isolation import (
    Attributes,
    OurMode,
    call_recorder,
    eager,
    fake_mode,
    forget_written,
    has_run,
    isolation,
    quiet,
    same_attributes,
    same_values,
    seed,
    without_history,
    written_by,
)
from lorasc_fx.errors import CaptureError
from lorasc_fx.quantized import QuantizedLinear, is_quantized
from lorasc_fx.signature import copied
from lorasc_fx.util.fingerprint import checksum
from lorasc_fx.util.undo import Block, isolated

PROJECTIONS = 8


@isolated
def requiring_grad(undo: Block, model: nn.Module, names: Collection[str] | None) -> None:
    """Let these parameters require gradients, and no others: the state of training, in which branches move them.

    Args:
        undo: restores the flags.
        model: whose parameters these are.
        names: of parameters; None for all that can.
    """
    for name, parameter in model.named_parameters():
        undo(partial(parameter.requires_grad_, parameter.requires_grad))
        possible = (parameter.is_floating_point() or parameter.is_complex()) and not is_quantized(parameter)
        parameter.requires_grad_(possible and (names is None or name in names))


def backward_nodes(outputs: Sequence[torch.Tensor]) -> set[Any]:
    """Return the nodes of the autograd graph behind some tensors."""
    waiting = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        for after, _ in waiting.pop().next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                waiting.append(after)
    return seen


def projected_gradients(outputs: Sequence[torch.Tensor], leaves: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return projections of the gradients of a random projection of outputs, by name of a leaf that has one.

    What is accumulated in `.grad` by then stays there, and hooks after accumulation are not called. Raises what the
    backward pass raises.
    """
    roots = [
        output for output in outputs if output.requires_grad and output.layout is torch.strided and not output.is_nested
    ]
    projections: dict[str, torch.Tensor] = {}

    def take(name: str, leaf: torch.Tensor) -> None:
        if leaf.grad is not None:
            part = projected(leaf.grad)
            projections[name] = projections[name] + part if name in projections else part
            leaf.grad = None

    named = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad and leaf.is_leaf}
    reached = [node.variable for node in backward_nodes(roots) if hasattr(node, "variable")]
    with without_gradients([*named.values(), *reached]):
        for name, leaf in named.items():
            leaf.register_post_accumulate_grad_hook(partial(take, name))
        backward_of_projection(roots)
    return projections


@isolated
def without_gradients(undo: Block, leaves: Sequence[torch.Tensor]) -> None:
    """Remove gradients and accumulation hooks of leaves inside the block."""

    def give_back(leaf: Any, gradient: torch.Tensor | None, hooks: Any, ours: dict[int, Any]) -> None:
        ours.clear()  # torch goes on calling them where there were none before
        leaf._post_accumulate_grad_hooks = hooks
        leaf.grad = gradient

    unique: list[Any] = list({id(leaf): leaf for leaf in leaves}.values())
    for leaf in unique:
        ours = OrderedDict[int, Any]()
        undo(partial(give_back, leaf, leaf.grad, leaf._post_accumulate_grad_hooks, ours))
        leaf.grad, leaf._post_accumulate_grad_hooks = None, ours


def backward_of_projection(outputs: Sequence[torch.Tensor]) -> None:
    """Go backward from a random projection of outputs, of which there may be none."""
    if outputs:
        torch.autograd.backward(outputs, [_coefficients(output, index) for index, output in enumerate(outputs)])


def _coefficients(output: torch.Tensor, key: int) -> torch.Tensor:
    """Return coefficients of an output's entries in a random projection, by shape and key; 0 where it is not finite."""
    drawn = _normal(output.shape, key).to(output.device, output.dtype)
    return torch.where(output.detach().isfinite(), drawn, torch.zeros_like(drawn))


def projected(value: torch.Tensor) -> torch.Tensor:
    """Return some bilinear forms of a tensor, with vectors that depend on its shape alone; linear in the tensor."""
    value = value.detach()
    if value.layout is not torch.strided:
        value = value.to_dense()
    if value.is_complex():
        value = torch.view_as_real(value)
    matrix = value.reshape(value.shape[0] if value.dim() > 1 else 1, -1) if value.numel() else value.new_zeros(1, 1)
    matrix = matrix if matrix.dtype is torch.float64 else matrix.float()
    rows, columns = (_normal((PROJECTIONS, size), size).to(matrix) for size in matrix.shape)
    return ((rows @ matrix) * columns).sum(1).cpu().double()


def _normal(shape: Sequence[int], key: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(key)
    return torch.randn(tuple(shape), generator=generator)


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


LARGE = 1 << 26
"""Bytes of an output of which no copy is kept while the next run makes its own."""


@dataclass(frozen=True)
class Digest:
    """What is kept of a large output: dtype, shape and a checksum of its bits."""

    dtype: torch.dtype
    shape: torch.Size
    checksum: int

    @classmethod
    def of(cls, output: torch.Tensor) -> torch.Tensor | Digest:
        """Return the output without its autograd graph, or what is kept of it."""
        dense = output.layout is torch.strided and not output.is_nested and not isinstance(output, FakeTensor)
        if not dense or output.nbytes < LARGE:
            return output.detach()
        return cls(output.dtype, output.shape, checksum(output))


@dataclass(frozen=True)
class Observed:
    """What a run showed: types and tensors of the output, and of the arguments after the call; the buffers then; which
    modules have hooks that return nothing (`observers`); the autograd graph, None where not all of it is visible; and
    projections of the gradients of weights and inputs, None where the backward pass raised (`broken`) or none was run.
    """

    output: tuple[Any, list[torch.Tensor | Digest]]
    arguments: tuple[Any, list[torch.Tensor]]
    buffers: list[tuple[str, torch.Tensor]]
    functions: tuple[str, ...]
    recomputes: bool
    asks: bool
    observers: tuple[str, ...]
    autograd: Description | None
    gradients: Mapping[str, torch.Tensor] | None
    broken: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether the values of all outputs are kept."""
        return not any(isinstance(output, Digest) for output in self.output[1])


@dataclass
class Preflight:
    """What runs of the eager model showed.

    Args:
        seen: the run against which graphs are held; one with gradients takes its place where they are asked for.
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
        """What only the model's own Python does: custom autograd Functions through which gradients go, new seeds."""
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
            raise RuntimeError(f"the model uses {self.functions[0]}")
        if self.recomputes:
            raise RuntimeError(
                "the model recomputes in backward what it does not keep (gradient checkpointing), and a traced graph "
                "would keep it all"
            )


def run_preflight(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], grad: bool = True) -> Preflight:
    """Run the model as it is, with gradients and without, and leave it as it was.

    Args:
        model: its parameters require gradients as in training.
        args, kwargs: of the call.
        grad: whether gradients are on in the call, which counts where the model computes something else without them.

    Raises:
        CaptureError: the model itself raises.
    """
    known = has_run(model)  # of which a cascade may still ask
    try:
        with quiet(), eager(), fake_mode(model), same_attributes(model) as attributes, torch.set_grad_enabled(grad):
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
                assigned = frozenset((change.holder, change.key) for change in held.changes())
            seed()
            moved = [index for index, state in enumerate(_generators()) if state != drawn[index]]
            if moved:
                _run(model, args, kwargs, start=1)
                again = _generators()  # a model that seeds them itself draws the same each time
                draws = any(drawn[index] != again[index] for index in moved)
            attributes.restore()
            with torch.set_grad_enabled(not grad):
                other = _observed_or_none(model, args, kwargs)
            if other is not None and not seen.is_whole and _difference(other, seen, gradients=False) is not None:
                seen = _observed(model, model, args, kwargs, whole=True)
                with torch.set_grad_enabled(not grad):
                    other = _observed_or_none(model, args, kwargs, whole=True)
            by_mode = other is None or _difference(other, seen, gradients=False) is not None
            if not by_mode and other is not None and not grad:
                seen = other
            return Preflight(seen, restless, draws, assigned, written, grad if by_mode else None)
    except (MemoryError, CaptureError):
        raise
    except Exception as fault:
        if not known:
            forget_written(model)
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
    """Hold a graph against its model on one call: types, values, buffers and arguments afterwards (a cache that forward
    writes into), and gradients.

    Raises:
        Disagreement: they differ by more than rounding, though the model repeats itself under one seed.
    """
    grad = preflight.grad is not False
    try:
        with quiet(), eager(), fake_mode(model), same_attributes(model), torch.set_grad_enabled(grad):
            ours = _observed(graph, model, args, kwargs, like=preflight.seen, whole=preflight.seen.is_whole)
    except MemoryError:
        raise
    except Exception as fault:
        raise Disagreement(graph, Difference(f"it raises {one_line(fault)}"), grad) from fault
    difference = _difference(ours, preflight.seen)
    if difference is not None and not (ours.is_whole and preflight.seen.is_whole):
        with quiet(), eager(), fake_mode(model), same_attributes(model), torch.set_grad_enabled(grad):
            preflight.seen = _observed(model, model, args, kwargs, whole=True)
            ours = _observed(graph, model, args, kwargs, like=preflight.seen, whole=True)
        difference = _difference(ours, preflight.seen)
    if difference is None and preflight.seen.autograd is not None and ours.autograd != preflight.seen.autograd:
        with quiet(), eager(), fake_mode(model), same_attributes(model), torch.set_grad_enabled(grad):
            preflight.seen = _observed(model, model, args, kwargs, backward=True, whole=ours.is_whole)
        difference = _difference(ours, preflight.seen)
    if difference is None:
        return
    with quiet(), eager(), fake_mode(model), same_attributes(model), torch.set_grad_enabled(grad):
        again = _observed(model, model, args, kwargs, backward=True, whole=preflight.seen.is_whole)
    if _difference(again, preflight.seen) is None:
        raise Disagreement(graph, difference, grad)


def agrees(graph: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a graph computes what its model computes on one call without gradients, or raises.

    A graph that computes something where the model raises does not agree.
    """
    try:
        with quiet(grad=False), eager(), fake_mode(model), same_attributes(model):
            ours = _observed(graph, model, args, kwargs, whole=True)
    except MemoryError:
        raise
    except Exception:
        return True
    with quiet(grad=False), eager(), fake_mode(model), same_attributes(model):
        theirs = _observed_or_none(model, args, kwargs, whole=True)
    return theirs is not None and _difference(ours, theirs, gradients=False) is None


def first_difference(fault: Disagreement, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Return the first module, in the order of calls, whose output a graph does not compute, or whose weights have
    other gradients in it; the model's own class if that cannot be found.
    """
    try:
        first = _first_difference(fault, model, args, kwargs)
    except MemoryError:
        raise
    except Exception:  # as where dynamo compiles a module's call, whose hooks it cannot trace
        first = ""
    return f"{first} ({type(model.get_submodule(first)).__name__})" if first else type(model).__name__


def _first_difference(fault: Disagreement, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Return the path of that module, or ""."""
    begun: list[str] = []
    ended: list[tuple[str, list[torch.Tensor]]] = []

    def enters(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        begun.append(path)

    def leaves(path: str, module: nn.Module, output: Any) -> None:
        floating = [value for value in _tensors(output) if value.is_floating_point() or value.is_complex()]
        ended.append((path, [projected(value) for value in floating]))

    with isolation(model, args, kwargs, call_recorder(model, enters, leaves), grad=fault.grad) as (inputs, named):
        model(*inputs, **named)
    if fault.weights:
        owners = {name.rpartition(".")[0] for name in fault.weights}
        return next((name for name in begun if name and name in owners), "")
    made = _Made()
    observed = isolation(model, args, kwargs, made, grad=fault.grad)
    with observed as (inputs, named), contextlib.suppress(Exception):  # what it makes before it raises is looked at
        fault.graph(*inputs, **named)
    return next((name for name, parts in ended if name and not all(map(made.has, parts))), "")


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


def _observed_or_none(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], whole: bool = False
) -> Observed | None:
    """Return what a run shows; None if the model raises. Some models that differentiate in forward do so in one of the
    two gradient modes.
    """
    try:
        return _observed(model, model, args, kwargs, whole=whole)
    except MemoryError:
        raise
    except Exception:
        return None


_ASKS = (torch.Tensor.requires_grad, torch.Tensor.grad_fn, torch.Tensor.is_leaf)


class _AutogradUse(OurMode, TorchFunctionMode):
    """Observes whether a model computes under hooks on saved tensors of its own (`recomputes`), whether it asks tensors
    for their gradient state (`asks`), and whether it may put hooks on tensors or on their nodes (`hooks`); not what the
    quantized layers of libraries do inside (`products`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.recomputes = self.asks = self.hooks = False
        self.products: list[tuple[Any, torch.Tensor | None]] = []
        self._inside = 0
        self._before = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.recomputes |= torch._C._autograd._top_saved_tensors_default_hooks(True) != self._before
        self.asks |= not self._inside and any(getattr(func, "__self__", None) is getter for getter in _ASKS)
        self.hooks |= func is torch.Tensor.register_hook or getattr(func, "__self__", None) is torch.Tensor.grad_fn
        return func(*args, **(kwargs or {}))

    def enters(self, module: nn.Module, args: Any) -> None:
        """Note that a product of a quantized layer begins."""
        self._inside += 1

    def leaves(self, module: nn.Module, args: Any, output: torch.Tensor | None) -> None:
        """Note that it ends; it has no output where it raises."""
        self._inside -= 1
        self.products.append((args, output))

    def nodes_of_products(self) -> set[Any]:
        """Return the nodes of the autograd graph between inputs and outputs of these products."""
        nodes = set[Any]()
        for args, output in self.products:
            if output is not None:
                nodes |= backward_nodes([output]) - backward_nodes(_tensors(args))
        return nodes


@isolated
def _products_observed(undo: Block, model: nn.Module, use: _AutogradUse) -> None:
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            undo(module.register_forward_pre_hook(use.enters).remove)
            undo(module.register_forward_hook(use.leaves, always_call=True).remove)


def _observed(
    call: Callable[..., Any],
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    like: Observed | None = None,
    backward: bool = False,
    whole: bool = False,
) -> Observed:
    """Run once, in the gradient mode that is on.

    Args:
        call: the model, or its graph.
        model, args, kwargs: of the run.
        like: another run. Backward runs where gradients are on and the autograd graph is not that of `like`; without
            `like`, where not all of the graph is visible.
        backward: whether backward runs in any case.
        whole: whether the values of large outputs are kept.
    """
    inputs, named = copied(args, kwargs)
    with same_values(model):
        seed()
        held = attribute_tensors(model)
        with _AutogradUse() as use, _watched_hooks(model) as observers, _products_observed(model, use):
            output = call(*inputs, **named)
        reseeded = torch.initial_seed() != 0  # which `seed` has set
        tensors = _tensors(output)
        held += [(name, value) for name, value in model.named_parameters() if name in written_by(model)]
        buffers = [(name, value.detach().clone()) for name, value in [*model.named_buffers(), *held]]
        custom = torch.autograd.function.BackwardCFunction
        nodes = [node for node in backward_nodes(tensors) - use.nodes_of_products() if isinstance(node, custom)]
        # control flow operators are ops of a graph, with a backward of their own
        nodes = [node for node in nodes if not _module_of(node).startswith("torch._higher_order_ops.")]
        reentrant = [node for node in nodes if getattr(node, "_forward_cls", None) is CheckpointFunction]
        names = {type(node).__name__.removesuffix("Backward") for node in nodes if node not in reentrant}
        names = {name for name in names if not name.startswith("GeneratedBackwardFor_")}
        functions = {f"the autograd.Function {name}, whose backward a traced graph does not keep" for name in names}
        if reseeded:  # dynamo would keep the seed as a constant
            functions.add("torch.seed or torch.manual_seed in forward, and a traced graph would keep one seed")
        without_values = any(isinstance(parameter, FakeTensor) for parameter in model.parameters())
        differentiates = torch.is_grad_enabled() and not without_values
        leaves = {f"input {index}": tensor for index, tensor in enumerate(_tensors((inputs, named)))}
        parameters = dict(model.named_parameters())
        visible = differentiates and not (backward or use.hooks or use.recomputes or written_by(model))
        autograd = describe(_differentiable(tensors), parameters, leaves) if visible else None
        same = autograd is not None and (like is None or autograd == like.autograd)
        gradients, broken = _gradients(tensors, leaves | parameters) if differentiates and not same else (None, "")
    if isinstance(call, fx.GraphModule):  # torch.export gives it constants of its own on the memory of the model's
        for value in (*vars(call).values(), *call._buffers.values()):
            if isinstance(value, torch.Tensor):
                without_history(value)
    outputs = [tensor.detach() if whole else Digest.of(tensor) for tensor in tensors]
    changed = (inputs, named)
    recomputes = use.recomputes or bool(reentrant)
    return Observed(
        (_types(output), outputs),
        (_types(changed), [tensor.detach() for tensor in _tensors(changed)]),
        buffers,
        tuple(sorted(functions)),
        recomputes,
        use.asks,
        tuple(sorted(observers)),
        autograd,
        gradients,
        broken,
    )


def _module_of(node: Any) -> str:
    """Return the name of the Python module that defines the autograd.Function of a node, or ""."""
    return getattr(getattr(node, "_forward_cls", None), "__module__", "")


_HOOKS_OF = {"torch", "lorasc_fx", "transformers", "timm", "peft", "accelerate", "lightning", "pytorch_lightning"}
"""Packages whose hooks set what the same forward reads (norms of weights, features), or nothing that counts."""


@isolated
def _watched_hooks(undo: Block, model: nn.Module) -> set[str]:
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


def _differentiable(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [output for output in outputs if output.is_floating_point() or output.is_complex()]


def _gradients(
    outputs: list[torch.Tensor], leaves: Mapping[str, torch.Tensor]
) -> tuple[Mapping[str, torch.Tensor] | None, str]:
    """Return projections of the gradients of leaves, or why the backward pass raises: an eager model may have none."""
    try:
        return projected_gradients(_differentiable(outputs), leaves), ""
    except MemoryError:
        raise
    except Exception as fault:
        return None, one_line(fault)


def _difference(ours: Observed, theirs: Observed, gradients: bool = True) -> Difference | None:
    """Return how two observations differ, or None."""
    for what, computed, expected in (
        ("an output", ours.output, theirs.output),
        ("an argument after the call", ours.arguments, theirs.arguments),
    ):
        if computed[0] != expected[0]:
            return Difference(f"{what} has other types, {computed[0]} for {expected[0]}")
        if len(computed[1]) != len(expected[1]):
            return Difference(f"{what} holds {len(computed[1])} tensors for {len(expected[1])}")
        for one, other in zip(computed[1], expected[1], strict=True):
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
        dtypes = {output.dtype for output in theirs.output[1] if output.dtype.is_floating_point}
        return _other_gradients(ours.gradients, theirs.gradients, dtypes)
    return None


def _other_gradients(
    ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], dtypes: set[torch.dtype]
) -> Difference | None:
    """Return which gradients differ by more than rounding, which is of the scale of the largest where terms cancel."""
    none = torch.zeros(PROJECTIONS, dtype=torch.float64)
    allowed = min(ROUNDING * max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0), COARSE)
    finite = [float(gradient.norm()) for gradient in theirs.values() if bool(gradient.isfinite().all())]
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


def _apart(one: torch.Tensor | Digest, other: torch.Tensor | Digest) -> str | None:
    if one.shape != other.shape or one.dtype != other.dtype:
        return f"{one.dtype} {tuple(one.shape)} for {other.dtype} {tuple(other.shape)}"
    if isinstance(one, Digest) or isinstance(other, Digest):
        return None if isinstance(one, Digest) and isinstance(other, Digest) and one == other else "another by its bits"
    without_values = isinstance(one, FakeTensor) and isinstance(other, FakeTensor)
    if without_values or one.is_nested or one.is_sparse or one.numel() == 0 or torch.equal(one, other):
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
    tensors: list[torch.Tensor] = []
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            tensors.append(item)
        elif isinstance(item, Mapping):
            waiting.extend(reversed(list(item.values())))
        elif isinstance(item, (list, tuple)):
            waiting.extend(reversed(item))
        elif hasattr(item, "__dict__") and not isinstance(item, (type, nn.Module)) and not callable(item):
            waiting.extend(reversed(list(vars(item).values())))
    return tensors


class _Made(TorchDispatchMode):
    """Records projections of the outputs of all ops of a run."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        real = [tensor for tensor in _tensors(output) if not isinstance(tensor, FakeTensor)]  # a graph may hold fakes
        self._made += [projected(tensor) for tensor in real if tensor.is_floating_point() or tensor.is_complex()]
        return output

    def has(self, value: torch.Tensor) -> bool:
        """Whether an op has made a tensor with these projections."""
        return any(bool((made - value).norm() <= CLOSE * value.norm()) for made in self._made)
