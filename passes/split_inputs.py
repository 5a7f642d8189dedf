"""Split inputs: the inverse of share-inputs, each branch reads its input itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lorasc_fx.graph import GraphEditor, branch_nodes, shared_input

from .base import CascadePass

__all__ = ["SplitInputs"]


@dataclass(frozen=True)
class SplitInputs(CascadePass):
    """Take shared products out again, and their nodes with them."""

    name: ClassVar[str] = "split-inputs"
    requires: ClassVar[frozenset[str]] = frozenset({"branches-inserted"})

    def rewrite(self, graph: GraphEditor) -> None:
        """Let every branch node read its own input."""
        for node in branch_nodes(graph.module):
            if shared_input(node) is not None:
                graph.unshare(node)
