"""The preflight: run the eager model, observe what a tracer misses, and compare a graph with it.

A tracer sees neither values nor gradients. It misses that the model refuses an input, that Python sets an attribute in
each call, that a custom autograd.Function has its own backward, and perhaps a write to a buffer, a tensor hook, a
branch on `requires_grad`, or the type of an output. So the model runs first, and each whole graph is compared with it,
in outputs and gradients, before it is accepted.

Each gradient is reduced to a few random projections at once, so that no gradient is kept. Projections are linear, so a
gradient may come in several parts (reentrant checkpoints). If the autograd graphs of both runs are equal, so are the
gradients, and no backward pass is run.
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
    call_recorder,
    fake_mode,
    forget_written,
    has_run,
    isolation,
    same_attributes,
    same_values,
    without_history,
    written_by,
)
from lorasc_fx.check.process_state import OurMode, eager, quiet, seed
from lorasc_fx.errors import CaptureError
from lorasc_fx.quantized import QuantizedLinear, is_quantized
from lorasc_fx.signature import copied
from lorasc_fx.util.fingerprint import checksum
from lorasc_fx.util.undo import Block, isolated

PROJECTIONS = 8


@isolated
def requiring_grad(undo: Block, model: nn.Module, names: Collection[str] | None) -> None:
    """Let these parameters require gradients, and no others, as in training. None means all that can."""
    for name, parameter in model.named_parameters():
        undo(partial(parameter.requires_grad_, parameter.requires_grad))
        possible = (parameter.is_floating_point() or parameter.is_complex()) and not is_quantized(parameter)
        parameter.requires_grad_(possible and (names is None or name in names))


def backward_nodes(outputs: Sequence[torch.Tensor]) -> set[Any]:
    """Return the nodes of the autograd graph behind some tensors."""
    waiting = [output.grad_fn for output in outputs if output.grad_fn is not None]
    nodes = set(waiting)
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None and node not in nodes:
                nodes.add(node)
                waiting.append(node)
    return nodes


def projected_gradients(outputs: Sequence[torch.Tensor], leaves: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return projections of the gradients of a random projection of outputs, for each leaf that has one.

    `.grad` of the leaves is left unchanged, and their hooks are not called. Raises what the backward pass raises.
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

    def restore(leaf: Any, gradient: torch.Tensor | None, hooks: Any, ours: dict[int, Any]) -> None:
        ours.clear()  # if the leaf had no hooks, torch would keep calling ours
        leaf._post_accumulate_grad_hooks = hooks
        leaf.grad = gradient

    unique: list[Any] = list({id(leaf): leaf for leaf in leaves}.values())
    for leaf in unique:
        ours = OrderedDict[int, Any]()
        undo(partial(restore, leaf, leaf.grad, leaf._post_accumulate_grad_hooks, ours))
        leaf.grad, leaf._post_accumulate_grad_hooks = None, ours


def backward_of_projection(outputs: Sequence[torch.Tensor]) -> None:
    """Run backward from a random projection of the outputs, if there are any."""
    if outputs:
        torch.autograd.backward(outputs, [_coefficients(output, index) for index, output in enumerate(outputs)])


def _coefficients(output: torch.Tensor, key: int) -> torch.Tensor:
    """Return the coefficients of a random projection, by shape and key; 0 for entries that are not finite."""
    drawn = _normal(output.shape, key).to(output.device, output.dtype)
    return torch.where(output.detach().isfinite(), drawn, torch.zeros_like(drawn))


def projected(value: torch.Tensor) -> torch.Tensor:
    """Return some random projections of a tensor, which depend on its shape alone and are linear in the tensor."""
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
"""Units in the last place, relative to the output's scale, by which a graph may differ: torch may use other kernels."""
MAX_MODULE_ERROR = 1e-3
"""Relative difference between a module's output and that of an op of the graph that are taken as the same."""
CANCELLED = 1e-3
"""Fraction of the largest gradient below which a gradient counts as the rounding error of terms that cancel."""
MAX_ROUNDING = 0.1
"""Relative difference that is never rounding, however few bits the dtype has."""
LARGE = 1 << 26
"""Bytes of an output from which on only a digest of it is kept."""


@dataclass(frozen=True)
class Difference:
    """How two runs differ, and the weights and inputs whose gradients do."""

    sentence: str
    weights: tuple[str, ...] = ()


class Disagreement(RuntimeError):
    """A graph that computes something else than its model."""

    def __init__(self, graph: Callable[..., Any], difference: Difference, grad: bool) -> None:
        super().__init__(f"its graph does something else than the model: {difference.sentence}")
        self.graph, self.weights, self.grad = graph, difference.weights, grad


@dataclass(frozen=True)
class Digest:
    """What is kept of a large output: dtype, shape and a checksum of its bits."""

    dtype: torch.dtype
    shape: torch.Size
    checksum: int

    @classmethod
    def of(cls, output: torch.Tensor) -> torch.Tensor | Digest:
        """Return a digest of a large output, or the detached output itself."""
        dense = output.layout is torch.strided and not output.is_nested and not isinstance(output, FakeTensor)
        if not dense or output.nbytes < LARGE:
            return output.detach()
        return cls(output.dtype, output.shape, checksum(output))


@dataclass(frozen=True)
class Observed:
    """What one run showed.

    Args:
        output, arguments: types and tensors of the output, and of the arguments after the call.
        buffers: buffers and other tensors of the model after the call, by name.
        functions: reasons why only the model's own Python can run it (custom autograd.Functions, new seeds).
        recomputes: whether it has its own hooks on saved tensors, as gradient checkpointing has.
        asks: whether its Python asks tensors for their gradient state.
        observers: modules with hooks of the user that return nothing.
        autograd: description of the autograd graph; None if not all of it is visible.
        gradients: projections of the gradients of weights and inputs; None if no backward was run or it raised.
        broken: why the backward pass raised.
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


_RECOMPUTES = (
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
    def functions(self) -> tuple[str, ...]:
        """Reasons why only the model's own Python can run it."""
        return self.seen.functions

    @property
    def asks(self) -> bool:
        """Whether the model's Python asks tensors for their gradient state."""
        return self.seen.asks

    @property
    def obstacles(self) -> list[str]:
        """Why no whole graph does what the model does."""
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
        obstacles += [f"the model uses {function}" for function in self.functions]
        return obstacles + [_RECOMPUTES] * self.seen.recomputes

    @property
    def only_recomputes(self) -> bool:
        """Whether gradient checkpointing is the only obstacle."""
        return self.obstacles == [_RECOMPUTES]

    def check(self) -> None:
        """Raise RuntimeError if no whole graph does what the model does."""
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
    known = has_run(model)
    try:
        with _trial(model, grad) as attributes:
            guards = Guards(model)
            seen = _observed(model, model, args, kwargs)
            if written_by(model):  # known only now, and observed from the next run on
                attributes.restore()
                seen = _observed(model, model, args, kwargs)
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
            draws = _draws(model, args, kwargs, states)
            attributes.restore()
            with torch.set_grad_enabled(not grad):
                other = _observed_or_none(model, args, kwargs)
            if other is not None and not seen.is_whole and _difference(other, seen, gradients=False) is not None:
                seen = _observed(model, model, args, kwargs, whole=True)  # the digests differ: compare the values
                with torch.set_grad_enabled(not grad):
                    other = _observed_or_none(model, args, kwargs, whole=True)
            depends = other is None or _difference(other, seen, gradients=False) is not None
            if not depends and other is not None and not grad:
                seen = other  # it has gradients
            mode = grad if depends else None
            return Preflight(seen, tuple(restless), draws, frozenset(assigned), tuple(written), mode)
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


def _draws(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], states: Sequence[Any]) -> bool:
    """Whether the model draws from the generators of Python or numpy, of which it left these states under one seed."""
    seed()
    moved = [index for index, state in enumerate(_generators()) if state != states[index]]
    if not moved:
        return False
    _run(model, args, kwargs, start=1)
    again = _generators()  # a model that seeds them itself leaves the same state under another seed
    return any(states[index] != again[index] for index in moved)


def check_agrees(
    graph: Callable[..., Any], preflight: Preflight, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Compare a graph with its model on one call: types, outputs, buffers, arguments after the call, and gradients.

    Raises:
        Disagreement: they differ by more than rounding, and the model repeats itself under one seed.
    """
    grad = preflight.grad is not False

    def observe(call: Callable[..., Any], whole: bool, **options: Any) -> Observed:
        with _trial(model, grad):
            return _observed(call, model, args, kwargs, whole=whole, **options)

    try:
        ours = observe(graph, preflight.seen.is_whole, like=preflight.seen)
    except MemoryError:
        raise
    except Exception as fault:
        raise Disagreement(graph, Difference(f"it raises {one_line(fault)}"), grad) from fault
    difference = _difference(ours, preflight.seen)
    if difference is not None and not (ours.is_whole and preflight.seen.is_whole):
        # The digests differ. Compare the values, which may differ by rounding.
        preflight.seen = observe(model, True)
        ours = observe(graph, True, like=preflight.seen)
        difference = _difference(ours, preflight.seen)
    if difference is None and preflight.seen.autograd is not None and ours.autograd != preflight.seen.autograd:
        # The graph ran a backward pass, because its autograd graph is another one. The model has to do so too.
        preflight.seen = observe(model, ours.is_whole, backward=True)
        difference = _difference(ours, preflight.seen)
    if difference is None:
        return
    again = observe(model, preflight.seen.is_whole, backward=True)
    if _difference(again, preflight.seen) is None:
        raise Disagreement(graph, difference, grad)


def agrees(graph: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a graph raises, or computes what its model computes, on one call without gradients."""
    try:
        with _trial(model, grad=False):
            ours = _observed(graph, model, args, kwargs, whole=True)
    except MemoryError:
        raise
    except Exception:
        return True
    with _trial(model, grad=False):
        theirs = _observed_or_none(model, args, kwargs, whole=True)
    return theirs is not None and _difference(ours, theirs, gradients=False) is None


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
        floating = [value for value in _tensors(output) if value.is_floating_point() or value.is_complex()]
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


def one_line(fault: Exception) -> str:
    """Return the type and the first line of an exception."""
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
    """Return what a run shows, or None if the model raises, as some models do in one of the two gradient modes."""
    try:
        return _observed(model, model, args, kwargs, whole=whole)
    except MemoryError:
        raise
    except Exception:
        return None


_ASKS = (torch.Tensor.requires_grad, torch.Tensor.grad_fn, torch.Tensor.is_leaf)


class _AutogradUse(OurMode, TorchFunctionMode):
    """Observes how a model uses autograd, except inside the quantized layers of libraries.

    Attributes:
        recomputes: whether it computes under its own hooks on saved tensors.
        asks: whether it asks tensors for their gradient state.
        hooks: whether it may put hooks on tensors or on autograd nodes.
        products: arguments and outputs of the calls of quantized layers.
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
        """Note that a call of a quantized layer begins."""
        self._inside += 1

    def leaves(self, module: nn.Module, args: Any, output: torch.Tensor | None) -> None:
        """Note that the call ends. The output is None if it raised."""
        self._inside -= 1
        self.products.append((args, output))

    def nodes_of_products(self) -> set[Any]:
        """Return the autograd nodes inside the quantized layers."""
        nodes = set[Any]()
        for args, output in self.products:
            if output is not None:
                nodes |= backward_nodes([output]) - backward_nodes(_tensors(args))
        return nodes


@isolated
def _products_observed(undo: Block, model: nn.Module, use: _AutogradUse) -> None:
    """Let `use` know of the calls of quantized layers."""
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
    """Run once, in the current gradient mode, and observe.

    Backward runs only if the autograd graph is not visible, or is not that of `like`.

    Args:
        call: the model, or its graph.
        model, args, kwargs: of the run.
        like: another run.
        backward: run backward in any case.
        whole: keep the values of large outputs too.
    """
    inputs, named = copied(args, kwargs)
    with same_values(model):
        seed()
        held = attribute_tensors(model)
        with _AutogradUse() as use, _watched_hooks(model) as observers, _products_observed(model, use):
            output = call(*inputs, **named)
        reseeded = torch.initial_seed() != 0  # as `seed` has set it
        tensors = _tensors(output)
        # Buffers, tensors among the attributes and parameters that forward writes: what a call may leave changed.
        held += [(name, value) for name, value in model.named_parameters() if name in written_by(model)]
        buffers = [(name, value.detach().clone()) for name, value in [*model.named_buffers(), *held]]
        functions, reentrant = _custom_functions(backward_nodes(tensors) - use.nodes_of_products())
        if reseeded:  # dynamo would keep the seed as a constant
            functions.add("torch.seed or torch.manual_seed in forward, and a traced graph would keep one seed")
        # Gradients, by the autograd graph if that is enough.
        without_values = any(isinstance(parameter, FakeTensor) for parameter in model.parameters())
        differentiates = torch.is_grad_enabled() and not without_values
        leaves = {f"input {index}": tensor for index, tensor in enumerate(_tensors((inputs, named)))}
        parameters = dict(model.named_parameters())
        visible = differentiates and not (backward or use.hooks or use.recomputes or written_by(model))
        autograd = describe(_differentiable(tensors), parameters, leaves) if visible else None
        same = autograd is not None and (like is None or autograd == like.autograd)
        gradients, broken = _gradients(tensors, leaves | parameters) if differentiates and not same else (None, "")
    if isinstance(call, fx.GraphModule):  # torch.export gives it constants on the memory of the model's tensors
        for value in (*vars(call).values(), *call._buffers.values()):
            if isinstance(value, torch.Tensor):
                without_history(value)
    outputs = [tensor.detach() if whole else Digest.of(tensor) for tensor in tensors]
    changed = (inputs, named)
    return Observed(
        (_types(output), outputs),
        (_types(changed), [tensor.detach() for tensor in _tensors(changed)]),
        buffers,
        tuple(sorted(functions)),
        use.recomputes or reentrant,
        use.asks,
        tuple(sorted(observers)),
        autograd,
        gradients,
        broken,
    )


def _custom_functions(nodes: set[Any]) -> tuple[set[str], bool]:
    """Return a phrase for each custom autograd.Function among nodes, and whether one is a reentrant checkpoint."""
    custom = [node for node in nodes if isinstance(node, torch.autograd.function.BackwardCFunction)]
    # Control flow operators are ops of a graph, with their own backward.
    custom = [node for node in custom if not _module_of(node).startswith("torch._higher_order_ops.")]
    reentrant = [node for node in custom if getattr(node, "_forward_cls", None) is CheckpointFunction]
    names = {type(node).__name__.removesuffix("Backward") for node in custom if node not in reentrant}
    names = {name for name in names if not name.startswith("GeneratedBackwardFor_")}
    phrases = {f"the autograd.Function {name}, whose backward a traced graph does not keep" for name in names}
    return phrases, bool(reentrant)


def _module_of(node: Any) -> str:
    """Return the name of the Python module that defines the autograd.Function of a node, or ""."""
    return getattr(getattr(node, "_forward_cls", None), "__module__", "")


_HOOKS_OF = {"torch", "lorasc_fx", "transformers", "timm", "peft", "accelerate", "lightning", "pytorch_lightning"}
"""Packages whose hooks do nothing that a graph would miss: they set what the same forward reads, or count."""


@isolated
def _watched_hooks(undo: Block, model: nn.Module) -> set[str]:
    """Return a set that the block fills with the names of modules with hooks of the user that return nothing."""
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
    """Return projections of the gradients of leaves, or None and why the backward pass raises."""
    try:
        return projected_gradients(_differentiable(outputs), leaves), ""
    except MemoryError:
        raise
    except Exception as fault:
        return None, one_line(fault)


def _difference(ours: Observed, theirs: Observed, gradients: bool = True) -> Difference | None:
    """Return how two runs differ, or None."""
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
    """Return which gradients differ by more than rounding.

    A small gradient may be a sum of large terms that cancel, so its rounding error is relative to the largest gradient.
    """
    none = torch.zeros(PROJECTIONS, dtype=torch.float64)
    allowed = min(ROUNDING * max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0), MAX_ROUNDING)
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
    allowed = min(ROUNDING * torch.finfo(one.dtype).eps, MAX_ROUNDING)
    return f"off by {gap / scale:.1e} of its scale" if gap > allowed * scale else None


def _types(value: Any) -> Any:
    """Return the type of a value, and the types of the items of containers."""
    if isinstance(value, Mapping):
        return (type(value).__name__, tuple((str(key), _types(item)) for key, item in value.items()))
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, tuple(map(_types, value)))
    return "Tensor" if isinstance(value, torch.Tensor) else type(value).__name__


def _tensors(value: Any) -> list[torch.Tensor]:
    """Return the tensors in an output of any type, each once."""
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


class _OpOutputs(TorchDispatchMode):
    """Records projections of the outputs of all ops of a run."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._projections: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        real = [tensor for tensor in _tensors(output) if not isinstance(tensor, FakeTensor)]  # a graph may hold fakes
        self._projections += [projected(value) for value in real if value.is_floating_point() or value.is_complex()]
        return output

    def has(self, value: torch.Tensor) -> bool:
        """Whether an op has computed a tensor with these projections."""
        return any(bool((other - value).norm() <= MAX_MODULE_ERROR * value.norm()) for other in self._projections)
