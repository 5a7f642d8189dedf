"""Values out of a cascade: other weights in place for a while, the folded state dict, and the release."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from lorasc_fx.branch import Which, is_quantized
from lorasc_fx.runtime.rigid import Requantize, check_asked, put, put_back, requantized
from lorasc_fx.runtime.slow import SlowWeights, fill
from lorasc_fx.runtime.transition import trained_moved

if TYPE_CHECKING:
    from lorasc_fx.runtime.core import Core

__all__ = ["ended", "folded_state", "place", "recast", "release", "rest"]


def place(
    core: Core,
    which: Which,
    parameters: Mapping[str, nn.Parameter],
    live: Mapping[str, torch.Tensor],
    past: SlowWeights | None = None,
) -> None:
    """Write slow, fast or base weights into the user's parameters; `live` are the trained ones as they are.

    `past` are slow weights of an earlier stage, to be written in place of the present ones.
    """
    slow, branches, plan = past or core.slow, core.branches_by_weight(), core.plan

    def new(name: str, out: torch.Tensor) -> None:
        if name in slow.trained:
            out.copy_(trained_value(slow, name, which, live[name], plan.spec.slow_train or past is not None))
        else:
            slow.write_value(name, which, out, branches.get(name))

    rigid = core.quantized if which != "base" else ()
    values = {name: slow.value(name, which, parameters[name], branches.get(name)) for name in rigid}
    names = [*slow.states, *slow.trained]
    fill(parameters, names, new, lambda name, out: _put_resting(core, name, out, live))
    core.dense = put(core.model, values)


def rest(core: Core, parameters: Mapping[str, nn.Parameter], live: Mapping[str, torch.Tensor]) -> None:
    """Write back what the parameters hold while the stage trains."""
    put_back(core.dense)
    core.dense = []
    with torch.no_grad():
        for name in [*core.slow.states, *core.slow.trained]:
            if not is_quantized(parameters[name]):
                _put_resting(core, name, parameters[name], live)
    core.note_weights()


def recast(core: Core, before: Mapping[str, torch.dtype]) -> None:
    """Round what was cast from W0, once; `before` are the dtypes that the parameters had."""
    parameters, rigid = core.parameters_by_name(), core.quantized
    with torch.no_grad():
        for name in core.slow.states:
            if name not in rigid and parameters[name].dtype != before[name]:
                core.slow.write_resting(name, core.plan, parameters[name])
    core.note_weights()


def _put_resting(core: Core, name: str, out: torch.Tensor, live: Mapping[str, torch.Tensor]) -> None:
    if name in live:
        out.copy_(live[name])
    else:
        core.slow.write_resting(name, core.plan, out)


def trained_value(
    slow: SlowWeights, name: str, which: Which, live: torch.Tensor, slow_train: bool = True
) -> torch.Tensor:
    """Return a parameter that is trained in full as the slow, fast or base weights have it."""
    kept = slow.trained[name]
    if which == "base":
        return kept.base
    return kept.slow.to(live.dtype) if which == "slow" and slow_train else live


def ended(core: Core) -> SlowWeights:
    """Return the slow state with the running stage folded, if it has trained; else as it is. Nothing is written."""
    slow, branches, trained = core.slow, core.branches_by_weight(), core.trained_parameters()
    begun = any(bool(branch.lora_B.any()) for branch in branches.values()) or trained_moved(slow, trained)
    return slow.after_stage(core.plan, branches, trained) if begun else slow


def folded_state(core: Core, call: str, quantized: Requantize = None) -> dict[str, torch.Tensor]:
    """Return copies of the model's state dict with the slow weights; tied names share one tensor as in the model."""
    slow, parameters = ended(core), core.parameters_by_name()
    check_asked(call, slow, quantized)
    first = {id(parameter): name for name, parameter in parameters.items()}
    folded: dict[str, torch.Tensor] = {}
    done: dict[str, torch.Tensor] = {}
    state = core.model.state_dict(keep_vars=True)
    for name, value in state.items():
        own = first.get(id(value))
        if own is None:
            folded[name] = value.detach().clone() if isinstance(value, torch.Tensor) else value
            continue
        if own not in done:
            if own in slow.states and not (is_quantized(value) and slow.states[own].carried("slow") is None):
                done[own] = slow.value(own, "slow", value)
            elif own in slow.trained:
                done[own] = trained_value(slow, own, "slow", value).detach().to(value.device, copy=True)
            else:
                done[own] = value.detach().clone()
        folded[name] = done[own]
    return folded


def release(core: Core, quantized: Requantize) -> None:
    """Write the slow weights into the user's parameters, for good, and let go of W0; all or nothing."""
    slow, parameters = ended(core), core.parameters_by_name()
    rigid = check_asked("release", slow, quantized)
    live = {name: parameters[name].detach().clone() for name in slow.trained}

    def new(name: str, out: torch.Tensor) -> None:
        if name in live:
            out.copy_(trained_value(slow, name, "slow", live[name]))
        else:
            slow.write_value(name, "slow", out)

    places = put(core.model, {name: slow.value(name, "slow", parameters[name]) for name in rigid})
    requantized(places, quantized)
    try:
        fill(parameters, [*slow.states, *live], new, lambda name, out: _put_resting(core, name, out, live))
    except BaseException:
        put_back(places)
        raise
    core.slow, core.base_file = SlowWeights(), None
