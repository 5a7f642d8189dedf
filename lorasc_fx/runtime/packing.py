"""A cascade as named tensors and JSON, and back. Names and shapes are checked before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from lorasc_fx.branch import Expert, Factors, KeptNoise, Past, SlowWeight
from lorasc_fx.errors import CheckpointError
from lorasc_fx.runtime.slow import SlowWeights, Trained, write
from lorasc_fx.runtime.transition import resting_value
from lorasc_fx.spec import Noise

if TYPE_CHECKING:
    from lorasc_fx.runtime.core import Core

__all__ = ["pack", "pack_optimizer", "unpack", "unpack_optimizer"]

Tensors = dict[str, torch.Tensor]


def pack(core: Core) -> tuple[Tensors, dict[str, Any]]:
    """Return branches, experts, what is trained in full and buffers; and coefficients and noise as JSON."""
    slow = core.slow
    tensors: Tensors = {}
    meta: dict[str, Any] = {"parked": slow.parked, "trained": list(slow.trained), "slow": {}, "past": {}}
    meta["turning"] = core.turning.armed
    for weight, branch in core.branches_by_weight().items():
        tensors[f"branch/{weight}/lora_A"] = branch.lora_A.detach()
        tensors[f"branch/{weight}/lora_B"] = branch.lora_B.detach()
    for weight, state in slow.states.items():
        meta["slow"][weight] = {
            "stages": [expert.stage for expert in state.experts],
            "slow": list(state.slow),
            "start": list(state.start),
            "kept": [asdict(kept) for kept in state.kept],
            "past": [[each.stage, each.slow] for each in state.past],
        }
        for index, expert in enumerate(state.experts):
            tensors[f"expert/{weight}/{index}/b"] = expert.factors.b
            tensors[f"expert/{weight}/{index}/a"] = expert.factors.a
        if state.dense_slow is not None:
            tensors[f"dense/{weight}/slow"] = state.dense_slow
        if state.dense_start is not None and state.dense_start is not state.dense_slow:
            tensors[f"dense/{weight}/start"] = state.dense_start
    parameters = core.parameters_by_name()
    for name, kept in slow.trained.items():
        tensors[f"trained/{name}/value"] = parameters[name].detach()
        tensors[f"trained/{name}/slow"] = kept.slow
        tensors[f"trained/{name}/start"] = kept.start
        meta["past"][name] = [stage for stage, _ in kept.past]
        tensors |= {f"trained/{name}/past/{stage}": value for stage, value in kept.past}
    for name, buffer in core.model.named_buffers():
        tensors[f"buffer/{name}"] = buffer.detach()
    return {name: tensor.clone() for name, tensor in tensors.items()}, meta


def unpack(core: Core, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any], where: str) -> None:
    """Put what `pack` returned into a fresh cascade of the same plan.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the plan says.
    """

    def take(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{where}: has no tensor {name!r}")
        if tuple(tensor.shape) != tuple(shape):
            raise CheckpointError(f"{where}: {name!r} is {tuple(tensor.shape)}, the plan says {tuple(shape)}")
        return tensor

    slow, parameters = core.slow, core.parameters_by_name()
    branches = core.branches_by_weight()
    factors = {
        weight: (
            take(f"branch/{weight}/lora_A", tuple(branch.lora_A.shape)),
            take(f"branch/{weight}/lora_B", tuple(branch.lora_B.shape)),
        )
        for weight, branch in branches.items()
    }
    if set(meta["slow"]) != set(slow.states):
        odd = sorted(set(meta["slow"]) ^ set(slow.states))
        raise CheckpointError(f"{where}: the slow state and the plan disagree about {odd[0]}")
    states = {name: _state(state, meta["slow"][name], tensors, take) for name, state in slow.states.items()}
    if set(meta["trained"]) != set(slow.trained):
        raise CheckpointError(f"{where}: other parameters were trained in full than the spec names")
    trained, values = {}, {}
    for name, kept in slow.trained.items():
        shape = tuple(kept.base.shape)
        values[name] = take(f"trained/{name}/value", shape)
        past = tuple((int(s), take(f"trained/{name}/past/{int(s)}", shape)) for s in meta.get("past", {}).get(name, ()))
        start = take(f"trained/{name}/start", shape)
        trained[name] = Trained(kept.base, take(f"trained/{name}/slow", shape), start, past)
    buffers = {
        name: (buffer, take(f"buffer/{name}", tuple(buffer.shape))) for name, buffer in core.model.named_buffers()
    }
    after = SlowWeights(states, trained, bool(meta["parked"]))
    moves: list[tuple[torch.Tensor, torch.Tensor]] = list(buffers.values())
    for weight, (a, b) in factors.items():
        moves += [(branches[weight].lora_A, a), (branches[weight].lora_B, b)]
    held = [tensor.detach().clone() for tensor, _ in moves]
    plan = core.plan
    with torch.no_grad():
        try:
            for tensor, value in moves:
                tensor.copy_(value)
            write(
                parameters,
                [*states, *trained],
                lambda name, like: values[name] if name in values else after.resting(name, plan, like),
                lambda name, like: resting_value(slow, name) if name in values else slow.resting(name, plan, like),
            )
        except BaseException:
            for (tensor, _), old in zip(moves, held, strict=True):
                tensor.copy_(old)
            raise
    core.advance(plan, after)


def _state(state: SlowWeight, meta: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], take: Any) -> SlowWeight:
    *stack, rows, columns = state.matrix
    experts = []
    for index, stage in enumerate(meta["stages"]):
        name = f"expert/{state.name}/{index}"
        found = tensors.get(f"{name}/a")
        rank = found.shape[-2] if found is not None and found.dim() > 1 else 0
        a = take(f"{name}/a", (*stack, rank, columns))
        b = take(f"{name}/b", (*stack, rows, rank))
        experts.append(Expert(int(stage), Factors(b, a)))
    dense = {
        which: take(f"dense/{state.name}/{which}", (*stack, rows, columns))
        for which in ("slow", "start")
        if f"dense/{state.name}/{which}" in tensors
    }
    slow, start = tuple(map(float, meta["slow"])), tuple(map(float, meta["start"]))
    if not len(slow) == len(start) == len(experts):
        raise ValueError(
            f"{state.name} has {len(experts)} experts, {len(slow)} slow and {len(start)} start coefficients"
        )
    kept = tuple(
        KeptNoise(Noise(**each["noise"]), each["seed"], each["stage"], each["amplitude"]) for each in meta["kept"]
    )
    past = tuple(Past(int(s), None if c is None else tuple(map(float, c))) for s, c in meta.get("past", ()))
    if any(each.slow is not None and len(each.slow) > len(experts) for each in past):
        raise ValueError(f"{state.name} has {len(experts)} experts, and had more at the end of an earlier stage")
    return replace(
        state,
        experts=tuple(experts),
        slow=slow,
        start=start,
        dense_slow=dense.get("slow"),
        dense_start=dense.get("start", dense.get("slow")),
        kept=kept,
        past=past,
    )


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


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any], where: str
) -> None:
    """Give an optimizer the state that `pack_optimizer` returned.

    Raises:
        CheckpointError: the optimizer has other groups.
    """
    now = optimizer.state_dict()["param_groups"]
    then: list[dict[str, Any]] = meta["groups"]
    if [len(group["params"]) for group in now] != [len(group["params"]) for group in then]:
        raise CheckpointError(f"{where}: the optimizer has other groups than the saved one; build it the same way")
    state: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in meta["numbers"].items()}
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/", 2)
            state.setdefault(int(index), {})[key] = tensor.clone()
    groups = [as_before(group, old) for group, old in zip(now, then, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def as_before(now: Any, then: Any) -> Any:
    """Return a value that JSON gave back, with the tuples and the integer keys that the present value has."""
    if isinstance(now, tuple) and isinstance(then, list):
        return tuple(then)
    if isinstance(now, dict) and isinstance(then, dict):
        names = {str(key): key for key in now}
        counted = bool(now) and all(isinstance(key, int) for key in now)
        keys = {name: names.get(name, int(name) if counted else name) for name in then}
        return type(now)({key: as_before(now.get(key), then[name]) for name, key in keys.items()})
    return then
