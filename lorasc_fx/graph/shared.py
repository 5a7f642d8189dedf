"""Branches that share an input: `%low = shared_down(%x, (lora_A, ...))`, `branches.KEY(%base, %low[i], shared=True)`.

The nodes are read here; `edit` makes and erases them.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from lorasc_fx.branch import shared_down
from lorasc_fx.graph.weights import BRANCHES

__all__ = ["SharedInput", "shared_input"]


@dataclass(frozen=True)
class SharedInput:
    """Where a branch's input comes from: the group's node, its x, and the key of the branch whose lora_A it met."""

    group: fx.Node
    x: fx.node.Argument
    factor: str


def shared_input(node: fx.Node) -> SharedInput | None:
    """Return the shared input of a branch node; None for one that has its own, or whose input is no group's."""
    if not node.kwargs.get("shared") or len(node.args) < 2:
        return None
    chosen = node.args[1]
    if not isinstance(chosen, fx.Node) or chosen.target is not operator.getitem:
        return None
    group, index = chosen.args
    if not isinstance(group, fx.Node) or group.target is not shared_down or not isinstance(index, int):
        return None
    x, factors = group.args
    if not isinstance(factors, (tuple, list)) or not 0 <= index < len(factors):
        return None
    factor = factors[index]
    name = str(factor.target) if isinstance(factor, fx.Node) else ""
    return SharedInput(group, x, name.removeprefix(f"{BRANCHES}.").removesuffix(".lora_A"))
