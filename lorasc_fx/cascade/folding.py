"""Folds: the slow weights as a state dict, or written into the user's model for good (`release`).

A quantized weight cannot hold a delta. Its folded value is dense, or is quantized again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from lorasc_fx.cascade.commit import Planned, WeightValues
from lorasc_fx.cascade.run import Run
from lorasc_fx.cascade.views import folded_weights
from lorasc_fx.errors import SpecError, StateError, named
from lorasc_fx.parameters import Holder, holders_of, substituted
from lorasc_fx.quantized import QuantizedLinear, dense, is_quantized, library_of
from lorasc_fx.shards import local
from lorasc_fx.state import SlowWeights
from lorasc_fx.util.undo import Undo


def folded_state(run: Run, call: str, quantized: Requantize, view: str) -> dict[str, torch.Tensor]:
    """Return a copy of the model's state dict with the folded weights. Tied parameters share one tensor.

    Arguments and errors are those of `Cascade.folded_state_dict`; `call` names the caller in messages.
    """
    folded: dict[str, torch.Tensor] = {}
    by_parameter: dict[int, torch.Tensor] = {}
    for name, value, compute in folded_each(run, call, quantized, view):
        if not isinstance(value, nn.Parameter):
            folded[name] = compute()
            continue
        if id(value) not in by_parameter:
            by_parameter[id(value)] = compute()
        folded[name] = by_parameter[id(value)]
    return folded


def folded_each(
    run: Run, call: str, quantized: Requantize = None, view: str = "slow"
) -> Iterator[tuple[str, Any, Callable[[], torch.Tensor]]]:
    """Yield each entry of the model's state dict: name, current value, and a function that returns the folded value.

    Values are computed lazily, so that a caller who writes them to a file needs memory for one at a time.
    """
    weights, parameters = folded_weights(run, view, call), run.parameters_by_name()
    names = {name: parameters[name] for name in check_quantized(call, weights.slow, quantized)}
    # Quantized weights that become dense are represented by placeholders in `changed`.
    changed = {
        name: nn.Parameter(torch.empty(value.shape, dtype=value.dtype, device="meta"), False)
        for name, value in names.items()
    }
    with substituted(run.model, changed):  # a layer saves a dense weight under another name than its packed values
        entries = run.model.state_dict(keep_vars=True)
    names_by_id = {id(parameter): name for name, parameter in {**parameters, **changed}.items()}
    for key, value in entries.items():
        name = names_by_id.get(id(value), "")
        current = parameters[name] if name in changed else value
        yield key, current, partial(_folded, weights, name, current)


def _folded(weights: WeightValues, name: str, value: Any) -> Any:
    """Return a copy of an entry of the state dict, with the folded value if `name` is a weight of the slow state."""
    slow = weights.slow
    # A quantized weight that has not trained stays quantized.
    if name in slow.states and (not is_quantized(value) or slow.states[name].unmerged("slow") is not None):
        return weights.value(name, value)
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def release(run: Run, quantized: Requantize, view: str, undo: Undo) -> None:
    """Write the folded weights into the user's parameters for good, and drop W0; see `Cascade.release`."""
    weights, parameters = folded_weights(run, view, "release"), run.parameters_by_name()
    dense = weights.dense(check_quantized("release", weights.slow, quantized, modules=True), parameters)
    trained = {name: local(parameters[name]).detach().clone() for name in run.slow.trained}
    holders = holders_of(run.model, [parameters[name] for name in dense])
    written = run.present(weights.slow.states)
    run.commit(Planned(run.plan, SlowWeights(), written, weights, dense, current=trained), undo)
    _requantize(holders, quantized, undo)


log = logging.getLogger("lorasc_fx")

Requantize = Literal["dequantize", "requantize"] | Callable[[nn.Module], object] | None
"""How a fold treats quantized weights that have trained. None raises an error. "dequantize" leaves them dense.
"requantize" quantizes them again with the settings of their layer. A callable gets each module with its dense weight,
and quantizes it in place."""


def check_quantized(call: str, slow: SlowWeights, how: Requantize, modules: bool = False) -> list[str]:
    """Check the argument `quantized` of a fold, and return the names of the quantized weights that the fold changes.

    Args:
        call: name of the caller, for messages.
        slow: the slow weights to fold.
        how: the argument `quantized` of the call.
        modules: whether the fold writes into modules, which can be quantized again. Otherwise it returns tensors.

    Raises:
        StateError: there are such weights, and `how` is None.
        SpecError: `how` is invalid.
    """
    if not (how in (None, "dequantize") or (modules and (how == "requantize" or callable(how)))):
        options = ", 'requantize' or a callable that quantizes a module" if modules else ""
        raise SpecError(f"{call}: quantized is {how!r}. Give None or 'dequantize'{options}")
    names = [name for name, state in slow.states.items() if state.unmerged("slow") is not None]
    if names and how is None:
        raise StateError(
            f"{call}: {named(names, 1)} is quantized, and its dtype cannot represent the trained weight; nothing was "
            "changed. Give quantized='dequantize' for dense weights"
            + (
                ", quantized='requantize' to quantize them again with the settings of their layer, or a callable that "
                "quantizes a module in place"
                if modules
                else ". release(quantized='requantize') quantizes them again. save and export.peft keep the branches"
            ),
            code="quantized-not-supported",
        )
    return names


def _requantize(holders: Iterable[Holder], how: Requantize, undo: Undo) -> None:
    """Quantize dense weights again unless `how` is "dequantize", and log the change of each weight.

    `holders` are the places of the dense weights in the model. Their `value` is the quantized weight of before.

    Raises:
        StateError: the callable does not quantize its module.
    """
    weights = [holder for holder in holders if holder.store is holder.module._parameters]
    # Read all dense weights first, because quantizing a module replaces its weight.
    exact = {id(holder.value): holder.module._parameters[holder.leaf] for holder in weights}
    for holder in weights:
        module, leaf, old, trained_weight = holder.module, holder.leaf, holder.value, exact[id(holder.value)]
        assert old is not None
        assert trained_weight is not None
        kind = type(module.layer if isinstance(module, QuantizedLinear) else module).__name__
        if how == "requantize":
            _requantize_like_layer(module, kind, trained_weight, undo)
        elif callable(how):
            how(module)
        else:
            log.info("%s of %s was dequantized to %s", leaf, kind, trained_weight.dtype)
            continue
        current = module._parameters[leaf]
        if current is None or not is_quantized(current):
            raise StateError(
                f"release: quantized={how!r} did not quantize the {leaf} of {kind}; nothing was changed. Give a "
                "callable that quantizes its module in place",
                code="quantized-not-supported",
            )
        # Log both changes relative to the norm of the weight: if rounding is the larger one, training may be lost.
        norm = dense(old).float().norm().clamp_min(1e-30)
        trained = float((trained_weight.float() - dense(old).float()).norm() / norm)
        rounded = float((dense(current).float() - trained_weight.float()).norm() / norm)
        log.info(
            "%s of %s was quantized again as %s: training changed it by %.3g %% of its norm, rounding by %.3g %%",
            leaf,
            kind,
            type(module.layer if isinstance(module, QuantizedLinear) and module.holds_layer else current).__name__,
            100 * trained,
            100 * rounded,
        )


def _requantize_like_layer(module: nn.Module, kind: str, weight: nn.Parameter, undo: Undo) -> None:
    """Re-quantize a dense weight with the settings of the original layer.

    Raises:
        StateError: there is no such layer, or its library needs more than the weight to quantize (calibration data).
    """
    row = library_of(module.layer) if isinstance(module, QuantizedLinear) else None
    if row is None or row.requantize is None:
        raise StateError(
            f"release: quantized='requantize' is not supported for {kind}, because its weight cannot be quantized "
            "again without more information; nothing was changed. Give quantized='dequantize', or a callable that "
            "quantizes a module in place, such as torchao's lambda module: quantize_(module, config)",
            code="quantized-not-supported",
        )
    assert isinstance(module, QuantizedLinear)
    undo(partial(module.set_layer, module.layer))
    with torch.no_grad():
        module.set_layer(row.requantize(module.layer, weight.detach()))
