"""Find the sites: which weights get a branch, at which nodes, and why the others do not."""

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
    """Mark each node that uses a site, and note plan, refusals and unreached weights in the graph's record.

    A graph that carries a plan already is matched against that plan; its spec must be this one. Once its branches are
    folded it may be planned anew under another spec: the stages are counted on, and sites that stay keep their experts.

    Raises:
        UnknownTarget: a pattern of the spec matches nothing.
        SpecError: the graph holds branches that were planned under another spec.
        PassError: a planned weight is used here in a form that has no branch.
    """

    spec: CascadeSpec = field(default_factory=CascadeSpec)

    name: ClassVar[str] = "match-sites"
    provides: ClassVar[frozenset[str]] = frozenset({"sites-matched"})

    def rewrite(self, graph: GraphEditor) -> None:
        """Change marks and record only; no node is made or erased."""
        record = graph.record
        plan, slow = record.plan, record.slow
        if plan is not None and plan.spec != self.spec:
            if "branches-inserted" in record.facts:
                raise SpecError(
                    "match-sites: this graph was planned under another spec; fold its branches first",
                    code="spec-differs",
                )
            record = replace(record, plan=Plan(self.spec, stage=plan.stage), refusals=())
        matching = match(graph.module, record, self.spec)
        if record.plan is not plan:
            sites = matching.plan.by_weight
            slow = replace(slow, states={weight: state for weight, state in slow.states.items() if weight in sites})
        graph.mark(matching.uses)
        graph.record = replace(
            record, plan=matching.plan, refusals=matching.refusals, unreached=matching.unreached, slow=slow
        )
