"""Tables of the runs of protocol.toml, for docs/evidence.md, and of the archive of earlier editions."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.evidence.methods import METHODS

__all__ = ["archive", "front", "interval", "second_edition", "write"]

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "evidence.md"
BASE_LOSS, ARCHIVE_BASE_LOSS = 3.85399, 3.947002728780111
"""Loss of SmolLM2-135M-Instruct on the general text, and on that of the archive (`lm-base`), before any training."""

COLUMNS = "Accuracy in % after the last task: average over tasks, change since each was trained (backward), last task."


def _complete(protocol: dict[str, Any], results: Any) -> Any:
    """Return the results without those of a method that has not made all its runs of a part."""
    kept = copy.copy(results)
    counts = Counter((cell.part, cell.method) for cell in results.found)
    runs = {
        part: len(protocol[part].get("orders") or protocol[part]["tasks"]) * len(protocol[part]["seeds"])
        for part in ("plane", "sequences", "images")
    }
    kept.found = {
        cell: result
        for cell, result in results.found.items()
        if cell.part in runs and counts[cell.part, cell.method] == runs[cell.part]
    }
    return kept


def frames(results: Any) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the plane (a row for each run and scale) and the sequences (a row for each run), accuracies in points."""
    plane, sequences = [], []
    for cell, result in results.found.items():
        if result["diverged"]:
            continue
        row = {"part": cell.part, "tasks": " > ".join(cell.tasks), "method": cell.method, "seed": cell.seed}
        for scaled, scale in zip(result.get("scaled", ()), (1.0, 0.85, 0.7, 0.5, 0.35), strict=False):
            measured = {"accuracy": 100 * scaled["accuracy"], "forgetting": scaled["general"] - BASE_LOSS}
            plane.append({**row, "scale": scale, **measured})
        if len(cell.tasks) > 1:
            after = [[100 * evaluated[task]["accuracy"] for task in cell.tasks] for evaluated in result["after"]]
            backward = np.mean([after[-1][i] - after[i][i] for i in range(len(cell.tasks) - 1)])
            general = result["after"][-1].get("general", np.nan) - BASE_LOSS
            measured = {"average": np.mean(after[-1]), "backward": backward, "last": after[-1][-1]}
            sequences.append({**row, **measured, "forgetting": general})
    return pd.DataFrame(plane), pd.DataFrame(sequences)


def front(points: pd.DataFrame) -> Callable[[float], float]:
    """Return accuracy as a function of forgetting: the best scale that forgets less, interpolated, constant beyond.

    A run that forgets nothing, or whose loss on general text even falls, counts as forgetting 0.
    """
    ordered = points.assign(forgetting=points["forgetting"].clip(lower=0.0)).sort_values(["forgetting", "accuracy"])
    forgetting, accuracy = [-1e-9, *ordered["forgetting"]], [0.0, *np.maximum.accumulate(ordered["accuracy"])]
    return lambda at: float(np.interp(at, forgetting, accuracy))


def _differences(
    plane: pd.DataFrame, sequences: pd.DataFrame, method: str, measure: str, baseline: str = "lora"
) -> pd.Series[float]:
    """Return the differences from scaled LoRA (in a sequence: from the baseline), by task or order and seed."""
    if (sequences if measure == "sequence" else plane).empty:
        return pd.Series(dtype=float)
    if measure == "sequence":
        texts = sequences[sequences["part"] == "sequences"]
        by = texts.set_index(["tasks", "seed", "method"])["average"].unstack("method")
        return (by[method] - by[baseline]).dropna() if {method, baseline} <= set(by) else pd.Series(dtype=float)
    found = {}
    for (task, seed), group in plane.groupby(["tasks", "seed"]):
        ours, lora = group[group["method"] == method], group[group["method"] == "lora"]
        if ours.empty or lora.empty:
            continue
        if measure == "equal forgetting":
            point = ours[ours["scale"] == 1.0].iloc[0]
            found[task, seed] = point["accuracy"] - front(lora)(point["forgetting"])
        else:
            grid = np.linspace(0, min(ours["forgetting"].max(), lora["forgetting"].max()), 101)
            found[task, seed] = float(np.mean([front(ours)(at) - front(lora)(at) for at in grid]))
    return pd.Series(found, dtype=float)


def interval(values: pd.Series[float], resamples: int, seed: int = 0) -> tuple[float, float, float]:
    """Return the mean over tasks and its 95 % interval, by the bootstrap over tasks and over the seeds of each."""
    groups = [group.to_numpy() for _, group in values.groupby(level=0)]
    source = np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        drawn = [groups[i] for i in source.integers(len(groups), size=len(groups))]
        of_groups = [group[source.integers(len(group), size=len(group))].sum() / len(group) for group in drawn]
        means.append(sum(of_groups) / len(of_groups))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(np.mean([group.mean() for group in groups])), float(low), float(high)


def _verdict(values: pd.Series[float], resamples: int) -> str:
    """Return mean, interval and verdict as cells; a side must also hold without the task that carries it."""
    mean, low, high = interval(values, resamples)
    sign = 1 if low > 0 else -1 if high < 0 else 0
    by_task = values.groupby(level=0).mean()
    if sign and len(by_task) > 1:
        carrier = (sign * by_task).idxmax()
        _, without_low, without_high = interval(values.drop(carrier, level=0), resamples)
        sign = sign if sign * (without_low if sign > 0 else without_high) > 0 else 0
    return f"{mean:+.2f}|{low:+.2f}|{high:+.2f}|{('refuted', 'undecided', 'supported')[sign + 1]}"


def picture(plane: pd.DataFrame, width: int = 760, height: int = 460, edge: int = 50) -> str:
    """Return the plane as SVG: for each method a line through its scales, means over tasks and seeds."""
    means = plane.groupby(["method", "scale"])[["forgetting", "accuracy"]].mean()
    x_end = 1.05 * means["forgetting"].max()
    y_start, y_end = 5 * np.floor(means["accuracy"].min() / 5), 5 * np.ceil(means["accuracy"].max() / 5)
    x = edge + (width - 3 * edge) * means["forgetting"] / x_end
    y = height - edge - (height - 2 * edge) * (means["accuracy"] - y_start) / (y_end - y_start)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-size="12">',
        f'<path d="M{edge} {edge} V{height - edge} H{width - 2 * edge}" stroke="gray" fill="none"/>',
        f'<text x="{edge}" y="{height - 15}">forgetting: rise of the loss on general text, 0 to {x_end:.2f}</text>',
        f'<text x="{edge}" y="{edge - 15}">accuracy, {y_start:.0f} to {y_end:.0f} %, dotted from a = 1.0</text>',
    ]
    methods = sorted(means.index.levels[0], key=lambda method: y[method, 1.0])
    heights: list[float] = []  # of the names beside the plane, which must not overlap
    for method in methods:
        heights.append(max(y[method, 1.0], heights[-1] + 15 if heights else edge))
    for index, (method, at) in enumerate(zip(methods, heights, strict=True)):
        color = f"hsl({137 * index % 360}, 70%, 40%)"  # neighbours differ
        points = [(f"{x[method, scale]:.1f}", f"{y[method, scale]:.1f}") for scale in sorted(means.loc[method].index)]
        path = " ".join(map(",".join, points))
        lines += [
            f'<polyline points="{path}" stroke="{color}" fill="none" stroke-width="{3 if method == "lora" else 1.5}"/>',
            f'<path d="M{" ".join(points[-1])} L{width - 2 * edge} {at:.1f}" stroke="{color}" stroke-dasharray="1 3"/>',
            f'<text x="{width - 2 * edge + 4}" y="{at + 4:.1f}" fill="{color}">{method}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


def _table(frame: pd.DataFrame) -> str:
    """Return a frame in Markdown, its index as columns."""
    flat = frame.reset_index().map(lambda it: f"{it:.2f}".replace("nan", "") if isinstance(it, float) else str(it))
    lines = [list(map(str, flat.columns)), ["---"] * len(flat.columns), *flat.to_numpy().tolist()]
    return "\n".join(f"|{'|'.join(line)}|" for line in lines)


def third_edition(protocol: dict[str, Any], results: Any) -> list[str]:
    """Return the lines about the runs of the protocol, with the methods that have made all runs of a part."""
    plane, sequences = frames(_complete(protocol, results))
    lines = [f"{len(results.found)} runs of version {protocol['version']} are made."]
    verdicts = []
    for claim in protocol["claims"]:
        name = claim["name"]  # in its first row
        for method in claim["methods"]:
            values = _differences(plane, sequences, method, claim["measure"], claim.get("baseline", "lora"))
            if len(values):
                verdicts.append(f"|{name}|{method}|{_verdict(values, protocol['statistics']['resamples'])}|")
                name = ""
    if not verdicts:
        return [*lines, "There is no verdict yet; the earlier editions below are what is known."]
    if not plane.empty:
        unscaled, measured = plane[plane["scale"] == 1.0], ["accuracy", "forgetting"]
        cells = unscaled.groupby(["method", "tasks"])[measured].mean().round(2).astype(str).agg("/".join, axis=1)
        means = unscaled.groupby("method")[measured].mean().join(cells.unstack("tasks"))
        means["about"] = [METHODS[name].about for name in means.index]
        lines += [
            "",
            "## Which should I use, and what does it cost in forgetting?",
            "",
            "The change D of every method is also scaled after training, W0 + a D, which costs nothing: a method is "
            "useful if it is above the curve of scaled LoRA. A task's column has accuracy/forgetting.",
            "",
            _table(means),
            "",
            "![Accuracy over forgetting of each method at five scales of its change](plane.svg)",
        ]
    if not sequences.empty:
        by = sequences.groupby(["part", "method"])[["average", "backward", "last", "forgetting"]].mean()
        table = by.unstack("part").dropna(axis=1, how="all")
        table.columns = [f"{name}, {part}" for name, part in table.columns]
        table["about"] = ["" if name in set(plane.get("method", ())) else METHODS[name].about for name in table.index]
        lines += ["", "## One task after another", "", COLUMNS, "", _table(table)]
    columns = "|claim|method|difference|from|to|verdict|"
    return [*lines, "", "## Verdicts", "", columns, 6 * "|---" + "|", *verdicts]


def archive(path: Path = HERE / "archive.jsonl") -> pd.DataFrame:
    """Return the finalists of the first two editions: a row for each run, at the rate of the lowest validation loss."""
    rows = []
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        cell, result = line["cell"], line["result"]
        if "finalists" in cell["phase"] and not result["diverged"]:
            measured = {"accuracy": 100 * result["test"]["accuracy"], "loss": result["validation"]["loss"]}
            rows.append({**cell, **measured, "forgetting": result.get("general", np.nan) - ARCHIVE_BASE_LOSS})
    frame = pd.DataFrame(rows)
    keys = ["task", "size", "budget", "method"]
    means = frame.groupby([*keys, "rate"], as_index=False)["loss"].mean()
    best = means.loc[means.groupby(keys)["loss"].idxmin(), [*keys, "rate"]]
    return frame.merge(best, on=[*keys, "rate"])


def second_edition() -> list[str]:
    """Return the tables of the archive: accuracy by task and method, and forgetting on the language model."""
    runs = archive()
    runs["examples"] = runs["size"].map(lambda size: size or "all")
    lines = []
    for language in (False, True):
        part = runs[runs["task"].str.startswith("lm-") == language]
        index = ["task", "examples", "budget"]
        shown = part.pivot_table(index=index, columns="method", values="accuracy").round(1).astype(object).fillna("")
        lines += [
            "",
            f"Test accuracy in %, mean over seeds, {'SmolLM2-135M' if language else 'encoders and small models'}:",
        ]
        lines += ["", _table(shown)]
    forgotten = runs.dropna(subset="forgetting").pivot_table(
        index=["task", "examples", "budget"], columns="method", values="forgetting"
    )
    return [*lines, "", "Rise of the loss on general text:", "", _table(forgotten.round(2).astype(object).fillna(""))]


def write(protocol: dict[str, Any], results: Any, page: Path = PAGE) -> None:
    """Write the page, whose text stays and whose tables go between their markers, and its picture."""
    before, _, rest = page.read_text(encoding="utf-8").partition("<!-- third -->\n")
    lines = "\n".join(third_edition(protocol, results)).strip()
    if "plane.svg" in lines:
        page.with_name("plane.svg").write_text(picture(frames(_complete(protocol, results))[0]), encoding="utf-8")
    after = rest.partition("<!-- /third -->")[2]
    page.write_text(f"{before}<!-- third -->\n{lines}\n<!-- /third -->{after}", encoding="utf-8")
