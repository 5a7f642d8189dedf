"""What is marked on nodes: the use of a site, the pass that made it, and which nodes call a branch."""

from __future__ import annotations

from torch import fx

from lorasc_fx.branch import Branch
from lorasc_fx.graph.record import MADE_BY, USE, Use
from lorasc_fx.graph.weights import module_at

__all__ = ["branch_nodes", "calls_branches", "made_by", "use_of"]


def use_of(node: fx.Node) -> Use | None:
    """Return the use that a match marked on the node."""
    found = node.meta.get(USE)
    return found if isinstance(found, Use) else None


def made_by(node: fx.Node) -> str:
    """Return the name of the pass of ours that made the node, or ""."""
    found = node.meta.get(MADE_BY, "")
    return found if isinstance(found, str) else ""


def branch_nodes(graph_module: fx.GraphModule) -> dict[fx.Node, Branch]:
    """Return the nodes that call a branch, with their branches."""
    found: dict[fx.Node, Branch] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            module = module_at(graph_module, node.target)
            if isinstance(module, Branch):
                found[node] = module
    return found


def calls_branches(graph_module: fx.GraphModule) -> fx.Node | None:
    """Return the first node that calls a branch, or a module inside which one stands."""
    for node in graph_module.graph.nodes:
        module = module_at(graph_module, str(node.target)) if node.op == "call_module" else None
        if module is not None and any(isinstance(each, Branch) for each in module.modules()):
            found: fx.Node = node
            return found
    return None
