"""Installs experts that were trained elsewhere, such as another tool's adapter, into the slow state of a cascade.

Everything is checked and computed before the first write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from lorasc_fx.cascade.commit import Planned
from lorasc_fx.cascade.run import Run
from lorasc_fx.errors import StateError
from lorasc_fx.parameters import Holder, buffer_holders
from lorasc_fx.state import Expert, SlowWeights, WeightState
from lorasc_fx.util.undo import Undo


def install_experts(
    run: Run,
    experts: Mapping[str, Sequence[tuple[float, Expert]]],
    trained: Mapping[str, torch.Tensor],
    buffers: Mapping[str, torch.Tensor],
) -> None:
    """Add experts to the slow weights and to the start of the running stage, and set parameters trained in full.

    Args:
        run: the run of the cascade.
        experts: (coefficient, expert) pairs by weight name. An expert has `b` [rows, r] and `a` [r, columns] for a
            weight stored as [rows, columns].
        trained: slow values of parameters trained in full, by name, in their own shapes.
        buffers: values of the model's buffers, by name.

    Raises:
        StateError: the cascade has no weight, parameter or buffer of this name, or a factor has another shape.
    """
    with run.exclusive("install_experts"):
        before = run.slow
        for kind, names, own_names in (
            ("a site", experts, before.states.keys() - before.trained.keys()),
            ("a parameter trained in full", trained, before.trained),
            ("a buffer", buffers, dict(run.model.named_buffers())),
        ):
            foreign = [name for name in names if name not in own_names]
            if foreign:
                raise StateError(
                    f"install_experts: {', '.join(sorted(foreign))} is not {kind} of this cascade", code="sites-differ"
                )
        states = {name: _with_experts(state, experts.get(name, ())) for name, state in before.states.items()}
        for name, value in trained.items():
            if value.shape != states[name].base.shape:
                raise StateError(
                    f"install_experts: {name} has the shape {list(states[name].base.shape)}, but the value has the "
                    f"shape {list(value.shape)}",
                    code="sites-differ",
                )
            states[name] = states[name].holding(value.detach().to("cpu", copy=True))
        # Write only weights that change, because the first write to a weight copies its W0.
        changed = [*(name for name in experts if experts[name]), *trained]
        install_slow(run, replace(before, states=states), changed, buffers)


def install_slow(
    run: Run,
    after: SlowWeights,
    names: Sequence[str],
    buffers: Mapping[str, torch.Tensor],
    undo: Undo | None = None,
) -> None:
    """Replace the slow weights inside the running stage. Trained branches and the noise are kept.

    Args:
        run: the run of the cascade.
        after: the new slow weights.
        names: names of the weights and parameters trained in full that change.
        buffers: values of the model's buffers, by name.
        undo: collects undo steps, if this is part of a larger transaction.
    """
    before, plan = run.slow, run.plan
    branches = run.branches_by_weight()
    # Branches whose initial values depend on the weight (PiSSA, DoRA) start again from the new one, if not yet trained.
    untrained = {
        name: branches[name] for name in names if name in branches and not before.moved({name: branches[name]})
    }
    after, factors = after.begin_stage(plan, untrained)
    tensors: list[tuple[torch.Tensor, torch.Tensor]] = []
    replaced: list[tuple[Holder, torch.Tensor | None]] = []
    holders = buffer_holders(run.model)
    for name, value in buffers.items():
        buffer = holders[name].value
        if buffer is not None and value.shape == buffer.shape:
            tensors.append((buffer, value))
        else:  # the model has no buffer of this shape to write to, so it gets a new tensor
            replaced.append((holders[name], value.to(holders[name].device, copy=True)))
    written = run.present(names)
    run.commit(Planned(plan, after, written, factors=factors, tensors=tensors, buffers=replaced), undo)


def _with_experts(state: WeightState, experts: Sequence[tuple[float, Expert]]) -> WeightState:
    """Return the state with these (coefficient, expert) pairs added, after a check of their shapes."""
    if not experts:
        return state
    *stack, rows, columns = state.matrix
    for _, pair in experts:
        rank = pair.a.shape[-2] if pair.a.dim() > 1 else 0
        if tuple(pair.b.shape) != (*stack, rows, rank) or tuple(pair.a.shape) != (*stack, rank, columns):
            raise StateError(
                f"install_experts: {state.name} has the shape {list(state.base.shape)}, and an expert for it has b "
                f"{list(pair.b.shape)} and a {list(pair.a.shape)}. Give b {[*stack, rows, 'r']} and a "
                f"{[*stack, 'r', columns]}",
                code="sites-differ",
            )
    device = state.base.device
    copies = [expert.map(lambda value, _: value.detach().to(device, copy=True)) for _, expert in experts]
    return state.added(copies, [float(coefficient) for coefficient, _ in experts])
