"""`lorasc-fx train`: trains a cascade with a Trainer, and writes a run folder that transformers opens as a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from torch import nn
from transformers import set_seed
from tyro.conf import Positional

import lorasc_fx as lx
from lorasc_fx.cli.config import Config, load_config, write_config
from lorasc_fx.cli.run_folder import CASCADE, CONFIG, TASK, check_folder
from lorasc_fx.cli.task import Task
from lorasc_fx.cli.trainer import arguments_of, trainer_of
from lorasc_fx.errors import SpecError, StateError


def train(
    config: Positional[Path],
    overrides: Positional[tuple[str, ...]] = (),
    /,
    resume: bool = False,
) -> int:
    """Train a model and write a run folder.

    Args:
        config: TOML file (docs/command-line.md).
        overrides: keys of the file with other values, such as spec.rank=16.
        resume: continue the run in the output folder.
    """
    settings = load_config(config, overrides)
    run = Path(settings.output)
    check_folder(run, settings, resume=resume)
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


def open_run(run: Path, model: nn.Module | None = None, *, safe: bool = False) -> tuple[lx.Cascade, Task]:
    """Build the model of a run again, and load its cascade.

    Args:
        run: the run folder.
        model: the model that was adapted. By default it is built from the configuration of the run.
        safe: whether to refuse to call a function that the configuration names.

    Raises:
        StateError: the folder has no run.
        SpecError: the model would be built by a user's function, and `safe` is set.
    """
    config, task = task_of(run)
    if model is None and safe and config.model.name.startswith("python:"):
        raise SpecError(
            f"{run}: model.name is {config.model.name}. For safety, this function is not called here. Build the model "
            f"yourself, after transformers.set_seed({config.train.get('seed', 0)}), and call "
            "lorasc_fx.cli.load(folder, model)",
            code="no-base",
        )
    set_seed(config.train.get("seed", 0))
    return lx.load(run / CASCADE, task.model() if model is None else model), task


def task_of(run: Path, overrides: Sequence[str] = ()) -> tuple[Config, Task]:
    """Return the configuration, with overrides, and the task of a run, whose data are not read.

    Raises:
        StateError: the folder has no run.
    """
    for name in (CONFIG, TASK):
        if not (run / name).is_file():
            raise StateError(f"{run} is not a run of lorasc-fx train: there is no {name} in it", code="no-checkpoint")
    config = load_config(run / CONFIG, overrides)
    return config, Task.read(config, run / TASK)
