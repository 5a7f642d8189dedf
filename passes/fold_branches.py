"""Fold branches into the weights and erase the branch nodes.

    %fc = linear(%x, %weight)                              W0
    %fc_lora = branches.fc/weight(%fc, %x, at="beside")
    %relu = relu(%fc_lora)

becomes

    %fc = linear(%x, %weight)                              W0 + s B A
    %relu = relu(%fc)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import fx

from lorasc_fx.errors import SpecError
from lorasc_fx.graph import GraphEditor, branch_nodes, named_weights, record_of
from lorasc_fx.plan import Plan
from lorasc_fx.state import SlowWeights, arithmetic, check_finite

from .base import CascadePass


@dataclass(frozen=True)
class EndsStage(CascadePass):
    """Base class of the passes that end the current stage."""

    def check(self, graph_module: fx.GraphModule) -> None:
        """Raise PassError for a missing fact, and NonFiniteBranch for inf or nan in a branch."""
        super().check(graph_module)
        for branch in branch_nodes(graph_module).values():
            check_finite(branch, record_of(graph_module).plan.stage)


@dataclass(frozen=True)
class FoldBranches(EndsStage):
    """Erase every branch node and add the delta of the branch to the weight. The inverse of `InsertBranches`.

    If the graph module owns its weights, the sums are new Parameters. Noise of the stage is removed, unless
    `noise.keep` is set. Weights that the insertion froze are trainable again, and the plan moves to the next stage.

    If the graph module reads a live model, only nodes are erased, because the cascade changes the weights.

    Args:
        view: `fast` folds the running branches in full, so that the folded graph computes the same as this graph, apart
            from noise. `slow` applies the slow update of the spec, as `StageTransition` does.

    Raises:
        SpecError: the view is neither `fast` nor `slow`.
        NonFiniteBranch: a branch holds inf or nan.
    """

    view: Literal["fast", "slow"] = "fast"

    def __post_init__(self) -> None:
        if self.view not in ("fast", "slow"):
            raise SpecError(f"{self.name}: view is {self.view!r}; give 'fast' or 'slow'")

    name: ClassVar[str] = "fold-branches"
    requires: ClassVar[frozenset[str]] = frozenset({"branches-inserted"})
    provides: ClassVar[frozenset[str]] = frozenset({"branches-folded"})
    removes: ClassVar[frozenset[str]] = frozenset({"branches-inserted"})

    def rewrite(self, graph: GraphEditor) -> None:
        """Erase the branch nodes, then set the new weights and increment the stage."""
        for node in branch_nodes(graph.module):
            graph.remove_branch(node)
        # If the graph reads a live model, the cascade changes the weights, not this pass.
        plan = graph.record.plan
        if not graph.record.owner:
            named = named_weights(graph.owner)
            # With pace 1, the slow update adds the whole delta.
            spec = plan.spec if self.view == "slow" else replace(plan.spec, pace=1.0)
            slow = absorb_branches(graph, replace(plan, spec=spec))
            # Compute in at least fp32, and round once to the dtype of the weight.
            for weight, state in slow.states.items():
                exact = state.exact("slow", arithmetic(state.base.dtype))
                graph.set_tensor(named.names[weight], state.on_grid(exact.to(state.base.dtype)))
            graph.record = replace(graph.record, slow=slow, plan=replace(plan, stage=plan.stage + 1))
            graph.unfreeze()
        graph.record = replace(graph.record, branched=frozenset())
        graph.set_branches({})


def absorb_branches(graph: GraphEditor, plan: Plan) -> SlowWeights:
    """Return the slow weights after the current stage, computed from the branches of the graph."""
    branches = {branch.weight_name: branch for branch in graph.branches.values()}
    return graph.record.slow.after_stage(plan, branches)
