"""Run a model or its graph once, record the results (outputs, buffers, gradients), and compare two such records.

Gradients are not stored. Each is reduced to a few random projections when it is computed. Projections are linear, so a
gradient may be accumulated in parts, as reentrant checkpointing does. If the autograd graphs of both executions have
the same nodes and edges, no backward pass is needed.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec, TypeVar

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from lorasc_fx.check.guards import attribute_tensors
from lorasc_fx.check.isolation import detach, restored_values, written_by
from lorasc_fx.check.process_state import ObserverMode, seed
from lorasc_fx.check.projections import PROJECTIONS, autograd_edges, backward_nodes, projected_gradients
from lorasc_fx.quantized import QuantizedLinear
from lorasc_fx.signature import copy_inputs
from lorasc_fx.util.environment import OUT_OF_MEMORY
from lorasc_fx.util.torch_private import FakeTensor, import_dynamo, saved_tensors_hooks
from lorasc_fx.util.undo import Block, isolated

T = TypeVar("T")
P = ParamSpec("P")

ROUNDING = 1e4
"""Maximum rounding difference between graph and model, in multiples of the dtype's eps, relative to the largest entry.
Graph and model may use different kernels."""
CANCELLED = 1e-3
"""A gradient smaller than this fraction of the largest gradient may be pure rounding error of terms that cancel."""
MAX_ROUNDING = 0.1
"""Maximum relative rounding difference for any dtype, because ROUNDING times the eps of bfloat16 exceeds 1."""
ARGUMENT = "an argument after the call"
"""Subject of a difference in an argument, such as a cache into which forward writes."""
CUSTOM_OP = "GeneratedBackwardFor_"
"""Prefix of the names of the autograd nodes of ops defined by `torch.library`."""


@dataclass(frozen=True)
class Observed:
    """The record of one execution.

    Args:
        output: (types, tensors) of the output.
        arguments: (types, tensors) of the arguments after the call, which may have written into them.
        buffers: (name, value) of buffers, tensors in attributes and written parameters, after the call.
        functions: phrases for code that a graph cannot hold: custom autograd.Functions, and new seeds.
        recomputes: whether the model sets hooks on saved tensors, as gradient checkpointing does.
        reads_grad_state: whether Python code of the model reads `requires_grad`, `grad_fn` or `is_leaf` of tensors.
        asks_grad_mode: whether the model may compute something else in the other gradient mode: it reads the mode or
            this state of tensors, differentiates, sets hooks, or runs code that `functions` lists.
        observers: names of modules with forward hooks of the user that return None.
        autograd: the edges of the autograd graph. None if the edges do not determine the gradients.
        gradients: {name of a parameter or input: projections of its gradient}. None if no backward ran, or it raised.
        backward_error: the exception of the backward pass, as one line, or "".
    """

    output: tuple[Any, list[torch.Tensor]]
    arguments: tuple[Any, list[torch.Tensor]]
    buffers: list[tuple[str, torch.Tensor]]
    functions: tuple[str, ...]
    recomputes: bool
    reads_grad_state: bool
    asks_grad_mode: bool
    observers: tuple[str, ...]
    autograd: Counter[Any] | None
    gradients: Mapping[str, torch.Tensor] | None
    backward_error: str = ""


def attempt(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[T | None, Exception | None]:
    """Call a function that may raise. Return (result, None) or (None, exception).

    Exceptions of OUT_OF_MEMORY are not caught, because what the caller would try next needs memory too.
    """
    try:
        return call(*args, **kwargs), None
    except OUT_OF_MEMORY:
        raise
    except Exception as fault:
        return None, fault


_GRAD_STATE = (torch.Tensor.requires_grad, torch.Tensor.grad_fn, torch.Tensor.is_leaf)
_DIFFERENTIATES = (torch.autograd.grad, torch.Tensor.backward, torch.Tensor.register_hook, torch.Tensor.requires_grad_)
"""Functions that do something else, or raise, if gradients are disabled."""


class _AutogradUse(ObserverMode, TorchFunctionMode):
    """Observes how the Python code of a model uses autograd. Code inside quantized layers is ignored.

    Attributes:
        recomputes: whether an op runs while the model has set hooks on saved tensors.
        reads_grad_state: whether `requires_grad`, `grad_fn` or `is_leaf` of a tensor is read.
        asks_grad_mode: whether the gradient mode is read, or a function of `_DIFFERENTIATES` is called.
        hooks: whether the model may have set hooks on tensors or autograd nodes.
        products: (arguments, output) of each call of a quantized layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recomputes = self.reads_grad_state = self.asks_grad_mode = self.hooks = False
        self.products: list[tuple[Any, torch.Tensor | None]] = []
        self._inside = 0  # depth of calls of quantized layers
        self._hooks_before = saved_tensors_hooks(True)

    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        # Gradient checkpointing runs its region under hooks on saved tensors.
        self.recomputes |= saved_tensors_hooks(True) != self._hooks_before
        getter_of = getattr(func, "__self__", None)  # the attribute that func reads, if func is a `__get__`
        self.reads_grad_state |= not self._inside and any(getter_of is attribute for attribute in _GRAD_STATE)
        # A model that reads grad_fn may set hooks on the node, which this mode does not see.
        self.hooks |= func is torch.Tensor.register_hook or getter_of is torch.Tensor.grad_fn
        self.asks_grad_mode |= func in _DIFFERENTIATES
        return func(*args, **(kwargs or {}))

    def before_layer(self, module: nn.Module, args: object) -> None:
        """Forward pre-hook of quantized layers."""
        self._inside += 1

    def after_layer(self, module: nn.Module, args: object, output: torch.Tensor | None) -> None:
        """Forward hook of quantized layers. The output is None if the layer raised."""
        self._inside -= 1
        self.products.append((args, output))

    def nodes_of_products(self) -> set[Any]:
        """Return the autograd nodes inside the quantized layers."""
        nodes = set[Any]()
        for args, output in self.products:
            if output is not None:
                nodes |= backward_nodes([output]) - backward_nodes(tensors_in(args))
        return nodes


@isolated
def _use_observed(undo: Block, model: nn.Module, use: _AutogradUse) -> None:
    """Context manager: let `use` observe torch functions, reads of the gradient mode, and quantized layers."""
    undo.enter(use)
    import_dynamo()
    is_grad_enabled = torch.is_grad_enabled

    def read() -> bool:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        # `torch.no_grad()` reads the mode to restore it. The hooks of a cascade read it too.
        use.asks_grad_mode |= caller != "torch.autograd.grad_mode" and not caller.startswith("lorasc_fx.")
        return is_grad_enabled()

    undo(partial(setattr, torch, "is_grad_enabled", is_grad_enabled))
    torch.is_grad_enabled = read
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            undo(module.register_forward_pre_hook(use.before_layer).remove)
            undo(module.register_forward_hook(use.after_layer, always_call=True).remove)


def observe(
    call: Callable[..., Any],
    model: nn.Module,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    reference: Observed | None = None,
    backward: bool = False,
    gradients: bool = True,
) -> Observed:
    """Run once in the current gradient mode, and return the record of the execution.

    Backward runs only if the edges of the autograd graph do not determine the gradients, or differ from `reference`.

    Args:
        call: the model, or its graph.
        model: the model, whose state is recorded and then restored.
        args, kwargs: arguments of the call. They are copied.
        reference: the record that the new one will be compared with.
        backward: run backward in any case.
        gradients: whether gradients are recorded, if gradients are on.
    """
    inputs, named = copy_inputs(args, kwargs)
    with restored_values(model):
        seed()  # so that dropout draws the same numbers in each observed execution
        stateful = attribute_tensors(model)
        use = _AutogradUse()
        with _watched_hooks(model) as observers, _use_observed(model, use):
            output = call(*inputs, **named)
        reseeded = torch.initial_seed() != 0  # `seed` has set it to 0
        tensors = tensors_in(output)
        # Record the tensors that a call may change: buffers, tensors in attributes, and written parameters.
        stateful += [(name, value) for name, value in model.named_parameters() if name in written_by(model)]
        buffers = [(name, value.detach().clone()) for name, value in [*model.named_buffers(), *stateful]]
        functions, reentrant = _custom_functions(backward_nodes(tensors) - use.nodes_of_products())
        if reseeded:  # dynamo would keep the seed as a constant
            functions.add("torch.seed or torch.manual_seed in forward, and a traced graph would keep one seed")
        without_values = any(isinstance(parameter, FakeTensor) for parameter in model.parameters())
        differentiates = gradients and torch.is_grad_enabled() and not without_values
        leaves = {f"input {index}": tensor for index, tensor in enumerate(tensors_in((inputs, named)))}
        parameters = dict(model.named_parameters())
        # The edges show neither hooks nor the order of writes, so backward must run if the model uses them.
        readable = differentiates and not (backward or use.hooks or use.recomputes or written_by(model))
        roots = [tensor for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()]
        autograd = autograd_edges(roots, leaves | parameters) if readable else None
        same = autograd is not None and (reference is None or autograd == reference.autograd)
        refused = bool(functions or observers or use.recomputes or reentrant)  # no graph will be compared
        run_backward = differentiates and not (same or refused)
        projections, fault = attempt(projected_gradients, roots, leaves | parameters) if run_backward else (None, None)
    # Constants of an exported graph may share memory with the model's tensors. A write then gives them a history.
    if isinstance(call, fx.GraphModule):
        for value in (*vars(call).values(), *call._buffers.values()):
            if isinstance(value, torch.Tensor):
                detach(value)
    arguments = (inputs, named)
    return Observed(
        (_types(output), [tensor.detach() for tensor in tensors]),
        (_types(arguments), [tensor.detach() for tensor in tensors_in(arguments)]),
        buffers,
        tuple(sorted(functions)),
        use.recomputes or reentrant,
        use.reads_grad_state,
        use.asks_grad_mode or use.reads_grad_state or bool(functions),
        tuple(sorted(observers)),
        autograd,
        projections,
        one_line(fault) if fault is not None else "",
    )


def _custom_functions(nodes: set[object]) -> tuple[set[str], bool]:
    """Return ({a phrase for each custom autograd.Function among the nodes}, whether one is a reentrant checkpoint)."""
    custom = [node for node in nodes if isinstance(node, torch.autograd.function.BackwardCFunction)]
    # A graph can hold control flow ops such as torch.cond, although each is an autograd.Function of torch.
    modules = {node: getattr(getattr(node, "_forward_cls", None), "__module__", "") for node in custom}
    custom = [node for node in custom if not modules[node].startswith("torch._higher_order_ops.")]
    reentrant = [node for node in custom if getattr(node, "_forward_cls", None) is CheckpointFunction]
    names = {type(node).__name__.removesuffix("Backward") for node in custom if node not in reentrant}
    names = {name for name in names if not name.startswith(CUSTOM_OP)}
    phrases = {f"the autograd.Function {name}, whose backward a traced graph does not keep" for name in names}
    return phrases, bool(reentrant)


_HOOKS_OF = {"torch", "lorasc_fx", "transformers", "timm", "peft", "accelerate"}
"""Packages whose hooks only prepare state for the same forward, or count. A graph need not repeat them."""


@isolated
def _watched_hooks(undo: Block, model: nn.Module) -> set[str]:
    """Context manager: watch the forward hooks of the user, which may have side effects that a graph would lose.

    Returns a set, to which the name of each module with a hook that returns None is added during the block.
    """
    observers: set[str] = set()

    def watched(name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: object, **kwargs: object) -> Any:
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


def difference_of(graph: Observed, model: Observed, gradients: bool = True) -> str | None:
    """Return the first difference between two executions as a phrase, or None if they agree up to rounding.

    Args:
        graph: the execution to check.
        model: the execution with the expected values.
        gradients: whether gradients are compared.
    """
    for subject, computed, expected in (
        ("an output", graph.output, model.output),
        (ARGUMENT, graph.arguments, model.arguments),
    ):
        if computed[0] != expected[0]:
            return f"{subject} has other types, {computed[0]} instead of {expected[0]}"
        if len(computed[1]) != len(expected[1]):
            return f"{subject} has {len(computed[1])} tensors instead of {len(expected[1])}"
        for value, expected_value in zip(computed[1], expected[1], strict=True):
            if (difference := _tensor_difference(value, expected_value)) is not None:
                return f"{subject} is {difference}"
    if [name for name, _ in graph.buffers] != [name for name, _ in model.buffers]:
        return "it has other buffers after the call"
    for (name, value), (_, expected_value) in zip(graph.buffers, model.buffers, strict=True):
        if (difference := _tensor_difference(value, expected_value)) is not None:
            return f"buffer {name} is {difference} after the call"
    if gradients and model.gradients is not None:
        if graph.gradients is None:
            return f"its backward pass raises {graph.backward_error}"
        dtypes = {output.dtype for output in model.output[1] if output.dtype.is_floating_point}
        return _gradient_difference(graph.gradients, model.gradients, dtypes)
    return None


def _gradient_difference(
    graph: Mapping[str, torch.Tensor], model: Mapping[str, torch.Tensor], dtypes: set[torch.dtype]
) -> str | None:
    """Return the gradients that differ by more than rounding as a phrase, or None if all agree.

    A small gradient may be a sum of large terms that cancel, so it is compared with a fraction of the largest gradient.

    Args:
        graph, model: {name: projections of the gradient}. A missing gradient is zero.
        dtypes: floating-point dtypes of the outputs, which determine the allowed rounding error.
    """
    zero = torch.zeros(PROJECTIONS, dtype=torch.float64)
    allowed = min(ROUNDING * max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0), MAX_ROUNDING)
    finite = [float(gradient.norm()) for gradient in model.values() if bool(gradient.isfinite().all())]
    min_scale = CANCELLED * max(finite, default=0.0)
    errors: dict[str, float] = {}
    for name in sorted(graph.keys() | model.keys()):
        computed, expected = graph.get(name, zero), model.get(name, zero)
        gap, scale = float((computed - expected).norm()), max(float(expected.norm()), min_scale)
        # If the gap is nan, `not gap <= ...` is true. Gradients with inf or nan in both executions cannot be compared.
        both_not_finite = (computed.isfinite().logical_not() & expected.isfinite().logical_not()).any()
        if not gap <= allowed * scale and not both_not_finite:
            errors[name] = gap / scale if scale else float("inf")
    if not errors:
        return None
    worst = max(errors, key=lambda name: errors[name])
    more = f", and {len(errors) - 1} more gradients differ" if len(errors) > 1 else ""
    return f"the gradient of {worst} is off by {errors[worst]:.1e} of its norm{more}"


def _tensor_difference(value: torch.Tensor, expected: torch.Tensor) -> str | None:
    """Return the difference of two tensors as a phrase, or None if they agree up to rounding."""
    if value.shape != expected.shape or value.dtype != expected.dtype:
        return f"{value.dtype} {tuple(value.shape)} instead of {expected.dtype} {tuple(expected.shape)}"
    without_values = isinstance(value, FakeTensor) and isinstance(expected, FakeTensor)
    if without_values or value.is_nested or value.is_sparse or value.numel() == 0 or torch.equal(value, expected):
        return None
    if not (value.is_floating_point() or value.is_complex()):
        return "different"
    finite = value.isfinite() & expected.isfinite()
    if not torch.equal(value.isfinite(), expected.isfinite()):
        return "not finite in the same places"
    scale = float(expected[finite].abs().max()) if bool(finite.any()) else 0.0
    gap = float((value - expected)[finite].abs().max()) if bool(finite.any()) else 0.0
    allowed = min(ROUNDING * torch.finfo(value.dtype).eps, MAX_ROUNDING)
    return f"off by {gap / scale:.1e} of its largest entry" if gap > allowed * scale else None


def _types(value: object) -> Any:
    """Return the type of a value, with the types of all items if it is a container."""
    if isinstance(value, Mapping):
        return (type(value).__name__, tuple((str(key), _types(item)) for key, item in value.items()))
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, tuple(map(_types, value)))
    return "Tensor" if isinstance(value, torch.Tensor) else type(value).__name__


def tensors_in(value: object) -> list[torch.Tensor]:
    """Return the tensors in a value, each once. Searches containers, and attributes of objects such as dataclasses."""
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


def one_line(fault: Exception) -> str:
    """Return the type of an exception and the first line of its message."""
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    return f"{type(fault).__name__}: {lines[0] if lines else 'no message'}"
