"""The benchmark runs and writes its page, and what it counts is what can be counted by hand."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorasc_fx as lx

pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from benchmarks import __main__ as command
from benchmarks import report
from benchmarks.floor import floor_ratio, low_rank_flops, step_flops
from benchmarks.memory import activation_bytes, allowed_bytes
from benchmarks.models import WORKS
from benchmarks.rivals import RIVALS, adapted, entries, make, make_all

pytestmark = pytest.mark.slow

TINY = WORKS["tiny"]
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "costs.md"


def test_each_part_runs_and_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A part takes its place in the file and on the page, beside the parts before it."""
    folder, page = tmp_path / "benchmarks", tmp_path / "docs" / "costs.md"
    folder.mkdir()
    page.parent.mkdir()
    page.write_text(f"{report.BEGIN}\n{report.END}\n", encoding="utf-8")
    monkeypatch.setattr(command, "HERE", folder)
    monkeypatch.setattr(command, "keep_freed", lambda: None)
    parts = {"table": "steps", "placement": "placement", "costs": "costs"}
    level, threads = logging.getLogger("lorasc_fx").level, torch.get_num_threads()
    found: dict[str, Any] = {}
    try:
        for part, key in parts.items():
            command.main(["tiny", "--quick", "--write", "--threads", str(threads), "--only", part])
            before, found = found, json.loads((folder / "results.json").read_text(encoding="utf-8"))
            assert all(found[name] == rows for name, rows in before.items() if rows)
            assert list(found[key]) == ["tiny"]
    finally:
        logging.getLogger("lorasc_fx").setLevel(level)
    written = page.read_text(encoding="utf-8")
    assert report.put(written, report.section(found)) == written
    for block in written.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1


def test_what_a_device_does_not_have_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        command.main(["--device", "cuda"])
    assert f"--device cuda: torch {torch.__version__} finds no GPU here" in capsys.readouterr().err


def test_rivals_start_from_the_same_function_and_train_as_much() -> None:
    rivals = make_all(TINY)
    losses = {name: rivals[name].loss().item() for name in RIVALS}
    assert losses["ours"] == losses["frozen"] == losses["full"]
    assert losses["peft"] == pytest.approx(losses["frozen"], rel=1e-6)
    assert losses["folded"] != losses["frozen"]  # it has trained before
    # conv 3x3 from 3 to 6 channels, fc from 384 to 20, head from 20 to 4; rank 8
    assert entries(rivals["ours"].model) == entries(rivals["peft"].model) == 8 * (27 + 6 + 384 + 20 + 20 + 4)
    assert entries(rivals["frozen"].model) == entries(rivals["folded"].model) == 0
    for rival in rivals.values():
        rival.prepare()
        rival.step()
        assert all(value.grad is not None for value in rival.inputs.values())


def test_activation_memory_of_a_case_by_hand() -> None:
    # rows 5: x [5, 3] -> first [5, 7] -> tanh [5, 7] -> last [5, 2]; float64
    model = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def forward() -> torch.Tensor:
        return model(x)

    assert activation_bytes(forward, model) == 8 * (5 * 3 + 5 * 7)  # x for its weight; tanh's output, saved twice
    model.requires_grad_(False)
    assert activation_bytes(forward, model) == 8 * 5 * 7  # tanh's output
    sites = lx.adapt(copy.deepcopy(model), (x,), spec=lx.CascadeSpec(rank=2)).sites
    assert allowed_bytes(forward, model, sites) == 8 * (5 * 3 + 5 * 7)
    assert allowed_bytes(forward, model, sites[1:]) == 8 * 5 * 7  # last's input is what tanh keeps


def test_the_floor_is_what_torch_counts_of_peft() -> None:
    batch, model = TINY.batch(), TINY.build()
    sites = adapted(TINY, copy.deepcopy(model), batch).sites
    theirs = make("peft", TINY, copy.deepcopy(model), batch)
    frozen = make("frozen", TINY, model, batch)
    extra = step_flops(theirs.step) - step_flops(frozen.step)
    assert low_rank_flops(frozen.loss, frozen.model, sites) == extra > 0
    assert floor_ratio(frozen.step, frozen.loss, frozen.model, sites) == 1 + extra / step_flops(frozen.step)


def test_the_page_holds_what_was_measured() -> None:
    found = json.loads((ROOT / "benchmarks" / "results.json").read_text(encoding="utf-8"))
    named = {name for name in WORKS if name != "tiny"}
    assert set(found["steps"]) == set(found["costs"]) == named
    page = PAGE.read_text(encoding="utf-8")
    assert report.put(page, report.section(found)) == page
    if (ROOT / "benchmarks" / "cuda.json").exists():
        on_cuda = json.loads((ROOT / "benchmarks" / "cuda.json").read_text(encoding="utf-8"))
        assert report.put(page, report.cuda_section(on_cuda), "cuda") == page
