"""Fold the branches: the graph is the captured one again, and its constants are the slow weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from lorasc_fx.graph import GraphEditor, branch_nodes, named_weights, record_of
from lorasc_fx.plan import Plan
from lorasc_fx.state import SlowWeights, arithmetic, check_finite

from .base import CascadePass


@dataclass(frozen=True)
class EndsStage(CascadePass):
    """A pass that ends the running stage, and so folds the branches.

    Args:
        loss: of the stage, if the pace of the spec is "loss".
    """

    loss: float | None = None

    def check(self, graph_module: fx.GraphModule) -> None:
        """Raise for a missing fact; NonFiniteBranch for inf or nan in a branch, unless the spec skips such branches."""
        super().check(graph_module)
        plan = record_of(graph_module).plan
        for branch in branch_nodes(graph_module).values():
            if plan is not None:
                check_finite(branch, plan.spec, plan.stage)


@dataclass(frozen=True)
class FoldBranches(EndsStage):
    """Erase every branch node; its base op computes with the slow weights instead.

    In a graph module that owns its weights the slow update of the plan's spec is made (pace, restart, noise) and
    written to new constants, and what the insertion has frozen is trainable again. Where the weights are live, their
    values are the runtime's and only nodes are erased.

    Raises:
        NonFiniteBranch: a branch holds inf or nan.
    """

    name: ClassVar[str] = "fold-branches"
    requires: ClassVar[frozenset[str]] = frozenset({"branches-inserted"})
    provides: ClassVar[frozenset[str]] = frozenset({"branches-folded"})
    removes: ClassVar[frozenset[str]] = frozenset({"branches-inserted"})

    def rewrite(self, graph: GraphEditor) -> None:
        """Take out nodes, then write values and go on to the next stage."""
        for node in branch_nodes(graph.module):
            graph.remove_branch(node)
        plan = graph.record.plan
        if plan is not None and not graph.record.owner:
            named = named_weights(graph.owner)
            slow = absorb_branches(graph, plan, self.loss)
            for weight, state in slow.states.items():
                exact = state.exact("slow", arithmetic(state.base.dtype))
                graph.set_tensor(named.names[weight], exact.to(state.base.dtype))
            graph.record = replace(graph.record, slow=slow, plan=plan.at_stage(plan.stage + 1))
            graph.unfreeze()
        graph.record = replace(graph.record, branched=frozenset())
        graph.set_branches({})


def absorb_branches(graph: GraphEditor, plan: Plan, loss: float | None) -> SlowWeights:
    """Return the slow weights after the running stage."""
    branches = {branch.weight_name: branch for branch in graph.branches.values()}
    return graph.record.slow.after_stage(plan, branches, loss)
