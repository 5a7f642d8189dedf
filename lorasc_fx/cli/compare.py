"""`lorasc-fx compare`: methods side by side, on the same steps, seeds and examples."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch

from lorasc_fx.cli.cells import Cell, Result
from lorasc_fx.cli.compare_table import print_tables
from lorasc_fx.cli.interrupt import Interrupt, on_ctrl_c
from lorasc_fx.cli.learners import PlainLearner
from lorasc_fx.cli.methods import TABLE
from lorasc_fx.cli.models import set_mode, warn_of_random_weights
from lorasc_fx.cli.run_folder import RunFolder
from lorasc_fx.cli.schema import METHODS, Config
from lorasc_fx.cli.setup import Setup
from lorasc_fx.cli.training import Diverged, Step, accuracy, make_optimizer, predict, train_steps
from lorasc_fx.errors import NonFiniteBranch, SpecError
from lorasc_fx.integrations.reporter import Reporter, reporting

__all__ = ["compare", "run_compare"]

_SECTIONS = ("model", "data", "train", "spec")


def run_compare(config: Config, *, overwrite: bool = False) -> int:
    """Compare, print the tables, and return the exit code (130 after Ctrl-C)."""
    results = compare(config, overwrite=overwrite)
    if results is None:
        return 130
    print_tables(config, results)
    return 0


def compare(config: Config, *, overwrite: bool = False) -> list[Result] | None:
    """Run each cell that has not run yet and return all results, or None after Ctrl-C."""
    if "probe" in config.compare.methods and not config.spec.train:
        raise SpecError("compare.methods has 'probe', which trains what spec.train names, and spec.train is empty")
    own = [rule.pattern for rule in config.spec.train_rules if rule.lr is not None]
    if "probe" in config.compare.methods and own:
        raise SpecError(
            f"compare.methods has 'probe', which trains at one rate (compare.probe_lrs), and spec.train_rules gives "
            f"{own[0]!r} a rate of its own: drop one of the two"
        )
    folder = RunFolder(Path(config.output))
    started = folder.started and not overwrite
    folder.check(config, _SECTIONS, resume=started, overwrite=overwrite)
    setup = None if started else Setup.of(config)  # what is wrong with the data must not leave a folder behind
    folder.begin(config, _SECTIONS, resume=started, overwrite=overwrite)
    cells = [
        Cell(method, seed, lr)
        for seed in config.compare.seeds
        for method in METHODS
        if method in config.compare.methods
        for lr in config.compare.rates(method)
    ]
    found = {cell: Result.read(folder.cells, cell) for cell in cells}
    if all(found.values()):
        return [result for result in found.values() if result is not None]
    setup = setup or Setup.of(config)
    warn_of_random_weights(config.model)
    with reporting() as reporter, on_ctrl_c() as interrupt:
        for number, cell in enumerate(cells, start=1):
            if found[cell] is None and not interrupt.asked:
                found[cell] = _run(cell, f"{number}/{len(cells)} {cell.name}", setup, folder, reporter, interrupt)
            if found[cell] is None:
                finished = sum(result is not None for result in found.values())
                reporter.say(
                    f"Stopped; {finished} of {len(cells)} runs are done, and the same command does the others."
                )
                return None
    return [result for result in found.values() if result is not None]


def _run(
    cell: Cell, title: str, setup: Setup, folder: RunFolder, reporter: Reporter, interrupt: Interrupt
) -> Result | None:
    """Train and evaluate one cell; None if Ctrl-C ended it."""
    config, method = setup.config, TABLE[cell.method]
    began = time.monotonic()
    model = setup.model(cell.seed)
    spec = replace(config.spec, seed=config.spec.seed + cell.seed)
    stages = method.stages(config.train.stages)
    learner = method.learner(model, setup.sample(cell.seed), spec, config.train.stages, train=setup.trains(model))
    optimizer = make_optimizer(learner, cell.lr, config.train.weight_decay)
    schedule = setup.schedule(stages)
    reporter.begin(title, schedule.steps)

    def observe(step: Step) -> None:
        reporter.step(step.done, f"stage {step.stage}/{stages}" if stages > 1 else "", step.loss)
        if step.done % config.train.log_every == 0 or step.ends_stage:
            folder.log(run=cell.name, step=step.done, stage=step.stage, loss=step.loss, lr=step.lr)

    parameters = learner.parameters
    try:
        whole = train_steps(
            learner,
            optimizer,
            setup.splits.train,
            schedule,
            setup.order(cell.seed),
            observe,
            interrupt=interrupt,
            device=config.train.device,
        )
        trained = learner.finish() if whole else None
    except (Diverged, NonFiniteBranch) as fault:
        reporter.say(f"{title}: diverged ({fault})")
        seconds = time.monotonic() - began
        result = Result(cell.method, cell.seed, cell.lr, 0, seconds, parameters, 0.0, {}, {}, diverged=True)
        result.write(folder.cells)
        return result
    if trained is None:
        return None
    seconds = time.monotonic() - began
    result = _evaluated(cell, trained, setup, schedule.steps, seconds, parameters)
    if cell.method in config.compare.keep_weights:
        folder.write_weights(trained.state_dict(), folder.cells / f"{cell.name}.safetensors")
    result.write(folder.cells)
    shown = " ".join(f"{part} {result.accuracy(part):.3f}" for part in result.predicted)
    reporter.say(f"{title}: validation {result.validation:.3f} {shown}, {seconds:.0f} s")
    return result


def _evaluated(cell: Cell, model: torch.nn.Module, setup: Setup, steps: int, seconds: float, parameters: int) -> Result:
    set_mode(model, False)
    device = setup.config.train.device
    learner = PlainLearner(model, ())
    parts = {"test": setup.splits.test, **setup.splits.shifts}
    predicted = {part: predict(learner.logits, examples, device).tolist() for part, examples in parts.items()}
    labels = {part: examples.labels.tolist() for part, examples in parts.items()}
    validation = accuracy(predict(learner.logits, setup.splits.validation, device), setup.splits.validation)
    return Result(cell.method, cell.seed, cell.lr, steps, seconds, parameters, validation, predicted, labels)
