"""Run a model or its graph once, observe what the run does, and compare two runs.

Each gradient is reduced to a few random projections at once, so that no gradient is kept. Projections are linear, so a
gradient may come in several parts (reentrant checkpoints). If the autograd graphs of both runs are equal, so are the
gradients, and no backward pass is run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from lorasc_fx.check.autograd_graph import Description, describe
from lorasc_fx.check.guards import attribute_tensors
from lorasc_fx.check.isolation import same_values, without_history, written_by
from lorasc_fx.check.process_state import OurMode, seed
from lorasc_fx.check.projections import PROJECTIONS, backward_nodes, projected_gradients
from lorasc_fx.quantized import QuantizedLinear
from lorasc_fx.signature import copy_inputs
from lorasc_fx.util.fingerprint import checksum
from lorasc_fx.util.undo import Block, isolated

ROUNDING = 1e4
"""Units in the last place, relative to the output's scale, by which a graph may differ: torch may use other kernels."""
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


def observe_or_none(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], whole: bool = False
) -> Observed | None:
    """Return what a run shows, or None if the model raises, as some models do in one of the two gradient modes."""
    try:
        return observe(model, model, args, kwargs, whole=whole)
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
        # Gradient checkpointing computes under its own hooks on saved tensors.
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
                nodes |= backward_nodes([output]) - backward_nodes(tensors_in(args))
        return nodes


@isolated
def _products_observed(undo: Block, model: nn.Module, use: _AutogradUse) -> None:
    """Let `use` know of the calls of quantized layers."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            undo(module.register_forward_pre_hook(use.enters).remove)
            undo(module.register_forward_hook(use.leaves, always_call=True).remove)


def observe(
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
    inputs, named = copy_inputs(args, kwargs)
    with same_values(model):
        seed()  # so that dropout draws the same numbers in each observed run
        held = attribute_tensors(model)
        with _AutogradUse() as use, _watched_hooks(model) as observers, _products_observed(model, use):
            output = call(*inputs, **named)
        reseeded = torch.initial_seed() != 0  # as `seed` has set it
        tensors = tensors_in(output)
        # Buffers, tensors among the attributes and parameters that forward writes: what a call may leave changed.
        held += [(name, value) for name, value in model.named_parameters() if name in written_by(model)]
        buffers = [(name, value.detach().clone()) for name, value in [*model.named_buffers(), *held]]
        functions, reentrant = _custom_functions(backward_nodes(tensors) - use.nodes_of_products())
        if reseeded:  # dynamo would keep the seed as a constant
            functions.add("torch.seed or torch.manual_seed in forward, and a traced graph would keep one seed")
        # Gradients, by the autograd graph if that is enough.
        without_values = any(isinstance(parameter, FakeTensor) for parameter in model.parameters())
        differentiates = torch.is_grad_enabled() and not without_values
        leaves = {f"input {index}": tensor for index, tensor in enumerate(tensors_in((inputs, named)))}
        parameters = dict(model.named_parameters())
        # The description shows neither hooks nor writes, so a backward pass must run if there may be some.
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
        (_types(changed), [tensor.detach() for tensor in tensors_in(changed)]),
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
    homes = {node: getattr(getattr(node, "_forward_cls", None), "__module__", "") for node in custom}
    custom = [node for node in custom if not homes[node].startswith("torch._higher_order_ops.")]
    reentrant = [node for node in custom if getattr(node, "_forward_cls", None) is CheckpointFunction]
    names = {type(node).__name__.removesuffix("Backward") for node in custom if node not in reentrant}
    names = {name for name in names if not name.startswith("GeneratedBackwardFor_")}
    phrases = {f"the autograd.Function {name}, whose backward a traced graph does not keep" for name in names}
    return phrases, bool(reentrant)


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


def difference_of(ours: Observed, theirs: Observed, gradients: bool = True) -> Difference | None:
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


def tensors_in(value: Any) -> list[torch.Tensor]:
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


def one_line(fault: Exception) -> str:
    """Return the type and the first line of an exception."""
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    return f"{type(fault).__name__}: {lines[0] if lines else 'no message'}"
