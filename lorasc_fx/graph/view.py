"""What a rule of the verifier looks at, and what a rule is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import fx

from lorasc_fx.branch import Branch
from lorasc_fx.graph.record import Record

__all__ = ["Rule", "View"]


@dataclass(frozen=True)
class View:
    """What a rule looks at."""

    module: fx.GraphModule
    record: Record
    branches: dict[fx.Node, Branch]
    canonical: dict[str, str]

    @property
    def inserted(self) -> bool:
        """Whether branches are there."""
        return "branches-inserted" in self.record.facts


Rule = Callable[[View], Iterator[str]]
"""Yields a sentence for each fault that it finds, naming the node or the weight."""
