"""`lorasc-fx compare`: trains several methods with the same steps, seeds and examples, and compares their accuracies.

Each run (a method, a seed, a learning rate) writes one small file, so that a stopped comparison can continue. Paired
differences have two 95 % intervals. The interval over seeds (Student's t) answers whether other training runs would
show the difference on these test examples. The interval over examples (bootstrap) answers whether other test examples
would show it with these runs. A difference is reliable only if both intervals exclude 0.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Annotated

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

import lorasc_fx as lx
from lorasc_fx.cli.compare_methods import METHODS
from lorasc_fx.cli.config import Config
from lorasc_fx.cli.data import short_name
from lorasc_fx.cli.models import set_mode
from lorasc_fx.cli.progress import Reporter, console, reporting
from lorasc_fx.cli.run_folder import RunFolder, write_atomically, write_weights
from lorasc_fx.cli.training import (
    Diverged,
    Setup,
    accuracy,
    describe,
    make_optimizer,
    note_short_stages,
    on_ctrl_c,
    predict,
    train_parameters,
    train_steps,
)
from lorasc_fx.errors import CheckpointError, NonFiniteBranch, SpecError
from lorasc_fx.util.extras import module_of
from lorasc_fx.util.files import parse_json


@dataclass(frozen=True)
class Run:
    """One run of the comparison: a method with a seed and a learning rate."""

    method: str
    seed: int
    lr: float

    @property
    def name(self) -> str:
        """Name of its files, without the ending."""
        return f"{self.method}-seed{self.seed}-lr{self.lr:g}"


@dataclass(frozen=True)
class Result(Run):
    """The result of one run.

    Args:
        steps: number of optimizer steps.
        seconds: duration of capture and training, without evaluation.
        parameters: number of trained parameters.
        validation: accuracy on the validation examples, or 0 if the run diverged.
        losses: mean loss on `validation`, `test` and each shifted test set.
        predicted: index of the predicted class for each example, by name of the test set.
        labels: index of the true class for each example, by name of the test set.
        diverged: whether the loss became inf or nan. Then the other fields have no meaning.
    """

    steps: int
    seconds: float
    parameters: int
    validation: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    predicted: dict[str, list[int]] = field(default_factory=dict)
    labels: dict[str, list[int]] = field(default_factory=dict)
    diverged: bool = False

    def correct(self, part: str) -> Tensor:
        """Return whether each prediction on a test set is correct, [examples] of bool."""
        return torch.tensor(self.predicted[part]) == torch.tensor(self.labels[part])

    def accuracy(self, part: str) -> float:
        """Return the accuracy on a test set."""
        return self.correct(part).double().mean().item()

    def score(self, select: str) -> float:
        """Return the score that selects the learning rate: the validation accuracy, or the negative validation loss."""
        return self.validation if select == "accuracy" else -self.losses.get("validation", math.inf)

    def write(self, folder: Path) -> None:
        """Write the file of this run."""
        write_atomically(folder / f"{self.name}.json", json.dumps(dataclasses.asdict(self)) + "\n")

    @classmethod
    def read(cls, folder: Path, run: Run) -> Result | None:
        """Return the result of a run, or None if there is none.

        Raises:
            CheckpointError: its file is damaged.
        """
        path = folder / f"{run.name}.json"
        if not path.exists():
            return None
        try:
            return cls(**parse_json(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as fault:
            raise CheckpointError(f"{path} is damaged ({fault}); delete it to repeat this run") from fault


@dataclass(frozen=True)
class CompareArguments:
    """Train several methods with the settings in CONFIG.toml, and compare them. Options override keys of the file.

    Run the same command again to continue a stopped comparison.
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    overwrite: bool = False
    """Delete the results in the output folder and start a new comparison."""


def run_compare(arguments: CompareArguments) -> int:
    """Compare the methods, print the tables, and return the exit code (130 after Ctrl-C)."""
    results = compare(arguments.config, overwrite=arguments.overwrite)
    if results is None:
        return 130
    print_tables(arguments.config, results)
    return 0


def compare(config: Config, *, overwrite: bool = False) -> list[Result] | None:
    """Train all runs that have no result yet. Return all results, or None after Ctrl-C.

    Raises:
        SpecError: the configuration is invalid, or the method `probe` is given without parameters to train.
        StateError: the folder has another comparison.
        CheckpointError: a result is damaged.
    """
    if "probe" in config.compare.methods:
        pattern = next((rule.pattern for rule in config.spec.train_rules if rule.lr is not None), None)
        if not config.spec.train:
            reason = (
                "which trains the parameters in spec.train, but spec.train is empty: name parameters there, or remove "
                "'probe'"
            )
        else:
            reason = (
                f"which trains with a single learning rate (compare.rates), but spec.train_rules gives {pattern!r} "
                "another one: remove one of the two"
            )
        if not config.spec.train or pattern is not None:
            raise SpecError(f"compare.methods has 'probe', {reason}", code="conflicting-options")
    folder = RunFolder(Path(config.output))
    started = folder.started and not overwrite
    folder.check(config, resume=started, overwrite=overwrite)
    setup = None if started else Setup.of(config)  # load the data before the folder is made, because it may be invalid
    folder.begin(config, overwrite=overwrite)
    runs = planned(config)
    results = {run: Result.read(folder.results, run) for run in runs}
    if None in results.values():
        setup = setup or Setup.of(config)
        describe(setup)
        if any(METHODS[method].staged for method in config.compare.methods):
            note_short_stages(setup, rates="compare.rates")
        with reporting() as reporter, on_ctrl_c() as interrupt:
            for number, run in enumerate(runs, start=1):
                if results[run] is None and not interrupt.is_set():
                    title = f"{number}/{len(runs)} {run.name}"
                    results[run] = _make(run, title, setup, folder, reporter, interrupt)
                if results[run] is None:
                    done = sum(result is not None for result in results.values())
                    reporter.say(f"Stopped after {done} of {len(runs)} runs. Run the same command again to continue.")
                    return None
    return [result for result in results.values() if result is not None]


def planned(config: Config) -> list[Run]:
    """Return the runs of a comparison, in the order in which they are trained."""
    return [
        Run(method, seed, lr)
        for seed in config.compare.seeds
        for method in METHODS
        if method in config.compare.methods
        for lr in config.compare.rates_of(method)
    ]


def _make(run: Run, title: str, setup: Setup, folder: RunFolder, reporter: Reporter, interrupt: Event) -> Result | None:
    """Train and evaluate one run. Return None if Ctrl-C has stopped it."""
    config, method = setup.config, METHODS[run.method]
    start = time.monotonic()
    stages = config.train.stages if method.staged else 1
    spec = replace(config.spec, seed=config.spec.seed + run.seed)
    # Build the model, and train it.
    model: nn.Module
    if method.spec is None:
        model = train_parameters(setup.model(run.seed), method.parameters(spec), spec.exclude)
    else:
        model = lx.adapt(**setup.call(run.seed), spec=method.spec(spec, config.train.stages))
    optimizer = make_optimizer(model, run.lr, config.train.weight_decay)
    entries = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    steps = setup.stage_steps(stages)
    cascade = model if isinstance(model, lx.Cascade) else None
    schedule = setup.schedule(optimizer, cascade, steps)
    reporter.begin(title, sum(steps))
    done = 0
    try:
        for step in train_steps(model, optimizer, schedule, setup, run.seed, steps, interrupt=interrupt):
            done = step.done
            if step.folded:
                continue
            reporter.step(done, f"stage {step.stage}/{stages}" if stages > 1 else "", step.loss)
            if done % config.train.log_every == 0 or step.ends_stage:
                folder.log(run=run.name, step=done, stage=step.stage, loss=step.loss, lr=step.lr)
        if done < sum(steps):
            return None
        trained = model
        if cascade is not None:
            trained = cascade.release(view="averaged" if cascade.plan.spec.average else "slow")
    except (Diverged, NonFiniteBranch) as fault:
        reporter.say(f"{title}: diverged ({fault})")
        seconds = time.monotonic() - start
        result = Result(run.method, run.seed, run.lr, 0, seconds, entries, diverged=True)
        result.write(folder.results)
        return result
    # Evaluate the folded model on the validation examples and on all test sets.
    seconds = time.monotonic() - start
    sets = {"validation": setup.splits.validation, **setup.splits.test_sets}
    set_mode(trained, False)
    logits = {part: predict(trained, examples, config.train.device) for part, examples in sets.items()}
    result = Result(
        run.method,
        run.seed,
        run.lr,
        done,
        seconds,
        entries,
        accuracy(logits["validation"], setup.splits.validation),
        {part: F.cross_entropy(logits[part], examples.labels).item() for part, examples in sets.items()},
        {part: logits[part].argmax(-1).tolist() for part in setup.splits.test_sets},
        {part: examples.labels.tolist() for part, examples in setup.splits.test_sets.items()},
    )
    if run.method in config.compare.keep_weights:
        write_weights(folder.results / f"{run.name}.safetensors", trained.state_dict())
    result.write(folder.results)
    shown = " ".join(f"{part} {result.accuracy(part):.3f}" for part in result.predicted)
    reporter.say(f"{title}: validation {result.validation:.3f} {shown}, {seconds:.0f} s")
    return result


# --- statistics ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A mean difference and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def settled(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def t_interval(differences: Sequence[float]) -> Interval:
    """Return Student's t interval of paired differences, one per seed. With one seed it is unbounded."""
    mean, count = statistics.fmean(differences), len(differences)
    if count < 2:
        return Interval(mean, -math.inf, math.inf)
    quantile = float(module_of("cli", "scipy.stats").t.ppf(0.975, count - 1))
    half_width = quantile * statistics.stdev(differences) / math.sqrt(count)
    return Interval(mean, mean - half_width, mean + half_width)


def bootstrap_interval(correct: Tensor, reference: Tensor) -> Interval:
    """Return the percentile bootstrap interval of a difference in accuracy. It resamples the examples.

    Args:
        correct, reference: whether each prediction of the two methods is correct, [seeds, examples], on the same
            examples.
    """
    differences = (correct.double() - reference.double()).mean(0).numpy()
    result = module_of("cli", "scipy.stats").bootstrap(
        (differences,), lambda sample, axis: sample.mean(axis), n_resamples=2000, batch=100, method="percentile", rng=0
    )
    low, high = result.confidence_interval
    return Interval(float(differences.mean()), float(low), float(high))


# --- tables --------------------------------------------------------------------------------------------------------


def best_rates(results: Sequence[Result], select: str) -> dict[str, list[Result]]:
    """Return the runs (one per seed) of each method at its best learning rate, by mean validation loss or accuracy.

    Of equally good rates, the smallest one is selected. A diverged run has accuracy 0 and an infinite loss.
    """
    best: dict[str, list[Result]] = {}
    for method in METHODS:
        rates = sorted({result.lr for result in results if result.method == method})
        by_rate = [
            sorted((run for run in results if (run.method, run.lr) == (method, rate)), key=lambda run: run.seed)
            for rate in rates
        ]
        if by_rate:
            best[method] = max(by_rate, key=lambda runs: statistics.fmean(run.score(select) for run in runs))
    return best


@dataclass(frozen=True)
class Table:
    """A table of texts, for the screen and for the report. Each line of `notes` is a paragraph."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: tuple[str, ...]


def tables(config: Config, results: Sequence[Result]) -> Iterator[Table]:
    """Yield the table of accuracies. If there is a second method, also yield the table of differences."""
    best = best_rates(results, config.compare.select)
    parts = ["test", *map(short_name, config.data.shifts)]
    seeds = len(config.compare.seeds)
    yield Table(
        f"{config.model.name} on {short_name(config.data.name)}: accuracy in %, "
        + (f"mean of {seeds} seeds" if seeds > 1 else "one seed"),
        ("method", "lr", "trained", "train s", "val. loss", "validation", *parts),
        [(method, *_row(runs, parts)) for method, runs in best.items()],
        (*(f"{method}: {METHODS[method].about}" for method in best), *_caption(config, results)),
    )
    reference = config.compare.reference
    if reference not in best or len(best) < 2:
        return
    yield Table(
        f"Difference to {reference} in percentage points, with 95 % intervals",
        ("method", "on", "difference", "over seeds (t)", "over examples (bootstrap)"),
        [
            (method, part, *_differences(runs, best[reference], part))
            for method, runs in best.items()
            for part in parts
            if method != reference
        ],
        (
            "* marks an interval that excludes 0. The interval over seeds is for other training runs on these "
            "examples. The interval over examples is for other examples with these runs. Neither is for other models "
            "or data, and there is no correction for multiple comparisons.",
        ),
    )


def print_tables(config: Config, results: Sequence[Result]) -> None:
    """Print both tables on standard output."""
    from rich.table import Table as Shown

    screen = console()
    for table in tables(config, results):
        screen.print(table.title, soft_wrap=True)
        shown = Shown()
        for column in table.head:
            shown.add_column(column, justify="left" if column in ("method", "on") else "right")
        for row in table.rows:
            shown.add_row(*row)
        screen.print(shown)
        for note in table.notes:
            screen.print(note)


def _row(runs: Sequence[Result], parts: Sequence[str]) -> list[str]:
    seconds = statistics.fmean(run.seconds for run in runs)
    row = [f"{runs[0].lr:g}", f"{runs[0].parameters:,}", f"{seconds:.1f}"]
    if any(run.diverged for run in runs):
        return [*row, *["diverged"] * (2 + len(parts))]
    row.append(f"{statistics.fmean(run.losses['validation'] for run in runs):.3f}")
    values = [[run.validation for run in runs], *([run.accuracy(part) for run in runs] for part in parts)]
    return row + [_percent(scores) for scores in values]


def _percent(values: Sequence[float]) -> str:
    mean = f"{100 * statistics.fmean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _differences(runs: Sequence[Result], reference: Sequence[Result], part: str) -> tuple[str, str, str]:
    if any(run.diverged for run in (*runs, *reference)):
        return ("-", "-", "-")
    pairs = list(zip(runs, reference, strict=True))
    over_seeds = t_interval([run.accuracy(part) - base.accuracy(part) for run, base in pairs])
    over_examples = bootstrap_interval(
        torch.stack([run.correct(part) for run, _ in pairs]), torch.stack([base.correct(part) for _, base in pairs])
    )
    return f"{100 * over_seeds.mean:+.1f}", _interval(over_seeds), _interval(over_examples)


def _interval(interval: Interval) -> str:
    if math.isinf(interval.high):
        return "one seed"
    return f"{100 * interval.low:+.1f} to {100 * interval.high:+.1f}{'*' if interval.settled else ' '}"


def _caption(config: Config, results: Sequence[Result]) -> tuple[str, ...]:
    steps = max((result.steps for result in results), default=0)
    rates = max(len(config.compare.rates_of(method)) for method in config.compare.methods)
    if rates > 1:
        tuning = f"The learning rate was selected by validation {config.compare.select} from {rates} per method."
    else:
        tuning = "The learning rate was not tuned."
    return (
        f"Every run: {steps} steps of AdamW with batches of {config.train.batch_size} in the same order. {tuning}",
        "lora is this package's LoRA without stages. Tests check that its steps equal the steps of peft's LoRA.",
        "Methods with stages are evaluated with their slow weights folded into the model (lorasc with their average "
        "if spec.average keeps one). ± is the standard deviation over seeds.",
    )
