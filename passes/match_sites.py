"""Find the weights to adapt from the nodes that use them. The nodes are not changed.

%fc = linear(%x, %weight)    the plan in the record has the site fc.weight, of kind linear
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from lorasc_fx.errors import SpecError
from lorasc_fx.graph import GraphEditor
from lorasc_fx.graph.matching import match
from lorasc_fx.plan import Plan
from lorasc_fx.spec import CascadeSpec

from .base import CascadePass


@dataclass(frozen=True)
class MatchSites(CascadePass):
    """Store the plan, the refusals and the unreached weights in the record.

    If the graph already has a plan, its sites are kept. The plan must have the same spec, unless the branches were
    folded. After a fold, another spec gets a new plan, which continues the stage number. Sites in both plans keep their
    experts.

    Args:
        spec: selects the weights and their options.
        partial: whether the graph is a part of a model. A pattern of the spec may then match nothing.

    Raises:
        UnknownTarget: a pattern of the spec matches nothing, and `partial` is False.
        SpecError: the graph has branches that were planned with another spec.
        PassError: the graph uses a planned weight in a way that its branch cannot follow.
    """

    spec: CascadeSpec = field(default_factory=CascadeSpec)
    partial: bool = False

    name: ClassVar[str] = "match-sites"
    provides: ClassVar[frozenset[str]] = frozenset({"sites-matched"})

    def rewrite(self, graph: GraphEditor) -> None:
        """Write plan, refusals and unreached weights to the record."""
        record = graph.record
        plan, slow = record.plan, record.slow
        if plan.spec != self.spec:
            if "branches-inserted" in record.facts:
                raise SpecError(
                    "match-sites: this graph was planned with another spec; run fold-branches first, or pass that spec",
                    code="spec-differs",
                )
            record = replace(record, plan=Plan(self.spec, stage=plan.stage), refusals=())
        matched = match(graph.module, record, self.partial)
        # Under a new spec, drop the slow states of weights that the new plan does not have.
        if record.plan is not plan:
            sites = matched.plan.by_weight
            slow = replace(slow, states={weight: state for weight, state in slow.states.items() if weight in sites})
        graph.record = replace(matched, slow=slow)
