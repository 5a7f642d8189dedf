"""The runner of the protocol: which runs there are, that they go on after a stop, that bits repeat, and its page."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from scipy.stats import trim_mean
from torch import nn

from experiments.evidence import page, runner
from experiments.evidence.data import TASKS, Part, Task
from experiments.evidence.methods import METHODS
from experiments.evidence.train import Training, run

TINY: dict[str, Any] = {
    "version": 7,
    "counts": [6],
    "training": {"batch_size": 8, "gradient_clipping": 1.0, "warmup": 1, "cycles": 3},
    "budgets": {"short": 6},
    "rates": {"branches": [0.001, 0.01], "beyond": [], "full": [0.001]},
    "statistics": {"resamples": 200},
    "phases": [
        {
            "name": name,
            "tasks": ["teacher-4"],
            "sizes": [16],
            "budgets": ["short"],
            "methods": ["lora", "recipe"],
            "seeds": [0, 1],
            "rates": rates,
        }
        for name, rates in (("grid", "grid"), ("finalists", "best"))
    ]
    + [
        {"name": name, "tasks": [], "sizes": [], "budgets": [], "methods": [], "seeds": [], "rates": "grid"}
        for name in ("ranks", "design", "forgetting", "sizes", "others", "adapters", "restarts", "map")
    ],
    "claims": [
        {
            "name": "better",
            "method": "recipe",
            "against": "lora",
            "metric": metric,
            "part": "test",
            "budgets": ["short"],
        }
        for metric in ("accuracy", "loss", "sensitivity")
    ],
}
TRAINING = Training(batch_size=8, warmup=1, cycles=3, clip=1.0)


def linear_task() -> Task:
    """A task of one layer, whose class is the largest of two sums."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 6, generator=generator)
    part = Part((x,), (x @ torch.randn(6, 2, generator=generator)).argmax(-1))

    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))

    places = torch.arange(120)
    return Task("line", 2, model, part.at(places[:80]), part.at(places[80:100]), part.at(places[100:]), head=())


def test_the_protocol_names_what_is_there() -> None:
    protocol = tomllib.loads(runner.PROTOCOL.read_text(encoding="utf-8"))
    cells = list(runner.cells_of(protocol, runner.Lines(Path("none"), protocol)))
    assert len(cells) == len(set(cells)) > 1000
    waiting = {"finalists", "design"}  # for the rates of the grid
    assert {cell.phase for cell in cells} == {phase["name"] for phase in protocol["phases"]} - waiting
    assert all(cell.task in TASKS and cell.method in METHODS for cell in cells)


@pytest.mark.parametrize(
    "name",
    [name for name in METHODS if "+" not in name and name != "recipe-gradient-A"]  # its option was removed
    + ["design+restart+cycles+average+noise", "map+pace=mean+stages=6+noise=0.3", "map+pace=0.5+stages=2+noise=0.0"],
)
def test_every_method_trains(name: str) -> None:
    (first,) = run(linear_task(), [METHODS[name]], TRAINING, size=40, steps=30, rate=0.03, seed=3)
    assert not first["diverged"]
    assert first["test"]["accuracy"] > 0.6  # of two classes
    assert first["delta"]["norm"] > 0


def test_methods_that_train_alike_share_a_run() -> None:
    """What a method gives does not depend on which others were evaluated beside it."""
    names = ["lora", "lora-average", "lora-early"]
    together = run(linear_task(), [METHODS[name] for name in names], TRAINING, 40, 30, 0.03, 3)
    alone = [run(linear_task(), [METHODS[name]], TRAINING, 40, 30, 0.03, 3)[0] for name in names]
    assert [{**result, "cpu_s": 0} for result in together] == [{**result, "cpu_s": 0} for result in alone]
    assert together[0]["test"] != together[1]["test"]
    with pytest.raises(ValueError, match="do not train alike"):
        run(linear_task(), [METHODS["lora"], METHODS["recipe"]], TRAINING, 40, 30, 0.03, 3)


@pytest.mark.slow
def test_runs_go_on_after_a_stop_and_repeat_their_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.jsonl"
    lines = runner.Lines(path, TINY)
    grid = list(runner.cells_of(TINY, lines))
    assert len(grid) == 8
    for cell in grid:
        lines.add(cell, *runner._made([cell], TINY, False))
    text = path.read_text(encoding="utf-8")
    path.write_text(text + text[:50], encoding="utf-8")  # a line that a kill cut short
    again = runner.Lines(path, TINY)
    assert set(again.found) == set(grid)
    finalists = [cell for cell in runner.cells_of(TINY, again) if cell.phase == "finalists"]
    assert {cell.method for cell in finalists} == {"lora", "recipe"}
    runner.make(TINY, again)  # in processes of its own
    assert set(again.found) == set(grid) | set(finalists)
    assert runner.check(TINY, again) == 0
    assert "the same, bit for bit" in capsys.readouterr().out

    page.write(TINY, runner.Lines(path, TINY), tmp_path)
    written = (tmp_path / "evidence.md").read_text(encoding="utf-8")
    assert f"{len(again.found)} of {len(again.found)} runs" in written
    assert "| better | recipe - lora | short | loss |" in written

    entry = next(entry for entry in again.found.values())
    entry["result"]["test"]["loss"] += 1e-12
    for other in list(again.found):
        if again.found[other] is not entry:
            del again.found[other]
    assert runner.check(TINY, again) == 1
    entry["processor"] = "another"
    assert runner.check(TINY, again) == 0  # losses to a tolerance there, but accuracies to the bit
    assert "another processor" in capsys.readouterr().out
    entry["result"]["test"]["accuracy"] += 1e-9
    assert runner.check(TINY, again) == 1


def test_statistics_by_hand() -> None:
    scores = numpy.random.default_rng(3).normal(0.5, 1.0, (12, 4))
    found = page.difference_over_tasks(scores, 4000)
    assert found.value == pytest.approx(trim_mean(scores.ravel(), 0.25))
    assert found.low < found.value < found.high
    deviation = scores.std() / numpy.sqrt(scores.size)
    assert 2 * deviation < found.high - found.low < 8 * deviation
    assert page.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # as R's p.adjust
