"""docs/evidence.md and its plots, from the lines of results alone."""

from __future__ import annotations

import fnmatch
import itertools
import json
import math
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
TABLES = Path(__file__).with_name("tables.md")
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
    for position, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - position) * p_values[index]))
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

    def methods(self, phase: dict[str, Any]) -> list[str]:
        """Return the methods of a phase that are known."""
        return runner.methods_of(self.protocol, self.lines, phase)

    def at_best(
        self, phase: dict[str, Any], task: str, size: int, budget: str, method: str, by: str, seed: int
    ) -> dict[str, Any] | None:
        """Return a run of a phase at the rate that its grid chose."""
        if phase["rates"] == "best over tasks":
            rate = runner.shared_rate(self.protocol, self.lines, budget, method)
        else:
            rate = self.rate(task, size, budget, method, by)
        return None if rate is None else self.result(phase["name"], task, size, budget, method, rate, seed)

    def seeds(
        self, phase: dict[str, Any], task: str, size: int, budget: str, method: str, by: str = "loss"
    ) -> list[dict[str, Any]] | None:
        """Return the runs of all seeds of a phase, at the rate that its grid has selected. None if a run is missing."""
        runs = [self.at_best(phase, task, size, budget, method, by, seed) for seed in phase["seeds"]]
        finished = [run for run in runs if run is not None]
        return finished if len(finished) == len(runs) else None

    def differences(
        self,
        phase: dict[str, Any],
        cells: Sequence[tuple[str, int, str]],
        methods: tuple[str, str],
        metric: str,
        part: str,
        by: str = "loss",
    ) -> NDArray[Any] | None:
        """Return the differences [seeds, cells] of two methods. Cells with missing seeds are left out. None if all are.

        Args:
            phase: the phase of the protocol.
            cells: tasks, sizes and budgets.
            methods: the method and its reference.
            metric, part: see `score`.
            by: the metric that has selected the rate.
        """
        columns = []
        for cell in cells:
            runs, reference = (self.seeds(phase, *cell, method, by) for method in methods)
            pairs = [
                [score(run, metric, part) for run in pair] for pair in zip(runs or (), reference or (), strict=False)
            ]
            if runs and reference and not any(None in pair for pair in pairs):
                columns.append([value - base for value, base in pairs])  # type: ignore[operator]
        return numpy.array(columns).T if columns else None

    def method(self, claim: dict[str, Any]) -> str:
        """Return the method of a claim: its name, or the best method in the list with this number in its phase."""
        if isinstance(claim["method"], str):
            return claim["method"]
        names = self.phase(claim["phase"])["best_of"][claim["method"]]
        return runner.best_method(self.protocol, self.lines, names) or f"best of {len(names)}"

    def paired(self, claim: dict[str, Any], budget: str, by: str) -> NDArray[Any] | None:
        """Return the differences [seeds, cells] that decide on a claim."""
        if claim["metric"] == "sensitivity":
            return self._sensitivity(claim, budget)
        phase, methods = self.phase(claim["phase"]), (self.method(claim), claim["against"])
        return self.differences(phase, _cells(claim, phase, budget), methods, claim["metric"], claim["part"], by)

    def complete(self, claim: dict[str, Any], budget: str, by: str) -> bool:
        """Return whether all runs that decide a claim exist. If a finalist has a rate, its grid is complete."""
        phase = self.phase(claim["phase"])
        return all(
            self.seeds(phase, *cell, method, by) is not None
            for cell in _cells(claim, phase, budget)
            for method in (self.method(claim), claim["against"])
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
        """Return the fraction of the rates whose test accuracy is within one point of the best rate's."""
        values = []
        for rate in self.protocol["rates"]["branches"]:
            run = self.result("grid", task, size, budget, method, rate, seed)
            if run is None:
                return None
            values.append(0.0 if run["diverged"] else run["test"]["accuracy"])
        return sum(value >= max(values) - 0.01 for value in values) / len(values)


def _cells(about: dict[str, Any], phase: dict[str, Any], budget: str) -> list[tuple[str, int, str]]:
    """Return the cells of a phase in a budget: of the tasks of a claim or a recommendation, if it names any."""
    return [(task, size, budget) for task in about.get("tasks", phase["tasks"]) for size in phase["sizes"]]


def score(result: dict[str, Any], metric: str, part: str) -> float | None:
    """Return a figure in points, larger is better; None where a task has no shifts. A diverged run has accuracy 0."""
    if result["diverged"]:
        return 0.0 if metric == "accuracy" else None
    if part == "general":
        return -result["general"]
    if part == "shifts" and not result["shifts"]:
        return None
    values = result["shifts"].values() if part == "shifts" else [result[part]]
    mean = statistics.fmean(value[metric] for value in values)
    return 100 * mean if metric == "accuracy" else -mean


def design_effects(results: Results) -> list[tuple[str, str, str, Difference]]:
    """Return the main effects of restart, cycles, average and noise: (part, budget, test or shifts, effect)."""
    phase = results.phase("design")
    effects = []
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
                    effects.append((part, budget, measured, effect))
    return effects


def _contrast(
    results: Results, part: str, parts: tuple[str, ...], cell: tuple[str, int, str, float, int], measured: str
) -> float | None:
    """Return the mean difference that a part makes, over the eight settings of the other parts."""
    differences = []
    for name in METHODS:
        on = set(name.split("+")[1:])
        if not name.startswith("design") or part not in on:
            continue
        without = "+".join(["design", *(item for item in parts if item in on and item != part)])
        task, size, budget, rate, seed = cell
        pair = [results.result("design", task, size, budget, method, rate, seed) for method in (name, without)]
        values = [score(run, "accuracy", measured) for run in pair if run is not None]
        if len(values) != 2 or None in values:
            return None
        differences.append(values[0] - values[1])  # type: ignore[operator]
    return statistics.fmean(differences) if differences else None


# ---- the page ------------------------------------------------------------------------------------------------------


def write(protocol: dict[str, Any], lines: runner.Lines, folder: Path = DOCS) -> None:
    """Write evidence.md, its detailed tables, and the plots whose runs exist."""
    at_home = folder == DOCS
    tables = TABLES if at_home else folder / TABLES.name
    link = "../experiments/evidence/tables.md" if at_home else tables.name
    results = Results(protocol, lines)
    cells = list(runner.cells_of(protocol, lines))
    done = sum(cell in lines.found for cell in cells)
    codes = sorted({entry["code"] for cell, entry in lines.found.items() if cell.version == protocol["version"]})
    text = [
        "# Evidence",
        "",
        "What the method does, by [the protocol](../experiments/evidence/protocol.toml), which was committed",
        "before the runs. `make evidence` makes the runs that are missing and this page;",
        "`make evidence-check` makes one run again and compares it. Everything below is computed from",
        "`experiments/evidence/results.jsonl`.",
        "",
        f"Protocol version {protocol['version']}; {done:,} of {len(cells):,} runs are made"
        + (f", with {len(codes)} versions of the code, which each line names." if codes else "."),
        *(["A comparison is shown once all its seeds are there."] if done < len(cells) else []),
        "",
        *_recommendations(results),
        *_in_short(results),
        *_summary(results, folder),
        *_language_finalists(results),
        *_in_stages(results),
        *_rates(results, folder),
        f"The other tables are in [{tables.name}]({link}).",
    ]
    (folder / "evidence.md").write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")
    more = [
        "# Tables of the evidence",
        "",
        "What stands behind docs/evidence.md, made by the same command from the same runs.",
        "",
        *_claims(results),
        *_design(results),
        *_language(results),
        *_language_tasks(results),
        *_grid(results),
        *_best_rates(results),
        *_tasks(results),
        *_restarts(results),
        *_trace(folder),
        *_map(results),
        *_ranks(results),
        *_others(results),
        *_less_lora(results, "adapters", "Adapter methods less LoRA", ("adapters",), _ABOUT_ADAPTERS),
        *_adapters(results),
        *_forgetting(results),
        *_sizes(results),
        *_deltas(results),
    ]
    tables.write_text("\n".join(more).rstrip() + "\n", encoding="utf-8")


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
            for by in SELECTIONS[: 1 if claim["phase"].startswith("lm-") else None]:
                scores = results.paired(claim, budget, by)
                if scores is not None:
                    difference = difference_over_tasks(scores, results.protocol["statistics"]["resamples"])
                    complete = claim["metric"] == "sensitivity" or results.complete(claim, budget, by)
                    entries.append(_Claim(claim, budget, by, scores, difference, complete))
    for phase in {entry.claim["phase"] for entry in entries}:
        indices = [index for index, entry in enumerate(entries) if entry.by == "loss" and entry.claim["phase"] == phase]
        for index, p in zip(indices, holm([entries[index].difference.p for index in indices]), strict=True):
            entries[index] = replace(entries[index], p=p)
    return entries


RECIPES = {
    "lora": "`recipes.lora`",
    "paper": "`recipes.small_data`",
    "lora-cycles": "`recipes.lora_cycles`",
}
"""Methods of `lx.recipes`."""


def _use(method: str) -> str:
    """Return the recipe of a method, or its name."""
    about = METHODS[method]
    if about.spec.get("adapter") and about.spec.keys() <= {"adapter", "restart", "pace"}:
        return f"`recipes.{'small_data' if about.stages else 'lora'}(adapter={about.spec['adapter']!r})`"
    return RECIPES.get(method, f"`{method}`")


def _recommendations(results: Results) -> list[str]:
    """Return what to use by type of task, number of examples and steps."""
    rows, missing = [], False
    for about in results.protocol["recommendations"]:
        phases = [results.phase(name) for name in about["phases"]]
        for phase, size, budget in (
            (item, size, budget) for item in phases for size in item["sizes"] for budget in item["budgets"]
        ):
            cells = [(task, size, budget) for task in about["tasks"]]
            row = _recommended(results, phase, cells)
            missing |= row is None
            if row is not None:
                steps = str(results.protocol["budgets"][budget])
                rows.append([about["type"], str(size or "all"), steps, *row])
    text = (
        "The finalist with the best validation accuracy is compared with LoRA on the test examples. Both have as many "
        "steps, and their rates of the lowest validation loss. If the 95 % interval of its gain is not above 0, "
        "use LoRA. Gains are in points of test accuracy. Two studies of language models "
        "found that LoRA at a well chosen rate is within 1 to 2 % of its variants "
        "([2602.04998](https://arxiv.org/abs/2602.04998), [2601.22708](https://arxiv.org/abs/2601.22708))."
    )
    if missing:
        text += " Other rows have no runs yet."
    names = [name for name in METHODS if any(f"`{name}`" in row[4] for row in rows) and name not in RECIPES]
    legend = [f"- `{name}`: {METHODS[name].about}" for name in names]
    table = _section("Which should I use?", text, ["task", "examples", "steps", "use", "best", "its gain"], rows)
    return [*table, *legend, *([""] if legend else [])]


def _recommended(results: Results, phase: dict[str, Any], cells: Sequence[tuple[str, int, str]]) -> list[str] | None:
    """Return what to use, the best method by validation accuracy, and its gain on the test examples."""
    accuracy = {}
    methods = results.methods(phase)
    for method in methods:
        runs = [results.seeds(phase, *cell, method) for cell in cells]
        if None in runs:
            return None
        accuracy[method] = statistics.fmean(
            score(run, "accuracy", "validation") or 0.0 for seeds in runs for run in seeds or ()
        )
    best = max(methods, key=lambda method: accuracy[method], default="lora")
    scores = results.differences(phase, cells, (best, "lora"), "accuracy", "test")
    if scores is None:
        return None
    gain = difference_over_tasks(scores, results.protocol["statistics"]["resamples"])
    use = best if gain.low > 0 else "lora"
    return [_use(use), f"`{best}`", "" if best == "lora" else str(gain)]


def _general_before(results: Results) -> float | None:
    """Return the loss on general text before training."""
    phase = results.phase("lm-base")
    for task, size, budget, seed in itertools.product(*(phase[key] for key in ("tasks", "sizes", "budgets", "seeds"))):
        if run := results.result(phase["name"], task, size, budget, "base", 0.0, seed):
            return float(run["general"])
    return None


def _language_finalists(results: Results) -> list[str]:
    """Return the finalists on a language model, by number of examples and steps."""
    before, rows = _general_before(results), []
    for name in ("lm-finalists", "lm-finalists-long", "lm-finalists-all"):
        phase = results.phase(name)
        for size, budget, method in itertools.product(phase["sizes"], phase["budgets"], results.methods(phase)):
            cells = [(task, size, budget) for task in phase["tasks"]]
            by_task = [results.seeds(phase, *cell, method) for cell in cells]
            differences = results.differences(phase, cells, (method, "lora"), "accuracy", "test")
            if before is None or differences is None or None in by_task:
                continue
            losses = [statistics.fmean(run["general"] for run in runs or ()) - before for runs in by_task]
            accuracies = [run["test"]["accuracy"] for runs in by_task for run in runs or ()]
            gain = difference_over_tasks(differences, results.protocol["statistics"]["resamples"])
            rows.append(
                [
                    str(size or "all"),
                    str(results.protocol["budgets"][budget]),
                    method,
                    f"{100 * statistics.fmean(accuracies):.1f}",
                    "" if method == "lora" else str(gain),
                    f"{min(losses):+.2f} to {max(losses):+.2f}",
                    str(len(cells)),
                ]
            )
    about = (
        "SmolLM2-135M-Instruct, its last layers trained, 10 seeds: test accuracy (of whole answers), the gain over "
        "LoRA as above, and the change of the loss on general text, by task (more is forgotten). The rate of a method "
        "was chosen on two tasks with one seed, so a part of a difference may come from rates."
    )
    header = ["examples", "steps", "method", "accuracy", "less LoRA", "general loss", "tasks"]
    return _section("Language model", about, header, rows) if rows else []


def _language(results: Results) -> list[str]:
    """Return the methods on a language model: against LoRA, and what they cost."""
    phase, rows, before = results.phase("lm-methods"), list[list[str]](), _general_before(results)
    (size,), (budget,) = phase["sizes"], phase["budgets"]
    for method in results.methods(phase):
        cells = [(task, size, budget) for task in phase["tasks"]]
        runs = [run for cell in cells for run in results.seeds(phase, *cell, method) or () if not run["diverged"]]
        differences = [
            results.differences(phase, cells, (method, "lora"), metric, part)
            for metric, part in (("accuracy", "test"), ("loss", "test"), ("accuracy", "shifts"))
        ]
        if not runs or before is None or differences[0] is None:
            continue
        accuracy = difference_over_tasks(differences[0], results.protocol["statistics"]["resamples"])
        mean = {
            key: statistics.fmean(run[key] for run in runs) for key in ("general", "cpu_s", "memory", "disk", "trained")
        }
        rows.append(
            [
                method,
                str(accuracy),
                *("-" if values is None else f"{values.mean():+.2f}" for values in differences[1:]),
                f"{mean['general'] - before:+.3f}",
                f"{mean['memory'] / 2**20:.0f}",
                f"{mean['cpu_s']:.0f}",
                f"{mean['disk'] / 2**10:,.0f}",
                f"{mean['trained']:,.0f}",
                str(accuracy.tasks),
            ]
        )
    about = (
        "SmolLM2-135M-Instruct, its last layers trained. Less LoRA: test accuracy, test loss with the sign turned, "
        "accuracy under shift. Then the change of the loss on general text (more is forgotten), the peak memory of a "
        f"step in MiB, seconds of training, KiB on disk, and trained parameters. {len(phase['seeds'])} seeds, "
        f"{size} examples, {results.protocol['budgets'][budget]} steps."
    )
    header = ["method", "test", "test loss", "shift", "general loss", "memory", "seconds", "disk", "trained", "tasks"]
    return _section("Language model: all methods", about, header, rows) if rows else []


def _language_tasks(results: Results) -> list[str]:
    """Return test accuracy and loss of the finalists on a language model, by task."""
    sections = [
        _pivot(results, "lm-finalists", "Language tasks", "Finalists, test accuracy and loss.", results.seeds),
        _pivot(results, "lm-finalists-long", "Language tasks, long", "As above.", results.seeds),
        _pivot(results, "lm-finalists-all", "Language tasks, all examples", "As above.", results.seeds),
    ]
    return [line for section in sections if "No runs yet." not in section for line in section]


def _in_stages(results: Results) -> list[str]:
    """Return each adapter method on a language model in one stage and in three, at their best rates in the grid."""
    phase, rows = results.phase("lm-grid"), []
    for method in results.methods(phase):
        staged = "paper" if method == "lora" else f"{method}-stages"
        cells = [_at_shared_rate(results, phase, name) for name in (method, staged) if name in METHODS]
        if len(cells) == 2 and None not in cells:
            rows.append([method, *(value for cell in cells for value in cell or ())])
    about = (
        f"SmolLM2-135M-Instruct, means over {', '.join(phase['tasks'])}: validation loss (geometric mean) and test "
        "accuracy in one stage, and in three stages by the paper's rule, each at its best rate of the grid. One seed, "
        "so differences of a few points are no finding."
    )
    header = ["method", "one stage: rate", "loss", "accuracy", "three stages: rate", "loss", "accuracy"]
    section = _section("Language model: one stage and three", about, header, rows)
    return section if rows else []


def _at_shared_rate(results: Results, phase: dict[str, Any], method: str) -> list[str] | None:
    """Return rate, validation loss and test accuracy in a grid over tasks, or None if runs are missing."""
    (budget,), (size,), (seed,) = phase["budgets"], phase["sizes"], phase["seeds"]
    rate = runner.shared_rate(results.protocol, results.lines, budget, method)
    if rate is None:
        return None
    runs = [results.result(phase["name"], task, size, budget, method, rate, seed) for task in phase["tasks"]]
    losses = [math.log(run["validation"]["loss"]) for run in runs if run is not None]
    accuracies = [run["test"]["accuracy"] for run in runs if run is not None]
    return [f"{rate:g}", f"{math.exp(statistics.fmean(losses)):.3f}", f"{100 * statistics.fmean(accuracies):.0f}"]


def _in_short(results: Results) -> list[str]:
    """Return a row for each claim, with its budgets as columns."""
    steps, rows = results.protocol["budgets"], dict[tuple[str, str], list[str]]()
    columns = list(dict.fromkeys(budget.removeprefix("lm-") for budget in steps))
    for entry in _decided(results):
        if entry.by == "loss":
            methods = f"{results.method(entry.claim)} - {entry.claim['against']}"
            row = rows.setdefault((entry.claim["name"], methods), [""] * len(columns))
            row[columns.index(entry.budget.removeprefix("lm-"))] = f"{entry.difference}: {entry.verdict}"
    about = (
        "The claims of the protocol: interquartile mean over tasks of paired differences, in points of accuracy, or of "
        "loss with the sign turned so that more is better, with 95 % bootstrap intervals over seeds. Supported or "
        "refuted: p is below 0.05 after Holm's correction. "
        f"Steps: {', '.join(f'{budget} {count}' for budget, count in steps.items())} (lm: the language model)."
    )
    return _section("In short", about, ["claim", "methods", *columns], [[*key, *row] for key, row in rows.items()])


def _claims(results: Results) -> list[str]:
    decided = _decided(results)
    by_accuracy = {(entry.claim["name"], entry.budget): entry for entry in decided if entry.by == "accuracy"}
    rows = []
    for entry in decided:
        if entry.by == "loss":
            at_accuracy = by_accuracy.get((entry.claim["name"], entry.budget))
            rows.append(
                [
                    f"{results.method(entry.claim)} - {entry.claim['against']}",
                    f"{entry.claim['metric']}, {entry.claim['part']}",
                    entry.budget,
                    str(entry.difference),
                    "{:+.2f} to {:+.2f}".format(*entry.tasks),
                    "" if at_accuracy is None else str(at_accuracy.difference),
                    "" if entry.p is None else f"{entry.p:.3f}",
                    str(entry.difference.tasks),
                    entry.verdict,
                ]
            )
    about = (
        "Interquartile mean over tasks (and sizes) of paired differences, in points of accuracy, or of loss with the "
        "sign turned so that more is better, with 95 % bootstrap intervals over seeds; the rate of each method is by "
        "validation loss, and beside it by validation accuracy. p is corrected by Holm over the claims of a phase."
    )
    header = ["methods", "of", "budget", "difference", "by task", "rate by accuracy", "p", "cells", "verdict"]
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
    return f"{statistics.fmean(present):.1f}" if present else "-"


def _tasks(results: Results) -> list[str]:
    about = "Finalists at the rate of the lowest validation loss: mean test accuracy in % over seeds, and test loss."
    return _pivot(results, "finalists", "Tasks", about, results.seeds)


NAMES = {
    "r8": "topic: R8",
    "newsgroups": "topic: 20 Newsgroups",
    "tweets": "author of a tweet",
    "rotten-tomatoes": "sentiment: Rotten Tomatoes",
    "imdb": "sentiment: IMDB",
    "tales": "next character of a tale",
    "mnist": "digit: MNIST",
    "digits": "digit: scikit-learn's",
    "teacher-4": "teacher of rank 4, noisy labels",
}
"""What the tasks are, in the order of the summary."""


def _summary(results: Results, folder: Path) -> list[str]:
    """Return test accuracy less LoRA's by task, as a table, and draw it."""
    phase = results.phase("finalists")
    shown = {("paper", "short"): "paper's rule, 60 steps", ("paper", "long"): "paper's rule, 300 steps"}
    shown[("recipe", "long")] = "mean over restarts, 300 steps"
    values: dict[str, list[float | None]] = {}
    for task, (method, budget) in itertools.product(NAMES, shown):
        cell = (phase, task, phase["sizes"][0], budget)
        ours, lora = results.seeds(*cell, method), results.seeds(*cell, "lora")
        pairs = zip(ours, lora, strict=True) if ours and lora else ()
        differences = [score(run, "accuracy", "test") - score(base, "accuracy", "test") for run, base in pairs]
        values.setdefault(task, []).append(statistics.fmean(differences) if differences else None)
    if any(value is None for row in values.values() for value in row):
        return []
    figure, axes = _axes(1, 1)
    axis = axes[0][0]
    for column, label in enumerate(shown.values()):
        positions = [row + 0.22 * (column - 1) for row in range(len(values))]
        axis.plot([row[column] for row in values.values()], positions, "o", label=label)
    axis.axvline(0, color="gray", linewidth=0.8)
    axis.set_yticks(range(len(values)), [NAMES[task] for task in values], fontsize=8)
    axis.invert_yaxis()
    axis.legend(fontsize=7)
    figure.set_size_inches(8, 3)
    _save(figure, "test accuracy less that of LoRA in as many steps, in points", folder / "evidence-tasks.svg")
    rows = [[NAMES[task], *(f"{value:+.1f}" for value in row)] for task, row in values.items()]
    about = (
        "Test accuracy less that of LoRA in as many steps, in points (more is better): the last layers of MiniLM and "
        "of EfficientNet-Lite0 and two small models, 500 training examples, 3 stages, 10 seeds, each method at its "
        "rate of the lowest validation loss. *Paper's rule* is `recipes.small_data`, `paper` below; *mean over "
        "restarts* is `recipe` below, with pace='mean' and restart='fast'."
    )
    return [*_section("By task", about, ["", *shown.values()], rows), "![by task](evidence-tasks.svg)", ""]


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


Runs = Callable[[dict[str, Any], str, int, str, str], list[dict[str, Any]] | None]
"""Returns the runs of a phase, task, size, budget and method; None until all are there."""


def _grid_runs(results: Results) -> Runs:
    return lambda *cell: _grid_best(results, *cell)


def _test(runs: list[dict[str, Any]]) -> str:
    loss = statistics.fmean(run["test"]["loss"] if not run["diverged"] else float("nan") for run in runs)
    return f"{_mean([score(run, 'accuracy', 'test') for run in runs])} ({loss:.3f})"


def _pivot(
    results: Results,
    name: str,
    title: str,
    about: str,
    runs_of: Runs,
    cell: Callable[[list[dict[str, Any]]], str] = _test,
) -> list[str]:
    """Return a table of a phase with a row for each task, size and budget, and a column for each method."""
    phase, rows = results.phase(name), []
    methods = results.methods(phase)
    for task, size, budget in itertools.product(phase["tasks"], phase["sizes"], phase["budgets"]):
        runs_by_method = [runs_of(phase, task, size, budget, method) for method in methods]
        if any(runs_by_method):
            rows.append([task, str(size or "all"), budget, *(cell(runs) if runs else "-" for runs in runs_by_method)])
    return _section(title, about, ["task", "examples", "budget", *methods], rows)


def _others(results: Results) -> list[str]:
    about = (
        "Methods beside the finalists, each at the rate of its own grid with the lowest validation loss. "
        "DoRA leaves out embeddings."
    )
    table = _pivot(results, "others", "Other methods", about, _grid_runs(results))
    return [*table, *_less_lora(results, "others", "Other methods less LoRA", ("others", "grid"))]


_ABOUT_ADAPTERS = (
    "The other values of `CascadeSpec(adapter=...)` with their default options and LoRA's rank, in one stage, each at "
    "the rate of its own grid with the lowest validation loss. Two seeds: a difference of a few points is no finding. "
    "LoKr leaves out embeddings. DeLoRA's first step is as large as its option `bound` allows, at every rate; on "
    "digits it stays at chance."
)


def _adapters(results: Results) -> list[str]:
    return _pivot(results, "adapters", "Adapter methods", _ABOUT_ADAPTERS, _grid_runs(results))


def _less_lora(results: Results, of_tasks: str, title: str, compared: Sequence[str], about: str = "") -> list[str]:
    """Return the differences from LoRA of the methods in some phases, over the tasks of one phase."""
    phase, grid, rows = results.phase(of_tasks), results.phase("grid"), []
    phases = [results.phase(name) for name in compared]
    for budget in phase["budgets"]:
        for of, method in [(item, name) for item in phases for name in item["methods"] if name != "lora"]:
            pairs: list[tuple[Any, Any]] = []
            for task in phase["tasks"]:
                cell = (task, phase["sizes"][0], budget)
                ours, lora = _grid_best(results, of, *cell, method), _grid_best(results, grid, *cell, "lora")
                pairs += zip(ours, lora, strict=True) if ours and lora else [(None, None)]
            if not pairs or (None, None) in pairs:
                continue
            accuracy, loss = (
                [score(ours, metric, "test") - score(lora, metric, "test") for ours, lora in pairs]
                for metric in ("accuracy", "loss")
            )
            rows.append([budget, method, f"{statistics.fmean(accuracy):+.1f}", f"{statistics.fmean(loss):+.3f}"])
    means = f"Means over {', '.join(phase['tasks'])} and the seeds of the grid, in points of accuracy, and of loss"
    return _section(
        title, f"{means} with the sign turned. {about}".rstrip(), ["budget", "method", "test", "test loss"], rows
    )


def _restarts(results: Results) -> list[str]:
    about = "The recipe with one part changed, in the short budget, each at the best rate of its own grid."
    return _pivot(results, "restarts", "What a restart costs", about, _grid_runs(results))


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
                    scores = [score(run, "accuracy", "test") for run in runs if run is not None]
                    if len(scores) == len(runs):
                        accuracy[method, rate] = statistics.fmean(value for value in scores if value is not None)
            if len(accuracy) < len(methods) * len(results.protocol["rates"]["branches"]):
                continue
            best = max(accuracy.values())
            for group, names in groups.items():
                values = [value for (method, _), value in accuracy.items() if method in names]
                close = sum(value >= best - 1 for value in values) / len(values)
                rows.append([task, budget, group, f"{max(values):.1f}", f"{min(values):.1f}", f"{100 * close:.0f} %"])
    about = (
        "Test accuracy in % over a grid of learning rate, number of stages and noise: the best and the worst setting, "
        "and the share of settings within one point of the task's best."
    )
    return _section("Sensitivity", about, ["task", "budget", "methods", "best", "worst", "within 1 point"], rows)


def _ranks(results: Results) -> list[str]:
    about = (
        "A teacher whose change has rank R, 20 % of the training labels drawn at random; test labels are the teacher's."
    )
    return _pivot(results, "ranks", "Known rank", about, _grid_runs(results))


def _sizes(results: Results) -> list[str]:
    about = "More training examples, at the rate of the lowest validation loss."
    return _pivot(results, "sizes", "Sizes", about, _grid_runs(results))


def _forgetting(results: Results) -> list[str]:
    def cell(runs: list[dict[str, Any]]) -> str:
        means = [
            [100 * statistics.fmean(run["kept"][index][key] for run in runs) for key in ("target", "source")]
            for index in (0, 5, 10)
        ]
        return " / ".join(f"{target:.1f}, {source:.1f}" for target, source in means)

    about = (
        "Accuracy on the target, and on the source that the model was trained on before, with none / half / all of the "
        "change in."
    )
    return _pivot(results, "forgetting", "Forgetting", about, _grid_runs(results), cell)


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
    """Plot the results of `trace` around restarts, if there are any."""
    if not path.exists():
        return []
    traces = json.loads(path.read_text(encoding="utf-8"))
    titles = ("training loss, mean over 5 steps", "norm of the change over the weight's", "stable rank of the change")
    figure, axes = _axes(len(traces), len(trace.PARTS))
    for (row, task), (column, part) in itertools.product(enumerate(traces), enumerate(trace.PARTS)):
        axis, every, width = axes[row][column], *((1, 5) if part == "loss" else (trace.EVERY, 1))
        for method, parts in traces[task].items():
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
        "![restarts](../../docs/evidence-restarts.svg)",
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
                    scores = [score(run, "accuracy", "test") for run in runs if run is not None]
                    values.append(statistics.fmean(scores) if len(scores) == len(runs) else float("nan"))  # type: ignore[type-var]
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
    ]


def _best_rates(results: Results) -> list[str]:
    phase, methods = results.phase("grid"), ("lora", "lora-cycles", "paper", "recipe")
    rows = [
        [task, budget, *(_rate(results, task, budget, method) for method in methods)]
        for task in phase["tasks"]
        for budget in phase["budgets"]
    ]
    about = "The rates of the lowest validation loss, which the finalists and `make compare` use."
    return _section("Rates", about, ["task", "budget", *methods], rows)


def _rate(results: Results, task: str, budget: str, method: str) -> str:
    """Return the rate with the lowest validation loss, with a mark if it is the first or the last of its grid."""
    phase = results.phase("grid")
    rate = results.rate(task, phase["sizes"][0], budget, method, "loss")
    if rate is None:
        return "-"
    grid = runner.grid_of(results.protocol, results.lines, phase, task, phase["sizes"][0], budget, method)
    return f"{rate:g}{' (edge)' if rate in (grid[0], grid[-1]) else ''}"


def _deltas(results: Results) -> list[str]:
    phase, rows = results.phase("finalists"), []
    for budget in phase["budgets"]:
        for method in results.methods(phase):
            deltas = [
                run["delta"]
                for task in phase["tasks"]
                for run in results.seeds(phase, task, phase["sizes"][0], budget, method) or ()
                if not run["diverged"]
            ]
            if deltas:
                norm, rank = (statistics.fmean(delta[key] for delta in deltas) for key in ("norm", "rank"))
                rows.append([budget, method, f"{norm:.3f}", f"{rank:.2f}", str(len(deltas))])
    about = "Mean over weights of the change's norm over the weight's, and of its stable rank."
    return _section("Size of the change", about, ["budget", "method", "norm", "stable rank", "runs"], rows)
