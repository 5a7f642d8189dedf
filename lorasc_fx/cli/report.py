"""`lorasc-fx report`: writes one self-contained HTML file about a run or a comparison, with charts by matplotlib."""

from __future__ import annotations

import html
import io
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import tyro

from lorasc_fx.cli.compare import Result, best_rates, planned, tables
from lorasc_fx.cli.config import Config, load_config
from lorasc_fx.cli.data import short_name
from lorasc_fx.cli.run_folder import (
    REFUSAL,
    SITE,
    RunFolder,
    check_output,
    read_lines,
    read_record,
    write_atomically,
)
from lorasc_fx.errors import StateError
from lorasc_fx.util.extras import module_of, require

MAX_ROWS = 12
"""Tables with more rows are collapsed. Curves with fewer points have markers."""
MEASURES = ("validation", "validation_fast", "validation_loss", "validation_loss_fast")
Drawing = tuple[str, Callable[[Any], None]]
"""The title of a chart, and a function that draws it on matplotlib axes."""
EXPERTS = {"norm": "norm", "effective_rank": "effective rank"}

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ margin: 1rem auto; max-width: 64rem; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; font-size: .9rem; }}
caption, th, td {{ text-align: left; padding: .2rem .8rem .2rem 0; vertical-align: top; }}
td {{ border-top: 1px solid #ccc; }}
svg {{ width: 100%; height: auto; }}
</style></head><body>
<h1>{title}</h1>
<p>{lead}</p>
{body}
</body></html>
"""


class RunRecord:
    """The records of one run.

    Args:
        run: the run folder.

    Raises:
        StateError: the folder has no run of `train`, the run has no records yet, or a file is damaged.
    """

    def __init__(self, run: Path) -> None:
        folder = RunFolder(run)
        folder.check_run(checkpoint=False)
        if not folder.cascade.is_file() or not folder.metrics.is_file():
            raise StateError(
                f"{run} has nothing to report yet: {folder.cascade.name} or {folder.metrics.name} is missing. A run "
                "writes them in its first steps",
                code="not-available",
            )
        self.name = run.resolve().name
        self.config = load_config(folder.config)
        self.lines = read_lines(folder.metrics)
        self.about = read_record(folder.cascade)
        self.experts = read_lines(folder.experts)  # one record per stage and site
        self.environment = read_record(folder.environment)

    def by_step(self, name: str) -> list[tuple[int, float]]:
        """Return the steps and values of a metric. If a resumed run has repeated a step, the later value is used."""
        return sorted({line["step"]: line[name] for line in self.lines if name in line}.items())

    @cached_property
    def transitions(self) -> list[int]:
        """The steps at which a stage has ended."""
        return sorted({line["step"] for line in self.lines if "validation" in line})

    @cached_property
    def stages(self) -> list[dict[str, Any]]:
        """One row per ended stage: `stage`, `step`, and the metrics of the slow and fast weights."""
        rows: dict[int, dict[str, Any]] = {}
        for line in self.lines:
            if "validation" in line or "validation_fast" in line:
                rows.setdefault(line["stage"], {}).update(line)
        return [rows[stage] for stage in sorted(rows) if "validation" in rows[stage]]

    @cached_property
    def result(self) -> dict[str, float]:
        """Accuracy on the test set and the shifted test sets. Empty before the run has ended."""
        results = [line for line in self.lines if line.get("event") == "result"]
        return {name: value for name, value in results[-1].items() if name != "event"} if results else {}

    @cached_property
    def seconds_per_step(self) -> float | None:
        """Median over the logged intervals in which no stage has ended. None if there is no such interval."""
        timed = [line for line in self.lines if "seconds" in line]
        ends = set(self.transitions)
        rates = [
            (end["seconds"] - start["seconds"]) / (end["step"] - start["step"])
            for start, end in pairwise(timed)
            if end["step"] > start["step"] and end["seconds"] > start["seconds"] and start["step"] not in ends
        ]
        return statistics.median(rates) if rates else None

    def of_experts(self, measure: str) -> dict[int, list[float | None]]:
        """Return a metric of the experts by stage: one value per site, in the order of the model."""
        latest = {(line["stage"], line["site"]): line[measure] for line in self.experts}
        sites = [site["weight"] for site in self.about["sites"]]
        return {stage: [latest.get((stage, site)) for site in sites] for stage in sorted({key[0] for key in latest})}


@dataclass(frozen=True)
class ReportArguments:
    """Write one self-contained HTML page about a run or a comparison.

    For a run, it shows the loss, the slow and fast weights, the experts and the sites. For a comparison, it shows the
    accuracies of the methods and their differences.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Output folder of `train` or `compare`."""
    output: Path | None = None
    """File to write. The default is RUN/report.html."""


def run_report(arguments: ReportArguments) -> int:
    """Write the report of a run or a comparison, and return the exit code."""
    require("report", "matplotlib")
    folder = RunFolder(arguments.run)
    text = comparison_page(folder) if folder.results.exists() else page(RunRecord(arguments.run))
    output = arguments.output or folder.report
    check_output(output, folder=False)
    write_atomically(output, text)
    print(f"{output}: report of {arguments.run.resolve().name}", flush=True)
    return 0


def page(record: RunRecord) -> str:
    """Return the HTML page of a run."""
    config = record.config
    lead = f"{config.model.name} ({record.about['model']}) on {config.data.name}"
    lead += "." if record.result else "; this run has not ended yet."
    stages = [[row["stage"], row["step"], *map(row.get, MEASURES)] for row in record.stages]
    columns = {f"{name}, stage {stage}": values for key, name in EXPERTS.items()
               for stage, values in record.of_experts(key).items()}  # fmt: skip
    sites = record.about["sites"]
    refused = [tuple(refusal[key] for key in REFUSAL) for refusal in record.about["refusals"]]
    refused += [(name, "not reached", "no captured graph uses it") for name in record.about["unreached"]]
    body = [
        charts(_drawings(record)),
        table("Run", ("name", "value"), _facts(record)),
        table("Validation of slow and fast weights at the end of each stage", ("stage", "step", *MEASURES), stages),
        table("Experts by site", ("site", *columns),
              zip([site["weight"] for site in sites], *columns.values(), strict=True) if columns else ()),
        table("Sites", ("number", *SITE), [(number, *map(site.get, SITE)) for number, site in enumerate(sites, 1)]),
        table("Weights that are not adapted", ("weight", "reason", "explanation"), refused),
    ]  # fmt: skip
    return PAGE.format(title=html.escape(f"Run {record.name}"), lead=html.escape(lead), body="\n".join(body))


def comparison_page(folder: RunFolder) -> str:
    """Return the HTML page of a comparison.

    Raises:
        StateError: no run of the comparison has ended, or a file is damaged.
    """
    config = load_config(folder.config)
    runs = planned(config)
    results = [result for run in runs if (result := Result.read(folder.results, run)) is not None]
    if not results:
        raise StateError(
            f"{folder.path} has nothing to report yet: no run of the comparison has ended", code="not-available"
        )
    ended = "" if len(results) == len(runs) else f" {len(results)} of {len(runs)} runs have ended."
    body = [charts(_comparison_drawings(config, results))]
    for content in tables(config, results):
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in content.notes)
        body.append(table(content.title, content.head, content.rows) + notes)
    title, lead = f"Comparison {folder.path.resolve().name}", f"{config.model.name} on {config.data.name}.{ended}"
    return PAGE.format(title=html.escape(title), lead=html.escape(lead), body="\n".join(body))


def _comparison_drawings(config: Config, results: Sequence[Result]) -> Iterator[Drawing]:
    """Yield the title of each chart, and the function that draws it."""
    best = best_rates(results, config.compare.select)
    for part in ("test", *map(short_name, config.data.shifts)):
        values = {
            method: [100 * run.accuracy(part) for run in runs if not run.diverged] for method, runs in best.items()
        }
        yield f"accuracy on {part} in %: each seed, and the mean", partial(_by_method, values)
    ended = [result for result in results if not result.diverged]
    if any(len(config.compare.rates_of(method)) > 1 for method in best):
        yield "validation loss by learning rate, mean of the seeds", partial(_by_rate, ended)


def _by_method(values: Mapping[str, Sequence[float]], axes: Any) -> None:
    for x, accuracies in enumerate(values.values()):
        if accuracies:
            axes.plot([x] * len(accuracies), accuracies, "o", color="C0", alpha=0.5)
            axes.plot([x - 0.2, x + 0.2], [statistics.fmean(accuracies)] * 2, color="C0")
    axes.set_xticks(range(len(values)), values)
    axes.margins(x=0.2)


def _by_rate(results: Sequence[Result], axes: Any) -> None:
    for method in dict.fromkeys(result.method for result in results):
        losses: dict[float, list[float]] = {}
        for result in results:
            if result.method == method:
                losses.setdefault(result.lr, []).append(result.losses["validation"])
        points = [(rate, statistics.fmean(losses[rate])) for rate in sorted(losses)]
        axes.plot(*zip(*points, strict=True), marker="o", label=method)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.legend()


def table(title: str, head: Sequence[str], rows: Any) -> str:
    """Return a table as HTML, collapsed if it is long. Without rows, return an empty text."""
    lines = [f"<tr>{''.join(f'<td>{html.escape(_shown(cell))}</td>' for cell in row)}</tr>" for row in rows]
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    text = f"<table><caption>{html.escape(title)}</caption>\n<tr>{cells}</tr>\n" + "\n".join(lines) + "\n</table>"
    if len(lines) > MAX_ROWS:
        text = f"<details><summary>{html.escape(title)} ({len(lines)} rows)</summary>{text}</details>"
    return text if lines else ""


def _shown(cell: Any) -> str:
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return "–" if cell is None else " × ".join(map(str, cell)) if isinstance(cell, list) else str(cell)


def _facts(record: RunRecord) -> Iterator[tuple[str, Any]]:
    """Yield results, settings, cost and versions."""
    about, train, spec = record.about, record.config.train, record.config.spec
    yield from ((f"accuracy on {part}", value) for part, value in record.result.items())
    yield "steps", max((step for step, _ in record.by_step("loss")), default=0)
    yield "stages ended", f"{len(record.stages)} of {train.stages}"
    yield "pace, noise, restart", f"{spec.pace}, {spec.noise.strength:g}, {spec.restart}"
    yield (
        "learning rate",
        f"{train.lr:g}, {train.decay} decay to {train.floor:g} of it, {train.warmup} steps of warm-up",
    )
    yield "batch size, weight decay", f"{train.batch_size}, {train.weight_decay:g}"
    yield "seeds of run, split, branches", f"{train.seed}, {record.config.data.seed}, {spec.seed}"
    yield "classes", ", ".join(about.get("classes", ())) or "unknown"
    yield "trained parameters", f"{about['trainable']:,} of {about['parameters']:,}"
    yield "median seconds per step", record.seconds_per_step
    yield "front end", about["frontend"]
    yield from ((f"front end {name} refused", reason) for name, reason in about["refused_frontends"])
    versions = record.environment | record.environment.get("packages", {})
    yield from ((name, value) for name, value in versions.items() if value is not None and name != "packages")


# --- charts ----------------------------------------------------------------------------------------------------------


def charts(chosen: Iterator[Drawing]) -> str:
    """Return one SVG element with all charts."""
    drawings = list(chosen)
    matplotlib, figures = module_of("report", "matplotlib"), module_of("report", "matplotlib.figure")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lorasc-fx"}):
        rows = math.ceil(len(drawings) / 2)
        figure = figures.Figure(figsize=(10, 3.2 * rows), layout="constrained")
        for position, (title, draw) in enumerate(drawings, start=1):
            draw(axes := figure.add_subplot(rows, 2, position))
            axes.set_title(title)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    titles = html.escape(", ".join(title for title, _ in drawings))
    return svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{titles}"', 1)


def _drawings(record: RunRecord) -> Iterator[Drawing]:
    """Yield the title of each chart, and the function that draws it."""
    for name, title in (("loss", "training loss"), ("lr", "learning rate")):
        if points := record.by_step(name):
            yield f"{title}; lines where a stage ends", partial(_curve, points, record.transitions)
    for name, title in (("validation", "validation accuracy"), ("validation_loss", "validation loss")):
        if record.stages:
            yield f"{title} by stage", partial(_slow_and_fast, record.stages, name)
    for name, title in EXPERTS.items():
        if record.experts:
            yield f"{title} of each expert", partial(_by_site, record.of_experts(name))


def _curve(points: Sequence[tuple[int, float]], transitions: Sequence[int], axes: Any) -> None:
    axes.plot(*zip(*points, strict=True), marker="o" if len(points) < MAX_ROWS else None)
    for step in transitions:
        axes.axvline(step, color="gray", linestyle=":")
    axes.set_xlabel("step")


def _slow_and_fast(stages: Sequence[Mapping[str, Any]], measure: str, axes: Any) -> None:
    for label, key, marker in (("slow", measure, "o"), ("fast", f"{measure}_fast", "s")):
        points = [(row["stage"], row[key]) for row in stages if row.get(key) is not None]
        axes.plot([stage for stage, _ in points], [value for _, value in points], marker=marker, label=label)
    axes.set_xlabel("stage")
    axes.legend()


def _by_site(values: Mapping[int, Sequence[float | None]], axes: Any) -> None:
    """Draw values as colors. The x axis has the sites in the order of the model, the y axis has the stages."""
    grid = [[math.nan if value is None else value for value in row] for row in values.values()]
    mesh = axes.pcolormesh(range(1, len(grid[0]) + 1), [*values], grid, shading="nearest")
    axes.figure.colorbar(mesh)
    axes.set(xlabel="site, as numbered in the table", ylabel="stage")
