"""Folded weights one at a time: of a cascade, or of a checkpoint alone, for which no model is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from lorasc_fx.branch import Branch
from lorasc_fx.cascade.experts import check_view
from lorasc_fx.cascade.folding import check_quantized
from lorasc_fx.cascade.run import Run
from lorasc_fx.cascade.transition import ended
from lorasc_fx.checkpoint.reader import Checkpoint
from lorasc_fx.parameters import names_of
from lorasc_fx.state import ViewName, check_finite

Change = Callable[[torch.Tensor], torch.Tensor]
"""From W0 to the folded weight of the same shape, dtype and device."""


@dataclass(frozen=True)
class FoldedWeights:
    """How a fold changes a base.

    Args:
        where: the run or checkpoint, for messages.
        base: fingerprint of each base parameter, by its first name.
        changes: function for each parameter that the fold changes, by its first name.
        whole: folded values of the parameters trained in full, which need no base.
        buffers: current buffers of the model, by name.
        aliases: all names of a tied parameter, by each of them.
        running: the number of a stage that has trained without an end, and counts as ended here; None without one.
    """

    where: str
    base: Mapping[str, str]
    changes: Mapping[str, Change]
    whole: Mapping[str, torch.Tensor]
    buffers: Mapping[str, torch.Tensor]
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    running: int | None = None


def of_run(run: Run, call: str, view: str | Mapping[str, float]) -> FoldedWeights:
    """Return the folded weights of a cascade. A running stage that has trained counts as ended.

    Raises:
        StateError: a quantized weight has trained, and a file in the layout of the base cannot hold it.
    """
    check_view(call, str(view), run.plan.spec)
    meant: ViewName = "averaged" if view == "averaged" else "slow"
    slow, parameters = ended(run, call), run.parameters_by_name()
    check_quantized(f"{call} into the files of a base", slow, None)
    changes: dict[str, Change] = {
        name: partial(slow.value, name, meant)
        for name, state in slow.states.items()
        if state.changed and name not in slow.quantized
    }
    whole = {name: slow.value(name, meant, parameters[name]) for name in slow.trained}
    changes |= {name: partial(_cast, value) for name, value in whole.items()}
    buffers = {name: buffer.detach().cpu() for name, buffer in run.model_state().items()}
    return FoldedWeights(call, run.fingerprints(), changes, whole, buffers, names_of(run.model))


def of_checkpoint(checkpoint: Checkpoint, view: ViewName = "slow") -> FoldedWeights:
    """Return the folded weights of a checkpoint. A running stage that has trained counts as ended.

    Raises:
        CheckpointError: its tensors do not fit its plan.
        StateError: which is `averaged`, and its spec keeps no average.
        NonFiniteBranch: a running branch holds inf or nan.
    """
    plan = checkpoint.plan
    check_view(f"fold {checkpoint.path}", view, plan.spec)
    state, learners = checkpoint.with_learners()
    slow, begun = state.slow, state.slow.moved(learners)
    if begun:
        slow.losses_with(None, plan)  # raises if the pace depends on a loss
        for learner in learners.values():
            if isinstance(learner, Branch):
                check_finite(learner, plan.spec, plan.stage)

    def folded(name: str, base: torch.Tensor) -> torch.Tensor:
        held = slow.states[name]
        one = replace(slow, states={name: held if held.full else replace(held, base=base)})
        if begun:
            one = one.after_stage(plan, {name: learners[name]} if name in learners else {})
        return one.value(name, view, base)

    changes: dict[str, Change] = {
        name: partial(folded, name) for name, weight in slow.states.items() if begun or weight.changed
    }
    whole = {name: folded(name, value) for name, value in state.values.items()}
    changes |= {name: partial(_cast, value) for name, value in whole.items()}
    aliases = {name: group for site in plan.sites for group in [(site.weight, *site.aliases)] for name in group}
    base, unended = dict(checkpoint.manifest["base"]), plan.stage if begun else None
    return FoldedWeights(str(checkpoint.path), base, changes, whole, state.buffers, aliases, unended)


def _cast(value: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    return value.detach().to(device=base.device, dtype=base.dtype)
