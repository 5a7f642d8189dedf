"""The runner of the protocol: which runs there are, that they go on after a stop, that bits repeat, and its page."""

from __future__ import annotations

import copy
import math
import tomllib
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from scipy.stats import trim_mean
from torch import nn

from experiments.evidence import language, page, runner
from experiments.evidence.data import Part, Task, measure
from experiments.evidence.methods import METHODS, RECORDED
from experiments.evidence.train import Training, run
from tests.kit import tiny

LANGUAGE = ("lm-base", "lm-grid", "lm-finalists", "lm-methods", "lm-grid-long", "lm-finalists-long", "lm-finalists-all")
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
        {"name": name, "tasks": [], "sizes": [16], "budgets": ["short"], "methods": [], "seeds": [], "rates": "grid"}
        for name in ("ranks", "design", "forgetting", "sizes", "others", "adapters", "restarts", "map", *LANGUAGE)
    ],
    "recommendations": [{"type": "noisy labels", "phases": ["finalists"], "tasks": ["teacher-4"]}],
    "claims": [
        {
            "name": "better",
            "phase": "finalists",
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
    waiting = {  # for the rates of a grid
        "finalists", "design", "lm-finalists", "lm-methods", "lm-finalists-long", "lm-finalists-all",
    }  # fmt: skip
    assert {cell.phase for cell in cells} == {phase["name"] for phase in protocol["phases"]} - waiting
    assert all(cell.task in runner.TASKS and cell.method in METHODS for cell in cells)


@pytest.mark.parametrize(
    "name",
    # base is the untrained model.
    [name for name in METHODS if "+" not in name and name not in {*RECORDED, "base"}]
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
def test_runs_go_on_after_a_stop_and_repeat_their_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert "| better | recipe - lora | " in written
    assert "| recipe - lora | loss, test | short |" in (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert "| noisy labels | 16 | 6 |" in written

    entry = next(entry for entry in again.found.values())
    entry["result"]["test"]["loss"] += 1e-12
    for other in list(again.found):
        if again.found[other] is not entry:
            del again.found[other]
    assert runner.check(TINY, again) == 1
    monkeypatch.setitem(runner.LANGUAGE_TASKS, "teacher-4", runner.TASKS["teacher-4"])
    for key, value in (("cell", {**entry["cell"], "version": 6}), ("processor", "another")):
        with monkeypatch.context() as patch:
            patch.setitem(entry, key, value)
            assert runner.check(TINY, again) == 0  # losses to a tolerance there, but accuracies to the bit
        assert "rounded otherwise" in capsys.readouterr().out
    entry["processor"] = "another"
    entry["result"]["test"]["accuracy"] += 1e-9
    assert runner.check(TINY, again) == 1


def test_a_grid_over_tasks_goes_on_while_its_best_rate_is_at_an_end(tmp_path: Path) -> None:
    """Its rate, and the method with the lowest loss, are those of the phase of finalists."""
    common = {"tasks": ["lm-extract", "lm-r8"], "sizes": [200], "budgets": ["short"], "seeds": [0]}
    protocol = TINY | {
        "rates": {"language": {"start": [0.001, 0.01], "lower": [0.0001], "higher": [0.1, 1.0]}},
        "phases": [
            common | {"name": "lm-grid", "methods": ["lora", "hira", "oft"], "rates": "grid over tasks"},
            common
            | {"name": "lm-finalists", "methods": ["lora"], "best_of": [["hira", "oft"]], "rates": "best over tasks"},
        ],
    }
    lines = runner.Lines(tmp_path / "results.jsonl", protocol)
    best = {"lora": 0.01, "hira": 0.0001, "oft": 1.0}  # hira goes on below, oft as far as there are rates, lora twice

    def result(cell: runner.Cell) -> dict[str, Any]:
        far = abs(math.log(cell.rate / best[cell.method]))
        return {"diverged": cell.rate > 0.5 and cell.method == "hira", "validation": {"loss": 1 + far, "accuracy": 0.5}}

    for _ in range(10):
        for cell in [each for each in runner.cells_of(protocol, lines) if each not in lines.found]:
            lines.add(cell, result(cell))
    rates = {
        method: sorted({cell.rate for cell in lines.found if (cell.phase, cell.method) == ("lm-grid", method)})
        for method in best
    }
    assert rates == {
        "lora": [0.001, 0.01, 0.1],
        "hira": [0.0001, 0.001, 0.01],
        "oft": [0.001, 0.01, 0.1, 1.0],
    }
    finalists = {(cell.method, cell.rate) for cell in lines.found if cell.phase == "lm-finalists"}
    assert finalists == {("lora", 0.01), ("hira", 0.0001)}  # hira and oft have the same loss; the first one counts


def test_statistics_by_hand() -> None:
    scores = numpy.random.default_rng(3).normal(0.5, 1.0, (12, 4))
    found = page.difference_over_tasks(scores, 4000)
    assert found.value == pytest.approx(trim_mean(scores.ravel(), 0.25))
    assert found.low < found.value < found.high
    deviation = scores.std() / numpy.sqrt(scores.size)
    assert 2 * deviation < found.high - found.low < 8 * deviation
    assert page.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # as R's p.adjust


# ---- a language model: a tiny Llama in the place of SmolLM2 ----------------------------------------------------------

LAYERS = 2
"""Trained layers, of 3."""


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    return tiny.llama(num_hidden_layers=3).eval().requires_grad_(False)


def drawn_examples(count: int, seed: int = 0) -> list[language.Example]:
    """Return examples of different lengths, whose answer is the first tokens of the prompt."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        prompt = tuple(torch.randint(3, 40, (4 + number % 3,), generator=generator).tolist())
        found.append(language.Example(prompt, prompt[: 1 + number % 2]))
    return found


def language_task(llama: Any) -> Task:
    """Return a task of the tail of a tiny Llama."""
    pool, rest = (language.part_of(llama, LAYERS, drawn_examples(24, seed)) for seed in (1, 2))
    model = language.Tail(llama, LAYERS)
    return Task(
        "tiny",
        4,
        lambda seed: copy.deepcopy(model).requires_grad_(True),
        pool,
        pool,
        rest,
        {"other": rest},
        head=(),
        exclude=("head.*",),
        measure=language.exact_match,
        general=rest,
    )


def test_the_tail_computes_the_logits_of_the_whole_model(llama: Any) -> None:
    """On padded examples, against a call of the model with an attention mask."""
    examples = drawn_examples(7)
    part = language.part_of(llama, LAYERS, examples)
    logits = language.Tail(llama, LAYERS)(*part.inputs)
    for row, each in enumerate(examples):
        count, padding = len(each.answer), 3
        tokens = torch.tensor([[*[0] * padding, *each.prompt, *each.answer]])  # padded on the other side
        mask = torch.ones_like(tokens)
        mask[:, :padding] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        whole = llama(tokens, attention_mask=mask, position_ids=positions).logits[0, -count - 1 : -1]
        torch.testing.assert_close(logits[row, :count], whole, atol=1e-5, rtol=0)
        assert part.labels[row].tolist() == [*each.answer, *[-100] * (part.labels.shape[1] - count)]


def test_exact_match_is_that_of_greedy_decoding(llama: Any) -> None:
    examples = []
    for number, each in enumerate(drawn_examples(6)):
        prompt = torch.tensor([each.prompt])
        told = llama.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
        answer = told[0, prompt.shape[1] :].tolist()
        if number % 3 == 2:
            answer[number // 3 + 1] ^= 1  # a wrong token
        examples.append(language.Example(each.prompt, tuple(answer)))
    part = language.part_of(llama, LAYERS, examples)
    found = language.exact_match(language.Tail(llama, LAYERS), part)
    assert found["accuracy"] == pytest.approx(4 / 6)
    logits, labels = language.Tail(llama, LAYERS)(*part.inputs), part.labels
    assert found["loss"] == pytest.approx(measure(lambda *_: logits, Part(part.inputs, labels))["loss"], rel=1e-6)  # type: ignore[arg-type]


def test_a_language_model_is_trained_and_measured(llama: Any) -> None:
    task = language_task(llama)
    (before,) = run(task, [METHODS["base"]], TRAINING, 0, 6, 0.0, 0)
    for name in ("lora", "oft-stages"):
        (after,) = run(task, [METHODS[name]], TRAINING, 0, 6, 0.01, 0)
        assert not after["diverged"]
        assert after["validation"]["loss"] < before["validation"]["loss"]
        assert after["shifts"]["other"] == after["test"] != before["test"]
        assert after["general"] == after["test"]["loss"]  # in this test the same examples
        assert after["memory"] > 4 * after["trained"]
        assert after["disk"] > 4 * after["trained"]
        (repeated,) = run(task, [METHODS[name]], TRAINING, 0, 6, 0.01, 0)
        differing = {key for key in after if after[key] != repeated[key]}
        assert differing <= runner.NOT_REPEATED
    again = run(task, [METHODS["recipe"], METHODS["loss-average"]], TRAINING, 0, 6, 0.01, 0)
    assert again[0]["test"] != again[1]["test"]
    assert before["trained"] == 0
