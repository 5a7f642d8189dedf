"""Which nodes of a rewritten graph a picture shows: the branches of some sites and what is around them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import fx

from lorasc_fx.branch import shared_down
from lorasc_fx.errors import SpecError, StateError, UnknownTarget, nearest
from lorasc_fx.graph import branch_nodes, call_template, text
from lorasc_fx.graph.printer import SYMBOL
from lorasc_fx.graph.targets import targeted
from lorasc_fx.plan import Plan, Site
from lorasc_fx.spec import KINDS

__all__ = ["Box", "Scene", "chosen_sites", "scene"]

FIRST = 3
"""Sites that are shown where none is asked for."""
CROWD = 12
"""Neighbours from which on a node is shown and not looked past: a residual stream would bring the whole model."""
WIDTH = 34
"""Letters of a line; a longer name loses its middle."""


@dataclass(frozen=True)
class Box:
    """A node as it is shown.

    Args:
        kind: `beside`, `merged` or `weight`, the placement of a branch; `shared`, a stacked product of several; `site`,
            an adapted weight; `parameter`; `input`; `output`; `op`.
        lines: its name, what it does, its dtype and shape.
        cut: it has neighbours that are not shown.
    """

    kind: str
    lines: tuple[str, ...]
    cut: bool


@dataclass(frozen=True)
class Scene:
    """What a picture shows: boxes and arrows between them, by the names of the nodes."""

    boxes: dict[str, Box]
    arrows: tuple[tuple[str, str], ...]


def chosen_sites(plan: Plan, patterns: Sequence[str]) -> list[Site]:
    """Return the sites that patterns mean (kinds or globs, as in a spec), or the first few.

    Raises:
        SpecError: a single string in place of a sequence.
        UnknownTarget: a pattern means no site.
    """
    if isinstance(patterns, str):
        raise SpecError(f"draw: sites is {patterns!r}; give a sequence of kinds or globs")
    if not patterns:
        return list(plan.sites[:FIRST])
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
    known: set[str] = set()
    for number, graph_module in enumerate(graphs):
        branches = branch_nodes(graph_module)
        seeds = [node for node, branch in branches.items() if branch.weight_name in weights]
        if not seeds or text(graph_module) in known:  # the same code is captured again for other sizes
            continue
        known.add(text(graph_module))
        prefix = f"{number}:" if len(graphs) > 1 else ""
        near = _around(seeds, radius)
        shown = [node for node in graph_module.graph.nodes if node in near]
        symbols: dict[str, str] = {}
        own = {
            node.name: Box(_kind(node, branches, plan), _lines(node, branches, plan, symbols), _cut(node, near))
            for node in shown
        }
        boxes |= {prefix + name: box for name, box in own.items()}
        arrows += [
            (prefix + each.name, prefix + node.name) for node in shown for each in node.all_input_nodes if each in near
        ]
    if not boxes:
        raise StateError(
            f"draw: the branches of {', '.join(sorted(weights)[:3])} stand in no graph: Python between the graphs uses "
            "these weights, and sees them swapped",
            code="no-whole-graph",
        )
    return Scene(boxes, tuple(arrows))


def _cut(node: fx.Node, shown: set[fx.Node]) -> bool:
    return any(each not in shown for each in (*node.all_input_nodes, *node.users))


def _around(seeds: Sequence[fx.Node], radius: int) -> set[fx.Node]:
    near: nx.Graph = nx.Graph()
    near.add_nodes_from(seeds)
    front = list(seeds)
    for _ in range(radius):
        found = []
        for node in front:
            neighbours = [*node.all_input_nodes, *node.users]
            if node in seeds or len(neighbours) <= CROWD:
                found += [each for each in neighbours if each not in near]
                near.add_nodes_from(neighbours)
        front = found
    return set(near)


def _kind(node: fx.Node, branches: dict[fx.Node, Any], plan: Plan) -> str:
    if node in branches:
        if call_template(node) is not None:
            return "merged"
        return "beside" if len(node.args) > 1 else "weight"
    if node.target is shared_down:
        return "shared"
    if node.op == "get_attr":
        return "site" if _weight(node) in plan.by_weight else "parameter"
    return {"placeholder": "input", "output": "output"}.get(node.op, "op")


def _lines(node: fx.Node, branches: dict[fx.Node, Any], plan: Plan, symbols: dict[str, str]) -> tuple[str, ...]:
    if node in branches:
        branch = branches[node]
        kind = _kind(node, branches, plan)
        where = {"beside": "beside the op", "merged": "merged into the op", "weight": "on the weight"}[kind]
        does = f"branch, rank {branch.rank}, {where}"
        return (_short(branch.weight_name), does, *_shape(node, symbols))
    if node.op == "get_attr":
        return (
            _short(_weight(node)),
            "weight" if _kind(node, branches, plan) == "site" else "parameter",
            *_shape(node, symbols),
        )
    if node.op in ("placeholder", "output"):
        return (_short(node.name), {"placeholder": "input", "output": "output"}[node.op], *_shape(node, symbols))
    target = node.target if isinstance(node.target, str) else fx.node._get_qualified_name(node.target)
    does = re.sub(r"^(torch\.ops\.|torch\._C\._nn\.|torch\.nn\.functional\.|torch\.|_operator\.)", "", target)
    return (_short(node.name), _short(does.removesuffix(".default").removeprefix("model.")), *_shape(node, symbols))


def _weight(node: fx.Node) -> str:
    return str(node.target).removeprefix("model.")


def _short(name: str) -> str:
    return name if len(name) <= WIDTH else f"{name[: WIDTH // 2 - 1]}…{name[-(WIDTH // 2) :]}"


def _shape(node: fx.Node, symbols: dict[str, str]) -> tuple[str, ...]:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ()
    sizes = [
        SYMBOL.sub(lambda found: symbols.setdefault(found[0], f"s{len(symbols)}"), str(size)) for size in value.shape
    ]
    return (_short(f"{str(value.dtype).removeprefix('torch.')}[{', '.join(sizes)}]"),)
