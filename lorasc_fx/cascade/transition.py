"""Stage transitions: fold the branches, then start them again. Graph nodes and Parameter objects stay the same.

All values are computed before the first write. If anything raises, Ctrl-C included, all writes are rolled back.

The slow weights at the end of an earlier stage are one more coefficient vector over the experts (docs/algorithm.md,
"The slow state is small"). Parameters trained in full keep one copy per stage if they are small
(`state.model.MAX_FULL_ENTRIES`). When the experts of a weight are summed into a dense delta, its earlier stages are no
longer available.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lorasc_fx.cascade.commit import Gradients, Planned, write_planned
from lorasc_fx.cascade.optim import check_holds, kept_state, treated_state
from lorasc_fx.cascade.run import Run
from lorasc_fx.errors import StateError, named
from lorasc_fx.plan import Plan
from lorasc_fx.state import SlowWeights
from lorasc_fx.util.checks import is_integer
from lorasc_fx.util.undo import Undo, commit

log = logging.getLogger("lorasc_fx")


def next_stage(
    run: Run,
    optimizer: torch.optim.Optimizer | None,
    idle: bool = False,
    then: Callable[[], object] | None = None,
    loss: Any = None,
) -> None:
    """End the running stage and start the next one.

    Args:
        run: of the cascade.
        optimizer: holds the branches; None if there is none.
        idle: whether the next stage waits: the slow weights are in place, without noise.
        then: called at the end. The transition is rolled back if it raises.
        loss: of the stage, for pace="loss".
    """
    with run.exclusive("transition", sharded=True, ends_stage=True):
        plan, before, begun = run.plan, run.slow, time.monotonic()
        branches, trained = run.branches_by_weight(), run.present(run.slow.trained)
        if optimizer is not None:
            check_holds(optimizer, run.trainable())
        run.check_buffers("transition")
        # Fold: the slow state after this stage.
        after = replace(before.after_stage(plan, {**branches, **trained}, loss), idle=idle)
        planned = plan.at_stage(plan.stage + 1)
        moved, state = before.moved(branches), dict[nn.Parameter, Any]()
        if optimizer is not None:
            state |= treated_state(optimizer, trained.values(), "kept")
            for branch in branches.values():
                state |= treated_state(optimizer, branch.parameters(), plan.spec.optimizer_state)
                if kept := {} if idle else branch.kept_entries(plan.spec):
                    state |= kept_state(optimizer, {branch.get_parameter(name): mask for name, mask in kept.items()})
            # Reset the state of factors with a new shape, and the state that led to inf or nan.
            reset = [parameter for site in planned.sites for parameter in branches[site.weight].resized(site)]
            for name in after.left_out:
                reset += branches[name].parameters() if name in branches else [trained[name]]
            state |= treated_state(optimizer, reset, "reset")
        with commit() as undo:
            begin(run, Planned(planned, after, optimizer=optimizer, states=state), undo)
            experts, seconds = sum(len(state.experts) for state in after.states.values()), time.monotonic() - begun
            log.info("stage %d folded, %d experts, in %.2f s", plan.stage, experts, seconds)
            if not moved and (optimizer is not None or before.moved(trained)):
                run.warned.once(
                    "no-branch-moved",
                    f"stage {plan.stage} ended, and no branch has moved, so their weights are unchanged. Call the "
                    "cascade in the training loop, not the adapted model, and check that optimizer.step() runs with "
                    "learning rates above 0",
                )
            if then is not None:
                then()


def restart(run: Run, optimizer: torch.optim.Optimizer | None) -> None:
    """Start another stage where the running one started, and drop what the running one has trained."""
    planned = run.plan.at_stage(run.plan.stage + 1)  # a stage number draws its noise only once
    _begin_reset(run, optimizer, planned, run.slow)


def _begin_reset(run: Run, optimizer: torch.optim.Optimizer | None, planned: Plan, slow: SlowWeights) -> None:
    """Start a stage from slow weights, with new branches and a reset optimizer state."""
    state: dict[nn.Parameter, Any] = {}
    if optimizer is not None:
        check_holds(optimizer, run.trainable())
        state = treated_state(optimizer, run.trainable().values(), "reset")
    with commit() as undo:
        begin(run, Planned(planned, replace(slow, idle=False), optimizer=optimizer, states=state), undo, keep=False)


def begin(run: Run, planned: Planned, undo: Undo, keep: bool = True) -> None:
    """Start a stage: write its weights, new values of the branches, and the optimizer's state.

    Args:
        run: of the cascade.
        planned: plan, slow weights and optimizer state of the stage.
        undo: gets the steps that restore everything.
        keep: whether branches take over what the spec keeps of the stage before.
    """
    branches = run.branches_by_weight()
    resized = any(branches[site.weight].resized(site) for site in planned.plan.sites)
    after, factors = planned.slow.begin_stage(planned.plan, branches, restart=True, keep=keep)
    planned = replace(planned, slow=after, parameters=run.present(after.states), factors=factors, gradients=Gradients())
    write_planned(run, planned, undo)
    if resized:
        undo(run.replicas.restorer())
        run.replicas.outdate()


def end_idle(run: Run) -> None:
    """Start the waiting stage after a loop has ended: write its start weights, noise included."""
    with run.exclusive("stages", sharded=True):
        if not run.slow.idle:
            return
        if has_begun(run):
            raise StateError(
                "stages: the branches were trained after the last stage ended. Call transition(optimizer) first",
                code="stage-not-ended",
            )
        after, factors = replace(run.slow, idle=False).begin_stage(run.plan, run.branches_by_weight())
        run.commit(Planned(run.plan, after, run.present(after.states), factors=factors))


def has_begun(run: Run) -> bool:
    """Whether a branch, or a parameter trained in full, has changed since the start of the stage."""
    return run.slow.moved(run.learners())


def at_stage(slow: SlowWeights, stage: int, call: str) -> SlowWeights:
    """Return the slow weights at the end of a stage; 0 is the base.

    Raises:
        StateError: the stage has not ended here, or its weights are no longer kept.
    """
    gone_to = max((state.gone for state in slow.states.values()), default=0)
    ended = sorted({end for state in slow.states.values() for end in state.ends} | set(range(1, gone_to + 1)))
    if not is_integer(stage, 0) or stage not in (0, *ended):
        raise StateError(
            f"{call}: stage {stage!r} has not ended in this cascade. Available: "
            f"{', '.join(map(str, (0, *ended)))} (0 is the base). For the running stage give weights('fast')",
            code="unknown-stage",
        )
    states = {name: state.at(stage) for name, state in slow.states.items()}
    if gone := [name for name, state in states.items() if state is None]:
        can = [end for end in (0, *ended) if all(state.at(end) is not None for state in slow.states.values())]
        raise StateError(
            f"{call}: stage {stage} is gone for {named(gone)}. Experts are summed if they outgrow their weight, or the "
            "rank that a quantized weight carries, and parameters trained in full are kept for each stage only if they "
            f"are small. Available: {', '.join(map(str, can))}. To have all, save a checkpoint per stage (keep=...)",
            code="unknown-stage",
        )
    # An average starts again from the slow weights of that stage.
    found = {name: state for name, state in states.items() if state is not None}
    losses = {end: loss for end, loss in slow.losses.items() if end <= stage}
    return SlowWeights(found, averaged=min(stage, slow.averaged, 1), losses=losses, group=slow.group)


def rewind(run: Run, stage: int, optimizer: torch.optim.Optimizer | None) -> None:
    """Start a stage from the slow weights of an earlier one; see `Cascade.rewind`."""
    with run.exclusive("rewind", sharded=True):
        after = at_stage(run.slow, stage, "rewind")
        unused = run.slow.idle and not run.slow.moved(run.branches_by_weight())
        # A stage number draws its noise only once, so a stage that has run gets a new number.
        planned = run.plan if unused else run.plan.at_stage(run.plan.stage + 1)
        _begin_reset(run, optimizer, planned, after)
        log.info("back at the end of stage %d; stage %d starts", stage, planned.stage)


def ended(run: Run, call: str) -> SlowWeights:
    """Return the slow state with the running stage folded if it has trained. Writes nothing.

    Warns if a first stage outside `stages` keeps only a part of what it has trained.

    Raises:
        StateError: training has made a buffer inf or nan.
    """
    run.check_buffers(call)
    slow, learners = run.slow, run.learners()
    if not slow.moved(learners):
        return slow
    after = slow.after_stage(run.plan, learners)
    pace = run.plan.spec.pace_at(run.plan.stage, after.losses)
    if pace < 1 and run.plan.stage == 1 and not run.looped:
        run.warned.once(
            "running-stage-folded",
            f"{call}: stage 1 has trained and is folded now, which keeps only {pace:g} of what it has trained: the "
            "pace of the spec. Train in `for stage in cascade.stages(...)`. To keep all of it without stages, give "
            'pace=1.0, or save inside `with cascade.weights("fast"):`',
        )
    return after
