"""A cascade as named tensors and JSON; `unpacking` is the way back."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from lorasc_fx.runtime.model_state import layout

if TYPE_CHECKING:
    from lorasc_fx.runtime.core import Core

__all__ = ["pack", "pack_optimizer"]

Tensors = dict[str, torch.Tensor]


def pack(core: Core) -> tuple[Tensors, dict[str, Any]]:
    """Return branches, experts, what is trained in full and buffers; and coefficients and noise as JSON."""
    slow = core.slow
    tensors: Tensors = {}
    meta: dict[str, Any] = {"parked": slow.parked, "trained": list(slow.trained), "slow": {}, "past": {}}
    meta["turning"] = core.turning.armed
    for weight, branch in core.branches_by_weight().items():
        tensors |= {f"branch/{weight}/{name}": value.detach() for name, value in branch.named_parameters()}
    for weight, state in slow.states.items():
        meta["slow"][weight] = {
            "stages": [expert.stage for expert in state.experts],
            "slow": list(state.slow),
            "start": list(state.start),
            "kept": [asdict(kept) for kept in state.kept],
            "past": [[each.stage, each.slow] for each in state.past],
            **({"average": list(state.average)} if state.average is not None else {}),
        }
        for index, expert in enumerate(state.experts):
            tensors[f"expert/{weight}/{index}/b"] = expert.factors.b
            tensors[f"expert/{weight}/{index}/a"] = expert.factors.a
        if state.began is not None and state.began.factors is not None:
            tensors |= {f"began/{weight}/b": state.began.factors.b, f"began/{weight}/a": state.began.factors.a}
        if state.began is not None and state.began.magnitude is not None:
            tensors[f"began/{weight}/m"] = state.began.magnitude
        if state.turns or state.rows is not None:
            meta["slow"][weight]["turns"] = [[turn.stage, turn.before] for turn in state.turns]
            tensors |= {f"turn/{weight}/{index}": turn.rows for index, turn in enumerate(state.turns)}
        if state.rows is not None:
            tensors[f"rows/{weight}"] = state.rows
        if state.dense_slow is not None:
            tensors[f"dense/{weight}/slow"] = state.dense_slow
        if state.dense_start is not None and state.dense_start is not state.dense_slow:
            tensors[f"dense/{weight}/start"] = state.dense_start
        if state.dense_average is not None:
            tensors[f"dense/{weight}/average"] = state.dense_average
    parameters = core.parameters_by_name()
    for name, kept in slow.trained.items():
        tensors[f"trained/{name}/value"] = parameters[name].detach()
        tensors[f"trained/{name}/slow"] = kept.slow
        tensors[f"trained/{name}/start"] = kept.start
        meta["past"][name] = [stage for stage, _ in kept.past]
        tensors |= {f"trained/{name}/past/{stage}": value for stage, value in kept.past}
        if kept.average is not None:
            tensors[f"trained/{name}/average"] = kept.average
    rules = core.plan.spec.train_rules
    if ruled := {name: rules.index(kept.rule) for name, kept in slow.trained.items() if kept.rule is not None}:
        meta["rules"] = ruled
    if core.plan.spec.average != "off":
        meta["averaged"] = slow.averaged
    tensors |= {f"buffer/{name}": value.detach() for name, value in core.model_state().items()}
    meta |= layout(core.model)
    return {name: tensor.clone() for name, tensor in tensors.items()}, meta


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[Tensors, dict[str, Any]]:
    """Return an optimizer's state as tensors and JSON."""
    state = optimizer.state_dict()
    tensors: Tensors = {}
    numbers: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer/{index}/{name}"] = value.detach().clone()
            else:
                numbers.setdefault(str(index), {})[name] = value
    return tensors, {"class": type(optimizer).__name__, "groups": state["param_groups"], "numbers": numbers}
