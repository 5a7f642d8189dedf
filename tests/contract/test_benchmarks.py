"""Every table of the benchmark can be measured, the page shows what is stored, and memory is counted as by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from benchmarks import __main__ as command
from benchmarks import tables
from benchmarks.measure import Turn, alternate, ratios, saved_bytes
from benchmarks.models import WORKS
from benchmarks.rivals import RIVALS, entries, make_all
from benchmarks.tables import TABLES

TINY = WORKS["tiny"]
LONG = {"compiled": "a minute of compilation", "methods": "methods without convolutions"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TABLES if name not in LONG])
def test_a_table_is_measured_and_written(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows have cells in all columns; a second write of the same rows changes nothing."""
    monkeypatch.setattr(tables, "keep_freed", lambda: None)
    threads = torch.get_num_threads()
    try:
        rows = tables.measure(name, "tiny", 1)
    finally:
        torch.set_num_threads(threads)
    assert rows
    assert all(all(row.values()) for row in rows)
    page = tmp_path / "costs.md"
    page.write_text(f"<!-- {name} -->\n<!-- /{name} -->\n", encoding="utf-8")
    found = {"text": TABLES[name].text, "machine": "a machine", "rows": {"tiny": rows}}
    command.write(name, found, tmp_path, page)
    written = page.read_text(encoding="utf-8")
    assert written.count("\n|") == 2 + len(rows)
    command.write(name, found, tmp_path, page)
    assert page.read_text(encoding="utf-8") == written


def test_the_page_shows_the_stored_rows() -> None:
    page = command.PAGE.read_text(encoding="utf-8")
    stored = sorted(command.RESULTS.glob("*.json"))
    assert {path.stem for path in stored} >= {"steps", "memory", "costs", "start", "methods", "serving"}
    for path in stored:
        found = json.loads(path.read_text(encoding="utf-8"))
        assert command.put(page, path.stem, command.markdown(found)) == page, path.name
        assert found["text"] == TABLES[path.stem.removesuffix("-cuda")].text


def test_rows_of_another_machine_are_dropped(tmp_path: Path) -> None:
    page = tmp_path / "costs.md"
    page.write_text("<!-- steps -->\n<!-- /steps -->\n", encoding="utf-8")
    for machine, model in (("one", "a"), ("one", "b"), ("other", "c")):
        command.write("steps", {"text": "", "machine": machine, "rows": {model: [{"model": model}]}}, tmp_path, page)
    assert list(json.loads((tmp_path / "steps.json").read_text(encoding="utf-8"))["rows"]) == ["c"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["steps", "--device", "cuda"], "finds no GPU here"),
        (["calls", "--device", "cuda"], "no table calls for cuda; there are steps, memory, costs"),
        (["stepps"], "no table stepps for cpu; there are steps, kernels"),
        (["steps", "--models", "bert"], "invalid choice: 'bert'"),
    ],
)
def test_mistakes_are_one_message(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


def test_variants_start_from_the_same_function_and_train_as_much() -> None:
    rivals = make_all(TINY)
    losses = {name: rivals[name].loss().item() for name in RIVALS}
    assert losses["ours"] == losses["frozen"] == losses["full"]
    assert losses["peft"] == pytest.approx(losses["frozen"], rel=1e-6)
    assert losses["folded"] != losses["frozen"]  # it was trained
    # conv 3x3 from 3 to 6 channels, fc from 384 to 20, head from 20 to 4; rank 8
    assert entries(rivals["ours"].model) == entries(rivals["peft"].model) == 8 * (27 + 6 + 384 + 20 + 20 + 4)
    assert entries(rivals["frozen"].model) == entries(rivals["folded"].model) == 0
    for rival in rivals.values():
        rival.prepare()
        rival.step()
        assert all(value.grad is not None for value in rival.inputs.values())


def test_saved_memory_of_a_case_by_hand() -> None:
    # rows 5: x [5, 3] -> first [5, 7] -> tanh [5, 7] -> last [5, 2]; float64
    model = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert saved_bytes(lambda: model(x), model) == 8 * (
        5 * 3 + 5 * 7
    )  # x for its weight; the output of tanh, saved twice
    model.requires_grad_(False)
    assert saved_bytes(lambda: model(x), model) == 8 * 5 * 7


def test_ratios_are_of_minima_and_within_rounds() -> None:
    seconds = {"a": [2.0, 6.0, 3.0], "b": [4.0, 3.0, 2.0]}
    assert ratios(seconds, [("a", "b"), ("a", "missing")]) == {"a / b": "1.00 (1.50)"}
    order: list[str] = []
    turns = {name: Turn(lambda: None, lambda name=name: order.append(name)) for name in "ab"}
    assert all(len(found) == 2 for found in alternate(turns, 2).values())
    assert order == ["a", "b", "a", "b", "b", "a"]
