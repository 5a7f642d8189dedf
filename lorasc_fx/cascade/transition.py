"""Stage transitions: fold the branches, then start them again. Graph nodes and Parameter objects stay the same.

The next slow state and the initial values of branches are computed before the first write. Weights are computed while
they are written, because a second copy of all weights would double the memory. If anything raises, including Ctrl-C,
all writes are rolled back.

The slow weights at the end of an earlier stage follow from the history of the stages (`state.weight.History`).
Parameters trained in full keep one copy per stage if they are small (`state.stage.MAX_FULL_ENTRIES`). When the experts
of a weight are summed into a dense delta, its earlier stages are no longer available.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lorasc_fx.cascade.run import Planned, Run, write_planned
from lorasc_fx.cascade.training import Treatment, check_holds, treated_state
from lorasc_fx.errors import StateError, named
from lorasc_fx.parameters import Holder, buffer_holders
from lorasc_fx.plan import Plan
from lorasc_fx.state import Kept, SlowWeights, WeightState, kept_by, loss_of
from lorasc_fx.util.decode import is_integer
from lorasc_fx.util.undo import Undo, commit

log = logging.getLogger("lorasc_fx")


@dataclass(frozen=True)
class Stage:
    """One stage of the loop `for stage in cascade.stages(...)`.

    Args:
        number: number of the stage in the cascade, from 1. The seed of its noise depends on it.
        index: number of the stage in the loop, from 1 to `count`.
        count: number of stages of the loop.
    """

    number: int
    index: int
    count: int


def loop(
    run: Run, count: int, optimizers: Sequence[torch.optim.Optimizer], schedulers: Sequence[object]
) -> Iterator[Stage]:
    """Yield the stages of a loop, with a transition after each; see `Cascade.stages`."""
    end_idle(run)
    for index in range(1, count + 1):
        yield Stage(run.plan.stage, index, count)
        # After the last stage the run is idle, so that callers evaluate the slow weights, without noise.
        next_stage(run, optimizers, idle=index == count, schedulers=schedulers)


def next_stage(
    run: Run,
    optimizers: Sequence[torch.optim.Optimizer],
    idle: bool = False,
    schedulers: Sequence[Any] = (),
) -> None:
    """End the running stage and start the next one; see `Cascade.transition`.

    Args:
        optimizers: the optimizers that together hold all trained parameters; empty if there are none.
        idle: whether the next stage waits. Until it starts, the parameters hold the slow weights without noise.
        schedulers: learning rate schedulers, stepped at the end. If one raises, the transition is rolled back.
    """
    with run.exclusive("transition", sharded=True, ends_stage=True):
        plan, before, start_time = run.plan, run.slow, time.monotonic()
        branches, trained = run.branches_by_weight(), run.present(before.trained)
        if optimizers:
            check_holds(optimizers, run.trainable())
        # Fold the branches: compute the slow state after this stage.
        after = replace(before.after_stage(plan, {**branches, **trained}), idle=idle)
        moved, how = before.moved(branches), plan.spec.optimizer_state
        # Compute the next optimizer state. Parameters trained in full continue to train, so their state is kept.
        treatments: dict[nn.Parameter, Treatment] = {}
        for branch in branches.values():
            if how != "kept" and (idle or branch.restarts(plan.spec)):
                treatments |= dict.fromkeys(branch.parameters(), how)
        states = treated_state(optimizers, treatments)
        # Write everything, or nothing.
        with commit() as undo:
            next_plan = replace(plan, stage=plan.stage + 1)
            begin(run, Planned(next_plan, after, optimizers=optimizers, states=states), undo)
            seconds = time.monotonic() - start_time
            check_rounding(run, "transition", after)
            share = min(run.kept.values(), default=Kept(1.0, 0.0)).share
            log.info("stage %d folded in %.2f s; rounding kept at least %.3f of the change", plan.stage, seconds, share)
            if not moved and (optimizers or before.moved(trained)):
                run.warned.once(
                    "no-branch-moved",
                    f"stage {plan.stage} ended, and no branch has moved, so the weights are unchanged. In the training "
                    "loop call the cascade, not the model that you adapted, and check that optimizer.step() runs with "
                    "learning rates above 0",
                )
            for scheduler in schedulers:
                scheduler.step()


def restart(run: Run, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Drop the training of the running stage, and start a new stage from the same weights."""
    planned = replace(run.plan, stage=run.plan.stage + 1)  # the same number would draw the same noise
    _begin_reset(run, optimizers, planned, run.slow)


def _begin_reset(run: Run, optimizers: Sequence[torch.optim.Optimizer], planned: Plan, slow: SlowWeights) -> None:
    """Start a stage from these slow weights, with all branches at initial values and all optimizer states reset."""
    if optimizers:
        check_holds(optimizers, run.trainable())
    state = treated_state(optimizers, dict.fromkeys(run.trainable().values(), "reset"))
    with commit() as undo:
        begin(run, Planned(planned, replace(slow, idle=False), optimizers=optimizers, states=state), undo, keep=False)


def begin(run: Run, planned: Planned, undo: Undo, keep: bool = True) -> None:
    """Start a stage: write its weights, the initial values of its branches, and the optimizer's state.

    Args:
        planned: plan, slow weights and optimizer state of the stage.
        keep: whether the factors that do not restart (`spec.restart_factors`) keep their values.
    """
    branches = run.branches_by_weight()
    after, factors = planned.slow.begin_stage(planned.plan, branches, restart=True, keep=keep)
    planned = replace(planned, slow=after, parameters=run.present(after.states), factors=factors, gradients={})
    write_planned(run, planned, undo)
    run.note_kept()


def end_idle(run: Run) -> None:
    """If the run is idle after an earlier loop, start the stage that waits: write its weights with noise."""
    with run.exclusive("stages", sharded=True):
        if not run.slow.idle:
            return
        if has_begun(run):
            raise StateError(
                "stages: the branches were trained after the last stage had ended. Call "
                "cascade.transition(optimizer) first, to end a stage with this training",
                code="stage-not-ended",
            )
        after, factors = replace(run.slow, idle=False).begin_stage(run.plan, run.branches_by_weight())
        run.commit(Planned(run.plan, after, run.present(after.states), factors=factors))


def install_slow(
    run: Run,
    after: SlowWeights,
    names: Sequence[str],
    buffers: Mapping[str, torch.Tensor],
    undo: Undo | None = None,
) -> None:
    """Replace the slow weights inside the running stage. Trained branches and the noise are kept.

    Args:
        after: the new slow weights.
        names: names of the weights that change, and of the parameters trained in full that change. Only these are
            written, because the first write to a weight copies its W0.
        buffers: values of the model's buffers, by name.
        undo: collects undo steps, if this is part of a larger transaction.
    """
    before, plan = run.slow, run.plan
    branches = run.branches_by_weight()
    # Untrained branches with initial values from the weight (PiSSA, DoRA) start again from the new weight.
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
        else:  # there is no buffer of this shape to write to
            replaced.append((holders[name], value.to(holders[name].device, copy=True)))
    written = run.present(names)
    run.commit(Planned(plan, after, written, factors=factors, tensors=tensors, buffers=replaced), undo)


SAMPLE = 8
"""Number of weights, evenly spaced, whose rounding `check_rounding` measures."""


def check_rounding(run: Run, call: str, slow: SlowWeights) -> None:
    """Measure how much of their change some half-precision weights keep. Warn once if one keeps too little."""
    narrow, measured = list[WeightState](), dict[str, Kept]()
    for state in slow.states.values():
        if state.base.dtype.itemsize < 4 and state.changed:
            narrow.append(state)
    for state in narrow[:: max(1, -(-len(narrow) // SAMPLE))]:
        if (kept := kept_by(state)) is not None:
            measured[state.name] = kept
    run.kept = measured
    if measured and (loss := loss_of(measured)):
        run.warned.once("change-rounded-away", f"{call}: {loss}")


def has_begun(run: Run) -> bool:
    """Whether a branch, or a parameter trained in full, has changed since the start of the stage."""
    return run.slow.moved(run.learners())


def at_stage(slow: SlowWeights, stage: int, call: str) -> SlowWeights:
    """Return the slow weights at the end of a stage, where stage 0 is the base. `call` is the name in messages."""
    ended = slow.history.numbers
    if not is_integer(stage, 0) or stage not in (0, *ended):
        raise StateError(
            f"{call}: stage {stage!r} has not ended in this cascade. Available: "
            f"{', '.join(map(str, (0, *ended)))} (0 is the base). For the weights of the running stage use "
            "weights('fast')",
            code="unknown-stage",
        )
    states = {name: state.at(stage) for name, state in slow.states.items()}
    if gone := [name for name, state in states.items() if state is None]:
        complete = [end for end in (0, *ended) if all(state.at(end) is not None for state in slow.states.values())]
        raise StateError(
            f"{call}: stage {stage} is no longer available for {named(gone)}. Experts are summed if they need more "
            "memory than their weight. Parameters trained in full "
            f"are kept for each stage only if they are small. Available: {', '.join(map(str, complete))}. To keep all "
            "stages, save a checkpoint per stage: lorasc_fx.save(cascade, folder, keep=...)",
            code="unknown-stage",
        )
    at_end = {name: state for name, state in states.items() if state is not None}
    return SlowWeights(at_end, history=slow.history.until(stage), group=slow.group)


def rewind(run: Run, stage: int, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Start a stage from the slow weights at the end of an earlier one; see `Cascade.rewind`."""
    with run.exclusive("rewind", sharded=True):
        after = at_stage(run.slow, stage, "rewind")
        unused = run.slow.idle and not run.slow.moved(run.branches_by_weight())
        # Two stages with one number would draw the same noise, so only a stage that has not run keeps its number.
        planned = run.plan if unused else replace(run.plan, stage=run.plan.stage + 1)
        _begin_reset(run, optimizers, planned, after)
        log.info("rewound to the end of stage %d; stage %d starts", stage, planned.stage)


def ended(run: Run, call: str) -> SlowWeights:
    """Return the slow state after the slow update of the running stage, or unchanged if the stage has not trained.

    Writes nothing. If the pace is below 1 and the run never had a loop over stages, warns that only a share of the
    training is kept.
    """
    slow, learners = run.slow, run.learners()
    if not slow.moved(learners):
        return slow
    after = slow.after_stage(run.plan, learners)
    pace = slow.pace(run.plan)
    if pace < 1 and run.plan.stage == 1 and not run.looped:
        run.warned.once(
            "running-stage-folded",
            f"{call}: stage 1 has trained and is folded now. The pace of the spec is {pace:g}, so only this share of "
            "its training is kept. Train in stages: `for stage in cascade.stages(count, optimizer):`. To keep all "
            'training of a single stage, give pace=1.0, or save inside `with cascade.weights("fast"):`',
        )
    return after
