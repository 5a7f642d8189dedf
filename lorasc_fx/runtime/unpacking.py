"""A cascade out of named tensors and JSON. All of it is checked before anything is written, and written as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from lorasc_fx.branch import Branch
from lorasc_fx.errors import CheckpointError
from lorasc_fx.plan import Plan
from lorasc_fx.runtime.core import Core, Planned
from lorasc_fx.runtime.model_state import Slot, slots
from lorasc_fx.runtime.opening import told
from lorasc_fx.runtime.slow import SlowWeights, Trained
from lorasc_fx.shards import local
from lorasc_fx.spec import CascadeSpec, Noise
from lorasc_fx.state import Began, Expert, Factors, KeptNoise, Past, SlowWeight, Turn, began_shapes
from lorasc_fx.undo import Undo

__all__ = ["Taken", "began", "slow_state", "unpack"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)
ELSEWHERE = ("rng/", "optimizer/", "gradient/", "outside/")
"""Tensors that a resume takes, not a load."""


class Taken:
    """Gives out the tensors of a checkpoint, each checked, and knows which nobody has asked for."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], where: str) -> None:
        self.tensors, self.where = tensors, where
        self.left = dict.fromkeys(name for name in tensors if not name.startswith(ELSEWHERE))

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def take(
        self, name: str, shape: tuple[int, ...], like: torch.dtype | None = None, whole: bool = False
    ) -> torch.Tensor:
        """Return a tensor of this shape, of the kind of numbers that `like` is (real ones by default); `whole`: without
        inf and nan.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.where}: has no tensor {told(repr(name))}", code="missing-tensor")
        if tuple(tensor.shape) != tuple(shape):
            raise CheckpointError(
                f"{self.where}: {told(repr(name))} is {tuple(tensor.shape)}, the plan says {tuple(shape)}",
                code="wrong-shape",
            )
        like = torch.float32 if like is None else like
        if tensor.dtype != like and not any(tensor.dtype in kind and like in kind for kind in (FLOATS, COMPLEX)):
            raise CheckpointError(
                f"{self.where}: {told(repr(name))} holds {tensor.dtype}, not {like}", code="wrong-dtype"
            )
        if whole and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{self.where}: {told(repr(name))} holds inf or nan, which no fold takes", code="non-finite-tensor"
            )
        self.left.pop(name, None)
        return tensor


def unpack(
    core: Core,
    tensors: Mapping[str, torch.Tensor],
    meta: Mapping[str, Any],
    where: str,
    plan: Plan,
    undo: Undo | None = None,
) -> None:
    """Put what `pack` returned into a cascade that has the sites of this plan, which is its plan then.

    With `undo` this is a part of a larger block.

    Raises:
        CheckpointError: a tensor is missing, foreign, not finite, or has another shape or kind than the plan says. The
            cascade is as it was.
    """
    slow, branches = core.slow, core.branches_by_weight()
    held = Taken(tensors, where)
    whole = plan.spec.on_nonfinite == "raise"  # else such a branch is left out at the fold, and may be here
    factors = {
        weight: {
            name: held.take(f"branch/{weight}/{name}", tuple(local(factor).shape), factor.dtype, whole)
            for name, factor in branch.named_parameters()
        }
        for weight, branch in branches.items()
    }
    moves: list[tuple[torch.Tensor, torch.Tensor]] = []
    if set(meta["slow"]) != set(slow.states):
        odd = sorted(set(meta["slow"]) ^ set(slow.states))
        raise CheckpointError(f"{where}: the slow state and the plan disagree about {told(odd[0])}")
    states = {name: slow_state(state, meta["slow"][name], held) for name, state in slow.states.items()}
    for name, branch in branches.items():
        states[name] = replace(states[name], began=began(branch, plan.spec, meta["parked"], held))
    if set(meta["trained"]) != set(slow.trained):
        raise CheckpointError(f"{where}: other parameters were trained in full than the spec names")
    trained, values = {}, {}
    for name, kept in slow.trained.items():
        value, end, start = (
            held.take(f"trained/{name}/{what}", tuple(like.shape), like.dtype)
            for what, like in (("value", kept.base), ("slow", kept.slow), ("start", kept.start))
        )
        past = tuple(
            (stage, held.take(f"trained/{name}/past/{stage}", tuple(kept.slow.shape), kept.slow.dtype))
            for stage in meta["past"].get(name, ())
        )
        average = f"trained/{name}/average"
        mean = held.take(average, tuple(kept.slow.shape), kept.slow.dtype) if average in held else None
        values[name], trained[name] = value, Trained(kept.base, end, start, past, mean, kept.rule)
    new_buffers = _model_state(core, held, meta, moves)
    if held.left:
        raise CheckpointError(
            f"{where}: holds {told(repr(next(iter(held.left))))}, which this plan has no place for",
            code="foreign-tensor",
        )
    after = SlowWeights(states, trained, meta["parked"], averaged=meta.get("averaged", 0), together=slow.together)

    def write(name: str, out: torch.Tensor) -> None:
        if name in values:
            out.copy_(values[name])
        else:
            after.write_resting(name, plan, out)

    names = [*states, *trained]
    core.commit(Planned(plan, after, names, write, factors=factors, tensors=moves, slots=new_buffers), undo)


def _model_state(
    core: Core, held: Taken, meta: Mapping[str, Any], moves: list[tuple[torch.Tensor, torch.Tensor]]
) -> list[tuple[Slot, torch.Tensor | None]]:
    """Add to `moves` the buffers that keep their tensors, and parameters that forward writes; return the other buffers,
    each with the tensor that it gets.

    A tensor of the file takes no more memory than its bytes there, so that a buffer may have any shape.
    """
    where, empty, shared = held.where, meta.get("empty_buffers", ()), meta.get("shared_buffers", {})
    buffers = slots(core.model, core.written())
    foreign = next((name for name in (*empty, *shared) if name not in buffers), None)
    if foreign is not None:
        raise CheckpointError(
            f"{where}: has a buffer {told(repr(foreign))}, and the model has none of this name", code="foreign-tensor"
        )
    first: dict[int, str] = {}
    groups: dict[str, list[str]] = {}  # names of the buffers that hold one tensor, by its name in the file
    for name, slot in buffers.items():
        same = first.setdefault(id(slot.held), name) if slot.held is not None else name
        source = shared.get(name, name if f"buffer/{name}" in held else same)
        if f"buffer/{source}" in held:
            groups.setdefault(source, []).append(name)
        elif slot.held is not None and name not in empty:
            held.take(f"buffer/{source}", tuple(slot.held.shape), slot.held.dtype)  # raises
    replaced: list[tuple[Slot, torch.Tensor | None]] = [(buffers[name], None) for name in empty]
    for source, names in groups.items():
        value, before = held.tensors[f"buffer/{source}"], buffers[names[0]].held
        holders = [name for name, slot in buffers.items() if slot.held is before]
        if before is not None and value.shape == before.shape and holders == names:
            moves.append((before, held.take(f"buffer/{source}", tuple(before.shape), before.dtype)))
        else:
            held.take(f"buffer/{source}", tuple(value.shape), value.dtype)
            new = value.to(buffers[names[0]].device, copy=True)
            replaced += [(buffers[name], new) for name in names]
    known = core.slow.states.keys() | core.slow.trained.keys()
    for name, parameter in core.parameters_by_name().items():
        if f"buffer/{name}" in held and name not in known and name not in buffers:  # forward writes it
            own = local(parameter)
            moves.append((own, held.take(f"buffer/{name}", tuple(own.shape), own.dtype)))
    return replaced


def began(branch: Branch, spec: CascadeSpec, parked: bool, held: Taken) -> Began | None:
    """Return where a branch of the running stage began; None for B = 0."""
    found, name = Began(), f"began/{branch.weight_name}"
    if spec.factor_start.from_weight and not parked:
        shapes = zip("ba", began_shapes(branch), strict=True)
        b, a = (held.take(f"{name}/{each}", shape, torch.float64, True).double() for each, shape in shapes)
        found = replace(found, factors=Factors(b, a))
    if branch.magnitude is not None:
        shape = tuple(branch.magnitude.shape)
        found = replace(found, magnitude=held.take(f"{name}/m", shape, torch.float64, True).double())
    return None if found == Began() else found


def slow_state(state: SlowWeight, meta: Mapping[str, Any], held: Taken) -> SlowWeight:
    """Return the slow state that a checked manifest and these tensors describe."""
    *stack, rows, columns = state.matrix
    experts = []
    for index, stage in enumerate(meta["stages"]):
        name = f"expert/{state.name}/{index}"
        found = held.tensors.get(f"{name}/a")
        rank = found.shape[-2] if found is not None and found.dim() > 1 else 0
        a = held.take(f"{name}/a", (*stack, rank, columns), whole=True)
        b = held.take(f"{name}/b", (*stack, rows, rank), whole=True)
        experts.append(Expert(stage, Factors(b, a)))
    dense = {
        which: held.take(f"dense/{state.name}/{which}", (*stack, rows, columns), whole=True)
        for which in ("slow", "start", "average")
        if f"dense/{state.name}/{which}" in held
    }
    if dense and "slow" not in dense:
        raise CheckpointError(
            f"{held.where}: has no tensor {told(repr(f'dense/{state.name}/slow'))}, "
            "which what is dense beside it needs",
            code="missing-tensor",
        )
    size = (columns if state.turned else rows,)
    turns = tuple(
        Turn(stage, before, held.take(f"turn/{state.name}/{index}", size, torch.float64, True).double())
        for index, (stage, before) in enumerate(meta.get("turns", ()))
    )
    total = f"rows/{state.name}"
    kept = tuple(
        KeptNoise(Noise(**each["noise"]), each["seed"], each["stage"], float(each["amplitude"]))
        for each in meta["kept"]
    )
    return replace(
        state,
        experts=tuple(experts),
        slow=tuple(map(float, meta["slow"])),
        start=tuple(map(float, meta["start"])),
        dense_slow=dense.get("slow"),
        dense_start=dense.get("start", dense.get("slow")),
        kept=kept,
        turns=turns,
        rows=held.take(total, size, torch.float64, True).double() if total in held else None,
        past=tuple(Past(stage, None if slow is None else tuple(map(float, slow))) for stage, slow in meta["past"]),
        average=tuple(map(float, meta["average"])) if "average" in meta else None,
        dense_average=dense.get("average"),
    )
