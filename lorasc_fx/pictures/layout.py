"""Where the boxes of a scene stand: in layers from input to output, by igraph's Sugiyama layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx

from lorasc_fx.pictures.library import library

__all__ = ["Placed", "placed"]

Point = tuple[float, float]


@dataclass(frozen=True)
class Placed:
    """Centres of boxes by name, in points, y downwards; and the points that each arrow goes through."""

    centres: Mapping[str, Point]
    arrows: Sequence[Sequence[Point]]


def placed(names: Sequence[str], arrows: Sequence[tuple[str, str]], across: float, down: float) -> Placed:
    """Return the layout of an acyclic graph.

    Args:
        names: of the boxes.
        arrows: pairs of names, from producer to reader.
        across, down: points between the centres of two neighbours in a layer, and between two layers.

    Raises:
        MissingExtra: igraph is not installed.
    """
    igraph = library("igraph")
    index = {name: place for place, name in enumerate(names)}
    layers = _layers(names, arrows)
    edges: list[tuple[int, int]] = []
    routes = []
    for source, target in arrows:  # a long arrow goes through a point of its own in each layer between
        between = range(layers[index[source]] + 1, layers[index[target]])
        route = [index[source], *range(len(layers), len(layers) + len(between)), index[target]]
        layers += between
        edges += pairwise(route)
        routes.append(route)
    graph = igraph.Graph(len(layers), edges, directed=True)
    layout = graph.layout_sugiyama(layers=layers, hgap=across, vgap=down, maxiter=200)
    points = _apart([(float(x), float(y)) for x, y in layout.coords], len(names), across)
    return Placed({name: points[place] for name, place in index.items()}, [[points[p] for p in r] for r in routes])


def _apart(points: Sequence[Point], boxes: int, across: float) -> list[Point]:
    """Return the points with those of a layer moved apart where two stand too near, which igraph lets happen.

    The first `boxes` are centres of boxes, the others are points of arrows, which need half the room.
    """
    moved = list(points)
    for height in {y for _, y in points}:
        layer = sorted((place for place, (_, y) in enumerate(points) if y == height), key=lambda place: points[place])
        for before, place in pairwise(layer):
            room = across * (0.5 * (before < boxes) + 0.5 * (place < boxes)) or across / 8
            moved[place] = (max(moved[place][0], moved[before][0] + room), height)
    return moved


def _layers(names: Sequence[str], arrows: Sequence[tuple[str, str]]) -> list[int]:
    """Return the layer of each box: as far down as its longest path; what has no input, just above its reader."""
    graph = nx.DiGraph()
    graph.add_nodes_from(names)
    graph.add_edges_from(arrows)
    layer = {name: depth for depth, group in enumerate(nx.topological_generations(graph)) for name in group}
    for name in names:
        if graph.in_degree(name) == 0 and graph.out_degree(name):
            layer[name] = min(layer[reader] for reader in graph.successors(name)) - 1
    lowest = min(layer.values())
    return [layer[name] - lowest for name in names]
