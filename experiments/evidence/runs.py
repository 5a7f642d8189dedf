"""The runs of protocol.toml: which there are, and which are missing."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorasc_fx.errors import SpecError

__all__ = ["Cell", "Results", "cells", "chosen_rate", "main", "make"]

HERE = Path(__file__).parent
PROTOCOL, RESULTS = HERE / "protocol.toml", HERE / "results.jsonl"
PROCESSES = 2
Protocol = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A run: part of the protocol, tasks in their order, method, learning rates by task, and seed."""

    part: str
    tasks: tuple[str, ...]
    method: str
    rates: tuple[float, ...]
    seed: int


class Results:
    """Results by cell, in a file with a line for each.

    Args:
        path: of the file.
        version: of the protocol. Lines of other versions are not read.
    """

    def __init__(self, path: Path, version: int) -> None:
        self.path, self.version, self.found = path, version, dict[Cell, dict[str, Any]]()
        for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            line = json.loads(text)
            if line["version"] == version:
                cell = line["cell"]
                key = Cell(cell["part"], tuple(cell["tasks"]), cell["method"], tuple(cell["rates"]), cell["seed"])
                self.found[key] = line["result"]

    def add(self, cell: Cell, result: dict[str, Any]) -> None:
        """Append a line."""
        self.found[cell] = result
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        line = {"version": self.version, "cell": asdict(cell), "commit": commit.stdout.strip(), "result": result}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _next_rates(protocol: Protocol, results: Results, task: str, method: str) -> tuple[list[float], bool]:
    """Return the rates of a grid that are known so far, and whether there are no others to come."""
    about = protocol["rates"]
    rates = list(about["start"])
    while True:
        losses = {rate: _losses(protocol, results, task, method, rate) for rate in rates}
        if any(values is None for values in losses.values()):
            return rates, False
        best = min(rates, key=lambda rate: (statistics.fmean(losses[rate] or [math.inf]), rate))
        lower, higher = rates[0] / about["factor"], rates[-1] * about["factor"]
        if best == rates[0] and lower >= about["limits"][0]:
            rates.insert(0, lower)
        elif best == rates[-1] and higher <= about["limits"][1]:
            rates.append(higher)
        else:
            return rates, True


def _losses(protocol: Protocol, results: Results, task: str, method: str, rate: float) -> list[float] | None:
    """Return the validation losses of all seeds (infinite if a run diverged), or None if a run is missing."""
    runs = [results.found.get(Cell("rates", (task,), method, (rate,), seed)) for seed in protocol["rates"]["seeds"]]
    finished = [run for run in runs if run is not None]
    if len(finished) < len(runs):
        return None
    return [math.inf if run["diverged"] else run["validation"]["loss"] for run in finished]


def chosen_rate(protocol: Protocol, results: Results, task: str, method: str) -> float | None:
    """Return the lowest rate within one standard error of the best mean validation loss; None if runs are missing."""
    rates, complete = _next_rates(protocol, results, task, method)
    if not complete:
        return None
    losses = {rate: _losses(protocol, results, task, method, rate) or [] for rate in rates}
    best = min(rates, key=lambda rate: statistics.fmean(losses[rate]))
    error = statistics.stdev(losses[best]) / math.sqrt(len(losses[best]))
    return min(rate for rate in rates if statistics.fmean(losses[rate]) <= statistics.fmean(losses[best]) + error)


def cells(protocol: Protocol, results: Results) -> Iterator[Cell]:
    """Yield the runs that are known so far: those of a grid decide which others there are."""
    from experiments.evidence.methods import METHODS

    plane, images = protocol["plane"], protocol["images"]
    learned = [(method, task) for method in plane["methods"] for task in plane["tasks"]]
    drawn = dict.fromkeys(itertools.chain(*images["orders"]))  # once each
    learned += [(method, task) for method in images["methods"] for task in drawn]
    for method, task in learned:
        source = METHODS[method].like or method
        for rate in _next_rates(protocol, results, task, source)[0] if source == method else ():
            yield from (Cell("rates", (task,), method, (rate,), seed) for seed in protocol["rates"]["seeds"])
        if task in plane["tasks"] and (rate := chosen_rate(protocol, results, task, source)):
            yield from (Cell("plane", (task,), method, (rate,), seed) for seed in plane["seeds"])
    for part in ("sequences", "images"):
        for method, order in itertools.product(protocol[part]["methods"], protocol[part]["orders"]):
            rates = [chosen_rate(protocol, results, task, METHODS[method].like or method) for task in order]
            chosen = tuple(rate for rate in rates if rate is not None)
            if len(chosen) == len(rates):
                yield from (Cell(part, tuple(order), method, chosen, seed) for seed in protocol[part]["seeds"])


def _made(cell: Cell, protocol: Protocol) -> dict[str, Any]:
    """Make a run, in a process of its own."""
    import torch

    from experiments.evidence.methods import METHODS
    from experiments.evidence.tasks import TASKS
    from experiments.evidence.train import run

    torch.set_num_threads(1)
    scales = protocol["plane"]["scales"] if cell.part == "plane" else ()
    tasks, tested = [TASKS[name]() for name in cell.tasks], cell.part != "rates"
    return run(tasks, METHODS[cell.method], protocol["training"], cell.rates, cell.seed, scales, tested)


def make(protocol: Protocol, results: Results, words: list[str]) -> None:
    """Make the runs that are missing: all, or those of some parts and methods."""
    from experiments.evidence.methods import METHODS

    parts = {"rates", "plane", "sequences", "images"}
    methods = set(words) - parts
    if unknown := methods - METHODS.keys():
        raise SpecError(f"run: no part or method is called {', '.join(sorted(unknown))}")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        running: dict[Future[dict[str, Any]], Cell] = {}
        while True:
            busy = set(running.values())
            missing = (
                cell for cell in cells(protocol, results)
                if cell not in results.found and cell not in busy
                and (parts.isdisjoint(words) or cell.part in words) and (not methods or cell.method in methods)
            )  # fmt: skip
            for cell in missing:
                if len(running) == PROCESSES:
                    break
                running[pool.submit(_made, cell, protocol)] = cell
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                cell = running.pop(future)
                results.add(cell, future.result())
                print(f"{len(results.found)} {cell.part} {' '.join(cell.tasks)} {cell.method} {cell.rates}", flush=True)


def check(protocol: Protocol, results: Results) -> int:
    """Make a run again (another one after each commit), and compare it and the loss before training."""
    from experiments.evidence.page import BASE_LOSS
    from experiments.evidence.tasks import general, measure, tail

    if not results.found:
        print("evidence: there are no runs yet; python -m experiments.evidence run", file=sys.stderr)
        return 2
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    cell = list(results.found)[int(commit[:8], 16) % len(results.found)]
    before, after = results.found[cell], _made(cell, protocol)
    before, after = ({key: value for key, value in result.items() if key != "cpu_s"} for result in (before, after))
    print(f"{cell}: {'the same' if before == after else f'{before} then, {after} now'}")
    loss = measure(tail(), general())["loss"]
    print(f"loss on general text before training: {BASE_LOSS} in page.py, {loss:.5f} now")
    return int(before != after or abs(loss - BASE_LOSS) > 1e-4)


def main(arguments: list[str]) -> int:
    """Run a command; return the exit code."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    protocol = tomllib.loads(PROTOCOL.read_text(encoding="utf-8"))
    results = Results(RESULTS, protocol["version"])
    command, *names = arguments or ["status"]
    try:
        if command == "run":
            make(protocol, results, names)
        elif command == "check":
            return check(protocol, results)
        elif command == "page":
            from experiments.evidence.page import write

            write(protocol, results)
        elif command == "archive":
            from experiments.evidence.page import second_edition

            print("\n".join(second_edition()).strip())
        elif command == "status":
            planned = list(cells(protocol, results))
            for part in ("rates", "plane", "sequences", "images"):
                of_part = [cell for cell in planned if cell.part == part]
                finished = sum(cell in results.found for cell in of_part)
                print(f"{part}: {finished} of {len(of_part)} runs that are known so far")
        else:
            print(f"evidence: there is no command {command!r}: run, status, page, archive or check", file=sys.stderr)
            return 2
    except SpecError as fault:
        print(f"evidence: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; {len(results.found)} runs are kept, and the same command makes the others", file=sys.stderr)
        return 130
    return 0
