"""The tables of `compare`: accuracies, and paired differences with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lorasc_fx.cli.cells import Result
from lorasc_fx.cli.methods import TABLE
from lorasc_fx.cli.schema import METHODS, Config
from lorasc_fx.cli.statistics import Interval, bootstrap_interval, mean_and_deviation, t_interval
from lorasc_fx.integrations.reporter import console

__all__ = ["chosen", "print_tables"]

Chosen = dict[str, list[Result]]


def chosen(config: Config, results: Sequence[Result]) -> Chosen:
    """Return, for each method, its runs (one a seed) at the learning rate of the best mean validation accuracy.

    Of equal ones the smaller rate is taken. A rate at which any seed diverged counts as 0 for that seed.
    """
    best: Chosen = {}
    for method in METHODS:
        of_method = [result for result in results if result.method == method]
        if not of_method:
            continue
        by_rate = {
            rate: [result for result in of_method if result.lr == rate] for rate in sorted({r.lr for r in of_method})
        }
        best[method] = max(by_rate.values(), key=lambda runs: math.fsum(run.validation for run in runs) / len(runs))
    del config
    return best


def print_tables(config: Config, results: Sequence[Result]) -> None:
    """Print both tables on standard output."""
    from rich.table import Table

    best = chosen(config, results)
    parts = ["test", *config.data.shifts]
    screen = console()
    runs_each = f"mean of {len(config.compare.seeds)} seeds" if len(config.compare.seeds) > 1 else "one seed"
    screen.print(f"{config.model.name} on {config.data.name}: accuracy in %, {runs_each}", soft_wrap=True)
    accuracies = Table()
    for column in ("method", "lr", "trained", "train s", "validation", *parts):
        accuracies.add_column(column, justify="left" if column == "method" else "right")
    for method, runs in best.items():
        accuracies.add_row(method, *_row(runs, parts))
    screen.print(accuracies)
    for method in best:
        screen.print(f"{method}: {TABLE[method].about}", soft_wrap=True)
    screen.print(_caption(config, results), soft_wrap=True)
    reference = config.compare.reference
    if reference not in best or len(best) < 2:
        return
    differences = Table(title=f"Difference to {reference} in points, with 95 % intervals")
    for column in ("method", "on", "difference", "over seeds (t)", "over examples (bootstrap)"):
        differences.add_column(column, justify="left" if column in ("method", "on") else "right")
    for method, runs in best.items():
        for part in parts if method != reference else ():
            differences.add_row(method, part, *_differences(runs, best[reference], part))
    screen.print(differences)
    screen.print(
        "* marks an interval that leaves out 0. Over seeds: other runs on these examples; over examples: other\n"
        "examples with these runs. They say nothing of other models or data, and are not corrected for their number.",
        soft_wrap=True,
    )


def _row(runs: Sequence[Result], parts: Sequence[str]) -> list[str]:
    seconds = mean_and_deviation([run.seconds for run in runs])[0]
    row = [f"{runs[0].lr:g}", f"{runs[0].parameters:,}", f"{seconds:.1f}"]
    if any(run.diverged for run in runs):
        return [*row, *["diverged"] * (1 + len(parts))]
    values = [[run.validation for run in runs], *([run.accuracy(part) for run in runs] for part in parts)]
    return row + [_percent(each) for each in values]


def _percent(values: Sequence[float]) -> str:
    mean, deviation = mean_and_deviation(values)
    return f"{100 * mean:.1f}" if math.isnan(deviation) else f"{100 * mean:.1f} ± {100 * deviation:.1f}"


def _differences(runs: Sequence[Result], reference: Sequence[Result], part: str) -> tuple[str, str, str]:
    if any(run.diverged for run in (*runs, *reference)):
        return ("-", "-", "-")
    pairs = list(zip(_by_seed(runs), _by_seed(reference), strict=True))
    over_seeds = t_interval([ours.accuracy(part) - theirs.accuracy(part) for ours, theirs in pairs])
    over_examples = bootstrap_interval(
        torch.stack([ours.right(part) for ours, _ in pairs]), torch.stack([theirs.right(part) for _, theirs in pairs])
    )
    return f"{100 * over_seeds.mean:+.1f}", _interval(over_seeds), _interval(over_examples)


def _by_seed(runs: Sequence[Result]) -> list[Result]:
    return sorted(runs, key=lambda run: run.seed)


def _interval(interval: Interval) -> str:
    if math.isinf(interval.high):
        return "one seed"
    return f"{100 * interval.low:+.1f} to {100 * interval.high:+.1f}{'*' if interval.settled else ' '}"


def _caption(config: Config, results: Sequence[Result]) -> str:
    steps = max((result.steps for result in results), default=0)
    rates = max(len(config.compare.rates(method)) for method in config.compare.methods)
    chosen_by = "chosen on the validation examples from" if rates > 1 else "not tuned here:"
    return (
        f"Every run: {steps} steps of {config.train.batch_size} in the same order, AdamW, learning rate {chosen_by} "
        f"{rates} a method.\n"
        "lora is this package's own branch without cascade, whose steps the tests hold equal to the package peft's.\n"
        "lorasc and cascade are evaluated with their slow weights folded into the model; ± is the deviation over seeds."
    )
