"""`lorasc-fx report`: the page is parsed by html.parser, and compared with the files and the cascade of the run."""

from __future__ import annotations

import copy
import json
import math
import shutil
import sys
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
from lorasc_fx.cli.config import Config, DataConfig, ModelConfig, TrainConfig, load_config
from lorasc_fx.cli.report import RunRecord
from lorasc_fx.cli.report import page as render
from lorasc_fx.cli.run_folder import RunFolder
from lorasc_fx.cli.training import Setup
from tests.cli.conftest import CONFIG
from tests.kit.state import trained_states, weight_states

STAGES, STEPS = 5, 100


def write_long_run(path: Path, sites: int = 60) -> Path:
    """Write a run with 5 stages of 100 steps and this many sites. The last site has an unusual name."""
    folder = RunFolder(path)
    config = Config(
        model=ModelConfig("timm:vit_small"), data=DataConfig("rotten-tomatoes"), train=TrainConfig(stages=5)
    )
    folder.begin(config)
    kinds = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    names = [f"encoder.blocks.{number // 4}.{kinds[number % 4]}.weight" for number in range(sites - 1)]
    names.append("odd.<b>&.weight")
    about = {
        "model": "VisionTransformer", "frontend": "export", "parameters": 21_900_000, "trainable": 1_400_000,
        "unreached": ["head_dist.weight"], "refused_frontends": [],
        "sites": [
            {"weight": name, "kind": "linear", "shape": [1536, 384], "rank": 8, "scale": 2.0,
             "placement": "merged" if number % 3 else "beside", "parameters": 15_360}
            for number, name in enumerate(names)
        ],
        "refusals": [
            {"weight": f"encoder.blocks.{number}.norm1.weight", "node": "", "reason": "not-targeted",
             "sentence": "matches no target of the spec"}
            for number in range(20)
        ],
    }  # fmt: skip
    folder.cascade.write_text(json.dumps(about))
    for step in range(10, STAGES * STEPS + 1, 10):
        stage = (step - 1) // STEPS + 1
        loss = 0.3 + 2 * math.exp(-step / 120) + 0.15 * math.sin(step) + 0.4 * math.exp(-((step - 1) % STEPS) / 10)
        folder.log(step=step, stage=stage, loss=loss, lr=1e-3, seconds=0.05 * step)
        if step % STEPS == 0:
            fast = 0.5 + 0.09 * stage
            folder.log(step=step, stage=stage, validation_fast=fast, validation_loss_fast=1.2 / stage)
            folder.log(step=step, stage=stage, validation=fast - 0.08 / stage, validation_loss=1.5 / stage)
            with folder.experts.open("a", encoding="utf-8") as file:
                for number, name in enumerate(names):
                    norm = (1 + 0.5 * math.sin(number)) / stage
                    rank = 4 + 3 * math.cos(number * stage)
                    file.write(json.dumps({"stage": stage, "site": name, "norm": norm, "effective_rank": rank}) + "\n")
    folder.log(event="result", test=0.912, **{"rotten-tomatoes-shifted": 0.734})
    return path


class Page(HTMLParser):
    """Collects the tables of a page as rows of texts, the texts of its chart, and its elements with attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.chart: list[str] = []
        self._open, self._caption = "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag
        if tag == "tr":
            self.tables[self._caption].append([])
        if tag in ("td", "th"):
            self.tables[self._caption][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "caption":
            self._caption = data
            self.tables[data] = []
        elif self._open in ("td", "th"):
            self.tables[self._caption][-1][-1] += data
        elif self._open == "text":
            self.chart.append(data)


def check_page(text: str) -> Page:
    """Assert that the page loads nothing from elsewhere, and return it."""
    page = Page(text)
    assert not {"script", "link", "img"} & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        links = [value for name, value in attributes.items() if name.rpartition(":")[2] in ("href", "src")]
        assert all(link.startswith(("#", "data:")) for link in links), links
    assert "@import" not in text
    return page


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
    """A run of three stages, and its checkpoints at the ends of the stages."""

    run: Path
    ends: list[Path]
    setup: Setup

    def cascade(self, stage: int) -> lx.Cascade:
        call = self.setup.call(0)
        call["model"].eval()
        return lx.load(self.ends[stage - 1], **call)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """Train once. The weights are larger than their experts, so the experts are not collapsed and can be compared."""
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


def test_the_page_of_a_run(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(trained.run)]) == 0
    assert capsys.readouterr().out == f"{trained.run}/report.html: report of wide\n"
    page = check_page((trained.run / "report.html").read_text())
    assert "training loss; lines where a stage ends" in page.chart
    assert {"norm of each expert", "validation loss by stage", "slow", "fast"} <= set(page.chart)
    facts = dict(page.tables["Run"][1:])
    assert facts["classes"] == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert facts["learning rate"] == "0.01, cosine decay to 0 of it, 1 steps of warm-up"
    assert (facts["steps"], facts["stages ended"], facts["torch"]) == ("12", "3 of 3", torch.__version__)
    cascade = trained.cascade(3)
    sites = page.tables["Sites"][1:]
    assert [row[1] for row in sites] == [site.weight for site in cascade.sites] == ["0.weight", "2.weight"]
    assert [row[6] for row in sites] == [cascade.placements[site.weight] for site in cascade.sites]
    refused = page.tables["Weights that are not adapted"][1:]
    assert [(row[0], row[1]) for row in refused] == [(each.weight, each.reason.value) for each in cascade.refusals]


def test_experts_equal_the_checkpoints(trained: Trained) -> None:
    head, *rows = check_page(render(RunRecord(trained.run))).tables["Experts by site"]
    experts = {row[0]: dict(zip(head[1:], map(float, row[1:]), strict=True)) for row in rows}
    for weight, state in weight_states(trained.cascade(3)).items():
        assert len(state.experts) == 3
        for stage, expert in enumerate(state.experts, start=1):
            values = torch.linalg.svdvals(expert.b.double() @ expert.a.double())
            share = values[:2] / values[:2].sum()
            rank = torch.exp(-(share * share.log()).sum()).item()
            assert 1.01 < rank < 2
            assert experts[weight][f"norm, stage {stage}"] == pytest.approx(values.norm().item(), rel=1e-3)
            assert experts[weight][f"effective rank, stage {stage}"] == pytest.approx(rank, rel=1e-3)


def test_slow_and_fast_accuracies(trained: Trained) -> None:
    """The fast weights of stage t are S_{t-1} + s B A, computed from the checkpoints at the ends of the stages."""
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


def test_a_stopped_run_has_a_page_without_repeated_steps(trained: Trained, tmp_path: Path) -> None:
    run = tmp_path / "stopped"
    shutil.copytree(trained.run, run)
    folder = RunFolder(run)
    lines = [line for line in folder.metrics.read_text().splitlines() if "result" not in line]
    folder.metrics.write_text("\n".join([*lines[:2], *lines]) + "\n")
    assert main(["report", str(run), "--output", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    check_page(text)
    assert "this run has not ended yet" in text
    assert [step for step, _ in RunRecord(run).by_step("loss")] == [2, 4, 6, 8, 10, 12]


def test_long_tables_are_collapsed_and_names_are_unchanged(tmp_path: Path) -> None:
    run = write_long_run(tmp_path / "long")
    assert main(["report", str(run)]) == 0
    page = check_page((run / "report.html").read_text())
    assert len(page.tables["Sites"]) == 1 + 60
    long = [len(rows) > 13 for rows in page.tables.values()]
    assert [tag for tag, _ in page.elements].count("details") == sum(long) > 0
    assert not all(long)
    assert page.tables["Sites"][60][1] == "odd.<b>&.weight"


def begin(run: Path) -> None:
    RunFolder(run).begin(Config())


def damaged(run: Path) -> None:
    begin(run)
    (run / "cascade.json").write_text("{}")
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": \n')


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda run: None, "absent is not a run folder: there is no config.toml in it"),
        (begin, "absent has nothing to report yet: cascade.json or metrics.jsonl is missing"),
        (
            lambda run: (begin(run), (run / "results").mkdir()),
            "absent has nothing to report yet: no run of the comparison has ended",
        ),
        (damaged, "absent/metrics.jsonl: line 2 is not JSON (Expecting value: "),
        (
            lambda run: (damaged(run), (run / "metrics.jsonl").write_text("[]")),
            "absent/metrics.jsonl: line 1 is not a JSON object. The file is damaged: restore it, or train again",
        ),
    ],
)
def test_a_folder_without_a_run(
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
        ("environment.json", b"[3]", "line 1 is not a JSON object. The file is damaged"),
    ],
)
def test_a_damaged_record_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, content: bytes, message: str
) -> None:
    run = write_long_run(tmp_path / "long", sites=4)
    (run / file).write_bytes(content)
    assert main(["report", str(run)]) == 2
    assert capsys.readouterr().err.startswith(f"lorasc-fx: {run / file}: {message}")


def test_a_comparison_has_a_report(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tables equal the tables that `compare` prints. Each note is one paragraph."""
    asked = ["--compare.methods", "lora", "lorasc", "--compare.lrs", "0.01", "0.02", "--train.steps", "6"]
    assert main(["compare", "tiny.toml", *asked]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Note: stages of 2 steps are short" in printed
    assert "(compare.rates)" in printed
    assert main(["report", "runs/tiny"]) == 0
    page = check_page((place / "runs" / "tiny" / "report.html").read_text())
    accuracies, differences = page.tables.values()
    assert [row[0] for row in accuracies] == ["method", "lora", "lorasc"]
    assert {row[1] for row in differences[1:]} == {"test", "blur", "mnist5k"}
    assert all(cell in printed for row in accuracies[1:] for cell in row)
    paragraphs = (place / "runs" / "tiny" / "report.html").read_text().count("<p>")
    assert paragraphs == 1 + 2 + 3 + 1  # the lead, a note per method, the caption, and a note on the differences
