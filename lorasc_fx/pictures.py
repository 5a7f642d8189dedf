"""Draw the adapted graph around some sites, for `cascade.draw`.

`scene` selects the nodes, `layout_of` arranges them in layers from input to output (Sugiyama layout of igraph), and
matplotlib draws them. igraph and matplotlib are imported on first use.
"""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

from torch import fx

from lorasc_fx.errors import SpecError, StateError, UnknownTarget, nearest, path_of
from lorasc_fx.graph import branch_nodes, text
from lorasc_fx.graph.patterns import targeted
from lorasc_fx.graph.placement import placement_of
from lorasc_fx.graph.printer import type_text
from lorasc_fx.plan import Plan, Site
from lorasc_fx.spec import KINDS
from lorasc_fx.util.checks import is_integer
from lorasc_fx.util.extras import module_of

LETTER, LINE = 5.2, 11.5
"""Width of a letter and height of a line, in points, of the monospaced 8.5 point type in the boxes."""
PAD, GAP = 9.0, 22.0
"""Points between a box's text and its edge, and between boxes."""
TITLE, LEGEND = 18.0, 300.0
"""Height of a title and width of the legend, in points."""

INK, MUTED = "#1f2430", "#68707f"
STYLES = {
    "beside": ("#0969b3", "#dcecf9", "branch beside its op"),
    "merged": ("#b5480b", "#fbe6d8", "branch merged into its op"),
    "weight": ("#7a3fa8", "#efe3f8", "branch on the weight"),
    "site": ("#16784a", "#dcf3e6", "adapted weight"),
    "parameter": (MUTED, "#eef0f3", "other parameter"),
    "input": (INK, "#ffffff", "input or output"),
    "op": (MUTED, "#ffffff", "op of the model"),
}
"""Edge color, face color and legend of a box, by kind."""

ENDINGS = (".svg", ".png", ".pdf")
DEFAULT_SITES = 3
"""Number of sites shown by default."""
MAX_NEIGHBOURS = 12
"""The search does not continue from a node with more neighbours. Otherwise a residual stream would add the whole model.
"""
MAX_LETTERS = 34
"""Maximum letters of a line. The middle of a longer name is replaced by an ellipsis."""


class Picture:
    """A drawing in memory, which a notebook displays.

    Args:
        svg: the drawing as SVG text.
    """

    def __init__(self, svg: str) -> None:
        self.svg = svg

    def _repr_svg_(self) -> str:
        """Return the SVG text for IPython."""
        return self.svg


def draw_graphs(
    graphs: Sequence[fx.GraphModule],
    plan: Plan,
    file: str | PathLike[str] | None,
    sites: Sequence[str],
    radius: int,
) -> Path | Picture:
    """Draw adapted graphs around some sites. Arguments and result are the ones of `Cascade.draw`.

    Raises:
        UnknownTarget: a pattern matches no site.
        SpecError: the ending of the file is not supported, its folder does not exist, or the radius is not a count.
        StateError: no graph has a branch of these sites.
        MissingExtra: igraph or matplotlib is not installed.
    """
    path = None if file is None else path_of(file)
    if path is not None and path.suffix not in ENDINGS:
        raise SpecError(f"draw: {path} must end with one of {', '.join(ENDINGS)}")
    if path is not None and not path.parent.is_dir():
        raise SpecError(f"draw: the folder {path.parent} does not exist; create it", code="unreadable-file")
    if not is_integer(radius, 0):
        raise SpecError(f"draw: radius is {radius!r}; give the number of arrows to follow, 0 or more")
    return _write({"": scene(graphs, plan, chosen_sites(plan, sites), radius)}, path)


def draw_steps(steps: Mapping[str, fx.GraphModule], plan: Plan, file: Path, sites: Sequence[str], radius: int) -> None:
    """Draw one graph after several passes side by side, around the nodes that read some weights.

    Args:
        steps: the graphs by title. They need no branches.
        plan: the sites.
        file: path of the file.
        sites: patterns of the sites to draw, as for `Cascade.draw`.
        radius: number of arrows to follow from the `get_attr` nodes of the weights.
    """
    weights = {site.weight for site in chosen_sites(plan, sites)}
    panels = {}
    for title, graph_module in steps.items():
        reads = [node for node in graph_module.graph.nodes if node.op == "get_attr" and _weight(node, plan) in weights]
        panels[title] = _part(graph_module, _around(reads, radius), plan)
    _write(panels, file)


def _write(panels: Mapping[str, Scene], path: Path | None) -> Path | Picture:
    """Write the drawing to a file and return its path. Without a path, return the picture."""
    with module_of("report", "matplotlib").rc_context({"svg.fonttype": "none", "svg.hashsalt": "lorasc-fx"}):
        figure = _figure(panels)
        buffer = io.StringIO()
        svg = path is None or path.suffix == ".svg"
        figure.savefig(path or buffer, format=None if path else "svg", metadata={"Date": None} if svg else None)
    return path or Picture(buffer.getvalue())


def _figure(panels: Mapping[str, Scene]) -> Any:
    """Return a matplotlib figure of the scenes side by side. Its units are points, with y downwards."""
    patches, figures = (module_of("report", f"matplotlib.{name}") for name in ("patches", "figure"))
    figure = figures.Figure()
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    panel_x = bottom = 0.0
    for title, scene in panels.items():
        width = max(len(line) for box in scene.boxes.values() for line in box.lines) * LETTER + 2 * PAD
        height = max(box.height for box in scene.boxes.values())
        layout = layout_of(list(scene.boxes), scene.arrows, width + GAP, height + 2 * GAP)
        # Move the layout to the right of the previous panel and below the title.
        xs, ys = zip(*[point for path in layout.arrows for point in path], *layout.centres.values(), strict=True)
        across, down = panel_x + width / 2 + GAP - min(xs), (TITLE if title else 0) + height / 2 + GAP - min(ys)
        _draw_scene(axes, scene, layout.moved(across, down))
        if title:
            axes.text(panel_x + GAP, TITLE, title, fontsize=11, fontweight="bold", color=INK)
        panel_x += max(xs) - min(xs) + width + 2 * GAP
        bottom = max(bottom, max(ys) + down + height / 2 + GAP)
    # The legend below the panels has one line per kind, and one for the dashed edges.
    boxes = [box for scene in panels.values() for box in scene.boxes.values()]
    kinds = [kind for kind in STYLES if any(box.kind == kind for box in boxes)]
    right, bottom = max(panel_x, LEGEND), bottom + 16 * (len(kinds) + 1)
    figure.set_size_inches(right / 72, bottom / 72)
    axes.set(xlim=(0, right), ylim=(bottom, 0))
    legend = [
        patches.Patch(edgecolor=STYLES[kind][0], facecolor=STYLES[kind][1], label=STYLES[kind][2]) for kind in kinds
    ]
    legend.append(patches.Patch(edgecolor=MUTED, facecolor="white", linestyle="--", label="has neighbours not shown"))
    axes.legend(handles=legend, loc="lower left", fontsize=9, frameon=False, labelspacing=0.2)
    return figure


def _draw_scene(axes: Any, scene: Scene, layout: Layout) -> None:
    """Draw the arrows and boxes of a scene at the positions of the layout."""
    for (source, target), path in zip(scene.arrows, layout.arrows, strict=True):
        (x0, y0), *between, (x1, y1) = path
        points = [(x0, y0 + scene.boxes[source].height / 2), *between, (x1, y1 - scene.boxes[target].height / 2)]
        axes.plot(*zip(*points, strict=True), color=MUTED, linewidth=0.9, zorder=0)
        style = {"arrowstyle": "-|>", "color": MUTED, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", points[-1], points[-2], arrowprops=style, zorder=0)
    for name, box in scene.boxes.items():
        edge, face, _ = STYLES[box.kind]
        style = {"boxstyle": "round,pad=0.5", "edgecolor": edge, "facecolor": face}
        style |= {"linewidth": 2 if box.is_branch else 1, "linestyle": "--" if box.cut else "-"}
        centre = {"horizontalalignment": "center", "verticalalignment": "center"}
        axes.text(*layout.centres[name], "\n".join(box.lines), bbox=style, family="monospace", fontsize=8.5, **centre)


@dataclass(frozen=True)
class Box:
    """A node in the picture.

    Args:
        kind: key of `STYLES`. `beside`, `merged` and `weight` are branches by placement. `shared` is the stacked
            product of several branches, `site` an adapted weight, `input` an input or an output.
        lines: name, description, and dtype with shape.
        cut: whether the node has neighbours outside the picture.
    """

    kind: str
    lines: tuple[str, ...]
    cut: bool

    @property
    def is_branch(self) -> bool:
        """Whether the node calls a branch."""
        return self.kind in ("beside", "merged", "weight")

    @property
    def height(self) -> float:
        """Height in points."""
        return len(self.lines) * LINE + PAD


@dataclass(frozen=True)
class Scene:
    """The boxes by node name, and the arrows between them as pairs of names."""

    boxes: dict[str, Box]
    arrows: tuple[tuple[str, str], ...]


def chosen_sites(plan: Plan, patterns: Sequence[str]) -> list[Site]:
    """Return the sites that match one of the patterns (kinds or globs, as in a spec). Without patterns, the first few.

    Raises:
        SpecError: `patterns` is a single string.
        UnknownTarget: a pattern matches no site.
    """
    if isinstance(patterns, str):
        raise SpecError(f"draw: sites is {patterns!r}; give a sequence of kinds or globs")
    if not patterns:
        return list(plan.sites[:DEFAULT_SITES])
    for pattern in patterns:
        if not any(targeted((pattern,), site.kind, (site.weight, *site.aliases)) for site in plan.sites):
            hint = nearest(pattern, [*(site.weight for site in plan.sites), *KINDS])
            raise UnknownTarget(f"draw: {pattern!r} matches no site of this cascade{hint}")
    return [site for site in plan.sites if targeted(patterns, site.kind, (site.weight, *site.aliases))]


def scene(graphs: Sequence[fx.GraphModule], plan: Plan, sites: Sequence[Site], radius: int) -> Scene:
    """Return the branch nodes of some sites in all graphs, with the nodes up to `radius` arrows away.

    Raises:
        StateError: no graph has a branch of any of these sites.
    """
    weights = {site.weight for site in sites}
    boxes: dict[str, Box] = {}
    arrows: list[tuple[str, str]] = []
    drawn: set[str] = set()
    for number, graph_module in enumerate(graphs):
        seeds = [node for node, branch in branch_nodes(graph_module).items() if branch.weight_name in weights]
        if not seeds or text(graph_module) in drawn:  # the same graph was captured for another call
            continue
        drawn.add(text(graph_module))
        prefix = f"{number}:" if len(graphs) > 1 else ""
        part = _part(graph_module, _around(seeds, radius), plan, prefix)
        boxes |= part.boxes
        arrows += part.arrows
    if not boxes:
        raise StateError(
            f"draw: no graph calls the branches of {', '.join(sorted(weights)[:3])}, because the model runs eagerly or "
            "the first call did not use these weights. Choose other sites, or see cascade.refused_frontends",
            code="no-graph",
        )
    return Scene(boxes, tuple(arrows))


def _part(graph_module: fx.GraphModule, shown: Collection[fx.Node], plan: Plan, prefix: str = "") -> Scene:
    """Return some nodes of a graph and the arrows between them. The prefix distinguishes nodes of several graphs."""
    branches, symbols = branch_nodes(graph_module), dict[str, str]()
    boxes: dict[str, Box] = {}
    nodes = [node for node in graph_module.graph.nodes if node in shown]
    for node in nodes:
        cut = any(neighbour not in shown for neighbour in (*node.all_input_nodes, *node.users))
        kind = _kind(node, branches, plan)
        boxes[prefix + node.name] = Box(kind, _lines(node, kind, branches, symbols, plan), cut)
    pairs = ((source, node) for node in nodes for source in node.all_input_nodes if source in shown)
    return Scene(boxes, tuple((prefix + source.name, prefix + node.name) for source, node in pairs))


def _around(seeds: Sequence[fx.Node], radius: int) -> set[fx.Node]:
    """Return the nodes up to `radius` arrows away from the seeds, by breadth-first search."""
    reached = set(seeds)
    frontier = list(seeds)
    for _ in range(radius):
        next_frontier = []
        for node in frontier:
            neighbours = [*node.all_input_nodes, *node.users]
            if node in seeds or len(neighbours) <= MAX_NEIGHBOURS:
                next_frontier += [neighbour for neighbour in neighbours if neighbour not in reached]
                reached.update(neighbours)
        frontier = next_frontier
    return reached


def _kind(node: fx.Node, branches: dict[fx.Node, Any], plan: Plan) -> str:
    """Return the kind of a node's box, a key of `STYLES`."""
    if node in branches:
        return placement_of(node)
    if node.op == "get_attr":
        return "site" if _weight(node, plan) in plan.by_weight else "parameter"
    return "input" if node.op in ("placeholder", "output") else "op"


def _lines(
    node: fx.Node, kind: str, branches: dict[fx.Node, Any], symbols: dict[str, str], plan: Plan
) -> tuple[str, ...]:
    """Return the lines of a node's box: name, description, and dtype with shape if they are known."""
    if node in branches:
        placement = {"beside": "beside the op", "merged": "merged into the op", "weight": "on the weight"}[kind]
        name, description = branches[node].weight_name, f"branch, rank {branches[node].rank}, {placement}"
    elif node.op == "get_attr":
        name, description = _weight(node, plan), "weight" if kind == "site" else "parameter"
    elif kind == "input":
        name, description = node.name, "output" if node.op == "output" else "input"
    else:
        target = node.target if isinstance(node.target, str) else fx.node._get_qualified_name(node.target)
        op = re.sub(r"^(torch\.ops\.|torch\._C\._nn\.|torch\.nn\.functional\.|torch\.|_operator\.)", "", target)
        name, description = node.name, _short(op.removesuffix(".default").removeprefix("model."))
    dtype_shape = type_text(node.meta.get("val"), symbols)
    return (_short(name), description, *([_short(dtype_shape)] if dtype_shape else []))


def _weight(node: fx.Node, plan: Plan) -> str:
    """Return the name of a parameter. Graphs of a cascade read `model.NAME`; folded graphs own it as `NAME`."""
    name = str(node.target)
    return name if name in plan.by_weight else name.removeprefix("model.")


def _short(name: str) -> str:
    """Return a name of at most MAX_LETTERS letters, with an ellipsis in the middle of a longer one."""
    return name if len(name) <= MAX_LETTERS else f"{name[: MAX_LETTERS // 2 - 1]}…{name[-(MAX_LETTERS // 2) :]}"


Point = tuple[float, float]


@dataclass(frozen=True)
class Layout:
    """The positions of boxes and arrows, in points, with y downwards.

    Args:
        centres: centre of each box, by name.
        arrows: the points of each arrow, from source to target.
    """

    centres: Mapping[str, Point]
    arrows: Sequence[Sequence[Point]]

    def moved(self, across: float, down: float) -> Layout:
        """Return the layout, moved by a distance."""
        centres = {name: (x + across, y + down) for name, (x, y) in self.centres.items()}
        return Layout(centres, [[(x + across, y + down) for x, y in path] for path in self.arrows])


def layout_of(names: Sequence[str], arrows: Sequence[tuple[str, str]], across: float, down: float) -> Layout:
    """Return the layout of an acyclic graph.

    Args:
        names: names of the boxes in topological order.
        arrows: pairs of names (source, target).
        across: distance in points between the centres of two neighbours in a layer.
        down: distance in points between two layers.

    Raises:
        MissingExtra: igraph is not installed.
    """
    igraph = module_of("report", "igraph")
    index = {name: number for number, name in enumerate(names)}
    layers = _layers(names, arrows)
    edges: list[tuple[int, int]] = []
    routes = []
    # An arrow over several layers gets a point in each layer that it crosses, so that it bends around boxes.
    for source, target in arrows:
        between = range(layers[index[source]] + 1, layers[index[target]])
        route = [index[source], *range(len(layers), len(layers) + len(between)), index[target]]
        layers += between
        edges += pairwise(route)
        routes.append(route)
    graph = igraph.Graph(len(layers), edges, directed=True)
    layout = graph.layout_sugiyama(layers=layers, hgap=across, vgap=down, maxiter=200)
    points = _apart([(float(x), float(y)) for x, y in layout.coords], len(names), across)
    return Layout({name: points[index[name]] for name in names}, [[points[p] for p in route] for route in routes])


def _apart(points: Sequence[Point], boxes: int, across: float) -> list[Point]:
    """Move the points of each layer apart if two are too close, which igraph does not prevent.

    Args:
        points: positions. The first ones are centres of boxes, the others are points of arrows.
        boxes: number of boxes.
        across: minimum distance of two boxes. Between a box and an arrow it is half of this, between arrows an eighth.
    """
    moved = list(points)
    for height in {y for _, y in points}:
        layer = sorted((index for index, (_, y) in enumerate(points) if y == height), key=lambda index: points[index])
        for previous, index in pairwise(layer):
            distance = across * (0.5 * (previous < boxes) + 0.5 * (index < boxes)) or across / 8
            moved[index] = (max(moved[index][0], moved[previous][0] + distance), height)
    return moved


def _layers(names: Sequence[str], arrows: Sequence[tuple[str, str]]) -> list[int]:
    """Return the layer of each box, starting from 0: the length of the longest path to it.

    A box without inputs is moved down to the layer above its first reader.
    """
    layer: dict[str, int] = {}
    for name in names:
        layer[name] = 1 + max((layer[source] for source, target in arrows if target == name), default=-1)
    targets = {target for _, target in arrows}
    for name in names:
        readers = [layer[target] for source, target in arrows if source == name]
        if readers and name not in targets:
            layer[name] = min(readers) - 1
    lowest = min(layer.values())
    return [layer[name] - lowest for name in names]
