"""The cost model: seconds by hand from given lines, the file of rates, what is chosen and told. Nothing is timed."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

import lorasc_fx as lx
from lorasc_fx.cost import (
    Cheapest,
    ConvUse,
    Line,
    LinearUse,
    Rates,
    beside,
    expect,
    measure,
    merged,
)
from lorasc_fx.cost.model import OPS, use_at, usual, work_of
from lorasc_fx.graph import Record, match
from lorasc_fx.graph.forms import name_of
from lorasc_fx.passes import InsertBranches, MatchSites, Pipeline

Given = Callable[[torch.device, torch.dtype], Rates]

LINES = {
    "down": Line(1, 2, 3),
    "up": Line(10, 1),
    "raise": Line(0, 0, 1),
    "gradient": Line(5, 1, 1),
    "image_down": Line(1, 1),
    "image_up": Line(2, 1),
    "image_raise": Line(3, 1),
    "image_gradient": Line(4, 1),
    "kernel_down": Line(6, 1),
    "kernel_raise": Line(7, 1),
    "kernel_gradient": Line(8, 1),
    "merge": Line(2, 3, 1),
    "add": Line(7, 1),
    "call": Line(11, 0),
    "dense": Line(0, 1),
    "frozen": Line(0, 1),
    "convolve": Line(0, 1),
    "depthwise": Line(9, 1),
}
RATES = Rates(LINES)
EVEN = Rates({**dict.fromkeys(OPS, Line(0, 1e-9)), **dict.fromkeys(("dense", "frozen"), Line(0, 1e-12))})
CPU = torch.device("cpu")


def even(device: torch.device, dtype: torch.dtype) -> Rates:
    """Rates at which every entry costs the same, whatever is done with it."""
    return EVEN


def unasked(device: torch.device, dtype: torch.dtype) -> Rates:
    raise AssertionError("rates were asked for")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache file of the test's own, and a process that knows no rates yet."""
    monkeypatch.setenv("LORASC_FX_CACHE", str(tmp_path / "cache" / "rates.json"))
    monkeypatch.setattr(measure, "_KNOWN", {})
    return tmp_path / "cache" / "rates.json"


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The dtypes for which rates were measured; each measurement finds RATES."""
    found: list[str] = []

    def measured(device: torch.device, dtype: torch.dtype) -> Rates:
        found.append(str(dtype))
        return RATES

    monkeypatch.setattr(measure, "measured", measured)
    return found


def forget() -> None:
    """Be a new process."""
    measure._KNOWN.clear()


# --- seconds ---------------------------------------------------------------------------------------------------------


def test_a_linear_by_hand() -> None:
    """x [10, 3], weight [5, 3], rank 2: 30 entries are read and 50 made."""
    use = LinearUse(tokens=10, inner=3, outer=5, rank=2)
    read = (1 + 30 * 8) + (5 + 30 * 3)  # A x, and the gradient of A
    made = (1 + 50 * 8) + (5 + 50 * 3)  # B^T slope, and the gradient of B
    assert beside(RATES, use) == 11 + read + made + (10 + 50) + 30 * 2 + (7 + 30)
    assert merged(RATES, use) == 11 + read + made + 2 * (2 + 15 * 5)


def test_with_fewer_tokens_than_outputs_the_backward_merges_nothing() -> None:
    use = LinearUse(tokens=4, inner=3, outer=5, rank=2)
    both = (1 + 12 * 8) + (5 + 12 * 3) + (1 + 20 * 8) + (5 + 20 * 3)
    assert merged(RATES, use) == 11 + both + (2 + 15 * 5) + (10 + 12)


def test_branches_that_share_an_input_read_it_once() -> None:
    use = LinearUse(tokens=10, inner=3, outer=5, rank=2)
    own = 11 + (10 + 50) + (1 + 50 * 8) + (5 + 50 * 3)
    stacked = (1 + 30 * 20) + 30 * 6 + (5 + 30 * 7) + (7 + 30)  # at rank 6
    assert beside(RATES, use, sharing=3) == pytest.approx(own + stacked / 3, rel=1e-12)


def test_a_convolution_that_is_a_product() -> None:
    """Image by image, or over rows where channels are innermost: 90 entries are read and 150 made."""
    use = ConvUse(pixels=30, places=30, inner=3, outer=5, kernel=1, rank=2)
    both = (1 + 90) + (4 + 90) + (1 + 150) + (4 + 150)
    assert beside(RATES, use) == 11 + both + (2 + 150) + (3 + 90) + (7 + 90)
    assert merged(RATES, use) == 11 + both + 2 * (2 + 15 * 5)
    rows = ConvUse(pixels=30, places=30, inner=3, outer=5, kernel=1, rank=2, in_rows=True)
    both = (1 + 90 * 8) + (5 + 90 * 3) + (1 + 150 * 8) + (5 + 150 * 3)
    assert beside(RATES, rows) == 11 + both + (10 + 150) + 90 * 2 + (7 + 90)
    assert merged(RATES, rows) == 11 + both + 2 * (2 + 15 * 5) + 2 * (7 + 15)


def test_a_convolution_with_a_kernel_and_a_stride() -> None:
    """3 x 3, stride 2: 10 places of 3 channels unfold to 270 entries; 120 are read and 50 made."""
    use = ConvUse(pixels=40, places=10, inner=3, outer=5, kernel=9, rank=2)
    both = (6 + 270) + (8 + 270) + (1 + 50) + (4 + 50)
    assert beside(RATES, use) == 11 + both + (2 + 50) + (7 + 270) + (7 + 120)
    assert merged(RATES, use) == 11 + both + 2 * (2 + 135 * 5)
    strided = ConvUse(pixels=40, places=10, inner=3, outer=5, kernel=1, rank=2)
    assert beside(RATES, strided) == 11 + (6 + 30) + (8 + 30) + (1 + 50) + (4 + 50) + (2 + 50) + (7 + 30) + (7 + 120)


def test_a_convolution_with_groups() -> None:
    """Six channels, each for itself: 540 multiply-adds, and a weight of 54 entries."""
    use = ConvUse(pixels=10, places=10, inner=6, outer=6, kernel=9, rank=2, groups=6)
    factors = (9 + 270) + 2 * (5 + 54 * 3)
    assert beside(RATES, use) == 11 + factors + (9 + 540) + 2 * (7 + 60)
    assert merged(RATES, use) == 11 + factors + 2 * (2 + 54 * 5)


# --- the fit ---------------------------------------------------------------------------------------------------------


def points(line: Line, *sizes: tuple[float, int]) -> list[measure.Point]:
    return [measure.Point(entries, rank, (line.seconds(entries, rank),) * 3) for entries, rank in sizes]


def test_a_fit_finds_the_line() -> None:
    line = Line(2e-5, 3e-10, 2e-11)
    found = measure.fitted(points(line, (65536, 8), (786432, 8), (786432, 64)))
    assert found.start == pytest.approx(line.start, rel=1e-9)
    assert found.entry == pytest.approx(line.entry, rel=1e-9)
    assert found.product == pytest.approx(line.product, rel=1e-9)
    plain = measure.fitted(points(Line(1e-5, 2e-10), (65536, 0), (786432, 0)))
    assert (plain.start, plain.entry, plain.product) == pytest.approx((1e-5, 2e-10, 0.0), rel=1e-9)


def test_a_fit_of_odd_seconds_has_no_number_below_zero() -> None:
    """A large size that is over-proportionally slow, and a rank that costs more than all the rest."""
    slow = [measure.Point(100.0, 8, (1.0,)), measure.Point(200.0, 8, (9.0,)), measure.Point(200.0, 64, (900.0,))]
    line = measure.fitted(slow)
    assert line.start == 0.0
    assert line.entry == 0.0
    assert line.product == pytest.approx(0.08 / 8, rel=1e-12)


def test_a_busy_machine_is_noticed() -> None:
    calm = {op: points(Line(2e-5, 3e-10), (65536, 8), (786432, 8)) for op in OPS}
    assert not measure.disturbed(calm)
    restless = {op: [measure.Point(1e5, 8, (1e-4, 3e-4, 3e-4)), calm[op][1]] for op in OPS}
    assert measure.disturbed(restless)
    stuck = {op: [measure.Point(65536, 8, (0.004,) * 3), measure.Point(786432, 8, (0.0041,) * 3)] for op in OPS}
    assert measure.disturbed(stuck)
    flat = {op: [calm[op][1], calm[op][1]] for op in OPS}
    assert measure.disturbed(flat)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_operation_is_run(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that counts: of each operation the same seconds, whatever its size."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(measure, "_clock", lambda device: lambda: float(next(ticks)))
    monkeypatch.setattr(measure, "disturbed", lambda found: False)
    monkeypatch.setattr(measure, "BUDGET", 1e9)
    monkeypatch.setattr(measure, "ROUNDS", 1)
    state = torch.get_rng_state()
    found = measure.measured(CPU, dtype)
    assert found is not None
    assert found.lines == dict.fromkeys(OPS, Line(1.0, 0.0))
    assert torch.equal(torch.get_rng_state(), state)


# --- the file --------------------------------------------------------------------------------------------------------


def test_rates_are_measured_once_and_kept(cache: Path, measurements: list[str]) -> None:
    first = measure.rates_of(CPU, torch.float32)
    assert measure.rates_of(CPU, torch.float32) is first
    forget()
    assert measure.rates_of(CPU, torch.float32) == RATES
    assert measurements == ["torch.float32"]
    assert [path.name for path in cache.parent.iterdir()] == ["rates.json"]


def test_rates_are_by_dtype_threads_and_version(
    cache: Path, measurements: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure.rates_of(CPU, torch.float32)
    measure.rates_of(CPU, torch.float64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    measure.rates_of(CPU, torch.float32)
    monkeypatch.setattr(torch, "__version__", "99.0")
    measure.rates_of(CPU, torch.float32)
    assert len(measurements) == 4
    held = json.loads(cache.read_text(encoding="utf-8"))["rates"]
    assert len(held) == 4
    assert all(Rates.from_json(each) == RATES for each in held.values())


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", "[" * 9999, '{"format": 99, "rates": {}}', json.dumps({"format": measure.FORMAT, "rates": []})],
    ids=["empty", "cut", "list", "deep", "format", "no-rates"],
)
def test_a_damaged_file_is_written_anew(
    cache: Path, measurements: list[str], caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    cache.parent.mkdir()
    cache.write_text(damage, encoding="utf-8")
    with caplog.at_level(logging.WARNING, "lorasc_fx"):
        assert measure.rates_of(CPU, torch.float32) == RATES
    assert str(cache) in caplog.text
    forget()
    measure.rates_of(CPU, torch.float32)
    assert len(measurements) == 1


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1.0, "1", None], ids=str)
def test_rates_that_are_none_are_measured_again(cache: Path, measurements: list[str], number: object) -> None:
    cache.parent.mkdir()
    held = {**RATES.to_json(), "add": [0.0, number, 0.0]}
    key = measure.key_of(CPU, torch.float32)
    rates = {key: held, "other": RATES.to_json()}
    cache.write_text(json.dumps({"format": measure.FORMAT, "rates": rates}), encoding="utf-8")
    assert measure.rates_of(CPU, torch.float32) == RATES
    assert len(measurements) == 1
    after = json.loads(cache.read_text(encoding="utf-8"))["rates"]
    assert after == {key: RATES.to_json(), "other": RATES.to_json()}


def test_a_folder_that_cannot_be_written_is_told_of(
    cache: Path, measurements: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.write_text("a file where the folder would be", encoding="utf-8")
    with caplog.at_level(logging.WARNING, "lorasc_fx"):
        assert measure.rates_of(CPU, torch.float32) == RATES
    assert "cannot be written" in caplog.text
    assert measure.rates_of(CPU, torch.float32) == RATES
    assert len(measurements) == 1


def test_a_write_that_fails_leaves_the_old_file(
    cache: Path, measurements: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure.rates_of(CPU, torch.float32)
    before = cache.read_bytes()

    def full(source: str, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    measure.rates_of(CPU, torch.float64)
    assert cache.read_bytes() == before
    assert [path.name for path in cache.parent.iterdir()] == ["rates.json"]


def test_a_busy_machine_is_taken_for_a_usual_one(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "measured", lambda device, dtype: None)
    assert measure.rates_of(CPU, torch.float32) == usual(torch.get_num_threads())
    assert not cache.exists()


def test_what_torch_cannot_run_is_told_of(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lacking(device: torch.device, dtype: torch.dtype) -> Rates:
        raise NotImplementedError("not implemented for 'Half'")

    monkeypatch.setattr(measure, "measured", lacking)
    with caplog.at_level(logging.WARNING, "lorasc_fx"):
        assert measure.rates_of(CPU, torch.float16) == usual(torch.get_num_threads())
    assert "cannot be measured on cpu in torch.float16: not implemented for 'Half'" in caplog.text
    assert not cache.exists()


def test_the_file_stands_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LORASC_FX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert measure.cache_file() == tmp_path / "lorasc_fx" / "rates.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "me")
    assert measure.cache_file() == tmp_path / "me" / ".cache" / "lorasc_fx" / "rates.json"


# --- the choice ------------------------------------------------------------------------------------------------------


class Three(nn.Module):
    """Three products of one input, and a sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) + self.k(x) * self.v(x)


def exported(model: nn.Module, x: Tensor) -> fx.GraphModule:
    found = torch.export.export(model, (x,)).module()
    assert isinstance(found, fx.GraphModule)
    return found


def chosen(graph: fx.GraphModule, rates: Given = even, **options: object) -> list[str]:
    spec = lx.CascadeSpec(**{"targets": ("linear", "conv"), **options})  # type: ignore[arg-type]
    return [site.placement for site in match(graph, Record(), spec, Cheapest(spec, rates)).plan.sites]


def linear(tokens: int, width: int, dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    model = nn.Sequential(nn.Linear(width, width)).to(dtype)
    return exported(model, torch.empty(2, tokens // 2, width, dtype=dtype))


@pytest.mark.parametrize(
    ("tokens", "width", "expected"),
    [(256, 1024, "beside"), (2048, 1024, "merged"), (512, 2048, "beside"), (512, 256, "merged")],
)
def test_the_choice_turns_with_tokens_and_width(tokens: int, width: int, expected: str) -> None:
    """Every entry costs the same: beside moves 3 Tn more than both do, merged 2 n^2, or n^2 + Tn where T < n."""
    assert chosen(linear(tokens, width)) == [expected]


def test_a_gain_within_the_margin_is_none() -> None:
    """For T = 0.7 n merging saves 0.4 n^2 of 4.9 n^2; for T = 0.54 n it saves 0.08 n^2 of 3.8 n^2."""
    assert chosen(linear(716, 1024)) == ["merged"]
    assert chosen(linear(552, 1024)) == ["beside"]


def test_branches_that_would_share_an_input_are_weighed_so() -> None:
    """At T = 2 n alone: 14 n^2 beside, 10 merged. With two others that read x: 8.7 beside."""
    graph = exported(Three(512), torch.empty(1024, 512))
    assert chosen(graph) == ["beside"] * 3
    assert chosen(graph, exclude=("k", "v")) == ["merged"]
    assert chosen(graph, targets=("q",)) == ["merged"]


@pytest.mark.parametrize("groups", [1, 64])
def test_convolutions_are_weighed(groups: int) -> None:
    """Few weights and many places: merged."""
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, groups=groups))
    assert chosen(exported(model, torch.empty(4, 64, 56, 56))) == ["merged"]


def test_a_wide_kernel_over_few_places_stays_beside() -> None:
    model = nn.Sequential(nn.Conv2d(512, 512, 3, padding=1))
    assert chosen(exported(model, torch.empty(1, 512, 7, 7))) == ["beside"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_numbers_stay_beside(dtype: torch.dtype) -> None:
    """The sum W + s B A would be rounded to them."""
    assert chosen(linear(2048, 512, dtype), unasked) == ["beside"]


def test_doubles_are_merged() -> None:
    assert chosen(linear(2048, 512, torch.float64)) == ["merged"]


def test_autocast_stays_beside() -> None:
    graph = linear(2048, 512)
    assert chosen(graph) == ["merged"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert chosen(graph, unasked) == ["beside"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = linear(2048, 512)
    assert chosen(cast, unasked) == ["beside"]


def test_without_sizes_the_branch_stays_beside() -> None:
    assert chosen(fx.symbolic_trace(nn.Sequential(nn.Linear(2048, 2048))), unasked) == ["beside"]


def test_small_ops_ask_for_no_rates() -> None:
    assert chosen(linear(256, 256), unasked) == ["beside"]


@pytest.mark.parametrize("rows", [False, True], ids=["images", "rows"])
def test_a_convolution_is_read_off_its_node(rows: bool) -> None:
    """[2, 6, 9, 8] to [2, 12, 4, 6] in three groups, by a kernel of 3 x 3."""
    model, x = nn.Sequential(nn.Conv2d(6, 12, 3, stride=(2, 1), groups=3)), torch.empty(2, 6, 9, 8)
    graph = exported(model, x.to(memory_format=torch.channels_last) if rows else x)
    node = next(each for each in graph.graph.nodes if name_of(each) == "conv2d")
    found = use_at(node.args[0], node, (12, 2, 3, 3), 4)
    assert found == ConvUse(pixels=144, places=48, inner=6, outer=12, kernel=9, rank=4, groups=3, in_rows=rows)
    assert found.work == work_of(node, "conv2d") == 48 * 12 * 2 * 9


# --- the frozen step -------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Each op that is counted by its multiply-adds: four convolutions (one transposed), attention, two products."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.deep = nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3, groups=64)
        self.thin, self.transposed = nn.Conv2d(64, 32, 1), nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.out = nn.Linear(32, 24)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.thin(self.deep(self.wide(x)))
        rows = y.flatten(2).transpose(1, 2)
        seen = nn.functional.scaled_dot_product_attention(rows[:, None], rows[:, None], rows[:, None])
        return self.transposed(y), self.out(seen), rows @ rows.transpose(1, 2)


MIXED = (2, 64, 14, 13)
WIDE, DEEP, THIN = 2 * 12 * 11 * 64 * 64 * 9, 2 * 10 * 9 * 64 * 9, 2 * 10 * 9 * 64 * 32
TURNED, ATTENDED, PAIRS, OUT = 2 * 10 * 9 * 32 * 16 * 4, 2 * 90 * 90 * 64, 2 * 90 * 90 * 32, 2 * 90 * 32 * 24


def test_multiply_adds_are_those_that_torch_counts() -> None:
    """torch's counter is the judge: its operations are two for each multiply-add."""
    model, x = Mixed(), torch.randn(MIXED)
    with FlopCounterMode(display=False) as counter:
        model(x)
    found = [work_of(node, name_of(node)) for node in exported(model, x).graph.nodes]
    assert 2 * sum(found) == counter.get_total_flops()
    assert sorted(filter(None, found)) == sorted((WIDE, DEEP, THIN, TURNED, ATTENDED, PAIRS, OUT))


def test_the_frozen_step_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and the input's gradient: twice the work with a weight, three times between two inputs."""
    monkeypatch.setattr("lorasc_fx.cost.placement.WORTH", 1)
    lines = dict.fromkeys(OPS, Line(0, 0)) | {"dense": Line(0, 1), "convolve": Line(0, 100), "depthwise": Line(0, 1e4)}
    graph = exported(Mixed(), torch.randn(MIXED))
    found = expect(graph, graph, lambda device, dtype: Rates(lines)).frozen
    dense = 2 * (THIN + OUT) + 3 * (ATTENDED + PAIRS)
    assert found == pytest.approx(dense + 100 * (WIDE + TURNED) + 1e4 * DEEP, rel=1e-12)


def test_what_oneDNN_gains_is_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of the two products with a weight; those of two inputs stay what they are."""
    monkeypatch.setattr("lorasc_fx.cost.placement.WORTH", 1)
    lines = dict.fromkeys(OPS, Line(0, 0)) | {"dense": Line(0, 3), "frozen": Line(0, 1)}
    graph = exported(Mixed(), torch.randn(MIXED))
    for faster in (True, False):
        monkeypatch.setattr("lorasc_fx.branch.products.onednn_is_faster", lambda faster=faster: faster)
        found = expect(graph, graph, lambda device, dtype: Rates(lines)).branches
        assert found == (-2 * 2 * OUT if faster else 0)


def test_a_branch_beside_a_grouped_product_costs_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows [40, 5] meet one matrix [5, 7] each, however many experts there are."""
    monkeypatch.setattr("lorasc_fx.cost.placement.WORTH", 1)
    graph = fx.Graph()
    x, stack = graph.placeholder("x"), graph.get_attr("stack")
    ends = graph.placeholder("ends")
    made = graph.call_function(torch._grouped_mm, (x, stack), {"offs": ends})
    graph.output(made)
    for node, shape in ((x, (40, 5)), (stack, (3, 5, 7)), (made, (40, 7))):
        node.meta["val"] = torch.empty(shape)
    root = nn.Module()
    root.stack = nn.Parameter(torch.zeros(3, 5, 7))
    plain = fx.GraphModule(root, graph)
    adapted = Pipeline([MatchSites(lx.CascadeSpec(rank=2, targets=("experts",))), InsertBranches()])(plain).graph_module
    found = expect(plain, adapted, lambda device, dtype: RATES)
    assert found.placements == {"stack": "beside"}
    assert work_of(made, "_grouped_mm") == 40 * 5 * 7
    assert found.frozen == 2 * 40 * 5 * 7
    assert found.branches == beside(RATES, LinearUse(tokens=40, inner=5, outer=7, rank=2))


# --- what is told ----------------------------------------------------------------------------------------------------


def test_the_summary_tells_placements_and_the_expected_step(cache: Path) -> None:
    """Two products with 2^28 multiply-adds forward and backward, one of them adapted and merged."""
    cache.parent.mkdir()
    held = {measure.key_of(CPU, torch.float32): EVEN.to_json()}
    cache.write_text(json.dumps({"format": measure.FORMAT, "rates": held}), encoding="utf-8")
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))
    cascade = lx.adapt(model, (torch.zeros(1024, 512),), spec=lx.CascadeSpec(targets=("0",)))
    assert cascade.placements == {"0.weight": "merged"}
    frozen = 2 * 2 * 2**28 * 1e-12
    branch = (2 * 512**2 + 4 * 1024 * 512) * 1e-9
    assert cascade.expected_step_ratio == pytest.approx(1 + branch / frozen, rel=1e-12)
    assert "  placements: 1 merged; expected step 3.44 of the frozen model's" in str(cascade).splitlines()


def test_a_guess_is_not_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine too busy to be measured: placements are chosen by the rates of a usual one, no ratio is claimed."""
    monkeypatch.setattr(measure, "measured", lambda device, dtype: None)
    cascade = lx.adapt(nn.Sequential(nn.Linear(256, 256)), (torch.zeros(4096, 256),), spec=lx.CascadeSpec())
    assert cascade.expected_step_ratio is None
    assert "  placements: 1 merged" in str(cascade).splitlines()


def test_a_forced_placement_is_told_as_it_is(cache: Path) -> None:
    cache.parent.mkdir()
    held = {measure.key_of(CPU, torch.float32): EVEN.to_json()}
    cache.write_text(json.dumps({"format": measure.FORMAT, "rates": held}), encoding="utf-8")
    x = torch.zeros(1024, 512)
    ratios = {}
    for where in ("beside", "merged", "weight"):
        cascade = lx.adapt(Three(512), (x,), spec=lx.CascadeSpec(placement=where))  # type: ignore[arg-type]
        assert set(cascade.placements.values()) == {where}
        ratios[where] = cascade.expected_step_ratio
    shared = lx.adapt(Three(512), (x,), spec=lx.CascadeSpec())
    assert set(shared.placements.values()) == {"beside"}
    entries = 1024 * 512
    grown = entries * 3 * 2.5 / 3  # a sum, and a product of two: each reads two and makes one
    frozen = 3 * 2 * 2**28 * 1e-12 + 2 * grown * 1e-9
    assert ratios["beside"] == pytest.approx(1 + 3 * 7 * entries * 1e-9 / frozen, rel=1e-12)
    assert ratios["merged"] == pytest.approx(1 + 3 * (2 * 512**2 + 4 * entries) * 1e-9 / frozen, rel=1e-12)
    assert shared.expected_step_ratio == pytest.approx(1 + (3 * 3 + 4) * entries * 1e-9 / frozen, rel=1e-12)


def test_a_small_model_is_adapted_without_a_measurement(cache: Path, measurements: list[str]) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Conv1d(3, 5, 2))
    cascade = lx.adapt(model, (torch.zeros(2, 3, 6),), spec=lx.CascadeSpec(targets=("linear", "conv"), rank=2))
    assert cascade.expected_step_ratio is None
    assert "  placements: 2 beside" in str(cascade).splitlines()
    assert measurements == []
    assert not cache.exists()


def test_graphs_of_the_fallback_are_expected_together(cache: Path) -> None:
    cache.parent.mkdir()
    held = {measure.key_of(CPU, torch.float32): EVEN.to_json()}
    cache.write_text(json.dumps({"format": measure.FORMAT, "rates": held}), encoding="utf-8")
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))
    args = (torch.zeros(1024, 512),)
    whole = lx.adapt(model, args, spec=lx.CascadeSpec())
    told = (whole.placements, whole.expected_step_ratio)
    broken = lx.adapt(whole.release(), args, spec=lx.CascadeSpec(), frontend="graph-breaks")
    assert told[1] is not None
    assert (broken.placements, broken.expected_step_ratio) == (told[0], pytest.approx(told[1], rel=1e-12))


def test_nothing_is_expected_of_a_graph_without_sizes() -> None:
    graph = fx.symbolic_trace(nn.Sequential(nn.Linear(2048, 2048)))
    assert expect(graph, graph, unasked).ratio is None
