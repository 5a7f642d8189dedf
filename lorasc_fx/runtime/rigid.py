"""The fold of a quantized base: its numbers hold no delta, so it becomes dense, or is quantized again, if asked to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import nn

from lorasc_fx.branch import dense, is_quantized
from lorasc_fx.errors import SpecError, StateError, named
from lorasc_fx.parameters import Holder, exchange
from lorasc_fx.state import SlowWeights
from lorasc_fx.undo import Undo

__all__ = ["Requantize", "check_asked", "dense_in_place", "requantized"]

log = logging.getLogger("lorasc_fx")

Requantize = Literal["dequantize"] | Callable[[nn.Module], object] | None
"""What a fold does to quantized weights that have trained: refuse (None), leave them dense, or call this on each of the
modules that hold one, with the dense weight in it, to quantize it again."""


def check_asked(call: str, slow: SlowWeights, how: Requantize) -> list[str]:
    """Return the quantized weights that a fold changes.

    Raises:
        StateError: there are some, and the call does not say what to do with them.
        SpecError: `how` is none of what it may be.
    """
    if not (how is None or how == "dequantize" or callable(how)):
        raise SpecError(f"{call}: quantized is {how!r}; give None, 'dequantize' or a callable that quantizes a module")
    names = [
        name for name, state in slow.states.items() if is_quantized(state.base) and state.carried("slow") is not None
    ]
    if names and how is None:
        raise StateError(
            f"{call}: {named(names, 1)} is quantized, and its numbers cannot hold what was trained; nothing was "
            "changed. Give quantized='dequantize' for dense weights, or quantized=f, which quantizes a module again",
            code="quantized-not-supported",
        )
    return names


def dense_in_place(model: nn.Module, values: Mapping[str, torch.Tensor], undo: Undo) -> list[Holder]:
    """Put dense parameters in place of quantized ones, and return the places with what they held."""
    parameters = dict(model.named_parameters())
    exact = {id(parameters[name]): nn.Parameter(value, requires_grad=False) for name, value in values.items()}
    return exchange(model, lambda holder: exact.get(id(holder.value)), undo)


def requantized(held: Iterable[Holder], how: Requantize) -> None:
    """Quantize again where asked to, and log what was done to each weight.

    Raises:
        StateError: what shall quantize a module does not.
    """
    named = [holder for holder in held if holder.store is holder.module._parameters]
    exact = {id(holder.value): holder.module._parameters[holder.leaf] for holder in named}
    for holder in named:
        module, leaf, old, now_dense = holder.module, holder.leaf, holder.value, exact[id(holder.value)]
        assert now_dense is not None
        if not callable(how):
            log.info("%s of %s was dequantized: it is %s now", leaf, type(module).__name__, now_dense.dtype)
            continue
        how(module)
        now = module._parameters[leaf]
        if now is None or not is_quantized(now):
            raise StateError(
                f"release: quantized={how!r} did not quantize the {leaf} of {type(module).__name__}; "
                "nothing was changed. Give a callable that quantizes the module that it is given, in place",
                code="requantization-failed",
            )
        size = dense(old).float().norm().clamp_min(1e-30)
        trained = float((now_dense.float() - dense(old).float()).norm() / size)
        rounded = float((dense(now).float() - now_dense.float()).norm() / size)
        log.info(
            "%s of %s was quantized again as %s: training moved it by %.3g %% of its norm, rounding by %.3g %%",
            leaf,
            type(module).__name__,
            type(now).__name__,
            100 * trained,
            100 * rounded,
        )
