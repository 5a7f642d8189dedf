"""Compute `A x` of several branches with the same input in one product.

Examples are the branches of q, k and v, or of gate and up.

    %q_lora = branches.q/weight(%q, %x, at="beside")
    %k_lora = branches.k/weight(%k, %x, at="beside")

becomes

    %x_shared = shared_down(%x, (branches.q/weight.lora_A, branches.k/weight.lora_A))
    %x_shared_0 = getitem(%x_shared, 0)
    %x_shared_1 = getitem(%x_shared, 1)
    %q_lora = branches.q/weight(%q, %x_shared_0, at="after_shared")
    %k_lora = branches.k/weight(%k, %x_shared_1, at="after_shared")
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
    """Share the product `A x` among branches of linear ops that read the same input. `SplitInputs` is the inverse.

    Only branches with placement `beside` take part. A branch with dropout does not, because its input is different.

    Args:
        least: minimum number of entries of the input, as recorded in the graph's metadata. With 0, every input is
            shared, even without metadata.
    """

    least: int = 0

    name: ClassVar[str] = "share-inputs"
    requires: ClassVar[frozenset[str]] = frozenset({"branches-inserted"})

    def rewrite(self, graph: GraphEditor) -> None:
        """Insert one product per shared input, and a `getitem` per branch."""
        # Group the branches by input. Branches after an in-place write into the input stay separate.
        groups: dict[fx.Node, dict[str, fx.Node]] = defaultdict(dict)
        for node, branch in branch_nodes(graph.module).items():
            if _can_share(node, branch):
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
    """Make each branch compute `A x` separately. The inverse of `ShareInputs`."""

    name: ClassVar[str] = "split-inputs"
    requires: ClassVar[frozenset[str]] = frozenset({"branches-inserted"})

    def rewrite(self, graph: GraphEditor) -> None:
        """Make every branch node read the input itself, and erase the shared products."""
        for node in branch_nodes(graph.module):
            if shared_input(node) is not None:
                graph.unshare(node)


def _can_share(node: fx.Node, branch: Branch) -> bool:
    """Whether a branch node computes `A x` from the input of a linear, without dropout or another change of x."""
    has_factor = isinstance(branch, LowRankBranch) and branch.shared_factor is not None and branch.kind != "conv"
    has_factor = has_factor and not branch.dropout and branch.unmerged_A is None
    is_beside = len(node.args) == 2 and node.kwargs == {"at": "beside"} and isinstance(node.args[1], fx.Node)
    return has_factor and is_beside
