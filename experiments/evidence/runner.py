"""`python -m experiments.evidence run | trace | check | page | status`: make the runs of the protocol, and the page.

A run that was made is not made again, so that Ctrl-C at any time loses only what is running. Runs are made by two
processes of one thread each.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import processor
from experiments.evidence import data
from experiments.evidence.data import Task
from experiments.evidence.language import LANGUAGE_TASKS
from experiments.evidence.methods import METHODS
from experiments.evidence.train import Training, run
from lorasc_fx.errors import SpecError

__all__ = [
    "TASKS",
    "Cell",
    "Lines",
    "best_method",
    "best_rate",
    "cells_of",
    "grid_of",
    "main",
    "methods_of",
    "phase_of",
    "runs_of",
    "shared_rate",
    "training_of",
]

TASKS = data.TASKS | LANGUAGE_TASKS

HERE = Path(__file__).parent
PROTOCOL, RESULTS = HERE / "protocol.toml", HERE / "results.jsonl"
PROCESSES = 2
TOLERANCE = 1e-4
"""Of losses and other numbers, where a run is made again on another processor."""
NOT_REPEATED = {"cpu_s", "memory"}
"""Measures that another run of the same cell may differ in."""


@dataclass(frozen=True)
class Cell:
    """One run of the protocol: its configuration."""

    version: int
    phase: str
    task: str
    size: int
    budget: str
    method: str
    rate: float
    seed: int

    @property
    def key(self) -> str:
        """The configuration as text."""
        return json.dumps(asdict(self), sort_keys=True)


class Lines:
    """The results, one JSON line a run.

    Args:
        path: of the file; it need not be there.
        protocol: whose runs are wanted; those of the versions that it `counts` are its own.
    """

    def __init__(self, path: Path, protocol: dict[str, Any]) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if text and not text.endswith("\n"):  # a line that a stop cut short
            text = text[: text.rfind("\n") + 1]
            path.write_text(text, encoding="utf-8")
        self.found: dict[Cell, dict[str, Any]] = {}
        for line in text.splitlines():
            entry = json.loads(line)
            cell = Cell(**entry["cell"])
            if cell.version in protocol["counts"]:
                cell = replace(cell, version=protocol["version"])
            self.found[cell] = entry

    def add(self, cell: Cell, result: dict[str, Any]) -> None:
        """Append a result."""
        made = {"code": code_version(), "torch": torch.__version__, "processor": processor()}
        entry = {"cell": asdict(cell), **made, "result": result}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, sort_keys=True) + "\n")
        self.found[cell] = entry


@functools.cache
def code_version() -> str:
    """Return the commit that the runs were made with, with a mark where files differ from it, but for the results."""
    told = functools.partial(subprocess.run, cwd=HERE.parents[1], capture_output=True, text=True, check=True)
    commit = told(["git", "rev-parse", "--short=10", "HEAD"]).stdout.strip()
    changed = told(
        ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", f":!{RESULTS.relative_to(HERE.parents[1])}"]
    )
    return f"{commit}-dirty" if changed.stdout else commit


def cells_of(protocol: dict[str, Any], lines: Lines) -> Iterator[Cell]:
    """Yield the runs of a protocol in their order; those at a best rate once the grid they are chosen from is there.

    Raises:
        SpecError: an unknown task, budget or method.
    """
    for phase in protocol["phases"]:
        candidates = list(itertools.chain(phase["methods"], *phase.get("best_of", [])))
        for kind, names, known in (
            ("method", [p for p in candidates if not fnmatch.filter(METHODS, p)], METHODS),
            ("task", phase["tasks"], TASKS),
            ("budget", phase["budgets"], protocol["budgets"]),
        ):
            for name in names:
                if name not in known:
                    raise SpecError(f"{PROTOCOL.name}, phase {phase['name']!r}: there is no {kind} {name!r}")
        methods = methods_of(protocol, lines, phase)
        for task, size, budget, seed in itertools.product(
            phase["tasks"], phase["sizes"], phase["budgets"], phase["seeds"]
        ):
            for method in methods:
                for rate in _rates(protocol, phase, lines, (task, size, budget, method)):
                    yield Cell(protocol["version"], phase["name"], task, size, budget, method, rate, seed)


def phase_of(protocol: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a phase by name."""
    return next(phase for phase in protocol["phases"] if phase["name"] == name)


def methods_of(protocol: dict[str, Any], lines: Lines, phase: dict[str, Any]) -> list[str]:
    """Return the methods of a phase that are known: those of `methods`, and the best one of each list in `best_of`."""
    best = [best_method(protocol, lines, names) for names in phase.get("best_of", [])]
    patterns = [*phase["methods"], *(name for name in best if name is not None)]
    return [name for name in METHODS if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def best_method(protocol: dict[str, Any], lines: Lines, names: Sequence[str]) -> str | None:
    """Return the method with the lowest validation loss in the first grid over tasks, each at its best rate.

    None until all runs of the grid are there.
    """
    grid = next(each for each in protocol["phases"] if each["rates"] == "grid over tasks")
    losses = {}
    for name in names:
        found = _shared(protocol, lines, grid, grid["budgets"][0], name)
        if found is None:
            return None
        losses[name] = found.loss
    return min(losses, key=lambda name: losses[name])


def _rates(
    protocol: dict[str, Any], phase: dict[str, Any], lines: Lines, cell: tuple[str, int, str, str]
) -> list[float]:
    task, size, budget, method = cell
    if phase["rates"] == "fixed":
        return list(protocol["rates"]["full" if METHODS[method].full else "branches"])
    if phase["rates"] == "grid":
        return grid_of(protocol, lines, phase, *cell)
    if phase["rates"] == "none":
        return [0.0]
    if phase["rates"] == "grid over tasks":
        return _shared_grid(protocol, lines, phase, budget, method)
    if phase["rates"] == "best over tasks":
        rate = shared_rate(protocol, lines, budget, method)
        return [] if rate is None else [rate]
    chosen = phase["rates"].removeprefix("best of ") if phase["rates"].startswith("best of ") else method
    best = [best_rate(protocol, lines, task, size, budget, chosen, by) for by in ("loss", "accuracy")]
    return sorted({rate for rate in best if rate is not None})


def grid_of(
    protocol: dict[str, Any], lines: Lines, phase: dict[str, Any], task: str, size: int, budget: str, method: str
) -> list[float]:
    """Return the rates of a grid that are known so far: those beyond it follow while the largest is a best one."""
    if METHODS[method].full:
        return list(protocol["rates"]["full"])
    rates = list(protocol["rates"]["branches"])
    for rate in protocol["rates"]["beyond"]:
        runs = _by_rate(protocol, lines, phase, rates, task, size, budget, method)
        if runs is None or rates[-1] not in {_best(runs, by) for by in ("loss", "accuracy")}:
            break
        rates.append(rate)
    return rates


def _by_rate(
    protocol: dict[str, Any],
    lines: Lines,
    phase: dict[str, Any],
    rates: Sequence[float],
    task: str,
    size: int,
    budget: str,
    method: str,
) -> dict[float, list[dict[str, Any]]] | None:
    """Return the results of all seeds by rate; None until all are there."""
    found: dict[float, list[dict[str, Any]]] = {}
    for rate, seed in itertools.product(rates, phase["seeds"]):
        entry = lines.found.get(Cell(protocol["version"], phase["name"], task, size, budget, method, rate, seed))
        if entry is None:
            return None
        found.setdefault(rate, []).append(entry["result"])
    return found


def _best(runs: dict[float, list[dict[str, Any]]], by: str) -> float | None:
    """Return the rate of the best mean validation loss or accuracy, the smaller of equals; never one that diverged."""
    means = {
        rate: statistics.fmean(result["validation"][by] for result in results) * (-1 if by == "loss" else 1)
        for rate, results in runs.items()
        if not any(result["diverged"] for result in results)
    }
    return max(means, key=lambda rate: (means[rate], -rate)) if means else None


def runs_of(
    protocol: dict[str, Any], lines: Lines, phase: dict[str, Any], task: str, size: int, budget: str, method: str
) -> dict[float, list[dict[str, Any]]] | None:
    """Return the results of a phase's grid by rate; None until all are there."""
    cell = (task, size, budget, method)
    return _by_rate(protocol, lines, phase, grid_of(protocol, lines, phase, *cell), *cell)


def best_rate(
    protocol: dict[str, Any], lines: Lines, task: str, size: int, budget: str, method: str, by: str, phase: str = "grid"
) -> float | None:
    """Return the rate of the best mean validation loss or accuracy in the grid of a phase; None until all are there."""
    runs = runs_of(protocol, lines, phase_of(protocol, phase), task, size, budget, method)
    return None if runs is None else _best(runs, by)


@dataclass(frozen=True)
class Shared:
    """What a grid over tasks has chosen: the rate, and the mean of the logarithm of its validation losses."""

    rate: float
    loss: float


def shared_rate(protocol: dict[str, Any], lines: Lines, budget: str, method: str) -> float | None:
    """Return the rate that a grid over tasks chose for a budget; None until all its runs are there."""
    for phase in protocol["phases"]:
        if phase["rates"] == "grid over tasks" and budget in phase["budgets"]:
            found = _shared(protocol, lines, phase, budget, method)
            if found is not None:
                return found.rate if found.loss < math.inf else None
    return None


def _shared(protocol: dict[str, Any], lines: Lines, phase: dict[str, Any], budget: str, method: str) -> Shared | None:
    rates = _shared_grid(protocol, lines, phase, budget, method)
    return _best_shared(protocol, lines, phase, rates, budget, method)


def _best_shared(
    protocol: dict[str, Any], lines: Lines, phase: dict[str, Any], rates: Sequence[float], budget: str, method: str
) -> Shared | None:
    """Return the best one of some rates, the smaller of equals; None until all runs are there.

    Of a rate that diverged on a task the loss is infinite.
    """
    runs = [_by_rate(protocol, lines, phase, rates, task, phase["sizes"][0], budget, method) for task in phase["tasks"]]
    found = [each for each in runs if each is not None]
    if len(found) < len(runs):
        return None
    losses = {
        rate: statistics.fmean(
            math.inf if result["diverged"] else math.log(result["validation"]["loss"])
            for by_rate in found
            for result in by_rate[rate]
        )
        for rate in rates
    }
    best = min(rates, key=lambda rate: (losses[rate], rate))
    return Shared(best, losses[best])


def _shared_grid(
    protocol: dict[str, Any], lines: Lines, phase: dict[str, Any], budget: str, method: str
) -> list[float]:
    """Return the rates of a grid over tasks that are known so far: another follows while the best one is at an end."""
    about = protocol["rates"]["language"]
    rates, lower, higher = list(about["start"]), list(about["lower"]), list(about["higher"])
    while (best := _best_shared(protocol, lines, phase, rates, budget, method)) is not None:
        if best.rate == rates[0] and lower:
            rates.insert(0, lower.pop(0))
        elif best.rate == rates[-1] and higher:
            rates.append(higher.pop(0))
        else:
            break
    return rates


@functools.cache
def _task(name: str) -> Task:
    return TASKS[name]()


def _trained_alike(cell: Cell) -> tuple[Any, ...]:
    """Return what two runs agree in that one training serves."""
    training = repr(METHODS[cell.method].training)
    return cell.phase, cell.task, cell.size, cell.budget, cell.rate, cell.seed, training


def _made(cells: Sequence[Cell], protocol: dict[str, Any], mixes: bool) -> list[dict[str, Any]]:
    """Make runs that one training serves; in a process of its own."""
    torch.set_num_threads(1)
    cell = cells[0]
    steps = protocol["budgets"][cell.budget]
    methods = [METHODS[each.method] for each in cells]
    training = training_of(protocol, cell.phase)
    return run(_task(cell.task), methods, training, cell.size, steps, cell.rate, cell.seed, mixes)


def training_of(protocol: dict[str, Any], phase: str) -> Training:
    """Return what every run of a phase has in common."""
    about = protocol["training"] | phase_of(protocol, phase).get("training", {})
    return Training(about["batch_size"], about["warmup"], about["cycles"], about["gradient_clipping"])


def make(protocol: dict[str, Any], lines: Lines, only: Iterable[str] = ()) -> None:
    """Make the runs that are missing; `only` names phases."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # each measurement of memory would print that it begins
    context = multiprocessing.get_context("spawn")
    phases = set(only)
    with ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        running: dict[Future[list[dict[str, Any]]], list[Cell]] = {}
        missing: list[Cell] = []
        while True:
            if not missing:  # all that is known by now
                made = {*lines.found, *itertools.chain(*running.values())}
                known = (cell for cell in cells_of(protocol, lines) if not phases or cell.phase in phases)
                missing = [cell for cell in known if cell not in made]
            while len(running) < PROCESSES and missing:
                group = [cell for cell in missing if _trained_alike(cell) == _trained_alike(missing[0])]
                mixes = group[0].phase == "forgetting"
                running[pool.submit(_made, group, protocol, mixes)] = group
                missing = [cell for cell in missing if cell not in group]
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                for cell, result in zip(running.pop(future), future.result(), strict=True):
                    lines.add(cell, result)
                    print(
                        f"{len(lines.found)} {cell.phase} {cell.task} {cell.method} {cell.budget} {cell.rate:g}",
                        flush=True,
                    )


def check(protocol: dict[str, Any], lines: Lines) -> int:
    """Make one run again, another one after each commit, and compare every number with its line; the exit code.

    On the processor of the line bits are compared, on another one accuracies, and all else to TOLERANCE; so are runs of
    a language model by an earlier version of the protocol. Runs with noise are left out: theirs was drawn by another
    generator than today's.
    """
    cells = [cell for cell in lines.found if cell.version == protocol["version"] and not METHODS[cell.method].noise]
    if not cells:
        print("evidence-check: there are no runs yet; make evidence", file=sys.stderr)
        return 2
    cell = min(cells, key=lambda each: hashlib.sha256((each.key + code_version()).encode()).digest())
    print(f"checking {cell.key}", flush=True)
    line = lines.found[cell]
    before = dict(line["result"])
    (made,) = _made([cell], protocol, "kept" in before)
    now = json.loads(json.dumps(made))
    as_before = cell.task not in LANGUAGE_TASKS or line["cell"]["version"] == protocol["version"]
    same = line.get("processor") == processor() and as_before
    tolerance = 0.0 if same else TOLERANCE
    compared = before.keys() - NOT_REPEATED
    differing = [key for key in sorted(compared) if not agrees(now.get(key), before[key], tolerance, key)]
    for key in differing:
        print(f"  {key}: {now.get(key)} now, {before[key]} in the line", file=sys.stderr)
    how = "bit for bit" if same else f"accuracies equal, other numbers to {TOLERANCE:g}; the line was rounded otherwise"
    print(f"differs: other versions of the packages? Compared {how}" if differing else f"the same, {how}")
    return 1 if differing else 0


def agrees(one: Any, other: Any, tolerance: float, key: str = "") -> bool:
    """Whether two results are the same: accuracies, counts and texts equal, other numbers to a tolerance."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(agrees(one[k], other[k], tolerance, k) for k in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(agrees(*pair, tolerance, key) for pair in zip(one, other, strict=True))
    if isinstance(one, float) and isinstance(other, float) and key != "accuracy":
        return abs(one - other) <= tolerance * max(1.0, abs(other))
    return bool(one == other)


def main(arguments: list[str]) -> int:
    """Run a command; return the exit code."""
    protocol = tomllib.loads(PROTOCOL.read_text(encoding="utf-8"))
    lines = Lines(RESULTS, protocol)
    command, *rest = arguments or ["status"]
    try:
        if command == "run":
            make(protocol, lines, rest)
        elif command == "check":
            return check(protocol, lines)
        elif command == "trace":
            from experiments.evidence.trace import trace

            trace(protocol, lines)
        elif command == "page":
            from experiments.evidence.page import write

            write(protocol, lines)
        elif command == "status":
            cells = list(cells_of(protocol, lines))
            for phase in protocol["phases"]:
                own = [cell for cell in cells if cell.phase == phase["name"]]
                print(f"{phase['name']}: {sum(cell in lines.found for cell in own)} of {len(own)} known runs")
        else:
            print(f"evidence: unknown command {command!r}; run, trace, check, page or status", file=sys.stderr)
            return 2
    except SpecError as fault:
        print(f"evidence: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; {len(lines.found)} runs are kept, and the same command makes the others", file=sys.stderr)
        return 130
    return 0
