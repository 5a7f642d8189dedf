"""Find the smallest sizes at which a graph with dynamic sizes computes what its model computes.

torch.export assumes that a dynamic size is at least 2, but its graph also accepts 0 and 1, and may then compute
something else. A cascade captures a separate graph for calls with such sizes. An exported graph cannot be captured
again, so the export compares it with the model at these sizes once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lorasc_fx.capture.captured import Axis
from lorasc_fx.check.preflight import agrees
from lorasc_fx.graph.function import takes_leaves
from lorasc_fx.signature import is_opaque_leaf


def least_sizes(
    graph: fx.GraphModule, model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> dict[Axis, int]:
    """Return {dynamic axis: its smallest correct size, 1 or 2}. An axis that may also be 0 has no entry.

    Axes that share a symbol shrink together. Each symbol is tried alone, at 1 and at 0, and at 1 together with the
    symbols that were correct at 1. The model is left unchanged.

    Args:
        graph: the captured graph, without branches.
        model, args, kwargs: the captured call.
    """
    leaves, tree = pytree.tree_flatten((args, dict(kwargs)), is_leaf=is_opaque_leaf)
    values = [node.meta.get("val") for node in graph.graph.nodes if node.op == "placeholder"]
    if not takes_leaves(graph.graph) or len(values) != len(leaves):
        return {}  # the graph takes the arguments themselves, and records no sizes
    # An axis is dynamic if its size is a SymInt. The SymInt may be an expression of the symbol of another axis.
    shapes: list[tuple[Any, ...]] = [tuple(value.shape) if isinstance(value, torch.Tensor) else () for value in values]
    dynamic: dict[Axis, Any] = {
        (index, axis): size.node.expr
        for index, shape in enumerate(shapes)
        for axis, size in enumerate(shape)
        if isinstance(size, torch.SymInt)
    }
    sizes = {expr: leaves[index].shape[axis] for (index, axis), expr in dynamic.items() if expr.is_Symbol}

    def is_correct(smaller: dict[object, int]) -> bool:
        """Whether the graph agrees with the model if these symbols have these sizes."""
        shrunk = list(leaves)
        for (index, axis), expr in dynamic.items():
            size = expr.subs(sizes | smaller)
            if size.is_Integer and 0 <= size < shrunk[index].shape[axis]:
                shrunk[index] = shrunk[index].narrow(axis, 0, int(size))
        return agrees(graph, model, *pytree.tree_unflatten(shrunk, tree))

    least: dict[Any, int] = {}
    ones: dict[Any, int] = {}
    for symbol in sizes:
        one = {symbol: 1}
        # A size of 1 may be correct alone and wrong together with others, for example if the model multiplies sizes.
        if not is_correct(one) or (ones and not is_correct(ones | one)):
            least[symbol] = 2
            continue
        ones |= one
        if not is_correct({symbol: 0}):
            least[symbol] = 1
    return {axis: least[expr] for axis, expr in dynamic.items() if expr in least}
