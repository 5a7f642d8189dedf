"""`lorasc-fx report`: the page read by html.parser, its numbers against what the run's files and cascade say."""

from __future__ import annotations

import copy
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from lorasc_fx.cli import main
from lorasc_fx.cli.config import Config, load_config
from lorasc_fx.cli.report import RunRecord
from lorasc_fx.cli.report import page as render
from lorasc_fx.cli.run_folder import RunFolder
from lorasc_fx.cli.training import Setup
from tests.cli.conftest import CONFIG
from tests.cli.long_run import write_long_run
from tests.kit.state import trained_states, weight_states

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Every element with its attributes and those above it; every table as rows of texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], tuple[str, ...]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._open: list[str] = []
        self._caption = ""
        self.feed(text)
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}, tuple(self._open)))
        if tag == "tr" and self._caption:
            self.tables[self._caption].append([])
        if tag in ("td", "th"):
            self.tables[self._caption][-1].append("")
        if tag == "table":
            self._caption = ""
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}, tuple(self._open)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        where = self._open[-1] if self._open else ""
        self.texts.append((tuple(self._open), data))
        if where == "caption":
            self._caption = data.strip()
            self.tables[self._caption] = []
        elif where in ("td", "th"):
            self.tables[self._caption][-1][-1] += data.strip()

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes, _ in self.elements if name == tag]

    def said(self, tag: str) -> str:
        return " ".join(data for where, data in self.texts if tag in where)


def check_page(text: str) -> Page:
    """What holds of every report."""
    page = Page(text)
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert not page.all("script")
    assert not page.all("link")
    for tag, attributes, _ in page.elements:
        for name, value in attributes.items():
            if name.rpartition(":")[2] in ("href", "src", "srcset", "data", "action", "poster"):
                assert value.startswith("#"), f"<{tag} {name}={value!r}> reads from outside"
                assert value[1:] in ids
            if not name.startswith("xmlns"):
                assert "://" not in value, f"<{tag} {name}={value!r}>"
    outside = re.findall(r"url\(([^)]*)\)|@import", "".join(t for where, t in page.texts if "style" in where))
    assert not outside
    for reference in re.findall(r"url\(([^)]*)\)", text):
        assert reference.strip("\"'").removeprefix("#") in ids
    pictures = [a for tag, a, above in page.elements if tag == "svg" and "svg" not in above]
    assert pictures
    for attributes in pictures:
        assert attributes["role"] == "img"
        assert set(attributes["aria-labelledby"].split()) <= set(ids)
    titles = [data for where, data in page.texts if where[-2:] == ("svg", "title")]
    described = [data for where, data in page.texts if where[-2:] == ("svg", "desc")]
    assert len(titles) == len(described) == len(pictures) == len(set(titles))
    assert all(len(each) > 20 for each in described)
    assert page.all("html")[0]["lang"] == "en"
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert len(page.all("h1")) == 1
    return page


def number(text: str) -> float:
    return float(text.replace(",", ""))


MODEL = """
from torch import nn

def build(classes: int = 10) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 12, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, classes),
    )
"""


@dataclass(frozen=True)
class Trained:
    """A run of three stages, and its checkpoint at the end of each."""

    run: Path
    ends: list[Path]
    setup: Setup

    def cascade(self, stage: int) -> lx.Cascade:
        sample = self.setup.sample()
        return lx.load(self.ends[stage - 1], self.setup.model(0).eval(), args=sample.args)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """Train once; the weights hold more numbers than their experts, so that these are there to be compared with."""
    place = tmp_path_factory.mktemp("trained")
    (place / "odd_wide_model.py").write_text(MODEL)
    (place / "wide.toml").write_text(CONFIG.replace("tiny_model", "odd_wide_model").replace("7.*", "6.*"))
    ends = []
    save, threads = lx.save, torch.get_num_threads()

    def keep(cascade: lx.Cascade, folder: Path, **options: Any) -> Path:
        ends.append(place / f"end{len(ends)}")
        save(cascade, ends[-1], **options)
        return save(cascade, folder, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(place)
        patched.syspath_prepend(str(place))
        patched.setattr(lx, "save", keep)
        assert main(["train", "wide.toml", "--spec.noise.strength", "0.5", "--spec.pace", "0.3"]) == 0
        yield Trained(place / "runs" / "wide", ends, Setup.of(load_config(place / "runs" / "wide" / "config.toml")))
    sys.modules.pop("odd_wide_model", None)
    torch.set_num_threads(threads)


def test_the_page_of_a_run_says_what_the_run_was(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(trained.run)]) == 0
    assert capsys.readouterr().out == f"{trained.run}/report.html: the report of wide\n"
    page = check_page((trained.run / "report.html").read_text())
    headings = [data for where, data in page.texts if where[-1:] == ("h2",)]
    assert headings == ["Loss", "Slow beside fast weights", "Experts", "Final delta", "Settings", "Cost", "Sites",
                        "Refusals", "Made with"]  # fmt: skip
    told = page.said("desc")
    assert "Stages end at steps 4, 8, 12." in told
    losses = {line["step"]: line["loss"] for line in RunRecord(trained.run).lines if "loss" in line}
    assert f"to {losses[12]:.4g} at step 12" in told
    settings = dict(page.tables["Settings of the run"][1:])
    assert settings["classes"] == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert settings["learning rate"] == "0.01; in each stage 1 steps of warm-up, cosine decay to 0 times it"
    assert settings["batch size"] == "8"
    cascade = trained.cascade(3)
    sites = page.tables["Sites"][1:]
    assert [row[1] for row in sites] == [site.weight for site in cascade.sites] == ["0.weight", "2.weight"]
    assert [row[6] for row in sites] == [cascade.placements[site.weight] for site in cascade.sites]
    refused = page.tables["Refusals"][1:]
    assert [(row[0], row[1]) for row in refused] == [(each.weight, each.reason.value) for each in cascade.refusals]


def test_experts_and_delta_are_those_of_the_checkpoint(trained: Trained) -> None:
    page = check_page(render(RunRecord(trained.run)))
    experts = {row[1]: row[2:] for row in page.tables["Experts by site"][1:]}
    delta = {row[0]: row[1:] for row in page.tables["Final delta by site"][1:]}
    for weight, state in weight_states(trained.cascade(3)).items():
        total = torch.zeros(state.matrix, dtype=torch.float64)
        assert len(state.experts) == 3
        for place, (coefficient, expert) in enumerate(zip(state.slow, state.experts, strict=True)):
            dense = expert.b.double() @ expert.a.double()
            values = torch.linalg.svdvals(dense)
            share = values[:2] / values[:2].sum()
            assert number(experts[weight][2 * place]) == pytest.approx(dense.norm().item(), rel=1e-3)
            rank = torch.exp(-(share * share.log()).sum()).item()
            assert 1.01 < rank < 2
            assert number(experts[weight][2 * place + 1]) == pytest.approx(rank, rel=1e-3)
            total += coefficient * dense
        values = torch.linalg.svdvals(total)
        norm, ratio, rank, first, second, count = delta[weight]
        assert number(norm) == pytest.approx(total.norm().item(), rel=1e-3)
        assert float(ratio.rstrip("%")) / 100 == pytest.approx((total.norm() / state.base.norm()).item(), abs=1e-4)
        share = values[:6] / values[:6].sum()
        assert number(rank) == pytest.approx(torch.exp(-(share * share.log()).sum()).item(), rel=1e-3)
        assert (number(first), number(second)) == pytest.approx(values[:2].tolist(), rel=1e-3)
        assert count == "6"


def test_slow_stands_beside_fast_as_measured(trained: Trained) -> None:
    """Fast weights of stage t are S_{t-1} + s B A: made by hand from the checkpoints at the ends of stages."""
    record = RunRecord(trained.run)
    assert [row["stage"] for row in record.stages] == [1, 2, 3]
    examples = trained.setup.splits.validation
    batch = examples.batch(torch.arange(len(examples)))
    for row in record.stages:
        cascade = trained.cascade(row["stage"])
        with torch.no_grad(), cascade.weights("slow") as slow:
            logits = slow(*batch.args)
            loss = nn.functional.cross_entropy(logits, batch.labels).item()
            assert row["validation_loss"] == pytest.approx(loss, rel=1e-5)
            assert row["validation"] == (logits.argmax(-1) == batch.labels).double().mean().item()
            by_hand = copy.deepcopy(cascade.model)
            for name, state in weight_states(cascade).items():
                fast = state.base.clone()
                for place, expert in enumerate(state.experts):
                    part = 1.0 if place == len(state.experts) - 1 else 0.3
                    fast += part * (expert.b @ expert.a).view(fast.shape)
                by_hand.get_parameter(name).copy_(fast)
            for name, kept in trained_states(cascade).items():  # slow = start + pace (fast - start)
                start = kept.past.get(row["stage"] - 1, kept.base)
                by_hand.get_parameter(name).copy_(start + (kept.slow - start) / 0.3)
            loss = nn.functional.cross_entropy(by_hand(*batch.args), batch.labels).item()
            assert row["validation_loss_fast"] == pytest.approx(loss, rel=1e-5)
        assert row["validation_loss_fast"] != pytest.approx(row["validation_loss"], rel=3e-4)


def test_a_stopped_run_has_a_page_too_and_steps_made_twice_count_once(trained: Trained, tmp_path: Path) -> None:
    run = tmp_path / "stopped"
    shutil.copytree(trained.run, run)
    folder = RunFolder(run)
    lines = [line for line in folder.metrics.read_text().splitlines() if "result" not in line]
    folder.metrics.write_text("\n".join([*lines[:2], *lines]) + "\n")
    folder.spectrum.unlink()
    assert main(["report", str(run), "--output", str(tmp_path / "page.html")]) == 0
    page = check_page((tmp_path / "page.html").read_text())
    assert "this run has not ended yet" in page.said("header")
    assert "Final delta" not in page.said("h2")
    assert [step for step, _ in RunRecord(run).by_step("loss")] == [2, 4, 6, 8, 10, 12]


def test_long_tables_fold_and_names_are_shown_as_they_are(tmp_path: Path) -> None:
    run = write_long_run(tmp_path / "long")
    assert main(["report", str(run)]) == 0
    page = check_page((run / "report.html").read_text())
    assert len(page.tables["Sites"]) == 1 + 60
    above = [outer for tag, _, outer in page.elements if tag == "table"]
    long = [len(rows) > 13 for rows in page.tables.values()]
    assert ["details" in each for each in above] == long
    assert any(long)
    assert not all(long)
    assert page.tables["Sites"][60][1] == "odd.<b>&.weight"
    scrolls = [a for tag, a, _ in page.elements if tag == "div" and a.get("class") == "scroll"]
    assert all(each["tabindex"] == "0" and each["aria-label"] for each in scrolls)
    assert len(scrolls) == len(page.tables)


def begin(run: Path) -> None:
    RunFolder(run).begin(Config(), resume=False)


def damaged(run: Path) -> None:
    begin(run)
    (run / "cascade.json").write_text("{}")
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": \n')


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda run: None, "absent holds no run: there is no config.toml in it"),
        (begin, "absent has nothing to show yet: cascade.json or metrics.jsonl is missing"),
        (
            lambda run: (begin(run), (run / "results").mkdir()),
            "absent holds a comparison, and this command takes one run",
        ),
        (damaged, "absent/metrics.jsonl: line 2 is not JSON (Expecting value: "),
        (
            lambda run: (damaged(run), (run / "metrics.jsonl").write_text("[]")),
            "absent/metrics.jsonl: line 1 is not a JSON object; the file is damaged: restore it, or train again",
        ),
    ],
)
def test_a_folder_without_a_run_to_show(
    place: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], object], message: str
) -> None:
    make(place / "absent")
    assert main(["report", "absent"]) == 2
    assert f"lorasc-fx: {message}" in capsys.readouterr().err
    assert not (place / "absent" / "report.html").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.jsonl", b"\xff", "line 1 is not JSON ('utf-8' codec can't decode byte 0xff"),
        ("metrics.jsonl", b"[" * 9999, "line 1 is not JSON (it is nested too deeply)"),
        ("cascade.json", b"{}", "line 1 has no key 'model'; the file is damaged: restore it, or train again"),
        ("experts.jsonl", b'{"stage": 1}', "line 1 has no key 'site'; the file is damaged"),
        ("spectrum.json", b'{"a": 3}', "line 1 is not a JSON object; the file is damaged"),
    ],
)
def test_a_damaged_record_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, content: bytes, message: str
) -> None:
    run = write_long_run(tmp_path / "long", sites=4)
    (run / file).write_bytes(content)
    assert main(["report", str(run)]) == 2
    assert capsys.readouterr().err.startswith(f"lorasc-fx: {run / file}: {message}")


REFRESH = '<meta http-equiv="refresh"'


def test_a_page_that_is_watched_follows_the_run_and_ends_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_long_run(tmp_path / "run")
    folder, page = RunFolder(run), run / "report.html"
    cascade, metrics = folder.cascade.read_text(), folder.metrics.read_text().splitlines(keepends=True)
    folder.cascade.unlink()  # the run has only begun
    folder.metrics.write_text("".join(metrics[:12]))
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["report", str(run), "--watch", "0.05"])), daemon=True)
    thread.start()

    def wait_for(text: str) -> str:
        for _ in range(600):
            if page.is_file() and text in (found := page.read_text(encoding="utf-8")):
                return found
            time.sleep(0.05)
        raise AssertionError(f"no page has {text!r}")

    time.sleep(0.2)
    assert not page.exists()
    folder.cascade.write_text(cascade)
    assert REFRESH in wait_for("this run has not ended yet")
    folder.metrics.write_text("".join(metrics[:30]))
    assert REFRESH in wait_for("at step 260;")  # the learning rate of the last line
    folder.metrics.write_text("".join(metrics))
    thread.join(60)
    assert codes == [0]
    assert REFRESH not in page.read_text(encoding="utf-8")
    told = capsys.readouterr().out.splitlines()
    assert [line.endswith("which is still training") for line in told] == [True, False]
