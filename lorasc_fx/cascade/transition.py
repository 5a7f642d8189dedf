"""A stage transition in values: fold, then insert, with every node and every Parameter object left in place.

Everything is computed before anything is written; what is written is put back if anything raises, Ctrl-C included.

Earlier stages: S_k is one more coefficient vector over the experts that are there anyway (algorithm.md, "The slow state
is small"). What was trained in full is kept as a copy a stage (`state.model.AFFORDABLE`). After a dense collapse the
experts of the stages before are gone, and so are those stages.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lorasc_fx.branch import Branch, fresh_a
from lorasc_fx.cascade.commit import Gradients, Planned, write_planned
from lorasc_fx.cascade.optim import check_holds, treated_state
from lorasc_fx.cascade.run import Run
from lorasc_fx.errors import StateError, named
from lorasc_fx.plan import Plan
from lorasc_fx.shards import local_like
from lorasc_fx.state import SlowWeights
from lorasc_fx.util.checks import is_integer
from lorasc_fx.util.undo import commit

log = logging.getLogger("lorasc_fx")


def next_stage(
    run: Run, optimizer: torch.optim.Optimizer | None, idle: bool = False, then: Callable[[], object] | None = None
) -> None:
    """End the running stage; start the next one, or with `idle` leave the slow weights in place, without noise.

    `then` is called at the end; the transition is taken back if it raises.
    """
    with run.exclusive("transition", sharded=True, ends_stage=True):
        plan, before, begun = run.plan, run.slow, time.monotonic()
        branches, trained = run.branches_by_weight(), run.trained_parameters()
        if optimizer is not None:
            check_holds(optimizer, run.trainable())
        run.check_buffers("transition")
        after = replace(before.after_stage(plan, {**branches, **trained}), idle=idle)
        planned = plan.at_stage(plan.stage + 1)
        starts = {
            site.weight: branches[site.weight].next_a(site, planned.spec, planned.stage) for site in planned.sites
        }
        moved, state = before.moved(branches), dict[nn.Parameter, Any]()
        if optimizer is not None:
            # What made a branch or a weight inf or nan is no start, and what has another shape none either.
            anew = _resized(planned, branches)
            for name in after.left_out:
                anew += branches[name].parameters() if name in branches else [trained[name]]
            factors = [parameter for branch in branches.values() for parameter in branch.parameters()]
            state |= treated_state(optimizer, trained.values(), "kept")
            state |= treated_state(optimizer, factors, plan.spec.optimizer_state)
            state |= treated_state(optimizer, anew, "reset")

        def end() -> None:
            experts, seconds = sum(len(state.experts) for state in after.states.values()), time.monotonic() - begun
            log.info("stage %d folded, %d experts, in %.2f s", plan.stage, experts, seconds)
            if unmoved:
                run.warned.once(
                    "no-branch-moved",
                    f"stage {plan.stage} ended, and no branch has moved: their weights are as they were. In the loop "
                    "call the cascade, and not the model that it was made of; and check that optimizer.step() runs "
                    "with learning rates above 0",
                )
            if then is not None:
                then()

        unmoved = not moved and (optimizer is not None or before.moved(trained))
        begin(run, optimizer, planned, after, starts, state, end)


def restart(run: Run, optimizer: torch.optim.Optimizer | None) -> None:
    """Start another stage from where the running one started; what that one has trained is dropped."""
    if optimizer is not None:
        check_holds(optimizer, run.trainable())
    planned = run.plan.at_stage(run.plan.stage + 1)  # the noise of a number is drawn once
    _begin_anew(run, optimizer, planned, run.slow)


def _begin_anew(
    run: Run,
    optimizer: torch.optim.Optimizer | None,
    planned: Plan,
    slow: SlowWeights,
    then: Callable[[], object] | None = None,
) -> None:
    """Start a stage from slow weights with a fresh lora_A, and without the optimizer's state for what trains."""
    starts = {
        site.weight: fresh_a(planned.spec.seed, planned.stage, site.weight, site.factor_shapes[0])
        for site in planned.sites
    }
    state = treated_state(optimizer, run.trainable().values(), "reset") if optimizer is not None else {}
    begin(run, optimizer, planned, replace(slow, idle=False), starts, state, then)


def begin(
    run: Run,
    optimizer: torch.optim.Optimizer | None,
    planned: Plan,
    after: SlowWeights,
    starts: Mapping[str, torch.Tensor],
    state: Mapping[nn.Parameter, Any],
    then: Callable[[], object] | None = None,
) -> None:
    """Start a stage: write its weights, lora_A, B = 0, and the optimizer's state; all or nothing.

    Args:
        run, optimizer: that are written to.
        planned: the plan of the stage that starts.
        after: slow weights that it starts from.
        starts: lora_A by weight name.
        state: of the optimizer, for the parameters whose state changes.
        then: is called at the end; all is taken back if it raises.
    """
    branches = run.branches_by_weight()
    resized = bool(_resized(planned, branches))
    after, started = after.begin_stage(planned, branches, starts)
    factors = {
        weight: {
            "lora_A": local_like(starts[weight], branch.lora_A),
            "lora_B": torch.zeros((), dtype=branch.lora_B.dtype, device=branch.lora_B.device),
            **started.get(weight, {}),
        }
        for weight, branch in branches.items()
    }
    values = Planned(
        planned,
        after,
        run.present(after.states),
        factors=factors,
        gradients=Gradients(),
        optimizer=optimizer,
        states=state,
    )
    with commit() as undo:
        write_planned(run, values, undo)
        if then is not None:
            then()
        if resized:
            run.replicas.outdate()


def _resized(planned: Plan, branches: Mapping[str, Branch]) -> list[nn.Parameter]:
    """Return the factors that have another rank in the stage that is planned: no state of an optimizer fits them."""
    changed = [branches[site.weight] for site in planned.sites if branches[site.weight].rank != site.rank]
    return [factor for branch in changed for factor in (branch.lora_A, branch.lora_B)]


def end_idle(run: Run) -> None:
    """Start a stage after the last fold of a loop: write its start weights, noise included."""
    with run.exclusive("stages", sharded=True):
        if not run.slow.idle:
            return
        if has_begun(run):
            raise StateError(
                "stages: the branches trained after the last stage ended; call transition(optimizer) first",
                code="stage-not-ended",
            )
        after, factors = replace(run.slow, idle=False).begin_stage(run.plan, run.branches_by_weight())
        run.commit(Planned(run.plan, after, run.present(after.states), factors=factors))


def has_begun(run: Run) -> bool:
    """Whether the running stage has trained: a branch, or what is trained in full, has left where it started."""
    return run.slow.moved(run.learners())


def at_stage(slow: SlowWeights, stage: int, call: str) -> SlowWeights:
    """Return the slow weights at the end of a stage (0: before the first), from which a stage can start.

    Raises:
        StateError: no stage of this number has ended here, or it is gone; names what is missing, and which stages can
            be had.
    """
    gone_to = max((state.gone for state in slow.states.values()), default=0)
    ended = sorted({end for state in slow.states.values() for end in state.ends} | set(range(1, gone_to + 1)))
    if not is_integer(stage, 0) or stage not in (0, *ended):
        raise StateError(
            f"{call}: stage {stage!r} has not ended in this cascade; there are "
            f"{', '.join(map(str, (0, *ended)))} (0 is the base). Of the running stage give weights('fast')",
            code="unknown-stage",
        )
    states = {name: state.at(stage) for name, state in slow.states.items()}
    if gone := [name for name, state in states.items() if state is None]:
        can = [end for end in (0, *ended) if all(state.at(end) is not None for state in slow.states.values())]
        raise StateError(
            f"{call}: stage {stage} is gone for {named(gone)}: experts that outgrow their weight, or the rank at which "
            "a quantized one carries them, are summed, and what is trained in full is kept a stage at a time only "
            "while it is "
            f"small. There are {', '.join(map(str, can))}; save a checkpoint a stage (keep=...) to have all",
            code="unknown-stage",
        )
    # The average, if one is kept, restarts from the slow weights of that stage.
    found = {name: state for name, state in states.items() if state is not None}
    return SlowWeights(found, averaged=min(stage, slow.averaged, 1), group=slow.group)


def rewind(run: Run, stage: int, optimizer: torch.optim.Optimizer | None) -> None:
    """Start a stage from the slow weights of an earlier one; see `Cascade.rewind`."""
    with run.exclusive("rewind", sharded=True):
        if optimizer is not None:
            check_holds(optimizer, run.trainable())
        after = at_stage(run.slow, stage, "rewind")
        unused = run.slow.idle and not run.slow.moved(run.branches_by_weight())
        planned = run.plan if unused else run.plan.at_stage(run.plan.stage + 1)  # the noise of a number is drawn once

        def end() -> None:
            log.info("back at the end of stage %d; stage %d starts", stage, planned.stage)

        _begin_anew(run, optimizer, planned, after, end)


def ended(run: Run, call: str) -> SlowWeights:
    """Return the slow state with the running stage folded, if it has trained; else as it is. Nothing is written.

    Warns where a first stage that no loop over stages began loses a part of what it has trained.

    Raises:
        StateError: training has made a buffer inf or nan.
    """
    run.check_buffers(call)
    slow, learners = run.slow, run.learners()
    if not slow.moved(learners):
        return slow
    after, pace = slow.after_stage(run.plan, learners), run.plan.spec.pace_at(run.plan.stage)
    if pace < 1 and run.plan.stage == 1 and not run.looped:
        run.warned.once(
            "running-stage-folded",
            f"{call}: stage 1 has trained and is folded now, and only {pace:g} of what it has trained is kept: the "
            "pace of the spec. Train in `for stage in cascade.stages(...)`; to keep all of it without stages give "
            'pace=1.0, or save inside `with cascade.weights("fast"):`',
        )
    return after
