"""The benchmark measures what it says: a tiny model through all of it, and counts that can be made by hand."""

from __future__ import annotations

import copy
import fnmatch
import itertools
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.integrations import moe

import lorasc_fx as lx

pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from benchmarks import __main__ as command
from benchmarks import compiled, curves, models, report
from benchmarks.costs import ROWS, costs
from benchmarks.files import write
from benchmarks.floor import floor_ratio, low_rank_flops, step_flops
from benchmarks.measure import WARM, Turn, Turns, alternate, ratio
from benchmarks.memory import activation_bytes, allowed_bytes
from benchmarks.models import WORKS
from benchmarks.placement_oracle import oracle, placed
from benchmarks.resident import can_measure, resident, resident_all
from benchmarks.rivals import RIVALS, adapted, check_same_work, entries, make, make_all, wrapped
from benchmarks.sites import Recorder
from benchmarks.start import CALLS, STARTS, call, graph_breaks, import_seconds, start
from benchmarks.steps import PAIRS, measured

pytestmark = pytest.mark.slow

TINY = WORKS["tiny"]
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "costs.md"


@pytest.fixture(scope="module")
def row() -> dict[str, Any]:
    return measured(TINY, rounds=2, forced={"other": {"pace": 1.0}})


@pytest.fixture(scope="module")
def paid() -> dict[str, Any]:
    return costs(TINY, repeats=1, stages=2)


def results(row: Mapping[str, Any], paid: Mapping[str, Any]) -> dict[str, Any]:
    return {"about": report.about(2, 2), "steps": {"tiny": row}, "costs": {"tiny": paid}}


def numbers(found: Any) -> list[Any]:
    """The leaves of plain data."""
    if isinstance(found, dict):
        return [leaf for value in found.values() for leaf in numbers(value)]
    return [found]


def test_a_row_is_plain_data_and_complete(row: dict[str, Any], paid: dict[str, Any]) -> None:
    found = json.loads(json.dumps(results(row, paid)))
    assert found["steps"]["tiny"] == row
    assert found["costs"]["tiny"] == paid
    assert set(row["seconds"]) == {*RIVALS, "other"}
    assert set(row["ratios"]) == {*(f"{one}/{other}" for one, other in PAIRS), "ours/other"}
    assert set(row["ratios"]["ours/peft"]) == {"minimum", "median", "paired", "wall"}
    assert set(row["activation"]) == {*RIVALS, "other", "allowed"}
    assert all(set(paid[side]) == set(ROWS) for side in ("ours", "peft"))
    assert all(value > 0 for value in numbers({"seconds": row["seconds"], "ratios": row["ratios"]}))
    assert all(value >= 0 for value in numbers({side: paid[side] for side in ("ours", "peft", "streaming")}))


def test_tables_have_a_cell_for_each_title(row: dict[str, Any], paid: dict[str, Any]) -> None:
    text = report.section(results(row, paid))
    assert "`make bench`" in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    assert len(tables) == 3
    for lines in tables:
        assert len({line.count("|") for line in lines}) == 1
        assert lines[2].startswith("| tiny | ")
    first = row["ratios"]["ours/frozen"]
    assert tables[0][2].startswith(f"| tiny | {first['minimum']:.2f} ({first['paired']:.2f}) | ")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's call
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # YOSO's own
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's, of it
def test_what_comes_before_the_first_step(row: dict[str, Any], paid: dict[str, Any], tmp_path: Path) -> None:
    once = {"import": import_seconds(1), "call": call(1), "graph breaks": {"yoso": graph_breaks("yoso", 1)}}
    started = {"once": once, "tiny": start(TINY, 1)}
    assert set(started["tiny"]) == {"title", *STARTS}
    assert all(value > 0 for value in numbers({name: started["tiny"][name] for name in STARTS}))
    assert once["import"]["torch"] > 0 < once["import"]["lorasc_fx"]
    assert set(once["call"]) == set(CALLS)
    assert {*once["call"]["forward"]["seconds"]} == {"eager", "peft", "ours"}
    page = tmp_path / "page.md"
    for whole, part in ((True, results(row, paid)), (False, {"about": report.about(2, 2), "start": started})):
        page.write_text(f"{report.BEGIN}\n{report.END}\n")
        write(part, tmp_path, page, whole)
        assert ("after `import torch`" in page.read_text()) == (not whole)
    assert set(once["graph breaks"]["yoso"]) == {"dynamo", "dynamo, trained", "adapt"}
    for made in (
        report.start_table({"tiny": started["tiny"]}),
        report.call_table(once),
        report.graph_breaks_table(once),
    ):
        assert len({line.count("|") for line in made.splitlines()}) == 1
        assert made in page.read_text()


def test_placements_are_held_against_the_others(row: dict[str, Any], paid: dict[str, Any]) -> None:
    found = oracle(TINY, rounds=1)
    assert found["sites"] == {
        "as chosen, again": 0,
        "all beside": 3,
        "all merged": 3,
        "6 x 3 x 3 x 3: beside, here merged": 1,
        "20 x 384: beside, here merged": 1,
        "4 x 20: beside, here merged": 1,
    }
    made = report.placement_table({"tiny": found})
    assert len({line.count("|") for line in made.splitlines()}) == 1
    assert made in report.section({**results(row, paid), "placement": {"tiny": found}})


def test_a_placement_of_the_oracle_is_that_of_the_cascade() -> None:
    weights = {"conv.weight": "merged", "fc.weight": "beside", "head.weight": "merged"}
    with placed(weights):
        cascade = adapted(TINY, TINY.build(), TINY.batch())
    assert {site.weight: site.placement for site in cascade.sites} == weights


@pytest.fixture(scope="module")
def compiled_row() -> dict[str, Any]:
    return compiled.compiled(TINY, rounds=1)


@pytest.mark.skipif(not compiled.can_compile(), reason="inductor needs a C++ compiler")
def test_compiled_models_stand_side_by_side(
    compiled_row: dict[str, Any], row: dict[str, Any], paid: dict[str, Any]
) -> None:
    found = json.loads(json.dumps(compiled_row))
    assert {name: counted["graphs"] for name, counted in found["first"].items()} == dict.fromkeys(compiled.COMPILED, 1)
    assert found["transition"]["ours"]["graphs"] == 0
    assert set(found["transition"]) == {"ours", "peft"}
    seconds = [counted[clock] for counted in found["first"].values() for clock in ("cpu", "wall")]
    assert min(seconds) > 10 * found["transition"]["ours"]["cpu"]  # a compilation, and a step
    assert set(found["ratios"]) == {f"{one}/{other}" for one, other in compiled.PAIRS}
    made = report.compiled_table({"tiny": found})
    assert len({line.count("|") for line in made.splitlines()}) == 1
    first = found["ratios"]["ours/frozen"]
    assert f" | {first['minimum']:.2f} ({first['paired']:.2f}) | " in made
    assert made in report.section({**results(row, paid), "compiled": {"tiny": found}})


def test_a_graph_is_counted_when_it_is_compiled() -> None:
    torch._dynamo.reset()
    frozen = make("frozen", TINY, TINY.build(), TINY.batch())
    rival = replace(frozen, model=torch.compile(frozen.model, backend="eager"))
    more = replace(
        rival, inputs={name: torch.cat([value.detach()] * 2).requires_grad_() for name, value in frozen.inputs.items()}
    )
    assert [compiled._counted(each)["graphs"] for each in (rival, rival, more, more)] == [1, 0, 1, 0]


@pytest.mark.skipif(not compiled.can_compile(), reason="inductor needs a C++ compiler")
def test_a_graph_that_a_timed_step_compiles_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    count = itertools.count()
    monkeypatch.setattr(compiled, "_graphs", lambda: next(count))
    monkeypatch.setattr(torch, "compile", lambda model: model)
    with pytest.raises(RuntimeError, match="tiny: the steps compiled"):
        compiled.compiled(TINY, rounds=1)


class Event:
    """Stands for torch.cuda.Event: the second is recorded 250 ms after the first."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.recorded = False

    def record(self) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded

    def elapsed_time(self, end: Event) -> float:
        assert self.recorded
        assert end.recorded
        return 250.0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is not there: models of `cuda` are on the CPU, in bfloat16 all the same."""
    on = models.on
    monkeypatch.setattr(models, "on", lambda work, device, dtype: on(work, "cpu", dtype))
    peaks = itertools.count(1)
    for name, value in {
        "is_available": lambda: True,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: next(peaks),
        "max_memory_allocated": lambda: next(peaks) * 2**30,
        "get_device_name": lambda: "Stand-in 3000",
        "Event": Event,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


@pytest.mark.usefixtures("gpu")
def test_events_are_the_clock_of_a_gpu() -> None:
    times = alternate({"one": Turn(lambda: None, lambda: None)}, rounds=2, device="cuda")["one"]
    assert times.busy == (0.25, 0.25)
    assert times.to_dict()["cuda"] == {"minimum": 0.25, "median": 0.25}
    assert max(times.wall) < 0.25


@pytest.mark.usefixtures("gpu")
def test_a_gpu_has_a_file_and_a_section_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of the command, the processes apart, which cannot have the stand-in."""

    def here(name: str, threads: int, device: str) -> dict[str, dict[str, int]]:
        return {rival: resident(name, rival, threads, device) for rival in ("frozen", "full", "peft", "ours")}

    folder, page = tmp_path / "benchmarks", tmp_path / "docs" / "costs.md"
    folder.mkdir()
    page.parent.mkdir()
    before = PAGE.read_text(encoding="utf-8")
    page.write_text(before, encoding="utf-8")
    monkeypatch.setattr(command, "HERE", folder)
    monkeypatch.setattr(command, "resident_all", here)
    monkeypatch.setattr(command, "keep_freed", lambda: None)
    level, threads = logging.getLogger("lorasc_fx").level, torch.get_num_threads()
    try:
        command.main(["tiny", "--device", "cuda", "--quick", "--write", "--threads", str(threads)])
    finally:
        logging.getLogger("lorasc_fx").setLevel(level)
    assert [path.name for path in folder.iterdir()] == ["cuda.json"]
    found = json.loads((folder / "cuda.json").read_text(encoding="utf-8"))
    row = found["steps"]["tiny"]
    assert found["about"]["gpu"] == "Stand-in 3000"
    assert row["seconds"]["ours"]["cuda"] == {"minimum": 0.25, "median": 0.25}
    # each process asks for the peak of building, sets it back, and asks for that of the steps; ours twice, by stage
    assert [peaks["step"] / 2**30 for peaks in row["resident"].values()] == [3, 6, 9, 14]
    assert row["resident"]["ours"]["first"] == 12 * 2**30
    assert row["resident"]["ours"]["sites"] == 2 * (6 * 27 + 20 * 384 + 4 * 20)  # bfloat16
    written = page.read_text(encoding="utf-8")
    assert "Stand-in 3000, CUDA " in written
    assert "allocated: ours" in written
    assert report.put(written, report.cuda_section(found), "cuda") == written
    cut = report.MARKERS["cuda"][0]
    assert written.split(cut)[0] == before.split(cut)[0]  # what is of the CPU stays
    assert report.step_table(found["steps"]) in capsys.readouterr().out


def test_what_a_device_does_not_have_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        command.main(["--device", "cuda"])
    assert f"--device cuda: torch {torch.__version__} finds no GPU here" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for arguments, message in (
        (["--device", "cuda", "--only", "costs"], "--only costs is not measured on cuda"),
        (["--device", "cuda", "bert-base"], "no model 'bert-base'; there are vit-l, llama-1b, tiny"),
    ):
        with pytest.raises(SystemExit):
            command.main(arguments)
        assert message in capsys.readouterr().err
    monkeypatch.setattr(command, "can_compile", lambda: False)
    with pytest.raises(SystemExit):
        command.main(["--only", "compiled"])
    assert "install g++" in capsys.readouterr().err


def test_models_of_a_gpu_are_in_bfloat16_there() -> None:
    moved = models.on(TINY, "meta", torch.bfloat16)
    for tensor in (*moved.build().parameters(), *moved.batch().values()):
        assert (tensor.device.type, tensor.dtype) == ("meta", torch.bfloat16)


def test_the_section_takes_the_place_of_the_last_one() -> None:
    page = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    once = report.put(page, "new")
    assert once == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    assert report.put(once, "new") == once
    for broken in ("no markers", page + page, f"{report.END}{report.BEGIN}"):
        with pytest.raises(ValueError, match="once each"):
            report.put(broken, "new")


def test_a_part_takes_the_place_of_what_was_there(row: dict[str, Any], paid: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"{report.BEGIN}\n{report.END}\n", encoding="utf-8")
    found = results(row, paid)
    write(found, tmp_path, page, whole=True)
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == found
    assert page.read_text(encoding="utf-8") == report.put(f"{report.BEGIN}{report.END}\n", report.section(found))
    other = {"about": found["about"], "costs": {"tiny": {**paid, "title": "again"}, "new": paid}}
    write(other, tmp_path, page, whole=False)
    now = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert now["steps"] == found["steps"]
    assert {name: each["title"] for name, each in now["costs"].items()} == {"tiny": "again", "new": "tiny"}
    assert "| again | " in (before := page.read_text(encoding="utf-8"))
    with pytest.raises(SystemExit, match="measure all of it"):
        write({"about": report.about(3, 2), "costs": {}}, tmp_path, page, whole=False)
    assert page.read_text(encoding="utf-8") == before


def test_the_page_has_a_place_for_the_section() -> None:
    for device in report.SECTIONS:
        assert "new" in report.put(PAGE.read_text(encoding="utf-8"), "new", device)


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


def test_unequal_work_is_refused() -> None:
    model, batch = TINY.build(), TINY.batch()
    ours = adapted(TINY, copy.deepcopy(model), batch, rank=2)
    with pytest.raises(RuntimeError, match="not the same work"):
        check_same_work(TINY, ours, wrapped(TINY, model))


def test_what_is_trained_counts_as_changed_between_steps() -> None:
    ours = make("ours", TINY, TINY.build(), TINY.batch())
    trained = next(parameter for parameter in ours.model.parameters() if parameter.requires_grad)
    before = trained._version
    ours.step()
    ours.prepare()
    assert trained._version > before
    assert trained.grad is None


def test_ratios_are_paired_within_rounds() -> None:
    one, other = Turns((2.0, 6.0, 9.0), (1.0, 1.0, 1.0)), Turns((1.0, 2.0, 9.0), (4.0, 4.0, 2.0))
    assert ratio(one, other) == {"minimum": 2.0, "median": 3.0, "paired": 2.0, "wall": 0.25}
    assert one.to_dict()["cpu"] == {"minimum": 2.0, "median": 6.0}


def test_rivals_take_turns() -> None:
    said: list[str] = []
    turns = {name: Turn(lambda: None, lambda name=name: said.append(name)) for name in "abc"}
    times = alternate(turns, rounds=2)
    assert "".join(said) == "".join(name * WARM for name in "abc") + "abc" + "cba"
    assert all(len(time.busy) == len(time.wall) == 2 for time in times.values())


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


def test_a_grouped_product_meets_its_rows() -> None:
    # rows [6, 16] through [16, 24], one expert each: 16 * 24 multiply-adds a row
    stack, x = torch.randn(3, 16, 24), torch.randn(6, 16)
    model = nn.Module()
    model.experts = nn.Parameter(stack)
    ends = torch.tensor([2, 2, 6], dtype=torch.int32)
    site = lx.Site("experts", "experts", (3, 16, 24), lx.plan.SiteOptions(2, 2.0), layout="in_out")
    for product in (torch._grouped_mm, moe.torch.ops.transformers.grouped_mm_fallback):
        with Recorder(model, [site]) as recorder:
            product(x, model.experts, ends)
        recorder.check_all_met()
        assert sum(meeting.flops for meeting in recorder.meetings) == 2 * 6 * 16 * 24
        assert all(meeting.features == 24 for meeting in recorder.meetings)


def test_experts_keep_what_is_allowed() -> None:
    """The Mixtral-like model: a branch beside each grouped product keeps x and x A, which is a hundredth here."""
    work = WORKS["mixtral"]
    model, batch = work.build(), work.batch()
    frozen, ours = make("frozen", work, copy.deepcopy(model), batch), make("ours", work, model, batch)
    allowed = allowed_bytes(frozen.loss, frozen.model, ours.model.sites)
    assert activation_bytes(frozen.loss, frozen.model) < allowed
    assert allowed <= activation_bytes(ours.loss, ours.model) <= 1.10 * allowed


def test_a_view_counts_as_the_storage_that_it_holds() -> None:
    whole = torch.randn(4, 10)
    part, weight = whole[:, :2], torch.randn(2, requires_grad=True)

    def forward() -> torch.Tensor:
        return part * weight

    assert activation_bytes(forward, nn.Module()) == 4 * 40


def test_ours_keeps_what_is_allowed(row: dict[str, Any]) -> None:
    # and x A beside it: conv 8 channels of 8 x 8, fc 8, head 8, in fp32 for 3 images
    assert row["activation"]["ours"] <= row["activation"]["allowed"] + 4 * 3 * (8 * 64 + 8 + 8)


def test_the_floor_is_what_torch_counts_of_peft() -> None:
    batch, model = TINY.batch(), TINY.build()
    sites = adapted(TINY, copy.deepcopy(model), batch).sites
    theirs = make("peft", TINY, copy.deepcopy(model), batch)
    frozen = make("frozen", TINY, model, batch)
    extra = step_flops(theirs.step) - step_flops(frozen.step)
    assert low_rank_flops(frozen.loss, frozen.model, sites) == extra > 0
    assert floor_ratio(frozen.step, frozen.loss, frozen.model, sites) == 1 + extra / step_flops(frozen.step)


def test_a_site_that_nothing_reads_is_told() -> None:
    frozen = make("frozen", TINY, TINY.build(), TINY.batch())
    sites = adapted(TINY, TINY.build(), TINY.batch()).sites
    with pytest.raises(RuntimeError, match=r"conv\.weight and 2 more"):
        low_rank_flops(lambda: torch.zeros(()), frozen.model, sites)


def test_curves(tmp_path: Path) -> None:
    choices = [({"targets": tuple(names)}, {"target_modules": names}) for names in (["fc"], ["fc", "head"])]
    found = {
        "rank": curves.by_rank(1, (1, 2), TINY),
        "sites": curves.by_sites(1, choices, TINY),
        "stages": curves.by_stages(1, 2, TINY),
        "state": curves.state_size(4, 1, TINY),
    }
    assert [row["rank"] for row in found["rank"]] == [1, 2]
    assert [row["sites"] for row in found["sites"]] == [1, 2]
    assert [row["transitions"] for row in found["stages"]] == [0, 1, 2]
    page = tmp_path / "page.md"
    page.write_text(f"{report.BEGIN}\n{report.END}\n", encoding="utf-8")
    about = report.about(1, 9)
    write({"about": about, "curves": {"rounds": 1, **found}}, tmp_path, page, whole=True)
    assert "slow state" in (tmp_path / "curves.svg").read_text(encoding="utf-8")
    written = json.loads((tmp_path / "curves.json").read_text(encoding="utf-8"))
    assert written == {"about": about | {"rounds": 1}, "rounds": 1, **found}


def test_the_size_of_the_state_by_hand() -> None:
    # entries that a rank costs, and those of the weight: conv 33 and 162, fc 404 and 7680, head 24 and 80; fp32
    rows = curves.state_size(5, 4, TINY)
    found = [(row["experts"] / 4, row["dense"] / 4) for row in rows]
    assert found[0] == (0, 0)
    # what is dense is summed in fp64: two entries of fp32 each
    assert found[1] == (4 * 33 + 4 * 404, 2 * 80)  # 96 for the head is more than its weight
    assert found[2] == (8 * 404, 2 * (162 + 80))
    assert found[5][1] == 2 * (162 + 7680 + 80) == 2 * rows[5]["base"] / 4  # each has collapsed


@pytest.mark.skipif(not can_measure(), reason="this system does not tell the peak of a process")
def test_resident_memory_comes_from_a_process_of_its_own() -> None:
    found = resident_all("tiny", 1, ("frozen", "ours-file", "start-file"))
    assert found["ours-file"]["sites"] == found["start-file"]["sites"]
    assert found["frozen"]["step"] > 50 * 2**20  # an interpreter with torch in it
    assert found["frozen"]["built"] > 50 * 2**20
    assert found["start-file"]["sites"] == 4 * (6 * 27 + 20 * 384 + 4 * 20)
    assert found["start-file"]["weights"] == found["start-file"]["sites"] + 4 * (6 + 20 + 4)
    assert 0 <= found["start-file"]["forward"] < 50 * 2**20
    assert 0 <= found["start-file"]["added"] < 50 * 2**20  # of a model of 31 KiB, and no library is imported for it


def test_the_topmost_blocks_are_the_same_to_both() -> None:
    leaves = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "norm1")
    names = [f"blocks.{block}.{leaf}" for block in range(12) for leaf in leaves]
    for count in (1, 2, 12):
        ((ours, theirs),) = curves.topmost((count,), WORKS["vit-s"])
        asked = [name for name in names if any(fnmatch.fnmatchcase(name, target) for target in ours["targets"])]
        assert asked == [name for name in names if re.fullmatch(theirs["target_modules"], name)]
        assert asked == [f"blocks.{block}.{leaf}" for block in range(12 - count, 12) for leaf in leaves[:4]]


def test_the_page_holds_what_was_measured() -> None:
    found = json.loads((ROOT / "benchmarks" / "results.json").read_text(encoding="utf-8"))
    named = {name for name in WORKS if name != "tiny"}
    assert set(found["steps"]) == set(found["costs"]) == named
    page = PAGE.read_text(encoding="utf-8")
    assert report.put(page, report.section(found)) == page
    if (ROOT / "benchmarks" / "cuda.json").exists():
        on_cuda = json.loads((ROOT / "benchmarks" / "cuda.json").read_text(encoding="utf-8"))
        assert report.put(page, report.cuda_section(on_cuda), "cuda") == page


def test_a_profile_tells_low_rank_products_from_those_of_the_base() -> None:
    from benchmarks import profile

    assert profile.kind_of("aten::mm", [[512, 768], [768, 8]]) == "low-rank products"
    assert profile.kind_of("aten::addmm", [[3072], [512, 768], [768, 3072]]) == "base products"
    assert profile.kind_of("aten::add_", [[512, 768], [512, 768]]) == "sums and copies"
    assert profile.kind_of("aten::_softmax", [[8, 12, 128, 128]]) == "the rest"
    shown = profile.profiled("tiny", rounds=1).splitlines()
    assert [line.split("|")[1].strip() for line in shown[2:]] == list(profile.PROFILED)
    frozen, ours, _ = ([float(cell) for cell in line.split("|")[2:6]] for line in shown[2:])
    assert frozen[1] == 0 < ours[1]
    assert frozen[0] > 0
    assert ours[0] > 0
