"""Other runs on the same base, to be summed or added to a cascade: a checkpoint folder, or a cascade."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from os import PathLike

import torch

from lorasc_fx.cascade.experts import bare, differ, other_kind
from lorasc_fx.cascade.run import Run
from lorasc_fx.cascade.transition import ended
from lorasc_fx.checkpoint.reader import Checkpoint, check_digests, read
from lorasc_fx.errors import SpecError, StateError, named
from lorasc_fx.state import Part, host


class GivenRun:
    """A run as given to `merge` or `add`.

    Args:
        given: a run, or a checkpoint folder.
        name: for messages.
        call: that it was given to, for messages.

    Attributes:
        plan, frontend: of the run.
        base: fingerprints of its base.
        moved: names of what is not part of the base: buffers, and parameters that forward writes.
    """

    def __init__(self, given: Run | str | PathLike[str], name: str, call: str) -> None:
        self.base: Mapping[str, str]
        self.moved: Collection[str]
        self.run: Run | Checkpoint
        if isinstance(given, Run):
            given.check_ready(call)
            given.note_kept()
            self.run, self.name = given, f"{name}, a cascade"
            self.base, self.moved = given.fingerprints(), given.moved_parameters()
        elif isinstance(given, (str, PathLike)):
            self.run = read(given)
            self.name = f"{name}, {self.run.path}"
            self.base, self.moved = self.run.manifest["base"], self.run.moved
        else:
            raise SpecError(f"{call}: {name} is {type(given).__name__}; give a checkpoint folder or a cascade")
        self.plan, self.frontend = self.run.plan, self.run.frontend

    def check_base(self, digests: Mapping[str, str], call: str) -> None:
        """Raise CheckpointError if the model is not what this run adapted."""
        advice = "give runs that all adapted the same base"
        check_digests(f"{call}: {self.name}, is of", self.base, digests, digests, self.moved, advice)

    def part(self, bases: Mapping[str, torch.Tensor]) -> Part:
        """Return the run as a part of the sum. A running stage that has trained counts as ended, as in `release`.

        Args:
            bases: W0 by name. Without one, a checkpoint must have no running stage that has trained.

        Raises:
            StateError: there is such a stage, and a base is missing.
            CheckpointError: the tensors of a checkpoint do not fit its plan.
            NonFiniteBranch: a running branch holds inf or nan.
        """
        if isinstance(self.run, Run):
            buffers = {key: buffer.detach().clone() for key, buffer in self.run.model_state().items()}
            return Part(self.name, self.plan, bare(ended(self.run, "merge")), buffers)
        state, learners = self.run.with_learners()
        slow = state.slow
        if slow.moved(learners):
            if slow.states.keys() - bases.keys():
                raise StateError(
                    f"{self.name}, is in the middle of stage {state.plan.stage}, and ending the stage takes the base: "
                    "give the model too",
                    code="stage-not-ended",
                )
            states = {key: replace(weight, base=host(bases[key])) for key, weight in slow.states.items()}
            slow = replace(slow, states=states).after_stage(state.plan, learners)
        return Part(self.name, state.plan, bare(slow), state.buffers)


def add(run: Run, name: str, added: GivenRun) -> None:
    """Keep what another run on this base has learned, under a name. Nothing is written to the model.

    Raises:
        CheckpointError: another base. SpecError: the other run has changed a weight that is not a site here.
    """
    slow, parameters = run.slow, run.parameters_by_name()
    added.check_base(run.fingerprints(), "add")
    sites = slow.states
    bases = {key: sites[key].base if key in sites else parameter for key, parameter in parameters.items()}
    part = added.part(bases)
    if foreign := [key for key, state in part.slow.states.items() if state.changed and key not in sites]:
        raise SpecError(
            f"add: {added.name}, has changed {named(foreign)}, which is not a site here. Adapt with a spec whose "
            "targets include these weights, or load that run with lorasc_fx.load and add this one to it",
            code="sites-differ",
        )
    states = {key: state for key, state in part.slow.states.items() if key in sites}
    for key, state in states.items():
        if differ(state, sites[key]):
            raise other_kind("add", added.name, key)
    run.added = {**run.added, name: replace(part, slow=replace(part.slow, states=states))}
