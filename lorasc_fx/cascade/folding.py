"""Weights out of a cascade: the folded state dict, the release, and moves to other devices and dtypes.

A quantized weight cannot hold a delta. Its fold is a dense weight, or one that is quantized again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lorasc_fx.cascade.commit import Planned
from lorasc_fx.cascade.experts import Weights, folded_weights
from lorasc_fx.cascade.run import Run
from lorasc_fx.errors import SpecError, StateError, named
from lorasc_fx.parameters import Holder, holders_of, substituted
from lorasc_fx.quantized import QuantizedLinear, dense, is_quantized, library_of
from lorasc_fx.shards import local
from lorasc_fx.state import SlowWeights
from lorasc_fx.util.undo import Undo


def cast_weights(run: Run, fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], list[str]] | None:
    """Check that every parameter may be moved or cast by `fn` now.

    Fingerprints belong to the base as it was adapted, so they are computed here if its values are about to change.

    Returns:
        None if `fn` changes nothing. Otherwise a function to call after the cast. It returns the names of the weights
        that must be rounded again: those with another dtype, and those trained in full that have not moved yet.

    Raises:
        StateError: after `release`, or if something changes, inside `weights` or inside a backward.
    """
    run.check_alive("to")
    parameters, trained = run.parameters_by_name(), run.present(run.slow.trained)
    tensors = [*(parameter.data for parameter in parameters.values()), *run.model.buffers(), *run.branches.parameters()]
    # `to` with the current device and dtype changes nothing, and must not drop the graphs.
    if all(_stays(tensor.data, fn(tensor.data)) for tensor in tensors):
        return None
    run.check_ready("to")
    dtypes = {name: value.dtype for name, value in parameters.items()}
    if run.digests or any(fn(torch.empty(0, dtype=dtype)).dtype != dtype for dtype in set(dtypes.values())):
        run.fingerprints()
    unmoved = [name for name, value in trained.items() if not run.slow.moved({name: value})]

    def rounded_anew() -> list[str]:
        current = run.weights_by_name()
        return [*(name for name, value in current.items() if value.dtype != dtypes[name]), *unmoved]

    return rounded_anew


def wide(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that moves and casts factors like `fn`, but never to a dtype narrower than fp32."""

    def cast(factor: torch.Tensor) -> torch.Tensor:
        value = fn(factor)
        return value if value.dtype.itemsize >= 4 else factor.to(value.device, torch.float32)

    return cast


def tensors_writer(run: Run, cascade: nn.Module) -> Callable[[], None]:
    """Return a function that restores every module's parameters and buffers, with the memory that they have now."""
    held = [(module, dict(module._parameters), dict(module._buffers)) for module in cascade.modules()]
    lists = [
        (store, list(store)) for module in cascade.modules() for store in vars(module).values() if type(store) is list
    ]
    data = [
        (value, value.data, value.grad, None if value.grad is None else value.grad.data, value.requires_grad)
        for value in cascade.parameters()
    ]

    def write() -> None:
        for module, parameters, buffers in held:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        for store, values in lists:
            store[:] = values
        for value, memory, gradient, its_memory, trained in data:
            value.grad = None
            value.data = memory
            value.requires_grad_(trained)
            if gradient is not None and its_memory is not None:
                gradient.data = its_memory
            value.grad = gradient
        run.note_weights()
        run.note_frozen()

    return write


def replace_quantized(model: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Move or cast quantized weights as new parameters.

    torch would swap the old parameters with new ones, and refuses to if there is a weak reference to one.
    """
    new: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in () if isinstance(module, QuantizedLinear) else [*module._parameters.items()]:
            if parameter is not None and is_quantized(parameter):
                if id(parameter) not in new:
                    new[id(parameter)] = nn.Parameter(fn(parameter.detach()), False)
                module._parameters[name] = new[id(parameter)]


def _stays(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether a tensor is unchanged, or is a plain copy: torch makes one for the device `cpu:0`."""
    if after is before:
        return True
    if is_traceable_wrapper_subclass(before) and type(after) is type(before):  # a quantized weight
        names, how = before.__tensor_flatten__()
        other, its_how = after.__tensor_flatten__()
        alike = (names, how, before.dtype) == (other, its_how, after.dtype)
        return alike and all(_stays(getattr(before, name), getattr(after, name)) for name in names)
    if type(before) is not torch.Tensor or type(after) is not torch.Tensor:
        return False
    kind = (before.device, before.dtype, before.is_pinned())
    if kind != (after.device, after.dtype, after.is_pinned()):
        return False
    bits = [value.view(torch.uint8) if value.dtype.itemsize == 1 else value for value in (before, after)]
    return torch.equal(*bits)  # torch cannot compare fp8 values


def folded_state(
    run: Run, call: str, quantized: Requantize, view: str | Mapping[str, float]
) -> dict[str, torch.Tensor]:
    """Return a copy of the model's state dict with the folded weights. Tied names share one tensor."""
    folded: dict[str, torch.Tensor] = {}
    done: dict[int, torch.Tensor] = {}
    for name, value, new in folded_each(run, call, quantized, view):
        if not isinstance(value, nn.Parameter):
            folded[name] = new()
            continue
        if id(value) not in done:
            done[id(value)] = new()
        folded[name] = done[id(value)]
    return folded


def folded_each(
    run: Run, call: str, quantized: Requantize = None, view: str | Mapping[str, float] = "slow"
) -> Iterator[tuple[str, Any, Callable[[], torch.Tensor]]]:
    """Yield each entry of the model's state dict: name, current value, and a function that returns the folded value."""
    weights, parameters = folded_weights(run, view, call), run.parameters_by_name()
    buffers = weights.buffers
    names = {name: parameters[name] for name in check_asked(call, weights.slow, quantized)}
    # Placeholders for quantized weights that become dense. Their values are computed when they are asked for.
    changed = {
        name: nn.Parameter(torch.empty(value.shape, dtype=value.dtype, device="meta"), False)
        for name, value in names.items()
    }
    with substituted(run.model, changed):  # a layer saves a dense weight under another name than its packed values
        entries = run.model.state_dict(keep_vars=True)
    names_by_id = {id(parameter): name for name, parameter in {**parameters, **changed}.items()}
    for key, value in entries.items():
        name = names_by_id.get(id(value), "")
        current = buffers[key].to(value) if key in buffers else parameters[name] if name in changed else value
        yield key, current, partial(_folded, weights, name, current)


def _folded(weights: Weights, name: str, value: Any) -> Any:
    """Return a copy of an entry of the state dict, with the folded value if `name` is a weight of the slow state."""
    slow = weights.slow
    # A quantized weight that has not trained stays as it is.
    if name in slow.states and (not is_quantized(value) or slow.states[name].unmerged("slow") is not None):
        return slow.value(name, weights.view, value)
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def release(run: Run, quantized: Requantize, view: str | Mapping[str, float], undo: Undo) -> None:
    """Write slow, averaged or other weights into the user's parameters, for good, and drop W0."""
    weights, parameters = folded_weights(run, view, "release"), run.parameters_by_name()
    dense = weights.dense(check_asked("release", weights.slow, quantized, modules=True), parameters)
    trained = {name: local(parameters[name]).detach().clone() for name in run.slow.trained}
    holders, written = holders_of(run.model, dense), run.present(weights.slow.states)
    buffers = weights.moves(run)
    run.commit(Planned(run.plan, SlowWeights(), written, weights.write, dense, tensors=buffers, live=trained), undo)
    requantize(holders, quantized, undo)


log = logging.getLogger("lorasc_fx")

Requantize = Literal["dequantize", "requantize"] | Callable[[nn.Module], object] | None
"""What a fold does with quantized weights that have trained: refuse (None), leave them dense, quantize them again by
the method of their layer, or call a function on each module, with the dense weight in it, which quantizes the module.
"""


def check_asked(call: str, slow: SlowWeights, how: Requantize, modules: bool = False) -> list[str]:
    """Return the names of the quantized weights that a fold changes.

    Args:
        call: for messages.
        slow: the slow weights to fold.
        how: the argument `quantized` of the call.
        modules: whether the fold is written into modules, which can be quantized again, and not into tensors.

    Raises:
        StateError: there are such weights, and `how` is None.
        SpecError: an invalid `how`.
    """
    if not (how in (None, "dequantize") or (modules and (how == "requantize" or callable(how)))):
        more = ", 'requantize' or a callable that quantizes a module" if modules else ""
        raise SpecError(f"{call}: quantized is {how!r}. Give None or 'dequantize'{more}")
    names = [name for name, state in slow.states.items() if state.unmerged("slow") is not None]
    if names and how is None:
        raise StateError(
            f"{call}: {named(names, 1)} is quantized and cannot hold what was trained; nothing was changed. Give "
            "quantized='dequantize' for dense weights"
            + (
                ", 'requantize' to quantize them again by the method of their layer, or a function that quantizes a "
                "module"
                if modules
                else ". release can quantize them again (quantized='requantize'); save and export.peft keep branches"
            ),
            code="quantized-not-supported",
        )
    return names


def requantize(held: Iterable[Holder], how: Requantize, undo: Undo) -> None:
    """Quantize weights again if `how` asks for it, and log what was done to each weight.

    Args:
        held: the places that hold dense weights now, found when they held quantized ones.
        how: the argument `quantized` of the call.
        undo: gets the steps that restore the layers of libraries.

    Raises:
        StateError: the given function does not quantize its module.
    """
    named = [holder for holder in held if holder.store is holder.module._parameters]
    exact = {id(holder.value): holder.module._parameters[holder.leaf] for holder in named}
    for holder in named:
        module, leaf, old, trained_weight = holder.module, holder.leaf, holder.value, exact[id(holder.value)]
        assert old is not None
        assert trained_weight is not None
        kind = type(module.layer if isinstance(module, QuantizedLinear) else module).__name__
        if how == "requantize":
            _by_its_own_method(module, kind, trained_weight, undo)
        elif callable(how):
            how(module)
        else:
            log.info("%s of %s was dequantized: it is %s now", leaf, kind, trained_weight.dtype)
            continue
        current = module._parameters[leaf]
        if current is None or not is_quantized(current):
            raise StateError(
                f"release: quantized={how!r} did not quantize the {leaf} of {kind}; nothing was changed. Give a "
                "callable that quantizes its module in place",
                code="quantized-not-supported",
            )
        # Both changes relative to the weight, so that they can be compared.
        size = dense(old).float().norm().clamp_min(1e-30)
        trained = float((trained_weight.float() - dense(old).float()).norm() / size)
        rounded = float((dense(current).float() - trained_weight.float()).norm() / size)
        log.info(
            "%s of %s was quantized again as %s: training moved it by %.3g %% of its norm, rounding by %.3g %%",
            leaf,
            kind,
            type(module.layer if isinstance(module, QuantizedLinear) and module.holds_layer else current).__name__,
            100 * trained,
            100 * rounded,
        )


def _by_its_own_method(module: nn.Module, kind: str, weight: nn.Parameter, undo: Undo) -> None:
    """Re-quantize a dense weight with the settings of the original layer.

    Raises:
        StateError: there is no such layer, or its method needs more than the weight.
    """
    row = library_of(module.layer) if isinstance(module, QuantizedLinear) else None
    if row is None or row.requantize is None:
        raise StateError(
            f"release: quantized='requantize', but it is not known how {kind} was quantized; nothing was changed. Give "
            "'dequantize', or a function that quantizes a module in place, such as torchao's "
            "lambda module: quantize_(module, config)",
            code="quantized-not-supported",
        )
    assert isinstance(module, QuantizedLinear)
    undo(partial(module.hold, module.layer))
    with torch.no_grad():
        module.hold(row.requantize(module.layer, weight.detach()))
