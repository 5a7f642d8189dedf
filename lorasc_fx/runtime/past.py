"""Earlier stages: their slow weights from the experts and the coefficients of that time, and going on from one of them.

Algorithm.md, "The slow state is small": S_k is one more coefficient vector over the experts that are there anyway. What
was trained in full is kept as a copy a stage (`slow.AFFORDABLE`). After a dense collapse the experts of the stages
before are gone, and so are those stages.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from lorasc_fx.branch import fresh_a
from lorasc_fx.checks import is_integer
from lorasc_fx.errors import StateError, named
from lorasc_fx.runtime import transition
from lorasc_fx.runtime.optim import treated_state
from lorasc_fx.runtime.run import Run
from lorasc_fx.state import SlowWeights, Trained, WeightState

__all__ = ["at_stage", "rewind"]

log = logging.getLogger("lorasc_fx")


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
    states, trained, gone = _looked_up(slow, stage)
    if gone:
        can = [each for each in (0, *ended) if not _looked_up(slow, each)[2]]
        raise StateError(
            f"{call}: stage {stage} is gone for {named(gone)}: experts that outgrow their weight are "
            "summed into one dense delta, and what is trained in full is kept a stage at a time only while it is "
            f"small. There are {', '.join(map(str, can))}; save a checkpoint a stage (keep=...) to have all",
            code="stage-not-kept",
        )
    # An average begins anew, with the slow weights of then.
    return SlowWeights(states, trained, averaged=min(stage, 1), together=slow.together)


def _looked_up(slow: SlowWeights, stage: int) -> tuple[dict[str, WeightState], dict[str, Trained], list[str]]:
    """Return the states of a stage, and the names of those that are gone."""
    states = {name: state.at(stage) for name, state in slow.states.items()}
    trained = {name: kept.at(stage) for name, kept in slow.trained.items()}
    gone = [name for name, found in (states | trained).items() if found is None]
    return (
        {name: found for name, found in states.items() if found is not None},
        {name: found for name, found in trained.items() if found is not None},
        gone,
    )


def rewind(core: Run, stage: int, optimizer: torch.optim.Optimizer | None) -> None:
    """Start a stage from the slow weights of an earlier one; see `Cascade.rewind`."""
    plan = core.plan
    transition.check_optimizer(core, optimizer, "rewind")
    after = at_stage(core.slow, stage, "rewind")
    branches, trained = core.branches_by_weight(), core.trained_parameters()
    unused = core.slow.parked and not core.slow.moved(branches)
    planned = plan if unused else plan.at_stage(plan.stage + 1)  # the noise of a number is drawn once
    starts = {
        site.weight: fresh_a(plan.spec.seed, planned.stage, site.weight, site.factor_shapes[0])
        for site in planned.sites
    }
    own = [parameter for branch in branches.values() for parameter in branch.parameters()]
    state = treated_state(optimizer, [*own, *trained.values()], "reset") if optimizer is not None else {}

    def end() -> None:
        log.info("back at the end of stage %d; stage %d starts", stage, planned.stage)

    transition.begin(core, optimizer, planned, replace(after, parked=False), starts, state, end)
