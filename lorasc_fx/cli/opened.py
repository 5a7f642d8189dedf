"""A run folder opened again: its configuration, and the cascade of its last checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import lorasc_fx as lx
from lorasc_fx.cli.configure import load_config
from lorasc_fx.cli.models import set_mode
from lorasc_fx.cli.run_folder import RunFolder
from lorasc_fx.cli.setup import Setup

__all__ = ["OpenedRun", "open_run"]


@dataclass(frozen=True)
class OpenedRun:
    """A run's folder, the cascade as its last checkpoint has it, and what that is, for people."""

    folder: RunFolder
    cascade: lx.Cascade
    said: str


def open_run(run: Path) -> OpenedRun:
    """Build the run's model again and load the last checkpoint.

    Raises:
        StateError: the folder holds no run, or no checkpoint yet.
    """
    folder = RunFolder(run)
    folder.check_run()
    setup = Setup.of(load_config(folder.config))
    seed = setup.config.train.seed
    model, sample = setup.model(seed), setup.sample(seed)
    set_mode(model, setup.trains(model))
    cascade = lx.load(folder.checkpoint, model, args=sample.args, kwargs=sample.kwargs)
    step, schedule = int(cascade.resume()["step"]), setup.schedule(setup.config.train.stages)
    begun = (
        "" if step in (0, *map(schedule.end, range(1, schedule.stages + 1))) else ", its running stage folded as it is"
    )
    return OpenedRun(folder, cascade, f"weights at step {step} of {schedule.steps}{begun}")
