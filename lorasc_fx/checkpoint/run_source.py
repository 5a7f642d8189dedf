"""Reads runs that `merge` sums or a bank serves: from a checkpoint folder, or from a cascade."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from os import PathLike

import torch

from lorasc_fx.cascade.run import Run
from lorasc_fx.cascade.transition import ended
from lorasc_fx.checkpoint.reader import Checkpoint, check_digests, read
from lorasc_fx.errors import SpecError, StateError
from lorasc_fx.state import Part, host


class RunSource:
    """A run that the user gives to `merge` or to a bank: a cascade's run or a checkpoint folder.

    Args:
        source: the run, or the folder.
        name: name of the run, for messages.
        call: name of the user's call, for messages.

    Attributes:
        run: the run, or the checkpoint that was read.
        plan, frontend: the plan of the run, and the front end that captured its model.
        base: fingerprints of its base by parameter name.
        moved: names of tensors that are not compared with the base: buffers, and parameters that forward writes.
        changed_buffers: names of these tensors that differ from the base.
    """

    def __init__(self, source: Run | str | PathLike[str], name: str, call: str) -> None:
        self.base: Mapping[str, str]
        self.moved: Collection[str]
        self.run: Run | Checkpoint
        if isinstance(source, Run):
            source.check_ready(call)
            source.note_kept()
            self.run, self.name = source, f"{name}, a cascade"
            self.base, self.moved = source.fingerprints(), source.moved_parameters()
            self.changed_buffers = source.changed_buffers()
        elif isinstance(source, (str, PathLike)):
            self.run = read(source)
            self.name = f"{name}, {self.run.path}"
            self.base, self.moved = self.run.content.base, self.run.moved
            self.changed_buffers = list(self.run.content.changed_buffers)
        else:
            raise SpecError(f"{call}: {name} is a {type(source).__name__}; give a checkpoint folder or a cascade")
        self.plan, self.frontend = self.run.plan, self.run.frontend

    def check_base(self, digests: Mapping[str, str], call: str) -> None:
        """Raise CheckpointError if the fingerprints differ from the base of this run."""
        advice = "give runs that all adapted the same base"
        check_digests(f"{call}: {self.name}, is of", self.base, digests, digests, self.moved, advice)

    def part(self, bases: Mapping[str, torch.Tensor]) -> Part:
        """Return the run as one summand. A running stage that has trained counts as ended, as in `release`.

        Args:
            bases: W0 by name. Required if the source is a checkpoint in the middle of a stage.

        Raises:
            StateError: the checkpoint is in the middle of a stage, and W0 of a weight is missing.
            CheckpointError: the tensors of the checkpoint do not fit its plan.
            NonFiniteBranch: a running branch holds inf or nan.
        """
        if isinstance(self.run, Run):
            buffers = {key: buffer.detach().clone() for key, buffer in self.run.model_state().items()}
            return Part(self.name, self.plan, ended(self.run, "merge").without_base(), buffers)
        state, learners = self.run.with_learners()
        slow = state.slow
        if slow.moved(learners):
            if slow.states.keys() - bases.keys():
                raise StateError(
                    f"{self.name}, is in the middle of stage {state.plan.stage}. To end the stage, the weights of the "
                    "base are needed: give the model too",
                    code="stage-not-ended",
                )
            states = {key: replace(weight, base=host(bases[key])) for key, weight in slow.states.items()}
            slow = replace(slow, states=states).after_stage(state.plan, learners)
        buffers = {name: value for name, value in state.buffers.items() if value is not None}
        return Part(self.name, state.plan, slow.without_base(), buffers)
