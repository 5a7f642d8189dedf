"""`lorasc-fx train`: trains a cascade with a Trainer, and writes a run folder that transformers opens as a model."""

from __future__ import annotations

import json
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

CONFIG, TASK, CASCADE = "config.toml", "task.json", "cascade"
"""Files of a run folder beside those of the Trainer: the model, `checkpoint-N`, and `all_results.json`."""


def train(
    config: Positional[Path],
    overrides: Positional[tuple[str, ...]] = (),
    /,
    resume: bool = False,
) -> int:
    """Train a model and write a run folder.

    Args:
        config: TOML file (docs/llm.md).
        overrides: keys of the file with other values, such as spec.rank=16.
        resume: continue the run in the output folder.
    """
    settings = load_config(config, overrides)
    run = Path(settings.output)
    check_output(run, folder=True)
    saved = any(run.glob("checkpoint-*"))
    if resume and not saved:
        raise StateError(f"{run} has no checkpoint to resume; remove --resume", code="no-checkpoint")
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
        trainer.train(resume_from_checkpoint=resume)
    if arguments.process_index == 0:
        lx.save(cascade, run / CASCADE)
    if callback.stopped:
        print(f"Stopped after step {trainer.state.global_step}; continue with: lorasc-fx train {run / CONFIG} --resume")
        return 130
    trainer.save_model()
    evaluated = [name for name in task.data if name != "train"]  # in the same order in all processes
    for name in evaluated:
        trainer.save_metrics(name, trainer.evaluate(task.data[name], metric_key_prefix=name))
    if arguments.process_index == 0:
        results = json.loads((run / "all_results.json").read_text(encoding="utf-8"))
        metric = "loss" if task.kind == "language" else "accuracy"
        print(f"{metric}: " + ", ".join(f"{name} {results[f'{name}_{metric}']:.3f}" for name in evaluated))
    return 0


def check_output(path: Path, *, folder: bool) -> None:
    """Check that a file or folder can be written, before the long work starts. Raises SpecError or OSError."""
    if path.exists() and path.is_dir() != folder:
        kind, expected = ("a file", "a folder") if folder else ("a folder", "a file")
        raise SpecError(f"{path} is {kind}, but the output is {expected}; give another path", code="path-in-the-way")
    within = path.absolute() if folder else path.absolute().parent
    with tempfile.TemporaryFile(dir=next(place for place in (within, *within.parents) if place.exists())):
        pass


def check_same(run: Path, config: Config) -> None:
    """Check that a folder has a run with the settings that are about to be trained."""
    old, new = (json.loads(json.dumps(to_dict(each))) for each in (load_config(run / CONFIG), config))
    for table in ("model", "data", "stages", "train", "spec"):
        for key in {**old[table], **new[table]}:
            if (was := old[table].get(key)) != (wanted := new[table].get(key)):
                raise StateError(
                    f"{run} has a run with {table}.{key} = {was!r}, but now it is {wanted!r}. Resume with the same "
                    "value, delete the folder, or give another output=FOLDER",
                    code="spec-differs",
                )


def open_run(run: Path) -> tuple[lx.Cascade, Task]:
    """Build the model of a run again, and load its cascade."""
    config, task = task_of(run)
    set_seed(config.train.get("seed", 0))
    return lx.load(run / CASCADE, task.model()), task


def task_of(run: Path, overrides: Sequence[str] = ()) -> tuple[Config, Task]:
    """Return the configuration, with overrides, and the task of a run, whose data are not read."""
    for name in (CONFIG, TASK):
        if not (run / name).is_file():
            raise StateError(f"{run} is not a run of lorasc-fx train: there is no {name} in it", code="no-checkpoint")
    config = load_config(run / CONFIG, overrides)
    return config, Task.read(config, run / TASK)
