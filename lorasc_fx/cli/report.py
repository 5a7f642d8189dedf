"""`lorasc-fx report`: one HTML file about a run, without scripts, which needs no network."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import tyro

from lorasc_fx.cli.charts import by_site, loss_over_steps, rate_over_steps, slow_and_fast, spectra
from lorasc_fx.cli.config import load_config
from lorasc_fx.cli.report_page import PAGE, STYLE
from lorasc_fx.cli.run_folder import EXPERT, RunFolder, check_output, read_lines, write_whole
from lorasc_fx.errors import SpecError, StateError
from lorasc_fx.pictures import Picture
from lorasc_fx.util.extras import module_of, require


class RunRecord:
    """The records of one run.

    Args:
        run: folder of the run.

    Raises:
        StateError: the folder holds no run of `train`, or one without records yet; or a file is damaged.
    """

    def __init__(self, run: Path) -> None:
        folder = RunFolder(run)
        folder.check_run(checkpoint=False)
        if not folder.cascade.is_file() or not folder.metrics.is_file():
            raise StateError(
                f"{run} has nothing to show yet: {folder.cascade.name} or {folder.metrics.name} is missing. A run "
                "writes them in its first steps; a run of an older version must be run again",
                code="run-has-no-data",
            )
        self.name = run.resolve().name
        self.config = load_config(folder.config)
        self.lines = read_lines(folder.metrics)
        self.about = folder.read_cascade()
        self.experts = read_lines(folder.experts, EXPERT)  # one record per stage and site
        self.spectrum = folder.read_spectrum()  # by site; empty before the end of the run
        self.environment = folder.read_environment()

    def by_step(self, name: str) -> list[tuple[int, float]]:
        """Return the steps and values of a metric. If a resumed run has repeated a step, the later value counts."""
        return sorted({line["step"]: line[name] for line in self.lines if name in line}.items())

    @cached_property
    def transitions(self) -> list[int]:
        """Steps at which a stage ended."""
        return sorted({line["step"] for line in self.lines if "validation" in line})

    @cached_property
    def stages(self) -> list[dict[str, Any]]:
        """One row per ended stage: `stage`, `step`, and the measures of slow and fast weights."""
        rows: dict[int, dict[str, Any]] = {}
        for line in self.lines:
            if "validation" in line or "validation_fast" in line:
                rows.setdefault(line["stage"], {}).update(line)
        return [rows[stage] for stage in sorted(rows) if "validation" in rows[stage]]

    @cached_property
    def result(self) -> dict[str, float]:
        """Accuracy on the test set and its shifts; empty before the end."""
        results = [line for line in self.lines if line.get("event") == "result"]
        return {name: value for name, value in results[-1].items() if name != "event"} if results else {}

    @cached_property
    def seconds_a_step(self) -> float | None:
        """Median over the logged intervals in which no stage ended; None if there are none."""
        timed = [line for line in self.lines if "seconds" in line]
        ends = set(self.transitions)
        rates = [
            (after["seconds"] - before["seconds"]) / (after["step"] - before["step"])
            for before, after in pairwise(timed)
            if after["step"] > before["step"] and after["seconds"] > before["seconds"] and before["step"] not in ends
        ]
        return statistics.median(rates) if rates else None

    @cached_property
    def seconds(self) -> float:
        """Seconds of training and transitions, over all resumptions, each of which counts from 0."""
        seconds = [line["seconds"] for line in self.lines if "seconds" in line]
        return math.fsum(before for before, after in pairwise([*seconds, -1.0]) if after < before)


# --- the page --------------------------------------------------------------------------------------------------------

LONG = 12
"""A table with more rows is collapsed."""
DRAWN = 6
"""Number of spectra that are drawn; the table has all of them."""


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Args:
        title: of the table.
        columns: title and CSS class of each column: `name`, `text`, `sentence`, or "" for numbers.
        rows: of cells.
    """

    title: str
    columns: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[Any]]

    @property
    def folds(self) -> bool:
        """Whether the table is collapsed."""
        return len(self.rows) > LONG


@dataclass(frozen=True)
class Section:
    """A part of the page under one heading."""

    key: str
    title: str
    paragraphs: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class ReportArguments:
    """Write one HTML page about a run, which needs no network: loss, slow and fast weights, experts, spectra, sites."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    output: Path | None = None
    """File to write; RUN/report.html if not given."""
    watch: float = 0.0
    """Write the page again every so many seconds until the run ends, and let the browser reload it; 0: only once."""

    def __post_init__(self) -> None:
        if not 0 <= self.watch < math.inf:
            raise SpecError(f"watch is {self.watch}; give a number of seconds, or 0")


def run_report(arguments: ReportArguments) -> int:
    """Write the report of a run, and return the exit code.

    Raises:
        StateError: the folder holds no run with records.
        SpecError: the file cannot be written there.
        MissingExtra: the extra `report` is not installed.
    """
    require("report", "jinja2", "matplotlib")
    output, seen = arguments.output or RunFolder(arguments.run).report, -1
    while True:
        try:
            record = RunRecord(arguments.run)
        except StateError as fault:
            if not arguments.watch or fault.code != "run-has-no-data":
                raise
            time.sleep(arguments.watch)
            continue
        ended = not arguments.watch or bool(record.result)
        if ended or len(record.lines) != seen:
            check_output(output, folder=False)
            write_whole(output, page(record, 0.0 if ended else arguments.watch))
        if seen < 0 or ended:
            print(f"{output}: the report of {record.name}" + ("" if ended else ", which is still training"), flush=True)
        if ended:
            return 0
        seen = len(record.lines)
        time.sleep(arguments.watch)


def page(record: RunRecord, refresh: float = 0.0) -> str:
    """Return the page as text. A browser reloads it every `refresh` seconds, if that is not 0."""
    jinja2 = module_of("report", "jinja2")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    config, about = record.config, record.about
    spec = config.spec
    paces = spec.pace if isinstance(spec.pace, tuple) else (spec.pace,)
    lead = (
        f"{config.model.name} ({about['model']}) on {config.data.name}: {config.train.stages} stages, pace "
        f"{' then '.join(str(pace) for pace in paces)}, restart {spec.restart}, noise {spec.noise.strength:g}"
        + ("." if record.result else "; this run has not ended yet.")
    )
    sections = [section for section in _sections(record) if section.pictures or section.tables or section.paragraphs]
    text: str = environment.from_string(PAGE).render(
        title=f"Run {record.name}",
        lead=lead,
        style=STYLE,
        refresh=math.ceil(refresh),
        numbers=_numbers(record),
        sections=sections,
    )
    return text.strip() + "\n"


def _numbers(record: RunRecord) -> list[tuple[str, str]]:
    about = record.about
    share = about["trainable"] / max(about["parameters"], 1)
    numbers = [(part, f"{value:.1%}") for part, value in record.result.items()]
    if record.stages:
        numbers.append(("validation", f"{record.stages[-1]['validation']:.1%}"))
    steps = max((step for step, _ in record.by_step("loss")), default=0)
    numbers += [
        ("steps", f"{steps:,}"),
        ("stages ended", f"{len(record.stages)} of {record.config.train.stages}"),
        ("sites", f"{len(about['sites']):,}"),
        ("trained entries", f"{about['trainable']:,} ({share:.2%})"),
    ]
    return numbers


def _sections(record: RunRecord) -> Iterable[Section]:
    losses, rates = record.by_step("loss"), record.by_step("lr")
    pictures = [loss_over_steps(losses, record.transitions)] if losses else []
    pictures += [rate_over_steps(rates, record.transitions)] if rates else []
    yield Section("loss-section", "Loss", (), pictures)
    yield _slow_and_fast(record)
    yield _experts(record)
    yield _spectrum(record)
    yield _settings(record)
    yield _cost(record)
    yield _sites(record)
    yield _refusals(record)
    yield _environment(record)


def _slow_and_fast(record: RunRecord) -> Section:
    rows, title = record.stages, "Slow beside fast weights"
    if not rows:
        return Section("slow-fast", title)
    pictures = []
    for measure, title_of_measure in (("validation", "accuracy"), ("validation_loss", "validation loss")):
        points = [(row["stage"], row.get(measure), row.get(f"{measure}_fast")) for row in rows]
        if any(value is not None for _, *pair in points for value in pair):
            pictures.append(slow_and_fast(points, measure.replace("_", "-"), title_of_measure))
    columns = [(name, "") for name in ("stage", "step", "accuracy, slow", "fast", "loss, slow", "fast")]
    measures = ("validation", "validation_fast", "validation_loss", "validation_loss_fast")
    cells = [(row["stage"], row["step"], *(_number(row.get(name)) for name in measures)) for row in rows]
    about = "Fast weights are the trained ones of the stage, without noise. A release returns the slow weights."
    table = Table("On the validation examples, at the end of each stage", columns, cells)
    return Section("slow-fast", title, (about,), pictures, (table,))


def _experts(record: RunRecord) -> Section:
    stages = sorted({line["stage"] for line in record.experts})
    sites = [site["weight"] for site in record.about["sites"]]
    if not stages or not sites:
        return Section("experts", "Experts")
    latest = {(line["stage"], line["site"]): line for line in record.experts}

    def values(measure: str, stage: int) -> list[float | None]:
        return [latest.get((stage, site), {}).get(measure) for site in sites]

    measures = (("norm", "norm", "norm", "norm"), ("effective_rank", "rank", "effective rank", "eff. rank"))
    pictures = [
        by_site({stage: values(measure, stage) for stage in stages}, key, title_of_measure, len(sites))
        for measure, key, title_of_measure, _ in measures
    ]
    columns = [("no.", ""), ("site", "name")]
    columns += [(f"{short}, stage {stage}", "") for stage in stages for *_, short in measures]
    numbers = [map(_number, values(measure, stage)) for stage in stages for measure, *_ in measures]
    cells = list(zip(range(1, len(sites) + 1), sites, *numbers, strict=True))
    about = (
        "Each stage trains one expert a site, s B A. Its norm is the Frobenius norm; its effective rank is the "
        "exponential of the entropy of its singular values (Roy and Vetterli, 2007): 1 where one direction does all, "
        "the rank where all do as much."
    )
    return Section("experts", "Experts", (about,), pictures, (Table("Experts by site", columns, cells),))


def _spectrum(record: RunRecord) -> Section:
    moved = {name: delta for name, delta in record.spectrum.items() if delta["values"] and max(delta["values"]) > 0}
    if not moved:
        return Section("delta", "Final delta")
    largest = sorted(moved, key=lambda name: -moved[name]["norm"])[:DRAWN]
    columns = [("site", "name")]
    columns += [(title, "") for title in ("norm", "share of W0", "eff. rank", "largest", "second", "values")]
    cells = []
    for name, delta in record.spectrum.items():
        share = f"{delta['norm'] / delta['base_norm']:.2%}" if delta["base_norm"] else "–"
        first, second = [*map(_number, delta["values"][:2]), "–", "–"][:2]
        rank = _number(delta["effective_rank"])
        cells.append((name, _number(delta["norm"]), share, rank, first, second, len(delta["values"])))
    about = (
        "The slow delta S of each site, as the run ended: what a release adds to W0. Singular values come from the "
        "experts' factors; the share is that of the norms."
    )
    picture = spectra({name: moved[name]["values"] for name in largest})
    return Section("delta", "Final delta", (about,), (picture,), (Table("Final delta by site", columns, cells),))


def _facts(key: str, title: str, name: str, rows: Sequence[tuple[str, Any]], value: str, *text: str) -> Section:
    """Return a section with one table of facts, if there are any."""
    table = Table(name, [("what", "text"), (value, "text")], rows)
    return Section(key, title, text, (), (table,) if rows else ())


def _settings(record: RunRecord) -> Section:
    train, spec, classes = record.config.train, record.config.spec, record.about.get("classes", ())
    decay = f"{train.decay} decay to {train.floor:g} times it" if train.floor < 1 else "no decay"
    rows = [
        ("learning rate", f"{train.lr:g}; in each stage {train.warmup} steps of warm-up, {decay}"),
        ("batch size", f"{train.batch_size}"),
        ("weight decay", f"{train.weight_decay:g}"),
        ("seeds", f"run {train.seed}, split {record.config.data.seed}, branches and noise {spec.seed}"),
        ("classes", ", ".join(classes) or "not known"),
    ]
    return _facts("settings", "Settings", "Settings of the run", rows, "value")


def _cost(record: RunRecord) -> Section:
    about = record.about
    counted = Counter(site["placement"] for site in about["sites"])
    branches = sum(site["parameters"] for site in about["sites"])
    step = record.seconds_a_step
    rows = [
        ("entries of the model", f"{about['parameters']:,}"),
        ("trained entries", f"{about['trainable']:,}"),
        ("of these in branches", f"{branches:,}"),
        ("placements", ", ".join(f"{count} {placement}" for placement, count in counted.most_common()) or "–"),
        ("median seconds a step", f"{step:.3g}" if step is not None else "not known"),
        ("seconds of training", f"{record.seconds:.1f}"),
        ("front end", about["frontend"]),
    ]
    rows += [(f"front end {name} refused", reason) for name, reason in about["refused_frontends"]]
    text = "After the last fold none of this cost remains: the released model has the nodes of the original."
    return _facts("cost", "Cost", "Cost of the run", rows, "how much", text)


def _sites(record: RunRecord) -> Section:
    columns = [("no.", ""), ("site", "name"), ("kind", "text"), ("shape", ""), ("rank", ""), ("scale", ""),
               ("branch", "text"), ("entries", "")]  # fmt: skip
    rows = [
        (number, site["weight"], site["kind"], " × ".join(map(str, site["shape"])), site["rank"],
         f"{site['scale']:g}", site["placement"], f"{site['parameters']:,}")
        for number, site in enumerate(record.about["sites"], start=1)
    ]  # fmt: skip
    counted = Counter(site["kind"] for site in record.about["sites"])
    about = f"{len(rows)} weights were adapted: " + ", ".join(f"{n} {kind}" for kind, n in counted.most_common()) + "."
    return Section("sites", "Sites", (about,), (), (Table("Sites", columns, rows),))


def _refusals(record: RunRecord) -> Section:
    refusals, unreached = record.about["refusals"], record.about["unreached"]
    counted = Counter(refusal["reason"] for refusal in refusals)
    counts = [f"{count} {reason}" for reason, count in counted.most_common()]
    if unreached:
        counts.append(f"{len(unreached)} unreached (in no graph)")
    about = f"Weight matrices that have no branch: {', '.join(counts)}." if counts else "Every matrix was adapted."
    columns = [("weight", "name"), ("reason", "text"), ("because", "sentence")]
    rows = [(refusal["weight"], refusal["reason"], refusal["sentence"]) for refusal in refusals]
    rows += [(name, "unreached", "no captured graph uses it") for name in unreached]
    return Section("refusals", "Refusals", (about,), (), (Table("Refusals", columns, rows),) if rows else ())


def _environment(record: RunRecord) -> Section:
    machine = {name: value for name, value in record.environment.items() if name != "packages"}
    versions = machine | record.environment.get("packages", {})
    rows = [(name, value) for name, value in versions.items() if value is not None]
    return _facts("made-with", "Made with", "Machine and packages", rows, "version or value")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
