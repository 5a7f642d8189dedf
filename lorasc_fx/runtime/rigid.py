"""The fold of a quantized base: its numbers hold no delta, so it becomes dense, or is quantized again, if asked to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import nn

from lorasc_fx.branch import dense, is_quantized
from lorasc_fx.errors import SpecError, StateError
from lorasc_fx.runtime.slow import SlowWeights

__all__ = ["Requantize", "check_asked", "places", "put", "put_back", "requantized"]

log = logging.getLogger("lorasc_fx")

Requantize = Literal["dequantize"] | Callable[[nn.Module], object] | None
"""What a fold does to quantized weights that have trained: refuse (None), leave them dense, or call this on each of the
modules that hold one, with the dense weight in it, to quantize it again."""

Places = list[tuple[nn.Module, str, nn.Parameter]]


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
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise StateError(
            f"{call}: {names[0]}{more} is quantized, and its numbers cannot hold what was trained; nothing was "
            "changed. Give quantized='dequantize' for dense weights, or quantized=f, which quantizes a module again",
            code="quantized-not-supported",
        )
    return names


def places(model: nn.Module, names: Iterable[str]) -> Places:
    """Return every place where these parameters are held, with what is there."""
    parameters = dict(model.named_parameters())
    meant = {id(parameters[name]) for name in names}
    return [
        (module, leaf, value)
        for module in model.modules()
        for leaf, value in module._parameters.items()
        if value is not None and id(value) in meant
    ]


def put(held: Places, model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Put dense parameters in place of quantized ones, everywhere they are held."""
    parameters = dict(model.named_parameters())
    instead = {id(parameters[name]): nn.Parameter(value, requires_grad=False) for name, value in values.items()}
    for module, leaf, value in held:
        module._parameters[leaf] = instead[id(value)]


def put_back(held: Places) -> None:
    """Undo `put`."""
    for module, leaf, value in held:
        module._parameters[leaf] = value


def requantized(held: Places, how: Requantize) -> None:
    """Quantize again where asked to, and tell what was done to each weight; puts everything back if that fails."""
    kept = {id(old): module._parameters[leaf] for module, leaf, old in held}
    try:
        for module, leaf, old in held:
            exact = kept[id(old)]
            assert exact is not None
            if not callable(how):
                log.info("%s of %s was dequantized: it is %s now", leaf, type(module).__name__, exact.dtype)
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
            trained = float((exact.float() - dense(old).float()).norm() / size)
            rounded = float((dense(now).float() - exact.float()).norm() / size)
            log.info(
                "%s of %s was quantized again as %s: training moved it by %.3g %% of its norm, rounding by %.3g %%",
                leaf,
                type(module).__name__,
                type(now).__name__,
                100 * trained,
                100 * rounded,
            )
    except BaseException:
        put_back(held)
        raise
