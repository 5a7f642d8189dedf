"""What happens around a restart: loss of each step, and size and rank of the change, in the short budget.

A description and no claim: it is not in the protocol, decides nothing, and is made of runs of its own at the rates that
the grid chose, on the seeds of the phase `restarts`.
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
"""Methods, each with the one whose best rate it has."""
EVERY = 2
"""Steps from one look at the change to the next."""
PARTS = ("loss", "norm", "rank")


def trace(protocol: dict[str, Any], lines: runner.Lines, path: Path = PATH) -> None:
    """Make the runs, and write the means over their seeds: by task and method, a list of values of each part."""
    phase = next(each for each in protocol["phases"] if each["name"] == "restarts")
    (size,), (budget,) = phase["sizes"], phase["budgets"]
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name in phase["tasks"]:
        task = TASKS[name]()
        for method, like in METHODS_SHOWN.items():
            rate = runner.best_rate(protocol, lines, name, size, budget, like, "loss")
            if rate is None:
                continue
            seen = [
                _observed(task, method, protocol, (size, protocol["budgets"][budget], rate, seed))
                for seed in phase["seeds"]
            ]
            found.setdefault(name, {})[method] = {
                part: [round(statistics.fmean(each), 5) for each in zip(*(one[part] for one in seen), strict=True)]
                for part in PARTS
            }
            print(f"{name} {method} {rate:g}", flush=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _observed(
    task: Any, method: str, protocol: dict[str, Any], how: tuple[int, int, float, int]
) -> dict[str, list[float]]:
    seen: dict[str, list[float]] = {part: [] for part in PARTS}

    def observe(done: int, loss: float, change: Callable[[], dict[str, float]]) -> None:
        seen["loss"].append(loss)
        if done % EVERY == 0:
            for part, value in change().items():
                seen[part].append(value)

    run(task, [METHODS[method]], runner.training_of(protocol, "restarts"), *how, observe=observe)
    return seen
