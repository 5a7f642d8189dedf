"""`lorasc-fx fold`: from a run's checkpoint to plain weights in the layout of the original model."""

from __future__ import annotations

from pathlib import Path

import lorasc_fx as lx
from lorasc_fx.cli.configure import load_config
from lorasc_fx.cli.models import set_mode
from lorasc_fx.cli.run_folder import RunFolder
from lorasc_fx.cli.setup import Setup
from lorasc_fx.errors import StateError

__all__ = ["run_fold"]


def run_fold(run: Path, output: Path | None) -> int:
    """Write the slow weights of a run's last checkpoint, and return the exit code.

    Raises:
        StateError: the folder holds no run, or no checkpoint yet.
    """
    folder = RunFolder(run)
    if not folder.config.is_file():
        raise StateError(f"{run} holds no run: there is no {folder.config.name} in it")
    if not folder.saved:
        raise StateError(f"{run} holds no checkpoint yet; a run writes its first one at the end of its first stage")
    setup = Setup.of(load_config(folder.config))
    seed = setup.config.train.seed
    model, sample = setup.model(seed), setup.sample(seed)
    set_mode(model, setup.trains(model))
    cascade = lx.load(folder.checkpoint, model, args=sample.args, kwargs=sample.kwargs)
    step, schedule = int(cascade.resume()["step"]), setup.schedule(setup.config.train.stages)
    where = folder.write_weights(cascade.folded_state_dict(), output)
    begun = (
        "" if step in (0, *map(schedule.end, range(1, schedule.stages + 1))) else ", its running stage folded as it is"
    )
    print(f"{where}: slow weights at step {step} of {schedule.steps}{begun}")
    return 0
