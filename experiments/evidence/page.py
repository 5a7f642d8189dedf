"""docs/evidence.md and its plots, from the lines of results alone."""

from __future__ import annotations

import fnmatch
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from experiments.evidence import runner, trace
from experiments.evidence.methods import METHODS

__all__ = ["Difference", "design_effects", "difference_over_tasks", "holm", "write"]

DOCS = Path(__file__).parents[2] / "docs"
SELECTIONS = ("loss", "accuracy")


@dataclass(frozen=True)
class Difference:
    """A difference of two methods, positive where the first is better, with its 95 % interval and p-value."""

    value: float
    low: float
    high: float
    p: float
    tasks: int
    seeds: int

    def __str__(self) -> str:
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def difference_over_tasks(scores: NDArray[Any], resamples: int) -> Difference:
    """Return the interquartile mean over tasks and seeds of paired differences (2108.13264, as rliable computes it).

    Args:
        scores: differences [seeds, tasks], positive where the first method is better.
        resamples: of seeds, within each task.
    """
    from scipy.stats import trim_mean

    generator = numpy.random.default_rng(0)
    seeds = generator.integers(len(scores), size=(resamples, *scores.shape))
    sampled = numpy.take_along_axis(scores[None], seeds, axis=1).reshape(resamples, -1)
    drawn = trim_mean(sampled, 0.25, axis=1)
    low, high = numpy.percentile(drawn, [2.5, 97.5])
    p = min(1.0, 2 * min(float((drawn <= 0).mean()), float((drawn >= 0).mean())) + 1 / resamples)
    return Difference(
        float(trim_mean(scores, 0.25, axis=None)), float(low), float(high), p, scores.shape[1], scores.shape[0]
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm, 1979)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = largest
    return corrected


class Results:
    """Lookups in the lines of one version of the protocol."""

    def __init__(self, protocol: dict[str, Any], lines: runner.Lines) -> None:
        self.protocol, self.lines = protocol, lines

    def phase(self, name: str) -> dict[str, Any]:
        """Return a phase of the protocol."""
        return next(phase for phase in self.protocol["phases"] if phase["name"] == name)

    def result(
        self, phase: str, task: str, size: int, budget: str, method: str, rate: float, seed: int
    ) -> dict[str, Any] | None:
        """Return the result of a run that was made."""
        cell = runner.Cell(self.protocol["version"], phase, task, size, budget, method, rate, seed)
        entry = self.lines.found.get(cell)
        return entry["result"] if entry is not None else None

    def rate(self, task: str, size: int, budget: str, method: str, by: str) -> float | None:
        """Return the rate that the grid chose."""
        return runner.best_rate(self.protocol, self.lines, task, size, budget, method, by)

    def finalist(self, task: str, size: int, budget: str, method: str, by: str, seed: int) -> dict[str, Any] | None:
        """Return a finalist's run at the chosen rate."""
        rate = self.rate(task, size, budget, method, by)
        return None if rate is None else self.result("finalists", task, size, budget, method, rate, seed)

    def paired(self, claim: dict[str, Any], budget: str, by: str) -> NDArray[Any] | None:
        """Return differences [seeds, tasks] on the tasks all of whose seeds are there; None without any."""
        if claim["metric"] == "sensitivity":
            return self._sensitivity(claim, budget)
        phase, columns = self.phase("finalists"), []
        for task in phase["tasks"]:
            column = []
            for seed in phase["seeds"]:
                pair = [
                    self.finalist(task, phase["sizes"][0], budget, method, by, seed)
                    for method in (claim["method"], claim["against"])
                ]
                values = [score(each, claim["metric"], claim["part"]) for each in pair if each is not None]
                if len(values) == 2 and None not in values:
                    column.append(values[0] - values[1])
            if len(column) == len(phase["seeds"]):
                columns.append(column)
        return numpy.array(columns).T if columns else None

    def complete(self, claim: dict[str, Any], budget: str, by: str) -> bool:
        """Whether all runs that decide on a claim are there; those of the grid are, where a finalist has a rate."""
        phase = self.phase("finalists")
        return all(
            self.finalist(task, phase["sizes"][0], budget, claim[who], by, seed) is not None
            for task in phase["tasks"]
            for seed in phase["seeds"]
            for who in ("method", "against")
        )

    def _sensitivity(self, claim: dict[str, Any], budget: str) -> NDArray[Any] | None:
        phase, columns = self.phase("grid"), []
        for task in phase["tasks"]:
            column = []
            for seed in phase["seeds"]:
                flat = [
                    self._flatness(task, phase["sizes"][0], budget, claim[who], seed) for who in ("method", "against")
                ]
                if None not in flat:
                    column.append(100 * (flat[0] - flat[1]))  # type: ignore[operator]
            if len(column) == len(phase["seeds"]):
                columns.append(column)
        return numpy.array(columns).T if columns else None

    def _flatness(self, task: str, size: int, budget: str, method: str, seed: int) -> float | None:
        """Return the share of the grid of rates within one point of its best test accuracy."""
        values = []
        for rate in self.protocol["rates"]["branches"]:
            found = self.result("grid", task, size, budget, method, rate, seed)
            if found is None:
                return None
            values.append(0.0 if found["diverged"] else found["test"]["accuracy"])
        return sum(value >= max(values) - 0.01 for value in values) / len(values)


def score(result: dict[str, Any], metric: str, part: str) -> float | None:
    """Return a figure in points, larger is better; None where a task has no shifts. A diverged run has accuracy 0."""
    if result["diverged"]:
        return 0.0 if metric == "accuracy" else None
    if part == "shifts" and not result["shifts"]:
        return None
    values = result["shifts"].values() if part == "shifts" else [result[part]]
    mean = statistics.fmean(value[metric] for value in values)
    return 100 * mean if metric == "accuracy" else -mean


def design_effects(results: Results) -> list[tuple[str, str, str, Difference]]:
    """Return the main effects of restart, cycles, average and noise: (part, budget, test or shifts, effect)."""
    phase = results.phase("design")
    found = []
    parts = ("restart", "cycles", "average", "noise")
    for part in parts:
        for budget in phase["budgets"]:
            for measured in ("test", "shifts"):
                columns = []
                for task in phase["tasks"]:
                    rate = results.rate(task, phase["sizes"][0], budget, "lora", "loss")
                    if rate is None:
                        continue
                    column = []
                    for seed in phase["seeds"]:
                        cell = (task, phase["sizes"][0], budget, rate, seed)
                        differences = _contrast(results, part, parts, cell, measured)
                        if differences is not None:
                            column.append(differences)
                    if len(column) == len(phase["seeds"]):
                        columns.append(column)
                if columns:
                    effect = difference_over_tasks(numpy.array(columns).T, results.protocol["statistics"]["resamples"])
                    found.append((part, budget, measured, effect))
    return found


def _contrast(
    results: Results, part: str, parts: tuple[str, ...], cell: tuple[str, int, str, float, int], measured: str
) -> float | None:
    """Return the mean difference that a part makes, over the eight settings of the other parts."""
    differences = []
    for name in METHODS:
        on = set(name.split("+")[1:])
        if not name.startswith("design") or part not in on:
            continue
        without = "+".join(["design", *(other for other in parts if other in on and other != part)])
        task, size, budget, rate, seed = cell
        pair = [results.result("design", task, size, budget, each, rate, seed) for each in (name, without)]
        values = [score(each, "accuracy", measured) for each in pair if each is not None]
        if len(values) != 2 or None in values:
            return None
        differences.append(values[0] - values[1])  # type: ignore[operator]
    return statistics.fmean(differences) if differences else None


# ---- the page ------------------------------------------------------------------------------------------------------


def write(protocol: dict[str, Any], lines: runner.Lines, folder: Path = DOCS) -> None:
    """Write evidence.md, and a plot where its runs are there."""
    results = Results(protocol, lines)
    cells = list(runner.cells_of(protocol, lines))
    done = sum(cell in lines.found for cell in cells)
    made = sorted({entry["code"] for cell, entry in lines.found.items() if cell.version == protocol["version"]})
    text = [
        "# Evidence",
        "",
        "What the method does, by [the protocol](../experiments/evidence/protocol.toml), which was committed",
        "before the runs. `make evidence` makes the runs that are missing and this page;",
        "`make evidence-check` makes one run again and compares it. Everything below is computed from",
        "`experiments/evidence/results.jsonl`.",
        "",
        f"Protocol version {protocol['version']}; {done:,} of {len(cells):,} runs that are known so far are made"
        + (f", with code {', '.join(made)}." if made else "."),
        "Runs at chosen rates become known when their grid is complete; a comparison is shown once all its seeds are",
        "there.",
        "",
        *_in_short(results),
        *_claims(results),
        *_grid(results),
        *_tasks(results),
        *_design(results),
        *_restarts(results),
        *_trace(folder),
        *_map(results),
        *_ranks(results),
        *_others(results),
        *_adapters(results),
        *_forgetting(results),
        *_rates(results, folder),
        *_sizes(results),
        *_deltas(results),
    ]
    (folder / "evidence.md").write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")


def _section(title: str, about: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    body = [f"| {' | '.join(row)} |" for row in rows] if rows else []
    table = [f"| {' | '.join(header)} |", f"|{'|'.join(['---'] * len(header))}|", *body] if rows else ["No runs yet."]
    return [f"## {title}", "", about, "", *table, ""]


@dataclass(frozen=True)
class _Claim:
    """A claim of the protocol in one budget, with the rate chosen by one measure; p and verdict are by the loss."""

    claim: dict[str, Any]
    budget: str
    by: str
    scores: NDArray[Any]
    difference: Difference
    complete: bool
    p: float | None = None

    @property
    def verdict(self) -> str:
        if self.p is None:
            return ""
        if not self.complete:
            return f"{self.difference.tasks} tasks so far"
        return "undecided" if self.p >= 0.05 else "supported" if self.difference.value > 0 else "refuted"

    @property
    def tasks(self) -> tuple[float, float]:
        """The mean differences of the worst and of the best task."""
        means = self.scores.mean(axis=0)
        return float(means.min()), float(means.max())


def _decided(results: Results) -> list[_Claim]:
    """Return the claims whose runs are there."""
    entries = []
    for claim in results.protocol["claims"]:
        for budget in claim["budgets"]:
            for by in SELECTIONS:
                scores = results.paired(claim, budget, by)
                if scores is not None:
                    difference = difference_over_tasks(scores, results.protocol["statistics"]["resamples"])
                    complete = claim["metric"] == "sensitivity" or results.complete(claim, budget, by)
                    entries.append(_Claim(claim, budget, by, scores, difference, complete))
    corrected = iter(holm([entry.difference.p for entry in entries if entry.by == "loss"]))
    return [replace(entry, p=next(corrected)) if entry.by == "loss" else entry for entry in entries]


def _in_short(results: Results) -> list[str]:
    """Return a line for each claim; the demo prints them."""
    lines = []
    for entry in _decided(results):
        if entry.by == "loss":
            worst, best = entry.tasks
            about = f"{entry.claim['name']} ({entry.claim['method']} - {entry.claim['against']}, {entry.budget})"
            lines.append(f"- {about}: {entry.difference}, by task {worst:+.2f} to {best:+.2f}: {entry.verdict}")
    return ["## In short", "", *(lines or ["No runs yet."]), ""]


def _claims(results: Results) -> list[str]:
    rows = []
    for entry in _decided(results):
        rows.append(
            [
                entry.claim["name"],
                f"{entry.claim['method']} - {entry.claim['against']}",
                entry.budget,
                entry.by,
                str(entry.difference),
                *(f"{value:+.2f}" for value in entry.tasks),
                "" if entry.p is None else f"{entry.p:.3f}",
                str(entry.difference.tasks),
                entry.verdict,
            ]
        )
    about = (
        "Interquartile mean over tasks of paired differences, in points of accuracy (or of loss, with the sign turned "
        "so that more is better), with 95 % bootstrap intervals over seeds; worst and best are means of one task. p is "
        "corrected by Holm; the verdict is the protocol's."
    )
    header = ["claim", "methods", "budget", "rate by", "difference", "worst", "best", "p", "tasks", "verdict"]
    return _section("Claims", about, header, rows)


def _grid(results: Results) -> list[str]:
    """Return differences to LoRA on the seeds of the grid, each method at its own best rate."""
    phase, rows = results.phase("grid"), []
    for budget in phase["budgets"]:
        best = {
            (task, method): _grid_best(results, phase, task, phase["sizes"][0], budget, method)
            for task in phase["tasks"]
            for method in phase["methods"]
        }
        for method in phase["methods"]:
            columns: dict[tuple[str, str], list[float]] = {}
            for task in phase["tasks"]:
                ours, theirs = best[task, method], best[task, "lora"]
                if ours is None or theirs is None:
                    continue
                for metric, part in (("accuracy", "test"), ("loss", "test"), ("accuracy", "shifts")):
                    pairs = [
                        (score(our, metric, part), score(their, metric, part))
                        for our, their in zip(ours, theirs, strict=True)
                    ]
                    values = [our - their for our, their in pairs if our is not None and their is not None]
                    if values:
                        columns.setdefault((metric, part), []).append(statistics.fmean(values))
            if method != "lora" and columns:
                test, loss, shifts = columns["accuracy", "test"], columns["loss", "test"], columns["accuracy", "shifts"]
                rows.append(
                    [
                        budget,
                        method,
                        *(f"{value:+.2f}" for value in (statistics.fmean(test), min(test), max(test))),
                        f"{statistics.fmean(loss):+.3f}",
                        f"{statistics.fmean(shifts):+.2f}",
                    ]
                )
    about = (
        "Each method at its rate of the lowest validation loss, less LoRA at its own: means over "
        f"{len(phase['seeds'])} seeds and the tasks, in points of accuracy, and of loss with the sign turned. "
        "They are of the runs that chose the rates; the claims are decided on other seeds."
    )
    return _section("Grid", about, ["budget", "method", "test", "worst task", "best task", "test loss", "shifts"], rows)


def _mean(values: Sequence[float | None]) -> str:
    present = [value for value in values if value is not None]
    if not present:
        return "-"
    spread = f" ± {statistics.stdev(present):.1f}" if len(present) > 1 else ""
    return f"{statistics.fmean(present):.1f}{spread}"


def _tasks(results: Results) -> list[str]:
    phase, rows = results.phase("finalists"), []
    for task in phase["tasks"]:
        for budget in phase["budgets"]:
            for method in phase["methods"]:
                runs = [
                    results.finalist(task, phase["sizes"][0], budget, method, "loss", seed) for seed in phase["seeds"]
                ]
                found = [run for run in runs if run is not None]
                if len(found) < len(runs):
                    continue
                losses = [run["test"]["loss"] for run in found if not run["diverged"]]
                rows.append(
                    [
                        task,
                        budget,
                        method,
                        _rate(results, task, budget, method),
                        _mean([score(run, "accuracy", "test") for run in found]),
                        f"{statistics.fmean(losses):.3f}" if losses else "diverged",
                        _mean([score(run, "accuracy", "shifts") for run in found]),
                    ]
                )
    about = (
        "Finalists at the rate of the lowest validation loss: mean and standard deviation over seeds, accuracy in %."
    )
    return _section("Tasks", about, ["task", "budget", "method", "rate", "test", "test loss", "shifts"], rows)


def _design(results: Results) -> list[str]:
    rows = [[part, budget, measured, str(effect)] for part, budget, measured, effect in design_effects(results)]
    about = "What each part does on average over all settings of the others, in points of accuracy, at LoRA's rate."
    return _section("Parts", about, ["part", "budget", "on", "effect"], rows)


def _grid_best(
    results: Results, phase: dict[str, Any], task: str, size: int, budget: str, method: str
) -> list[dict[str, Any]] | None:
    """Return the runs of all seeds at the rate of the lowest mean validation loss; None until the grid is complete."""
    rate = runner.best_rate(results.protocol, results.lines, task, size, budget, method, "loss", phase["name"])
    runs = runner.runs_of(results.protocol, results.lines, phase, task, size, budget, method)
    return None if rate is None or runs is None else runs[rate]


def _of_phase(
    results: Results,
    name: str,
    title: str,
    about: str,
    header: Sequence[str],
    row: Callable[[list[dict[str, Any]]], list[str]],
) -> list[str]:
    phase, rows = results.phase(name), []
    for task in phase["tasks"]:
        for size in phase["sizes"]:
            for budget in phase["budgets"]:
                for method in phase["methods"]:
                    runs = _grid_best(results, phase, task, size, budget, method)
                    if runs is not None:
                        rows.append([task, str(size or "all"), budget, method, *row(runs)])
    return _section(title, about, ["task", "examples", "budget", "method", *header], rows)


def _test_row(runs: list[dict[str, Any]]) -> list[str]:
    loss = statistics.fmean(run["test"]["loss"] for run in runs)
    return [_mean([score(run, "accuracy", "test") for run in runs]), f"{loss:.3f}"]


def _adapter_row(runs: list[dict[str, Any]]) -> list[str]:
    return [f"{runs[0]['trained']:,}", *_test_row(runs)]


def _others(results: Results) -> list[str]:
    about = (
        "Methods beside the finalists, each at the rate of its own grid with the lowest validation loss. "
        "DoRA leaves out embeddings."
    )
    table = _of_phase(results, "others", "Other methods", about, ["test", "test loss"], _test_row)
    return [*table, *_less_lora(results, "others", "Other methods less LoRA", ("others", "grid"))]


def _adapters(results: Results) -> list[str]:
    about = (
        "The other values of `CascadeSpec(adapter=...)` with their default options and LoRA's rank, in one stage, each "
        "at the rate of its own grid with the lowest validation loss. LoKr leaves out embeddings. Two seeds: a "
        "difference of a few points is no finding."
    )
    table = _of_phase(results, "adapters", "Adapter methods", about, ["trained", "test", "test loss"], _adapter_row)
    return [*table, *_less_lora(results, "adapters", "Adapter methods less LoRA", ("adapters",))]


def _less_lora(results: Results, of_tasks: str, title: str, compared: Sequence[str]) -> list[str]:
    """Return the differences from LoRA of the methods in some phases, over the tasks of one phase."""
    phase, grid, rows = results.phase(of_tasks), results.phase("grid"), []
    phases = [results.phase(name) for name in compared]
    for budget in phase["budgets"]:
        for of, method in [(each, name) for each in phases for name in each["methods"] if name != "lora"]:
            pairs: list[tuple[Any, Any]] = []
            for task in phase["tasks"]:
                cell = (task, phase["sizes"][0], budget)
                ours, lora = _grid_best(results, of, *cell, method), _grid_best(results, grid, *cell, "lora")
                pairs += zip(ours, lora, strict=True) if ours and lora else [(None, None)]
            if (None, None) in pairs:
                continue
            accuracy, loss = (
                [score(ours, metric, "test") - score(lora, metric, "test") for ours, lora in pairs]
                for metric in ("accuracy", "loss")
            )
            rows.append([budget, method, f"{statistics.fmean(accuracy):+.1f}", f"{statistics.fmean(loss):+.3f}"])
    about = "Means over these tasks and the seeds of the grid, in points of accuracy, and of loss with the sign turned."
    return _section(title, about, ["budget", "method", "test", "test loss"], rows)


def _restarts(results: Results) -> list[str]:
    about = "The recipe with one part changed, in the short budget, each at the best rate of its own grid."
    return _of_phase(results, "restarts", "What a restart costs", about, ["test", "test loss"], _test_row)


def _map(results: Results) -> list[str]:
    """Return how much of a grid of rate, pace, stages and noise is within one point of the best of its task."""
    phase, rows = results.phase("map"), []
    methods = [name for name in METHODS if any(fnmatch.fnmatchcase(name, pattern) for pattern in phase["methods"])]
    groups = {"LoRA": [name for name in methods if name.startswith("lora")]}
    for pace in ("0.5", "1.0", "mean"):
        groups[f"cascade, pace {pace}"] = [name for name in methods if f"+pace={pace}+" in name]
    for task in phase["tasks"]:
        for budget in phase["budgets"]:
            accuracy = {}
            for method in methods:
                for rate in results.protocol["rates"]["branches"]:
                    runs = [
                        results.result("map", task, phase["sizes"][0], budget, method, rate, seed)
                        for seed in phase["seeds"]
                    ]
                    found = [score(run, "accuracy", "test") for run in runs if run is not None]
                    if len(found) == len(runs):
                        accuracy[method, rate] = statistics.fmean(value for value in found if value is not None)
            if len(accuracy) < len(methods) * len(results.protocol["rates"]["branches"]):
                continue
            best = max(accuracy.values())
            for group, names in groups.items():
                values = [value for (method, _), value in accuracy.items() if method in names]
                near = sum(value >= best - 1 for value in values) / len(values)
                rows.append([task, budget, group, f"{max(values):.1f}", f"{min(values):.1f}", f"{100 * near:.0f} %"])
    about = (
        "Test accuracy in % over a grid of learning rate, number of stages and noise: the best and the worst setting, "
        "and the share of settings within one point of the task's best."
    )
    return _section("Sensitivity", about, ["task", "budget", "methods", "best", "worst", "within 1 point"], rows)


def _ranks(results: Results) -> list[str]:
    about = (
        "A teacher whose change has rank R, 20 % of the training labels drawn at random; test labels are the teacher's."
    )
    return _of_phase(results, "ranks", "Known rank", about, ["test", "test loss"], _test_row)


def _sizes(results: Results) -> list[str]:
    about = "More training examples, at the rate of the lowest validation loss."
    return _of_phase(results, "sizes", "Sizes", about, ["test", "test loss"], _test_row)


def _forgetting(results: Results) -> list[str]:
    def row(runs: list[dict[str, Any]]) -> list[str]:
        means = [
            {key: statistics.fmean(run["kept"][place][key] for run in runs) for key in ("share", "target", "source")}
            for place in range(len(runs[0]["kept"]))
        ]
        return [
            " / ".join(
                f"{100 * point['target']:.1f}, {100 * point['source']:.1f}" for point in (means[0], means[5], means[10])
            )
        ]

    about = (
        "Accuracy on the target, and on the source that the model was trained on before, with none, half and all of "
        "the change in."
    )
    return _of_phase(results, "forgetting", "Forgetting", about, ["target, source at 0 / 0.5 / 1"], row)


def _axes(rows: int, columns: int) -> tuple[Any, Any]:
    """Return a figure and its axes [rows, columns]."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "evidence"  # the same figure has the same bytes
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=(8, 2.2 * rows), squeeze=False)


def _save(figure: Any, axis: str, path: Path) -> None:
    """Write a figure whose x axes have this label."""
    from matplotlib import pyplot

    figure.supxlabel(axis)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _trace(folder: Path, path: Path = trace.PATH) -> list[str]:
    """Draw what `trace` found around restarts, where it was run."""
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    titles = ("training loss, mean over 5 steps", "norm of the change over the weight's", "stable rank of the change")
    figure, axes = _axes(len(found), len(trace.PARTS))
    for (row, task), (column, part) in itertools.product(enumerate(found), enumerate(trace.PARTS)):
        axis, every, width = axes[row][column], *((1, 5) if part == "loss" else (trace.EVERY, 1))
        for method, parts in found[task].items():
            values = parts[part]
            means = [statistics.fmean(values[max(0, at + 1 - width) : at + 1]) for at in range(len(values))]
            axis.plot([(at + 1) * every for at in range(len(values))], means, label=method)
        axis.set_title(f"{task}: {titles[column]}", fontsize=7)
        axis.tick_params(labelsize=6)
    axes[0][0].legend(fontsize=6)
    _save(figure, "optimizer step", folder / "evidence-restarts.svg")
    return [
        "Around the restarts (`python -m experiments.evidence trace`): means over 3 seeds, each method at the rate of",
        "the lowest validation loss of the grid; described after the runs, and in no claim.",
        "",
        "![restarts](evidence-restarts.svg)",
        "",
    ]


def _rates(results: Results, folder: Path) -> list[str]:
    phase, shown = results.phase("grid"), ("lora", "lora-cycles", "paper", "recipe")
    curves: dict[tuple[str, str], dict[str, list[float]]] = {}
    for task in phase["tasks"]:
        for budget in phase["budgets"]:
            for method in shown:
                values = []
                for rate in results.protocol["rates"]["branches"]:
                    runs = [
                        results.result("grid", task, phase["sizes"][0], budget, method, rate, seed)
                        for seed in phase["seeds"]
                    ]
                    found = [score(run, "accuracy", "test") for run in runs if run is not None]
                    values.append(statistics.fmean(found) if len(found) == len(runs) else float("nan"))  # type: ignore[type-var]
                if not any(value != value for value in values):
                    curves.setdefault((task, budget), {})[method] = values
    if not curves:
        return ["## Rates", "", "No runs yet.", ""]
    tasks = sorted({task for task, _ in curves})
    budgets = list(phase["budgets"])
    figure, axes = _axes(len(tasks), len(budgets))
    for (task, budget), methods in curves.items():
        axis = axes[tasks.index(task)][budgets.index(budget)]
        for method, values in methods.items():
            axis.plot(results.protocol["rates"]["branches"], values, marker="o", label=method)
        axis.set_xscale("log")
        axis.set_title(f"{task}, {budget}", fontsize=9)
    axes[0][0].legend(fontsize=7)
    figure.supylabel("test accuracy in %")
    _save(figure, "learning rate", folder / "evidence-rates.svg")
    return [
        "## Rates",
        "",
        "Test accuracy by learning rate, mean over the seeds of the grid.",
        "",
        "![rates](evidence-rates.svg)",
        "",
        "The rates of the lowest validation loss, which the finalists and the demo use:",
        "",
        f"| task | budget | {' | '.join(shown)} |",
        f"|---|---|{'---|' * len(shown)}",
        *(
            f"| {task} | {budget} | {' | '.join(_rate(results, task, budget, method) for method in shown)} |"
            for task, budget in curves
        ),
        "",
    ]


def _rate(results: Results, task: str, budget: str, method: str) -> str:
    """Return the rate of the lowest validation loss, with a mark where it is the first or the last of its grid."""
    phase = results.phase("grid")
    rate = results.rate(task, phase["sizes"][0], budget, method, "loss")
    if rate is None:
        return "-"
    grid = runner.grid_of(results.protocol, results.lines, phase, task, phase["sizes"][0], budget, method)
    return f"{rate:g}{' (edge)' if rate in (grid[0], grid[-1]) else ''}"


def _deltas(results: Results) -> list[str]:
    phase, rows = results.phase("finalists"), []
    for budget in phase["budgets"]:
        for method in phase["methods"]:
            found = [
                run["delta"]
                for task in phase["tasks"]
                for seed in phase["seeds"]
                if (run := results.finalist(task, phase["sizes"][0], budget, method, "loss", seed)) is not None
                and not run["diverged"]
            ]
            if found:
                norm, rank = (statistics.fmean(delta[key] for delta in found) for key in ("norm", "rank"))
                rows.append([budget, method, f"{norm:.3f}", f"{rank:.2f}", str(len(found))])
    about = "Mean over weights of the change's norm over the weight's, and of its stable rank."
    return _section("Size of the change", about, ["budget", "method", "norm", "stable rank", "runs"], rows)
