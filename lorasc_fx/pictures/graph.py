"""`cascade.draw`: the rewritten graph around some sites, as an SVG file.

`scene` selects the nodes, `placed` puts them in layers from input to output (igraph's Sugiyama layout), and
`draw_graphs` draws them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
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
from lorasc_fx.pictures.svg import INK, MUTED, PAPER, Picture, element, library, named
from lorasc_fx.plan import Plan, Site
from lorasc_fx.spec import KINDS
from lorasc_fx.util.checks import is_integer

LETTER, LINE = 5.1, 11.5
"""Width of a letter and height of a line, in points, of the monospaced 8.5 point type in the boxes."""
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

DEFAULT_SITES = 3
"""Number of sites shown by default."""
MAX_NEIGHBOURS = 12
"""Neighbours from which on the search stops at a node. A residual stream would bring in the whole model."""
MAX_LETTERS = 34
"""Letters of a line. The middle of a longer name is left out."""


def draw_graphs(
    graphs: Sequence[fx.GraphModule],
    plan: Plan,
    file: str | PathLike[str],
    sites: Sequence[str],
    radius: int,
) -> Path:
    """Draw rewritten graphs around some sites; see `Cascade.draw`.

    Raises:
        UnknownTarget: a pattern matches no site.
        SpecError: the file is not an SVG file, its folder does not exist, or the radius is not a count.
        StateError: no graph has a branch of these sites.
        MissingExtra: igraph is not installed.
    """
    path = path_of(file)
    if path.suffix != ".svg":
        raise SpecError(f"draw: {path} is no .svg file; SVG is what is drawn")
    if not path.parent.is_dir():
        raise SpecError(f"draw: there is no folder {path.parent}", code="unreadable-file")
    if not is_integer(radius, 0):
        raise SpecError(f"draw: radius is {radius!r}; give the number of arrows to follow, 0 or more")
    chosen = chosen_sites(plan, sites)
    picture = _picture(scene(graphs, plan, chosen, radius), ", ".join(site.weight for site in chosen[:3]))
    path.write_text(picture.svg, encoding="utf-8")
    return path


def _picture(scene: Scene, sites: str) -> Picture:
    width = max(len(line) for box in scene.boxes.values() for line in box.lines) * LETTER + 2 * PAD
    height = max(len(box.lines) for box in scene.boxes.values()) * LINE + 2 * PAD
    layout = placed(list(scene.boxes), scene.arrows, width + GAP, height + 1.6 * GAP)
    xs, ys = zip(*[point for path in layout.arrows for point in path], *layout.centres.values(), strict=True)
    legend = [kind for kind in STYLES if any(box.kind == kind for box in scene.boxes.values())]
    left, top = min(xs) - width / 2 - GAP, min(ys) - height / 2 - GAP
    across = max(max(xs) - min(xs) + width + 2 * GAP, 260.0)
    down = max(ys) - min(ys) + height + 2 * GAP
    tall = down + 16 * len(legend) + 26
    shapes = [element("rect", {"x": left, "y": top, "width": across, "height": tall, "fill": PAPER})]
    shapes += [
        _arrow(path, scene.boxes[source].height, scene.boxes[target].height)
        for (source, target), path in zip(scene.arrows, layout.arrows, strict=True)
    ]
    shapes += [_box(box, layout.centres[name], width) for name, box in scene.boxes.items()]
    for row, kind in enumerate(legend):
        edge, face, meaning = STYLES[kind]
        x, y = left + GAP, top + down + 8 + 16 * row
        square = {"x": x, "y": y - 6, "width": 18, "height": 11}
        shapes.append(element("rect", square | {"fill": face, "stroke": edge, "stroke-width": 1.2}))
        shapes.append(_text(x + 26, y, 9, meaning))
    y = top + down + 8 + 16 * len(legend)
    shapes.append(_text(left + GAP, y, 9, "dashed edge: has neighbours that are not shown", MUTED))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{across:.1f}pt" height="{tall:.1f}pt" '
        f'viewBox="{left:.1f} {top:.1f} {across:.1f} {tall:.1f}">\n'
        '<g font-family="sans-serif">\n' + "\n".join(shapes) + "\n</g>\n</svg>\n"
    )
    return named(svg, "graph", f"Rewritten graph around {sites}", _words(scene, layout))


def _box(box: Box, centre: tuple[float, float], width: float) -> str:
    x, y = centre
    edge, face, _ = STYLES[box.kind]
    outline = {
        "x": x - width / 2 + 4,
        "y": y - box.height / 2,
        "width": width - 8,
        "height": box.height,
        "rx": 5,
        "fill": face,
        "stroke": edge,
        "stroke-width": 2 if box.kind in ("beside", "merged", "weight") else 1,
        "stroke-dasharray": "4 2" if box.cut else "none",
    }
    shapes = [element("rect", outline)]
    letters = {"font-family": "monospace", "text-anchor": "middle"}
    for row, line in enumerate(box.lines):
        weight, colour = "bold" if row == 0 else "normal", INK if row < 2 else MUTED
        middle = y + (row - (len(box.lines) - 1) / 2) * LINE
        shapes.append(_text(x, middle, 8.5, line, colour, **letters, **{"font-weight": weight}))
    return "".join(shapes)


def _arrow(points: Sequence[tuple[float, float]], above: float, below: float) -> str:
    """Return an arrow through points, between the edges of two boxes whose heights are `above` and `below`."""
    (x0, y0), (x1, y1) = points[0], points[-1]
    stops = [(x0, y0 + above / 2), *points[1:-1], (x1, y1 - below / 2)]
    path = f"M {x0:.1f} {stops[0][1]:.1f}"
    for (xa, ya), (xb, yb) in pairwise(stops):
        middle = (ya + yb) / 2
        path += f" C {xa:.1f} {middle:.1f} {xb:.1f} {middle:.1f} {xb:.1f} {yb:.1f}"
    x, y = stops[-1]
    head = f"M {x - 2.2:.1f} {y - 4:.1f} L {x:.1f} {y:.1f} L {x + 2.2:.1f} {y - 4:.1f} z"
    line = element("path", {"d": path, "fill": "none", "stroke": MUTED, "stroke-width": 0.9})
    return line + element("path", {"d": head, "fill": MUTED})


def _text(x: float, y: float, size: float, line: str, colour: str = INK, **style: str) -> str:
    """Return a line of text, vertically centred on y."""
    return element("text", {"x": x, "y": y + 0.35 * size, "font-size": size, "fill": colour, **style}, line)


def _words(scene: Scene, layout: Placed) -> str:
    """Return a description: the branches by placement, and the numbers of nodes and arrows."""
    counted = Counter(box.kind for box in scene.boxes.values())
    counts = [f"{counted[kind]} × {STYLES[kind][2]}" for kind in ("beside", "merged", "weight") if counted[kind]]
    branches = "; ".join(
        f"{box.lines[0]}: {box.lines[1]}" for box in scene.boxes.values() if box.kind in ("beside", "merged", "weight")
    )
    return (
        f"{len(scene.boxes)} nodes and {len(layout.arrows)} arrows from inputs (above) to outputs (below). "
        f"{', '.join(counts)}. {branches}."
    )


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
        branches = branch_nodes(graph_module)
        seeds = [node for node, branch in branches.items() if branch.weight_name in weights]
        if not seeds or text(graph_module) in drawn:  # other sizes of a call that is drawn already
            continue
        drawn.add(text(graph_module))
        prefix = f"{number}:" if len(graphs) > 1 else ""
        shown_nodes = _around(seeds, radius)
        shown = [node for node in graph_module.graph.nodes if node in shown_nodes]
        symbols: dict[str, str] = {}
        for node in shown:
            cut = any(neighbour not in shown_nodes for neighbour in (*node.all_input_nodes, *node.users))
            kind = _kind(node, branches, plan)
            boxes[prefix + node.name] = Box(kind, _lines(node, kind, branches, symbols), cut)
        arrows += [
            (prefix + source.name, prefix + node.name)
            for node in shown
            for source in node.all_input_nodes
            if source in shown_nodes
        ]
    if not boxes:
        raise StateError(
            f"draw: the branches of {', '.join(sorted(weights)[:3])} stand in no graph: Python between the graphs uses "
            "these weights, and sees them swapped",
            code="no-whole-graph",
        )
    return Scene(boxes, tuple(arrows))


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
        return "site" if _weight(node) in plan.by_weight else "parameter"
    return "input" if node.op in ("placeholder", "output") else "op"


def _lines(node: fx.Node, kind: str, branches: dict[fx.Node, Any], symbols: dict[str, str]) -> tuple[str, ...]:
    if node in branches:
        where = {"beside": "beside the op", "merged": "merged into the op", "weight": "on the weight"}[kind]
        name, does = branches[node].weight_name, f"branch, rank {branches[node].rank}, {where}"
    elif node.op == "get_attr":
        name, does = _weight(node), "weight" if kind == "site" else "parameter"
    elif kind == "input":
        name, does = node.name, "output" if node.op == "output" else "input"
    else:
        target = node.target if isinstance(node.target, str) else fx.node._get_qualified_name(node.target)
        op = re.sub(r"^(torch\.ops\.|torch\._C\._nn\.|torch\.nn\.functional\.|torch\.|_operator\.)", "", target)
        name, does = node.name, _short(op.removesuffix(".default").removeprefix("model."))
    return (_short(name), does, *_shape(node, symbols))


def _weight(node: fx.Node) -> str:
    return str(node.target).removeprefix("model.")


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


def placed(names: Sequence[str], arrows: Sequence[tuple[str, str]], across: float, down: float) -> Placed:
    """Return the layout of an acyclic graph.

    Args:
        names: of the boxes, each after those whose arrows it gets.
        arrows: pairs of names, from producer to reader.
        across, down: points between the centres of two neighbours in a layer, and between two layers.

    Raises:
        MissingExtra: igraph is not installed.
    """
    igraph = library("igraph")
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
