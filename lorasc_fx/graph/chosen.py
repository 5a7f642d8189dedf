"""One matrix that an input chooses out of a stack: an expert, by a router. A branch stands on the chosen one.

On the whole stack it would make all of the weights anew wherever one is used: once per expert, where a loop of the
user's own goes over the experts, each round a graph of its own.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from lorasc_fx.graph.flow import reads_shape_only
from lorasc_fx.graph.sizes import shape_of

__all__ = ["choices", "chosen_by"]

_SELECTS = (torch.ops.aten.select.int, torch.select, "select")
_INDEXES = (torch.ops.aten.index.Tensor, operator.getitem)


def chosen_by(node: fx.Node) -> fx.Node | None:
    """Return the index by which a node takes one matrix out of a stack, where it is computed; else None.

    An index that is written into the graph chooses nothing: all such choices together read the stack once.
    """
    if node.op not in ("call_function", "call_method") or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    rest = node.args[1:]
    if node.target in _SELECTS:
        index = rest[1] if len(rest) == 2 and rest[0] == 0 else None
    else:
        index = rest[0] if node.target in _INDEXES and len(rest) == 1 else None
    if isinstance(index, (tuple, list)) and len(index) == 1:
        index = index[0]
    stack, taken = shape_of(node.args[0]), shape_of(node)
    one = stack is not None and taken is not None and len(stack) == 3 and len(taken) == 2
    return index if one and isinstance(index, fx.Node) else None


def choices(stack: fx.Node) -> list[fx.Node]:
    """Return the nodes that take one matrix each out of a stack; none if anything else reads it."""
    users = [user for user in stack.users if not reads_shape_only(user)]
    return users if users and all(chosen_by(user) is not None and user.args[0] is stack for user in users) else []
