"""`cascade.draw`: the rewritten graph around some sites, as a picture.

`scene` selects the nodes, `placed` puts them in layers from input to output (igraph's Sugiyama layout), and matplotlib
draws them. Both are imported on first use.
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

import torch
from torch import fx

from lorasc_fx.branch import shared_down
from lorasc_fx.errors import SpecError, StateError, UnknownTarget, nearest, path_of
from lorasc_fx.graph import branch_nodes, call_template, text
from lorasc_fx.graph.patterns import targeted
from lorasc_fx.graph.printer import SYMBOL
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
    "shared": ("#00727d", "#d9f1f2", "A x of several branches at once"),
    "site": ("#16784a", "#dcf3e6", "adapted weight"),
    "parameter": (MUTED, "#eef0f3", "other parameter"),
    "input": (INK, "#ffffff", "input or output"),
    "op": (MUTED, "#ffffff", "op of the model"),
}
"""Edge, face and meaning of a box, by kind."""

ENDINGS = (".svg", ".png", ".pdf")
DEFAULT_SITES = 3
"""Number of sites shown by default."""
MAX_NEIGHBOURS = 12
"""Neighbours from which on the search stops at a node. A residual stream would bring in the whole model."""
MAX_LETTERS = 34
"""Letters of a line. The middle of a longer name is left out."""


class Picture:
    """A drawing without a file, which a notebook shows.

    Args:
        svg: the text of the drawing.
    """

    def __init__(self, svg: str) -> None:
        self.svg = svg

    def _repr_svg_(self) -> str:
        """Return what IPython shows."""
        return self.svg


def draw_graphs(
    graphs: Sequence[fx.GraphModule],
    plan: Plan,
    file: str | PathLike[str] | None,
    sites: Sequence[str],
    radius: int,
) -> Path | Picture:
    """Draw rewritten graphs around some sites; see `Cascade.draw`.

    Raises:
        UnknownTarget: a pattern matches no site.
        SpecError: the file has another ending, its folder does not exist, or the radius is not a count.
        StateError: no graph has a branch of these sites.
        MissingExtra: igraph or matplotlib is not installed.
    """
    path = None if file is None else path_of(file)
    if path is not None and path.suffix not in ENDINGS:
        raise SpecError(f"draw: {path} does not end with one of {', '.join(ENDINGS)}")
    if path is not None and not path.parent.is_dir():
        raise SpecError(f"draw: there is no folder {path.parent}", code="unreadable-file")
    if not is_integer(radius, 0):
        raise SpecError(f"draw: radius is {radius!r}; give the number of arrows to follow, 0 or more")
    return _written({"": scene(graphs, plan, chosen_sites(plan, sites), radius)}, path)


def draw_steps(steps: Mapping[str, fx.GraphModule], plan: Plan, file: Path, sites: Sequence[str], radius: int) -> None:
    """Draw one graph at several steps of its rewrite side by side, around the reads of some weights.

    Args:
        steps: the graphs, by the title of their panels. They need no branches.
        plan, sites, radius: as for `Cascade.draw`; the radius is counted from the reads of the weights.
        file: path of the file.
    """
    weights = {site.weight for site in chosen_sites(plan, sites)}
    panels = {}
    for title, graph_module in steps.items():
        reads = [node for node in graph_module.graph.nodes if node.op == "get_attr" and _weight(node, plan) in weights]
        panels[title] = Scene(*_shown(graph_module, _around(reads, radius), plan))
    _written(panels, file)


def _written(panels: Mapping[str, Scene], path: Path | None) -> Path | Picture:
    """Write the drawing to a file and return its path. Without a path, return the picture."""
    with module_of("report", "matplotlib").rc_context({"svg.fonttype": "none", "svg.hashsalt": "lorasc-fx"}):
        figure = _figure(panels)
        buffer = io.StringIO()
        svg = path is None or path.suffix == ".svg"
        figure.savefig(path or buffer, format=None if path else "svg", metadata={"Date": None} if svg else None)
    return path or Picture(buffer.getvalue())


def _figure(panels: Mapping[str, Scene]) -> Any:
    """Return the drawing of scenes, side by side, as a figure of matplotlib. Its units are points, y downwards."""
    patches, figures = (module_of("report", f"matplotlib.{name}") for name in ("patches", "figure"))
    figure = figures.Figure()
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    left = bottom = 0.0
    for title, scene in panels.items():
        width = max(len(line) for box in scene.boxes.values() for line in box.lines) * LETTER + 2 * PAD
        height = max(box.height for box in scene.boxes.values())
        layout = placed(list(scene.boxes), scene.arrows, width + GAP, height + 2 * GAP)
        xs, ys = zip(*[point for path in layout.arrows for point in path], *layout.centres.values(), strict=True)
        across, down = left + width / 2 + GAP - min(xs), (TITLE if title else 0) + height / 2 + GAP - min(ys)
        _draw_scene(axes, scene, layout.moved(across, down))
        if title:
            axes.text(left + GAP, TITLE, title, fontsize=11, fontweight="bold", color=INK)
        left += max(xs) - min(xs) + width + 2 * GAP
        bottom = max(bottom, max(ys) + down + height / 2 + GAP)
    boxes = [box for scene in panels.values() for box in scene.boxes.values()]
    kinds = [kind for kind in STYLES if any(box.kind == kind for box in boxes)]
    right, bottom = max(left, LEGEND), bottom + 16 * (len(kinds) + 1)
    figure.set_size_inches(right / 72, bottom / 72)
    axes.set(xlim=(0, right), ylim=(bottom, 0))
    legend = [
        patches.Patch(edgecolor=STYLES[kind][0], facecolor=STYLES[kind][1], label=STYLES[kind][2]) for kind in kinds
    ]
    legend.append(patches.Patch(edgecolor=MUTED, facecolor="white", linestyle="--", label="has neighbours not shown"))
    axes.legend(handles=legend, loc="lower left", fontsize=9, frameon=False, labelspacing=0.2)
    return figure


def _draw_scene(axes: Any, scene: Scene, layout: Placed) -> None:
    """Draw arrows and boxes at their places."""
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
        kind: `beside`, `merged` or `weight`, the placement of a branch; `shared`, a stacked product of several; `site`,
            an adapted weight; `parameter`; `input`, or output; `op`.
        lines: its name, what it does, its dtype and shape.
        cut: it has neighbours that are not shown.
    """

    kind: str
    lines: tuple[str, ...]
    cut: bool

    @property
    def is_branch(self) -> bool:
        """Whether it is a branch."""
        return self.kind in ("beside", "merged", "weight")

    @property
    def height(self) -> float:
        """Height in points."""
        return len(self.lines) * LINE + PAD


@dataclass(frozen=True)
class Scene:
    """Boxes and arrows between them, by the names of the nodes."""

    boxes: dict[str, Box]
    arrows: tuple[tuple[str, str], ...]


def chosen_sites(plan: Plan, patterns: Sequence[str]) -> list[Site]:
    """Return the sites that match patterns (kinds or globs, as in a spec). Without patterns, the first few.

    Raises:
        SpecError: a single string instead of a sequence.
        UnknownTarget: a pattern matches no site.
    """
    if isinstance(patterns, str):
        raise SpecError(f"draw: sites is {patterns!r}; give a sequence of kinds or globs")
    if not patterns:
        return list(plan.sites[:DEFAULT_SITES])
    for pattern in patterns:
        if not any(targeted((pattern,), site.kind, (site.weight, *site.aliases)) for site in plan.sites):
            hint = nearest(pattern, [*(site.weight for site in plan.sites), *KINDS])
            raise UnknownTarget(f"draw: {pattern!r} means no site of this cascade{hint}")
    return [site for site in plan.sites if targeted(patterns, site.kind, (site.weight, *site.aliases))]


def scene(graphs: Sequence[fx.GraphModule], plan: Plan, sites: Sequence[Site], radius: int) -> Scene:
    """Return the branch nodes of these sites and the nodes up to `radius` arrows away, of all graphs.

    Raises:
        StateError: no graph has a branch of any of these sites.
    """
    weights = {site.weight for site in sites}
    boxes: dict[str, Box] = {}
    arrows: list[tuple[str, str]] = []
    drawn: set[str] = set()
    for number, graph_module in enumerate(graphs):
        seeds = [node for node, branch in branch_nodes(graph_module).items() if branch.weight_name in weights]
        if not seeds or text(graph_module) in drawn:  # other sizes of a call that is drawn already
            continue
        drawn.add(text(graph_module))
        more = _shown(graph_module, _around(seeds, radius), plan, f"{number}:" if len(graphs) > 1 else "")
        boxes |= more[0]
        arrows += more[1]
    if not boxes:
        raise StateError(
            f"draw: the branches of {', '.join(sorted(weights)[:3])} stand in no graph: Python between the graphs uses "
            "these weights, and sees them swapped",
            code="no-whole-graph",
        )
    return Scene(boxes, tuple(arrows))


def _shown(
    graph_module: fx.GraphModule, shown_nodes: Collection[fx.Node], plan: Plan, prefix: str = ""
) -> tuple[dict[str, Box], tuple[tuple[str, str], ...]]:
    """Return the boxes of some nodes of a graph, and the arrows between them."""
    branches, symbols = branch_nodes(graph_module), dict[str, str]()
    boxes: dict[str, Box] = {}
    shown = [node for node in graph_module.graph.nodes if node in shown_nodes]
    for node in shown:
        cut = any(neighbour not in shown_nodes for neighbour in (*node.all_input_nodes, *node.users))
        kind = _kind(node, branches, plan)
        boxes[prefix + node.name] = Box(kind, _lines(node, kind, branches, symbols, plan), cut)
    pairs = ((source, node) for node in shown for source in node.all_input_nodes if source in shown_nodes)
    return boxes, tuple((prefix + source.name, prefix + node.name) for source, node in pairs)


def _around(seeds: Sequence[fx.Node], radius: int) -> set[fx.Node]:
    reached_nodes = set(seeds)
    front = list(seeds)
    for _ in range(radius):
        reached = []
        for node in front:
            neighbours = [*node.all_input_nodes, *node.users]
            if node in seeds or len(neighbours) <= MAX_NEIGHBOURS:
                reached += [neighbour for neighbour in neighbours if neighbour not in reached_nodes]
                reached_nodes.update(neighbours)
        front = reached
    return reached_nodes


def _kind(node: fx.Node, branches: dict[fx.Node, Any], plan: Plan) -> str:
    if node in branches:
        if call_template(node) is not None:
            return "merged"
        return "beside" if len(node.args) > 1 else "weight"
    if node.target is shared_down:
        return "shared"
    if node.op == "get_attr":
        return "site" if _weight(node, plan) in plan.by_weight else "parameter"
    return "input" if node.op in ("placeholder", "output") else "op"


def _lines(
    node: fx.Node, kind: str, branches: dict[fx.Node, Any], symbols: dict[str, str], plan: Plan
) -> tuple[str, ...]:
    if node in branches:
        where = {"beside": "beside the op", "merged": "merged into the op", "weight": "on the weight"}[kind]
        name, does = branches[node].weight_name, f"branch, rank {branches[node].rank}, {where}"
    elif node.op == "get_attr":
        name, does = _weight(node, plan), "weight" if kind == "site" else "parameter"
    elif kind == "input":
        name, does = node.name, "output" if node.op == "output" else "input"
    else:
        target = node.target if isinstance(node.target, str) else fx.node._get_qualified_name(node.target)
        op = re.sub(r"^(torch\.ops\.|torch\._C\._nn\.|torch\.nn\.functional\.|torch\.|_operator\.)", "", target)
        name, does = node.name, _short(op.removesuffix(".default").removeprefix("model."))
    return (_short(name), does, *_shape(node, symbols))


def _weight(node: fx.Node, plan: Plan) -> str:
    """Return the name of a parameter. Graphs read `model.NAME`, and folded graphs have constants `NAME`."""
    name = str(node.target)
    return name if name in plan.by_weight else name.removeprefix("model.")


def _short(name: str) -> str:
    return name if len(name) <= MAX_LETTERS else f"{name[: MAX_LETTERS // 2 - 1]}…{name[-(MAX_LETTERS // 2) :]}"


def _shape(node: fx.Node, symbols: dict[str, str]) -> tuple[str, ...]:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ()
    sizes = [
        SYMBOL.sub(lambda match: symbols.setdefault(match[0], f"s{len(symbols)}"), str(size)) for size in value.shape
    ]
    return (_short(f"{str(value.dtype).removeprefix('torch.')}[{', '.join(sizes)}]"),)


Point = tuple[float, float]


@dataclass(frozen=True)
class Placed:
    """Centres of boxes by name, in points, y downwards; and the points that each arrow goes through."""

    centres: Mapping[str, Point]
    arrows: Sequence[Sequence[Point]]

    def moved(self, across: float, down: float) -> Placed:
        """Return the layout, moved by a distance."""
        centres = {name: (x + across, y + down) for name, (x, y) in self.centres.items()}
        return Placed(centres, [[(x + across, y + down) for x, y in path] for path in self.arrows])


def placed(names: Sequence[str], arrows: Sequence[tuple[str, str]], across: float, down: float) -> Placed:
    """Return the layout of an acyclic graph.

    Args:
        names: of the boxes, each after those whose arrows it gets.
        arrows: pairs of names, from producer to reader.
        across, down: points between the centres of two neighbours in a layer, and between two layers.

    Raises:
        MissingExtra: igraph is not installed.
    """
    igraph = module_of("report", "igraph")
    index = {name: number for number, name in enumerate(names)}
    layers = _layers(names, arrows)
    edges: list[tuple[int, int]] = []
    routes = []
    for source, target in arrows:  # a long arrow gets a point in each layer that it crosses
        between = range(layers[index[source]] + 1, layers[index[target]])
        route = [index[source], *range(len(layers), len(layers) + len(between)), index[target]]
        layers += between
        edges += pairwise(route)
        routes.append(route)
    graph = igraph.Graph(len(layers), edges, directed=True)
    layout = graph.layout_sugiyama(layers=layers, hgap=across, vgap=down, maxiter=200)
    points = _apart([(float(x), float(y)) for x, y in layout.coords], len(names), across)
    return Placed({name: points[index[name]] for name in names}, [[points[p] for p in route] for route in routes])


def _apart(points: Sequence[Point], boxes: int, across: float) -> list[Point]:
    """Move the points of a layer apart if two are too close, which igraph does not prevent.

    The first `boxes` points are centres of boxes. The others are points of arrows, which need half the distance.
    """
    moved = list(points)
    for height in {y for _, y in points}:
        layer = sorted((index for index, (_, y) in enumerate(points) if y == height), key=lambda index: points[index])
        for before, index in pairwise(layer):
            distance = across * (0.5 * (before < boxes) + 0.5 * (index < boxes)) or across / 8
            moved[index] = (max(moved[index][0], moved[before][0] + distance), height)
    return moved


def _layers(names: Sequence[str], arrows: Sequence[tuple[str, str]]) -> list[int]:
    """Return the layer of each box: the length of its longest path. A box without inputs is just above its reader."""
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
