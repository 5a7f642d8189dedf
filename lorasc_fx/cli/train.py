"""`lorasc-fx train`: trains a cascade with a Trainer, and writes a run folder that transformers opens as a model."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from transformers import set_seed
from tyro.conf import Positional

import lorasc_fx as lx
from lorasc_fx.cli.config import Config, load_config, to_dict, write_config
from lorasc_fx.cli.task import Task
from lorasc_fx.cli.trainer import arguments_of, trainer_of
from lorasc_fx.errors import SpecError, StateError

Overrides = Positional[tuple[str, ...]]
CONFIG, TASK, CASCADE = "config.toml", "task.json", "cascade"
"""Entries of a run folder. The Trainer adds the model, the folders `checkpoint-N`, and `all_results.json`."""


def train(config: Positional[Path], overrides: Overrides = (), /, resume: bool = False) -> int:
    """Train a model and write a run folder.

    Args:
        config: TOML file (docs/llm.md).
        overrides: keys of the file with other values, such as spec.rank=16.
        resume: continue the run in the output folder from its last checkpoint, if it has one.
    """
    settings = load_config(config, overrides)
    run = Path(settings.output)
    check_output(run, folder=True)
    saved = any(run.glob("checkpoint-*"))
    if not resume and (saved or (run / CASCADE).exists()):
        raise StateError(
            f"{run} already has a run. Give --resume to continue it, delete the folder, or give another output=FOLDER",
            code="path-in-the-way",
        )
    if resume:
        check_same(run, settings)
    task = Task(settings)
    arguments = arguments_of(settings, task)
    trainer, cascade, callback = trainer_of(task, arguments)
    if arguments.process_index == 0:
        write_config(settings, run / CONFIG)
        task.write(run / TASK)
        print(cascade)
    with callback.catching() if arguments.world_size == 1 else nullcontext():
        trainer.train(resume_from_checkpoint=resume and saved)
    if arguments.process_index == 0:
        lx.save(cascade, run / CASCADE)
    if callback.stopped:
        print(f"Stopped after step {trainer.state.global_step}; continue with: lorasc-fx train {run / CONFIG} --resume")
        return 130
    trainer.save_model()
    for name in ("validation", "test"):
        metrics = trainer.evaluate(task.data[name], metric_key_prefix=name)
        trainer.log_metrics(name, metrics)
        trainer.save_metrics(name, metrics)
    return 0


def check_output(path: Path, *, folder: bool) -> None:
    """Raise SpecError or OSError if a file or folder cannot be written. Called before the long work starts."""
    if path.exists() and path.is_dir() != folder:
        raise SpecError(f"{path} is not a {'folder' if folder else 'file'}; give another path", code="path-in-the-way")
    within = path.absolute() if folder else path.absolute().parent
    with tempfile.TemporaryFile(dir=next(ancestor for ancestor in (within, *within.parents) if ancestor.exists())):
        pass


def check_same(run: Path, config: Config) -> None:
    """Raise StateError unless the run in a folder has the same settings."""
    old, new = to_dict(load_config(run / CONFIG)), to_dict(config)
    old["compare.text"], new["compare.text"] = old["compare"]["text"], new["compare"]["text"]
    for table in ("model", "data", "stages", "train", "spec", "compare.text"):
        if old[table] != new[table]:
            raise StateError(
                f"{run} has a run with {table} = {old[table]}, but now it is {new[table]}. Resume with the same "
                "values, delete the folder, or give another output=FOLDER",
                code="spec-differs",
            )


def open_run(run: Path) -> tuple[lx.Cascade, Task]:
    """Build the model of a run again, and load its cascade."""
    config, task = task_of(run)
    set_seed(config.train.get("seed", 0))
    return lx.load(run / CASCADE, task.model()), task


def task_of(run: Path, overrides: Sequence[str] = ()) -> tuple[Config, Task]:
    """Return the configuration of a run, with overrides, and its task. This does not read the data."""
    for name in (CONFIG, TASK):
        if not (run / name).is_file():
            raise StateError(f"{run} is not a run of lorasc-fx train: there is no {name} in it", code="no-checkpoint")
    config = load_config(run / CONFIG, overrides)
    return config, Task.read(config, run / TASK)
