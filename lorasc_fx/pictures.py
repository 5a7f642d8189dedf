"""Draws the adapted graph around some sites as Graphviz text, for `cascade.draw`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from torch import fx

from lorasc_fx.errors import StateError, UnknownTarget, nearest
from lorasc_fx.graph import branch_nodes, text
from lorasc_fx.graph.patterns import targeted
from lorasc_fx.graph.placement import placement_of
from lorasc_fx.graph.printer import type_text
from lorasc_fx.plan import Plan, Site
from lorasc_fx.spec import KINDS

STYLES = {
    "beside": ("#0969b3", "#dcecf9"),
    "merged": ("#b5480b", "#fbe6d8"),
    "weight": ("#7a3fa8", "#efe3f8"),
    "site": ("#16784a", "#dcf3e6"),
    "parameter": ("#68707f", "#eef0f3"),
    "input": ("#1f2430", "#ffffff"),
    "op": ("#68707f", "#ffffff"),
}
"""{kind of box: (edge color, face color)}. The first three kinds are branches, by placement. `site` is an adapted
weight, `parameter` any other tensor of the model, and `input` an input or the output of the graph."""

DEFAULT_SITES = 3
"""Number of sites shown by default."""
MAX_NEIGHBOURS = 12
"""The search does not continue from nodes with more neighbours. Some lead to the whole model, such as residual sums."""


def draw_graphs(graphs: Sequence[fx.GraphModule], plan: Plan, sites: Sequence[str], radius: int) -> str:
    """Draw the branch nodes of some sites with the nodes around them. Arguments and result as for `Cascade.draw`.

    Raises:
        UnknownTarget: a pattern matches no site.
        StateError: no graph has a branch of these sites.
    """
    weights = {site.weight for site in _chosen_sites(plan, sites)}
    lines: list[str] = []
    drawn: set[str] = set()
    for number, graph_module in enumerate(graphs):
        seeds = [node for node, branch in branch_nodes(graph_module).items() if branch.weight_name in weights]
        if seeds and text(graph_module) not in drawn:  # the same graph may have been captured for another call
            drawn.add(text(graph_module))
            lines += _lines(graph_module, _around(seeds, radius), plan, f"{number}:" if len(graphs) > 1 else "")
    if not lines:
        raise StateError(
            f"draw: no graph calls the branches of {', '.join(sorted(weights)[:3])}, because the model runs eagerly or "
            "the first call did not use these weights. Choose other sites, or see cascade.refused_frontends",
            code="no-graph",
        )
    head = '  node [shape=box style="rounded,filled" fontname=monospace fontsize=9]'
    return "\n".join(["digraph {", head, *lines, "}\n"])


def _chosen_sites(plan: Plan, patterns: Sequence[str]) -> list[Site]:
    """Return the sites that match one of the patterns (kinds or globs, as in a spec). Without patterns, the first few.

    Raises:
        UnknownTarget: a pattern matches no site.
    """
    if not patterns:
        return list(plan.sites[:DEFAULT_SITES])
    for pattern in patterns:
        if not any(targeted((pattern,), site.kind, (site.weight, *site.aliases)) for site in plan.sites):
            hint = nearest(pattern, [*(site.weight for site in plan.sites), *KINDS])
            raise UnknownTarget(f"draw: {pattern!r} matches no site of this cascade{hint}")
    return [site for site in plan.sites if targeted(patterns, site.kind, (site.weight, *site.aliases))]


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


def _lines(graph_module: fx.GraphModule, shown: set[fx.Node], plan: Plan, prefix: str) -> list[str]:
    """Return a line of Graphviz for each node in `shown`, and for each arrow between two of them.

    A box is dashed if the node has neighbours that are not shown. `prefix` distinguishes the nodes of several graphs.
    """
    branches, symbols = branch_nodes(graph_module), dict[str, str]()
    lines = []
    for node in graph_module.graph.nodes:
        if node not in shown:
            continue
        kind, label = _box(node, branches, plan)
        if dtype_shape := type_text(node.meta.get("val"), symbols):
            label = f"{label}\n{dtype_shape}"
        edge, face = STYLES[kind]
        options = f'color="{edge}" fillcolor="{face}"' + (" penwidth=2" if node in branches else "")
        if any(neighbour not in shown for neighbour in (*node.all_input_nodes, *node.users)):
            options += ' style="rounded,filled,dashed"'
        name = json.dumps(prefix + node.name)
        lines.append(f"  {name} [label={json.dumps(label, ensure_ascii=False)} {options}]")
        lines += [
            f"  {json.dumps(prefix + source.name)} -> {name}" for source in node.all_input_nodes if source in shown
        ]
    return lines


def _box(node: fx.Node, branches: dict[fx.Node, Any], plan: Plan) -> tuple[str, str]:
    """Return (kind, label) of a node's box: a key of `STYLES`, and the text in the box."""
    if node in branches:
        kind = placement_of(node)
        placement = {"beside": "beside the op", "merged": "merged into the op", "weight": "on the weight"}[kind]
        return kind, f"{branches[node].weight_name}\nbranch, rank {branches[node].rank}, {placement}"
    if node.op == "get_attr":
        weight = str(node.target).removeprefix("model.")  # graphs of a cascade read `model.NAME`
        return ("site", f"{weight}\nweight") if weight in plan.by_weight else ("parameter", f"{weight}\nparameter")
    if node.op in ("placeholder", "output"):
        return "input", f"{node.name}\n{'output' if node.op == 'output' else 'input'}"
    target = node.target if isinstance(node.target, str) else fx.node._get_qualified_name(node.target)
    op = re.sub(r"^(torch\.ops\.|torch\._C\._nn\.|torch\.nn\.functional\.|torch\.|_operator\.)", "", target)
    return "op", f"{node.name}\n{op.removesuffix('.default').removeprefix('model.')}"
