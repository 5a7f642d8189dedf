"""The protocol's runs: tasks, rates, sequences, verdicts, and the archive of earlier editions."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from experiments.evidence import page, tasks, train
from experiments.evidence import runs as runner
from experiments.evidence.methods import METHODS
from experiments.evidence.runs import Cell, Results
from experiments.evidence.tasks import Part, Tail, Task, measure, part_of
from tests.kit import tiny

PROTOCOL: dict[str, Any] = tomllib.loads(runner.PROTOCOL.read_text(encoding="utf-8"))
TRAINING = PROTOCOL["training"] | {"steps": 30, "examples": 40, "rank": 2}


class Line(nn.Module):
    """Applies the module `mlp` of its layers."""

    def __init__(self, layers: nn.ModuleDict) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers["mlp"](x)


def line(name: str, sign: float = 1.0) -> Task:
    """A task of two layers (`.mlp.` is in their names): which of two sums is larger; with sign -1 the other one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 6, generator=generator)
    part = Part((x,), (sign * x @ torch.randn(6, 2, generator=generator)).argmax(-1))

    def model() -> nn.Module:
        torch.manual_seed(0)
        mlp = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
        return nn.Sequential(Line(nn.ModuleDict({"mlp": mlp})))

    places = torch.arange(120)
    return Task(name, model, part.at(places[:60]), part.at(places[60:80]), part.at(places[80:]))


@pytest.fixture(autouse=True)
def images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy tasks have no general text."""
    monkeypatch.setattr(train, "IMAGES", ("one", "two"))


@torch.no_grad()
def test_exact_match_is_what_greedy_decoding_gives() -> None:
    model = tiny.llama(num_hidden_layers=3, eos_token_id=None).eval()  # no token ends an answer
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 40, (length,), generator=generator) for length in (4, 7, 5)]
    answers = [model.generate(p[None], max_new_tokens=5, do_sample=False)[0, len(p) :] for p in prompts]
    wrong = answers[2].clone()
    wrong[3] = (wrong[3] + 1) % 40
    rows = [(p.tolist(), a.tolist()) for p, a in zip(prompts, [answers[0], answers[1][:3], wrong], strict=True)]
    part = part_of(model, 2, rows)
    tail = Tail(model, 2).eval()
    assert measure(tail, part)["accuracy"] == pytest.approx(2 / 3)
    expected = []
    for prompt, answer in rows:
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        expected.append(nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
    assert measure(tail, part)["loss"] == pytest.approx(float(sum(expected)) / 13, rel=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_a_sequence(name: str) -> None:
    """Two tasks that contradict each other: the second is learned, and only separate adapters keep the first."""
    result = train.run([line("one"), line("two", -1.0)], METHODS[name], TRAINING, (0.05, 0.05), 0)
    first, last = result["after"]
    assert not result["diverged"]
    assert first["one"]["accuracy"] >= 0.6
    if METHODS[name].separate:
        assert last["one"] == first["one"]
        assert last["two"]["accuracy"] > 0.8
    else:
        assert last["two"]["accuracy"] + last["one"]["accuracy"] == pytest.approx(1.0)
        assert last["two"]["accuracy"] > first["two"]["accuracy"]


def test_scales_mix_the_weights() -> None:
    """A scale of 1 gives the trained weights, and a scale of 0 the original ones."""
    task = line("one")
    result = train.run([task], METHODS["lora"], TRAINING, (0.05,), 0, (1.0, 0.5, 0.0))
    assert result["scaled"][0] == result["after"][0]["one"]
    assert result["scaled"][2] == measure(task.model(), task.test)
    again = train.run([task], METHODS["lora"], TRAINING, (0.05,), 0, (1.0, 0.5, 0.0))
    assert again["scaled"] == result["scaled"]
    assert train.run([task], METHODS["lora"], TRAINING, (1e30,), 0)["diverged"]


def grid(tmp_path: Path, losses: dict[float, list[float]]) -> Results:
    results = Results(tmp_path / "results.jsonl", PROTOCOL["version"])
    for rate, found in losses.items():
        for seed, loss in zip(PROTOCOL["rates"]["seeds"], found, strict=True):
            cell = Cell("rates", ("r8",), "lora", (rate,), seed)
            results.found[cell] = {"diverged": False, "validation": {"loss": loss}}
    return results


def test_the_rate_is_the_lowest_within_one_standard_error(tmp_path: Path) -> None:
    first, middle, last = PROTOCOL["rates"]["start"]
    losses = {first: [1.05, 1.0, 1.1], middle: [0.9, 1.1, 1.0], last: [2.0, 2.0, 2.0]}
    assert runner.chosen_rate(PROTOCOL, grid(tmp_path, losses), "r8", "lora") == first  # error of the best: 0.058
    losses[first] = [1.2, 1.2, 1.2]
    assert runner.chosen_rate(PROTOCOL, grid(tmp_path, losses), "r8", "lora") == middle


def test_the_grid_is_extended_at_its_end(tmp_path: Path) -> None:
    first, middle, last = PROTOCOL["rates"]["start"]
    losses = {first: [3.0] * 3, middle: [2.0] * 3, last: [1.0] * 3}
    results = grid(tmp_path, losses)
    assert runner.chosen_rate(PROTOCOL, results, "r8", "lora") is None
    wanted = {cell.rates for cell in runner.cells(PROTOCOL, results) if cell.tasks == ("r8",) and cell.method == "lora"}
    assert wanted == {(first,), (middle,), (last,), (2 * last,)}
    assert runner.chosen_rate(PROTOCOL, grid(tmp_path, losses | {2 * last: [1.5] * 3}), "r8", "lora") == last


def test_runs_are_kept_by_version(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    cell = Cell("plane", ("r8",), "lora", (0.01,), 10)
    Results(path, 7).add(cell, {"diverged": True})
    assert Results(path, 7).found == {cell: {"diverged": True}}
    assert not Results(path, 8).found


def test_the_protocol_names_what_is_there() -> None:
    orders = [*PROTOCOL["sequences"]["orders"], *PROTOCOL["images"]["orders"]]
    names = {*PROTOCOL["plane"]["tasks"], *(name for order in orders for name in order)}
    assert names <= tasks.TASKS.keys()
    methods = {*PROTOCOL["plane"]["methods"], *PROTOCOL["sequences"]["methods"], *PROTOCOL["images"]["methods"]}
    assert methods == METHODS.keys()
    assert all((METHODS[name].like or name) in PROTOCOL["plane"]["methods"] for name in methods)
    assert not set(PROTOCOL["rates"]["seeds"]) & {*PROTOCOL["plane"]["seeds"], *PROTOCOL["sequences"]["seeds"]}


def test_intervals_are_of_tasks_and_seeds() -> None:
    """The mean of tasks with different numbers of seeds; a single task has the interval of its seeds."""
    index = pd.MultiIndex.from_tuples([("a", 0), ("a", 1), ("b", 0)])
    mean, low, high = page.interval(pd.Series([1.0, 3.0, 10.0], index=index), 2000)
    assert mean == 6.0
    assert 1.0 <= low < 2.5
    assert high == 10.0
    values = np.random.default_rng(0).normal(size=40)
    one = pd.Series(values, index=pd.MultiIndex.from_tuples([("a", seed) for seed in range(40)]))
    _, low, high = page.interval(one, 4000)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 40**0.5, rel=0.1)


def test_a_verdict_must_hold_without_its_carrier() -> None:
    index = pd.MultiIndex.from_product([("a", "b", "c"), range(5)])
    noise = np.random.default_rng(0).normal(size=15) * 0.1
    even = pd.Series([5.0] * 5 + [4.0] * 5 + [6.0] * 5 + noise, index=index)
    assert page._verdict(even, 500).endswith("supported")
    assert page._verdict(-even, 500).endswith("refuted")
    carried = pd.Series([0.5] * 5 + [0.0] * 5 + [60.0] * 5 + noise, index=index)
    assert page._verdict(carried, 500).endswith("undecided")


def test_equal_forgetting_is_read_from_the_front_of_lora() -> None:
    rows = [("lora", 1.0, 80, 2.0), ("lora", 0.5, 60, 1.0), ("shira", 1.0, 75, 1.5), ("shira", 0.5, 50, 0.5)]
    plane = pd.DataFrame(
        [{"tasks": "r8", "seed": 0, "method": m, "scale": s, "accuracy": a, "forgetting": f} for m, s, a, f in rows]
    )
    empty = pd.DataFrame()
    assert page._differences(plane, empty, "shira", "equal forgetting").tolist() == [5.0]
    assert page._differences(plane, empty, "lora", "area").tolist() == [0.0]
    assert page._differences(plane, empty, "shira", "area").iloc[0] > 0


def test_the_archive_has_the_numbers_of_the_second_edition() -> None:
    """Finalists on SmolLM2-135M as they were published: accuracy of LoRA on R8 and on extraction."""
    runs = page.archive()
    means = runs[runs["budget"] == "lm-long"].pivot_table(index=["task", "size"], columns="method", values="accuracy")
    assert means.loc[("lm-r8", 200), "lora"] == pytest.approx(89.0, abs=0.06)
    assert means.loc[("lm-extract", 200), "lora"] == pytest.approx(68.5, abs=0.06)
    tables = "\n".join(page.second_edition())
    assert "|lm-extract|200|lm-long|68.50|68.10|64.40|68.70|70.90|" in tables
    assert "|lm-extract|200|lm-long|0.10|0.10|0.05|0.20|0.13|" in tables


def test_the_page_shows_what_is_stored(tmp_path: Path) -> None:
    results = Results(runner.RESULTS, PROTOCOL["version"])
    assert results.found.keys() <= set(runner.cells(PROTOCOL, results))
    copy = tmp_path / "evidence.md"
    copy.write_text(page.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    page.write(PROTOCOL, results, copy)
    assert copy.read_text(encoding="utf-8") == page.PAGE.read_text(encoding="utf-8")


def small(*seeds: int) -> dict[str, Any]:
    """Return the protocol with one task, one order, and these seeds."""
    parts = {"plane": {"tasks": ["r8"]}, "sequences": {"orders": [["r8", "tweets", "extract"]]}}
    return PROTOCOL | {part: PROTOCOL[part] | about | {"seeds": seeds} for part, about in parts.items()}


def test_the_page_of_a_finished_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(tmp_path / "results.jsonl", PROTOCOL["version"])
    for number, method in enumerate(("lora", "shira-stages")):
        for seed in (1, 2):
            scaled = [
                {"accuracy": 0.5 + 0.1 * number, "loss": 1.0, "general": 4.0 + scale}
                for scale in (1.0, 0.85, 0.7, 0.5, 0.35)
            ]
            results.found[Cell("plane", ("r8",), method, (0.01,), seed)] = {"diverged": False, "scaled": scaled}
            after = [
                {"r8": {"accuracy": 0.9}, "tweets": {"accuracy": 0.1}},
                {"r8": {"accuracy": 0.3}, "tweets": {"accuracy": 0.8}},
            ]
            cell = Cell("sequences", ("r8", "tweets"), method, (0.01, 0.01), seed)
            after = [each | {"general": page.BASE_LOSS + 0.55} for each in after]
            results.found[cell] = {"diverged": False, "after": after}
    text = "\n".join(page.third_edition(small(1, 2) | {"statistics": {"resamples": 50}}, results))
    assert "|lora|55.00|-60.00|80.00|0.55|" in text
    assert "equal forgetting|shira-stages|+10.00|+10.00|+10.00|supported|" in text


def test_a_front_is_the_best_scale_that_forgets_less() -> None:
    points = pd.DataFrame({"forgetting": [0.4, 0.2, 0.1, -0.1], "accuracy": [70.0, 80.0, 60.0, 20.0]})
    front = page.front(points)
    assert [front(at) for at in (0.0, 0.05, 0.1, 0.2, 0.4, 1.0)] == pytest.approx([20.0, 40.0, 60.0, 80.0, 80.0, 80.0])


def test_a_page_of_a_part_of_the_runs(tmp_path: Path) -> None:
    """The plane has verdicts before the first sequence, and sequences before the plane; LoRA alone has none."""
    point, loss = {"accuracy": 0.5, "loss": 1.0}, page.BASE_LOSS + 0.1
    scaled = {"diverged": False, "after": [{"r8": point, "general": loss}], "scaled": [{**point, "general": loss}] * 5}
    order = PROTOCOL["sequences"]["orders"][0]
    after = {"diverged": False, "after": [dict.fromkeys(order, point) | {"general": loss}] * 3}
    runs = {
        "more accurate": {Cell("plane", ("r8",), name, (0.1,), 10): scaled for name in ("lora", "shira")},
        "keeps more": {Cell("sequences", tuple(order), name, (0.1,) * 3, 20): after for name in ("lora", "shira")},
    }
    for claim, found in runs.items():
        results = Results(tmp_path / "none.jsonl", PROTOCOL["version"])
        results.found = found
        assert len(page.third_edition(PROTOCOL, results)) == 2
        lines = page.third_edition(small(1), results)
        assert any(line.startswith(f"|{claim}") and "|shira|+0.00" in line for line in lines)
        results.found = {cell: result for cell, result in found.items() if cell.method == "lora"}
        assert len(page.third_edition(small(1), results)) == 2


def test_the_picture_has_a_line_for_each_method() -> None:
    index = pd.MultiIndex.from_product([("lora", "shira"), (0.5, 1.0), (1, 2)], names=["method", "scale", "seed"])
    forgetting = [0.0, 0.2, 0.5, 0.5, 0.2, 0.2, 1.0, 1.0]
    plane = pd.DataFrame({"forgetting": forgetting, "accuracy": [50.0] * 4 + [75.0] * 4}, index=index).reset_index()
    drawn = ElementTree.fromstring(page.picture(plane, width=350, height=200))
    (first, second), (third, fourth) = (
        [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
        for line in drawn.findall("{*}polyline")
    )
    assert first[1] == second[1] == 50.0  # 75 %, at the end of the axis
    assert third[1] == fourth[1] == 150.0
    assert [round(each[0] - 50) for each in (first, second, third, fourth)] == [38, 190, 19, 95]
    plane["accuracy"] = 50.0 + plane["accuracy"] // 75  # almost the same: the names do not overlap
    texts = ElementTree.fromstring(page.picture(plane, width=350, height=900)).findall("{*}text")[2:]
    assert abs(float(texts[0].attrib["y"]) - float(texts[1].attrib["y"])) >= 15.0
