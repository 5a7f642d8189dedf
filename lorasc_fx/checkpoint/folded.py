"""Computes the folded weights of a cascade or a checkpoint, one at a time. A checkpoint does not need its model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from lorasc_fx.branch import Branch
from lorasc_fx.cascade.folding import check_quantized
from lorasc_fx.cascade.run import Run
from lorasc_fx.cascade.transition import ended
from lorasc_fx.cascade.views import check_view
from lorasc_fx.checkpoint.reader import Checkpoint
from lorasc_fx.parameters import names_of
from lorasc_fx.state import ViewName, check_finite

Change = Callable[[torch.Tensor], torch.Tensor]
"""A function from W0 to the folded weight, with the same shape, dtype and device."""


@dataclass(frozen=True)
class FoldedWeights:
    """The changes that a fold makes to a base.

    Args:
        where: the run or checkpoint, for messages.
        base: fingerprint of each base parameter, by its first name.
        changes: a function for each changed parameter, by its first name.
        full: folded values of the parameters trained in full, by first name. They do not depend on the base.
        buffers: current buffers of the model, by name.
        aliases: all names of a tied parameter, by each of its names.
        running: number of the running stage if it has trained and therefore counts as ended, otherwise None.
    """

    where: str
    base: Mapping[str, str]
    changes: Mapping[str, Change]
    full: Mapping[str, torch.Tensor]
    buffers: Mapping[str, torch.Tensor]
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    running: int | None = None


def of_run(run: Run, call: str, view: str) -> FoldedWeights:
    """Return the folded weights of a cascade. A running stage that has trained counts as ended.

    Args:
        run: the run of the cascade.
        call: name of the user's call, for messages.
        view: `slow` or `averaged`.

    Raises:
        StateError: a quantized weight has trained. Files in the layout of the base cannot store it.
    """
    check_view(call, view, run.plan.spec)
    view_name: ViewName = "averaged" if view == "averaged" else "slow"
    slow, parameters = ended(run, call), run.parameters_by_name()
    check_quantized(f"{call} into the files of a base", slow, None)
    changes: dict[str, Change] = {
        name: partial(slow.value, name, view_name)
        for name, state in slow.states.items()
        if state.changed and name not in slow.quantized
    }
    full = {name: slow.value(name, view_name, parameters[name]) for name in slow.trained}
    changes |= {name: partial(_cast, value) for name, value in full.items()}
    buffers = {name: buffer.detach().cpu() for name, buffer in run.model_state().items()}
    return FoldedWeights(call, run.fingerprints(), changes, full, buffers, names_of(run.model))


def of_checkpoint(checkpoint: Checkpoint, view: ViewName) -> FoldedWeights:
    """Return the folded weights of a checkpoint. A running stage that has trained counts as ended.

    Raises:
        CheckpointError: the tensors do not fit the plan.
        StateError: view is `averaged`, but the spec keeps no average.
        NonFiniteBranch: a running branch holds inf or nan.
    """
    plan = checkpoint.plan
    check_view(f"fold {checkpoint.path}", view, plan.spec)
    state, learners = checkpoint.with_learners()
    slow, has_trained = state.slow, state.slow.moved(learners)
    if has_trained:
        for learner in learners.values():
            if isinstance(learner, Branch):
                check_finite(learner, plan.spec, plan.stage)

    def folded(name: str, base: torch.Tensor) -> torch.Tensor:
        # A checkpoint has no W0, so take it from the caller, for this weight only.
        weight = slow.states[name]
        single = replace(slow, states={name: weight if weight.full else replace(weight, base=base)})
        if has_trained:
            single = single.after_stage(plan, {name: learners[name]} if name in learners else {})
        return single.value(name, view, base)

    changes: dict[str, Change] = {
        name: partial(folded, name) for name, weight in slow.states.items() if has_trained or weight.changed
    }
    full = {name: folded(name, value) for name, value in state.values.items()}
    changes |= {name: partial(_cast, value) for name, value in full.items()}
    buffers = {name: value for name, value in state.buffers.items() if value is not None}
    aliases = {name: group for site in plan.sites for group in [(site.weight, *site.aliases)] for name in group}
    base, running = dict(checkpoint.content.base), plan.stage if has_trained else None
    return FoldedWeights(str(checkpoint.path), base, changes, full, buffers, aliases, running)


def _cast(value: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    return value.detach().to(device=base.device, dtype=base.dtype)
