"""Experts that were trained elsewhere become part of the slow state: another tool's adapter, experts of other runs.

All or nothing: everything is checked and computed before anything is written, and what is written is put back if a
later write raises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lorasc_fx.errors import StateError
from lorasc_fx.runtime.model_state import Slot, slots
from lorasc_fx.runtime.run import Planned, Run
from lorasc_fx.state import Expert, Factors, SlowWeights, Trained, WeightState
from lorasc_fx.undo import Undo

__all__ = ["adopt", "install"]


def adopt(
    run: Run,
    experts: Mapping[str, Sequence[tuple[float, Factors]]],
    trained: Mapping[str, torch.Tensor] | None = None,
    buffers: Mapping[str, torch.Tensor] | None = None,
    stage: int = 0,
) -> None:
    """Add experts to slow weights and start of the running stage, and set parameters trained in full.

    Args:
        run: of a cascade.
        experts: by weight name, pairs of a coefficient and factors, `b` [rows, r] and `a` [r, columns] as the weight is
            stored.
        trained: slow values of parameters that the spec trains in full, by name.
        buffers: values of the model's buffers, by name.
        stage: that is noted as the one which trained the experts; 0 for none of this cascade's.

    Raises:
        StateError: a name that the cascade does not know as such, or factors of another shape.
    """
    with run.exclusive("adopt"):
        before = run.slow
        values, tensors = dict(trained or {}), dict(run.model.named_buffers())
        for what, given, known in (
            ("a site", experts, before.states),
            ("trained in full", values, before.trained),
            ("a buffer", buffers or {}, tensors),
        ):
            foreign = [name for name in given if name not in known]
            if foreign:
                raise StateError(f"adopt: {', '.join(sorted(foreign))} is not {what} here", code="sites-differ")
        states = {name: _with(state, experts.get(name, ()), stage) for name, state in before.states.items()}
        kept = dict(before.trained)
        for name, value in values.items():
            base = kept[name].base
            if value.shape != base.shape:
                raise StateError(f"adopt: {name} is {list(base.shape)}, not {list(value.shape)}", code="wrong-shape")
            slow = value.detach().to("cpu", kept[name].slow.dtype, copy=True)
            kept[name] = Trained.of(base, slow, kept[name].rule)
        touched = [*(name for name in experts if experts[name]), *values]
        install(run, SlowWeights(states, kept, before.parked, averaged=before.averaged), touched, buffers or {})


def install(
    run: Run,
    after: SlowWeights,
    names: Sequence[str],
    buffers: Mapping[str, torch.Tensor],
    undo: Undo | None = None,
) -> None:
    """Go on from other slow weights in the running stage, B and noise as they are; all or nothing.

    Branches that start from the weights and have not trained yet start from the new ones.

    Args:
        run: of a cascade.
        after: the slow weights.
        names: of the weights that they change, trained in full or not.
        buffers: values of the model's buffers, by name.
        undo: of a block that this is a part of.
    """
    before, plan = run.slow, run.plan
    branches = run.branches_by_weight()
    unmoved = {name: branches[name] for name in names if name in branches and not before.moved({name: branches[name]})}
    after, factors = after.begin_stage(plan, unmoved)
    tensors: list[tuple[torch.Tensor, torch.Tensor]] = []
    replaced: list[tuple[Slot, torch.Tensor | None]] = []
    places = slots(run.model)
    for name, value in buffers.items():
        buffer = places[name].held
        if buffer is not None and value.shape == buffer.shape:
            tensors.append((buffer, value))
        else:
            replaced.append((places[name], value.to(places[name].device, copy=True)))
    run.commit(Planned(plan, after, names, factors=factors, tensors=tensors, slots=replaced), undo)


def _with(state: WeightState, experts: Sequence[tuple[float, Factors]], stage: int) -> WeightState:
    """Return the state with these experts added, each with its coefficient."""
    *stack, rows, columns = state.matrix
    for _, pair in experts:
        rank = pair.a.shape[-2] if pair.a.dim() > 1 else 0
        if tuple(pair.b.shape) != (*stack, rows, rank) or tuple(pair.a.shape) != (*stack, rank, columns):
            shapes = f"b {list(pair.b.shape)} and a {list(pair.a.shape)}"
            raise StateError(
                f"adopt: {state.name} is {list(state.base.shape)}, and its factors are {shapes}", code="wrong-shape"
            )
    if not experts:
        return state
    device = state.base.device
    more = [
        Expert(pair.b.detach().to(device, copy=True), pair.a.detach().to(device, copy=True), stage)
        for _, pair in experts
    ]
    return state.added(more, [float(coefficient) for coefficient, _ in experts])
