"""`cascade.draw`: the rewritten graph around some sites, as an SVG file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

from torch import fx

from lorasc_fx.errors import SpecError, path_of
from lorasc_fx.pictures.layout import Placed, placed
from lorasc_fx.pictures.library import library
from lorasc_fx.pictures.neighbourhood import Box, Scene, chosen_sites, scene
from lorasc_fx.pictures.svg import INK, MUTED, Picture, figure, finished
from lorasc_fx.plan import Plan

__all__ = ["draw_graphs"]

LETTER, LINE = 5.1, 11.5
"""Points of a letter and of a line of the boxes' type, a monospaced one of 8.5 points."""
PAD, GAP = 9.0, 22.0
"""Points between a box's text and its edge, and between boxes."""

STYLES = {
    "beside": ("#0969b3", "#dcecf9", "branch beside its op"),
    "merged": ("#b5480b", "#fbe6d8", "branch merged into its op"),
    "weight": ("#7a3fa8", "#efe3f8", "branch on the weight"),
    "shared": ("#00727d", "#d9f1f2", "A x of several branches at once"),
    "site": ("#16784a", "#dcf3e6", "adapted weight"),
    "parameter": (MUTED, "#eef0f3", "other parameter"),
    "input": (INK, "#ffffff", "input or output"),
    "op": (MUTED, "#ffffff", "op of the model"),
}
"""Edge, face and meaning of a box, by kind."""


def draw_graphs(
    graphs: Sequence[fx.GraphModule],
    plan: Plan,
    file: str | PathLike[str],
    sites: Sequence[str] = (),
    radius: int = 2,
) -> Path:
    """Draw rewritten graphs around some sites; see `Cascade.draw`.

    Raises:
        UnknownTarget: a pattern means no site.
        SpecError: the file is no SVG, or its folder is not there; or the radius is no count.
        StateError: no graph has a branch of these sites.
        MissingExtra: matplotlib or igraph is not installed.
    """
    path = path_of(file)
    if path.suffix != ".svg":
        raise SpecError(f"draw: {path} is no .svg file; SVG is what is drawn", code="wrong-file-ending")
    if not path.parent.is_dir():
        raise SpecError(f"draw: there is no folder {path.parent}", code="file-not-found")
    if isinstance(radius, bool) or not isinstance(radius, int) or radius < 0:
        raise SpecError(f"draw: radius is {radius!r}; give the number of arrows to follow, 0 or more")
    chosen = chosen_sites(plan, sites)
    picture = _picture(scene(graphs, plan, chosen, radius), ", ".join(site.weight for site in chosen[:3]))
    path.write_text(picture.svg, encoding="utf-8")
    return path


def _picture(shown: Scene, sites: str) -> Picture:
    patches, paths = library("matplotlib.patches"), library("matplotlib.path")
    names = list(shown.boxes)
    width = max(len(line) for box in shown.boxes.values() for line in box.lines) * LETTER + 2 * PAD
    height = max(len(box.lines) for box in shown.boxes.values()) * LINE + 2 * PAD
    where = placed(names, shown.arrows, width + GAP, height + 1.6 * GAP)
    xs, ys = zip(*[point for path in where.arrows for point in path], *where.centres.values(), strict=True)
    kinds = ["input" if box.kind == "output" else box.kind for box in shown.boxes.values()]
    legend = [kind for kind in STYLES if kind in kinds]
    left, top = min(xs) - width / 2 - GAP, min(ys) - height / 2 - GAP
    across = max(max(xs) - min(xs) + width + 2 * GAP, 260.0)
    down = max(ys) - min(ys) + height + 2 * GAP
    foot = len(legend) * 16 + 26
    with figure(across, down + foot) as drawn:
        axes = drawn.add_axes((0, 0, 1, 1))
        axes.set(xlim=(left, left + across), ylim=(top + down + foot, top))
        axes.axis("off")
        for (source, target), path in zip(shown.arrows, where.arrows, strict=True):
            axes.add_patch(_arrow(path, _tall(shown.boxes[source]), _tall(shown.boxes[target]), patches, paths))
        for name, box in shown.boxes.items():
            _box(axes, box, where.centres[name], width, patches)
        for row, kind in enumerate(legend):
            edge, face, meaning = STYLES[kind]
            y = top + down + 8 + row * 16
            axes.add_patch(
                patches.Rectangle((left + GAP, y - 6), 18, 11, facecolor=face, edgecolor=edge, linewidth=1.2)
            )
            axes.text(left + GAP + 26, y, meaning, fontsize=9, va="center", color=INK)
        y = top + down + 8 + len(legend) * 16
        axes.text(left + GAP, y, "dashed edge: has neighbours that are not shown", fontsize=9, va="center", color=MUTED)
        return finished(drawn, "graph", f"Rewritten graph around {sites}", _words(shown, where))


def _tall(box: Box) -> float:
    return len(box.lines) * LINE + PAD


def _box(axes: Any, box: Box, centre: tuple[float, float], width: float, patches: Any) -> None:
    edge, face, _ = STYLES["input" if box.kind == "output" else box.kind]
    x, y = centre
    tall = _tall(box)
    branch = box.kind in ("beside", "merged", "weight")
    axes.add_patch(
        patches.FancyBboxPatch(
            (x - width / 2 + 4, y - tall / 2),
            width - 8,
            tall,
            boxstyle="round,pad=0,rounding_size=5",
            facecolor=face,
            edgecolor=edge,
            linewidth=2.0 if branch else 1.0,
            linestyle=(0, (4, 2)) if box.cut else "solid",
        )
    )
    for row, line in enumerate(box.lines):
        axes.text(
            x,
            y + (row - (len(box.lines) - 1) / 2) * LINE,
            line,
            ha="center",
            va="center",
            fontsize=8.5,
            family="monospace",
            weight="bold" if row == 0 else "normal",
            color=INK if row < 2 else MUTED,
        )


def _arrow(points: Sequence[tuple[float, float]], above: float, below: float, patches: Any, paths: Any) -> Any:
    """Return an arrow from the lower edge of the first box (`above` high) through the points to the last (`below`)."""
    (x0, y0), (x1, y1) = points[0], points[-1]
    stops = [(x0, y0 + above / 2), *points[1:-1], (x1, y1 - below / 2)]
    vertices, codes = [stops[0]], [paths.Path.MOVETO]
    for (xa, ya), (xb, yb) in pairwise(stops):
        middle = (ya + yb) / 2
        vertices += [(xa, middle), (xb, middle), (xb, yb)]
        codes += [paths.Path.CURVE4] * 3
    return patches.FancyArrowPatch(
        path=paths.Path(vertices, codes),
        arrowstyle="-|>,head_length=4,head_width=2.2",
        color=MUTED,
        linewidth=0.9,
        shrinkA=0,
        shrinkB=0,
        zorder=0.5,
    )


def _words(shown: Scene, where: Placed) -> str:
    """Return what there is to see: the branches by placement, and how much is around them."""
    counted = Counter(box.kind for box in shown.boxes.values())
    told = [f"{counted[kind]} × {STYLES[kind][2]}" for kind in ("beside", "merged", "weight") if counted[kind]]
    branches = "; ".join(
        f"{box.lines[0]}: {box.lines[1]}" for box in shown.boxes.values() if box.kind in ("beside", "merged", "weight")
    )
    return (
        f"{len(shown.boxes)} nodes and {len(where.arrows)} arrows from inputs (above) to outputs (below). "
        f"{', '.join(told)}. {branches}."
    )
