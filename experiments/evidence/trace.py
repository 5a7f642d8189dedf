"""Records the loss of each step, and the size and rank of the change, around restarts in the short budget.

This is only a description. It is not in the protocol and decides no claim. It uses separate runs, at the rates that the
grid has selected, on the seeds of the phase `restarts`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.evidence import runner
from experiments.evidence.data import TASKS
from experiments.evidence.methods import METHODS
from experiments.evidence.train import run

__all__ = ["EVERY", "METHODS_SHOWN", "PARTS", "PATH", "trace"]

PATH = Path(__file__).parent / "trace.json"
METHODS_SHOWN = {"lora": "lora", "paper": "paper", "recipe": "recipe", "recipe-kept-state": "recipe"}
"""Methods, each with the method whose best rate it uses."""
EVERY = 2
"""Number of steps between two measurements of the change."""
PARTS = ("loss", "norm", "rank")


def trace(protocol: dict[str, Any], lines: runner.Lines, path: Path = PATH) -> None:
    """Train the runs, and write the means over the seeds: by task and method, a list of values for each part."""
    phase = next(item for item in protocol["phases"] if item["name"] == "restarts")
    (size,), (budget,) = phase["sizes"], phase["budgets"]
    traces: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name in phase["tasks"]:
        task = TASKS[name]()
        for method, like in METHODS_SHOWN.items():
            rate = runner.best_rate(protocol, lines, name, size, budget, like, "loss")
            if rate is None:
                continue
            runs = [
                _observed(task, method, protocol, (size, protocol["budgets"][budget], rate, seed))
                for seed in phase["seeds"]
            ]
            traces.setdefault(name, {})[method] = {
                part: [round(statistics.fmean(values), 5) for values in zip(*(run[part] for run in runs), strict=True)]
                for part in PARTS
            }
            print(f"{name} {method} {rate:g}", flush=True)
    path.write_text(json.dumps(traces, indent=1) + "\n", encoding="utf-8")


def _observed(
    task: Any, method: str, protocol: dict[str, Any], settings: tuple[int, int, float, int]
) -> dict[str, list[float]]:
    """Train one run with this size, number of steps, rate and seed, and return the values of each part."""
    values: dict[str, list[float]] = {part: [] for part in PARTS}

    def observe(done: int, loss: float, change: Callable[[], dict[str, float]]) -> None:
        values["loss"].append(loss)
        if done % EVERY == 0:
            for part, value in change().items():
                values[part].append(value)

    run(task, [METHODS[method]], runner.training_of(protocol, "restarts"), *settings, observe=observe)
    return values
