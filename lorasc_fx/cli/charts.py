"""The charts of a report: pure functions from numbers to pictures, whose text can be read on a phone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lorasc_fx.pictures.svg import MUTED, SERIES, Picture, figure, finished, library

WIDTH, HEIGHT = 320.0, 216.0
"""In points. In a phone's column of 343 CSS pixels, the smallest text, of 9 points, has 9.6 pixels."""
FEW = 20
"""A curve of fewer values is not smoothed."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))


def loss_over_steps(losses: Sequence[tuple[int, float]], transitions: Sequence[int]) -> Picture:
    """Draw the training loss, as logged and smoothed, with a line at each transition."""
    steps, values = zip(*losses, strict=True)
    with figure(WIDTH, HEIGHT) as drawn:
        axes = _axes_of_steps(drawn, "loss", transitions)
        mean = smoothed(values) if len(values) >= FEW else []
        faint = {"alpha": 0.35, "linewidth": 0.9} if mean else {"marker": "o", "markersize": 3}
        axes.plot(steps, values, color=SERIES[0], **faint)
        if mean:
            axes.plot(steps, mean, color=SERIES[0])
        if 0 < 50 * min(values) < max(values):
            axes.set_yscale("log")
        where = ", ".join(map(str, transitions)) if transitions else "none yet"
        caption = (
            f"Loss from {values[0]:.4g} at step {steps[0]} to {values[-1]:.4g} at step {steps[-1]}; the lowest is "
            f"{min(values):.4g}. Stages end at steps {where}."
        )
        caption += f" Smoothed it ends at {mean[-1]:.4g}." if mean else ""
        lines = "Training loss over steps" + (", as logged (faint) and smoothed" if mean else "")
        title = f"{lines}; dashed lines are transitions, with the number of the stage that ends"
        return finished(drawn, "loss", title, caption)


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the bias-corrected exponential moving average, whose weights halve in a twentieth of the values."""
    keep = 0.5 ** (20 / len(values))
    total, weight, means = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(total / weight)
    return means


def rate_over_steps(rates: Sequence[tuple[int, float]], transitions: Sequence[int]) -> Picture:
    """Draw the learning rate, as logged, with a line at each transition."""
    steps, values = zip(*rates, strict=True)
    with figure(WIDTH, HEIGHT) as drawn:
        axes = _axes_of_steps(drawn, "learning rate", transitions)
        axes.plot(steps, values, color=SERIES[1])
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        caption = (
            f"From {values[0]:.3g} at step {steps[0]} to {values[-1]:.3g} at step {steps[-1]}; "
            f"at most {max(values):.3g}."
        )
        return finished(drawn, "rate", "Learning rate over steps, as logged", caption)


def _axes_of_steps(drawn: Any, up: str, transitions: Sequence[int]) -> Any:
    """Return axes with a line at each transition, and the number of the ending stage if there are few."""
    axes = _axes(drawn, "step", up)
    for number, step in enumerate(transitions, start=1):
        axes.axvline(step, color=MUTED, linewidth=0.9, linestyle=(0, (3, 3)), zorder=1)
        if len(transitions) <= 12:
            top = axes.get_xaxis_transform()
            axes.text(step, 1.01, str(number), ha="center", va="bottom", fontsize=9, color=MUTED, transform=top)
    return axes


def slow_and_fast(points: Sequence[tuple[int, float | None, float | None]], key: str, measure: str) -> Picture:
    """Draw a measure of slow and fast weights at the end of each stage, from (stage, slow, fast)."""
    with figure(WIDTH, HEIGHT) as drawn:
        axes = _axes(drawn, "stage", measure)
        caption = []
        for index, name in enumerate(("slow", "fast")):
            curve = [(stage, values[index]) for stage, *values in points if values[index] is not None]
            if curve:
                axes.plot(*zip(*curve, strict=True), label=f"{name} weights", markersize=5, **_style(index))
                caption.append(f"{name}: " + ", ".join(f"{value:.4g}" for _, value in curve))
        axes.set_xticks(_ticks([stage for stage, *_ in points]))
        axes.legend(loc="best", fontsize=9)
        title = f"{measure.capitalize()} of slow beside fast weights, at the end of each stage"
        return finished(drawn, key, title, "; ".join(caption) + ".")


def _style(index: int) -> dict[str, Any]:
    """Return a style that distinguishes a curve from others, also without its colour."""
    series = {"marker": MARKERS, "linestyle": DASHES, "color": SERIES}
    return {name: choices[index % len(choices)] for name, choices in series.items()}


def by_site(values: Mapping[int, Sequence[float | None]], key: str, measure: str, sites: int) -> Picture:
    """Draw a measure of each expert as colours: sites across in the model's order, stages downwards."""
    stages = sorted(values)
    finite_values = [number for row in values.values() for number in row if number is not None]
    colours = library("matplotlib").colormaps["viridis"].resampled(32)  # with more, the bar would become an image
    with figure(WIDTH, 96.0 + 15.0 * min(len(stages), 16)) as drawn:
        axes = _axes(drawn, "site (number in the table)", "stage", right=54)
        axes.grid(visible=False)
        field = [[math.nan if number is None else number for number in values[stage]] for stage in stages]
        edges = [number + 0.5 for number in range(sites + 1)], [number + 0.5 for number in range(len(stages) + 1)]
        drawing = axes.pcolormesh(
            *edges,
            field,
            cmap=colours,
            edgecolors="face",
            linewidth=0.4,
            vmin=0,
            vmax=max(finite_values, default=1) or 1,
        )
        axes.set(xlim=(0.5, sites + 0.5), ylim=(len(stages) + 0.5, 0.5))
        axes.set_xticks(_ticks(range(1, sites + 1)))
        rows = _ticks(range(1, len(stages) + 1))
        axes.set_yticks(rows, [str(stages[row - 1]) for row in rows])
        box = axes.get_position()
        bar = drawn.add_axes((box.x1 + 0.03, box.y0, 0.03, box.height))
        drawn.colorbar(drawing, cax=bar).outline.set_visible(False)
        bar.tick_params(labelsize=9, length=3)
        means = [
            f"stage {stage}: mean {sum(finite) / len(finite):.4g}, largest {max(finite):.4g}"
            for stage in stages[:: max(1, len(stages) // 8)]
            if (finite := [number for number in values[stage] if number is not None])
        ]
        caption = f"{sites} sites. " + "; ".join(means) + ". The table below has every number."
        return finished(drawn, key, f"{measure.capitalize()} of each expert, by site and stage", caption)


def spectra(deltas: Mapping[str, Sequence[float]]) -> Picture:
    """Draw the singular values of some deltas, largest first, on a logarithmic axis."""
    with figure(WIDTH, HEIGHT + 15.0 * len(deltas)) as drawn:
        axes = _axes(drawn, "singular value number", "singular value", foot=15.0 * len(deltas))
        caption = []
        for index, (name, values) in enumerate(deltas.items()):
            positive = [number for number in values if number > max(values) * 1e-8]
            axes.plot(range(1, len(positive) + 1), positive, label=_short(name), markersize=3.5, **_style(index))
            caption.append(f"{name}: {len(positive)} values from {positive[0]:.3g} to {positive[-1]:.3g}")
        axes.set_yscale("log")
        axes.set_xticks(_ticks(range(1, max(len(values) for values in deltas.values()) + 1)))
        axes.legend(loc="upper left", bbox_to_anchor=(-0.1, -0.2), fontsize=9, borderaxespad=0)
        title = "Spectrum of the final slow delta, the sites of the largest norms"
        return finished(drawn, "spectrum", title, "; ".join(caption) + ".")


def _axes(drawn: Any, across: str, up: str, foot: float = 0.0, right: float = 10.0) -> Any:
    """Return axes with margins in points, below them `foot` points for a legend."""
    width, height = (72 * inches for inches in drawn.get_size_inches())
    left, top, bottom = 50, 20, 40 + foot
    axes = drawn.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height))
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(visible=True, axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, length=3)
    return axes


def _ticks(numbers: Sequence[int]) -> list[int]:
    """Return at most eight of these numbers, to mark on an axis."""
    numbers = sorted(set(numbers))
    return numbers[:: max(1, math.ceil(len(numbers) / 8))]


def _short(name: str) -> str:
    return name if len(name) <= 42 else f"…{name[-41:]}"
