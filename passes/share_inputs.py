"""Share inputs: branches that read one node (q, k and v; gate and up) make one stacked product of it.

Split inputs is the inverse.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from lorasc_fx.branch import Branch, LowRankBranch
from lorasc_fx.graph import GraphEditor, branch_nodes
from lorasc_fx.graph.branch_calls import shared_input
from lorasc_fx.graph.flow import entries, written_between

from .base import CascadePass


@dataclass(frozen=True)
class ShareInputs(CascadePass):
    """Let branches beside linear ops that read one input share one product of it with their stacked A.

    A branch with dropout has an input of its own, and stays apart. The inverse is split-inputs.

    Args:
        least: number of entries that an input must have for it, as far as the graph's metadata tells; 0 is any.
    """

    least: int = 0

    name: ClassVar[str] = "share-inputs"
    requires: ClassVar[frozenset[str]] = frozenset({"branches-inserted"})

    def rewrite(self, graph: GraphEditor) -> None:
        """Insert one node per shared input, and its parts."""
        groups: dict[fx.Node, dict[str, fx.Node]] = defaultdict(dict)
        for node, branch in branch_nodes(graph.module).items():
            if shares(node, branch):
                x = node.args[1]
                assert isinstance(x, fx.Node)
                group = groups[x]
                if not group or written_between(next(iter(group.values())), node, (x,)) is None:
                    group.setdefault(str(node.target), node)
        for x, nodes in groups.items():
            if len(nodes) > 1 and entries(x) >= self.least:
                graph.share(list(nodes.values()))


@dataclass(frozen=True)
class SplitInputs(CascadePass):
    """Let each branch read its input itself: the inverse of share-inputs."""

    name: ClassVar[str] = "split-inputs"
    requires: ClassVar[frozenset[str]] = frozenset({"branches-inserted"})

    def rewrite(self, graph: GraphEditor) -> None:
        """Let every branch node read its own input."""
        for node in branch_nodes(graph.module):
            if shared_input(node) is not None:
                graph.unshare(node)


def shares(node: fx.Node, branch: Branch) -> bool:
    """Whether a branch node multiplies its input by its A, and does nothing to it before."""
    plain = isinstance(branch, LowRankBranch) and branch.shared_factor is not None
    plain = plain and not branch.dropout and branch.unmerged_A is None
    beside = len(node.args) == 2 and node.kwargs == {"at": "beside"} and isinstance(node.args[1], fx.Node)
    return plain and beside
