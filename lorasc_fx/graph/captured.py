"""Other targets and arguments for the nodes of a graph that a front end has just made, and that nobody else holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

__all__ = ["call_instead", "give_arguments", "rename_inputs", "retarget"]


def call_instead(
    graph: fx.Graph,
    old: Callable[..., Any],
    new: Callable[..., Any],
    where: Callable[[fx.Node], bool] = lambda node: True,
) -> bool:
    """Let every node that calls one function (and that `where` means) call another one; whether there was any."""
    found = [node for node in graph.nodes if node.op == "call_function" and node.target is old and where(node)]
    for node in found:
        node.target = new
    return bool(found)


def retarget(graph: fx.Graph, rename: Callable[[fx.Node], str]) -> None:
    """Give each node that names an attribute or module the target that `rename` returns."""
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            node.target = rename(node)


def rename_inputs(graph: fx.Graph, names: Sequence[str]) -> None:
    """Give the inputs these names, in order, by which a call may pass them; as they are if there are not as many."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) == len(names):
        for node, name in zip(inputs, names, strict=True):
            node.target = name


def give_arguments(node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Let a node be called with other arguments."""
    node.args, node.kwargs = args, dict(kwargs)
