"""End a stage and start the next one without changing nodes.

    %fc = linear(%x, %weight)                              W_t
    %fc_lora = branches.fc/weight(%fc, %x, at="beside")    A_t, B_t

becomes

    %fc = linear(%x, %weight)                              W_{t+1} = W0 + S_t + N_{t+1}
    %fc_lora = branches.fc/weight(%fc, %x, at="beside")    a new A, B = 0
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from lorasc_fx.errors import PassError
from lorasc_fx.graph import GraphEditor, named_weights
from lorasc_fx.state import begin_stage, start_weight

from .fold_branches import EndsStage, absorb_branches


@dataclass(frozen=True)
class StageTransition(EndsStage):
    """Fold the branches by the slow update of the spec, and start the next stage.

    The result has the same values as after `FoldBranches(view="slow")` and `InsertBranches`.

    The weights are replaced by new Parameters. The Parameters of the branches are reset in place, so that an optimizer
    stays valid. So this is the only pass that changes tensors which its input and its result share.

    Raises:
        PassError: the graph reads a live model; call `cascade.transition` instead.
        NonFiniteBranch: a branch holds inf or nan.
    """

    name: ClassVar[str] = "stage-transition"
    requires: ClassVar[frozenset[str]] = frozenset({"branches-inserted"})
    provides: ClassVar[frozenset[str]] = frozenset({"branches-inserted"})

    def rewrite(self, graph: GraphEditor) -> None:
        """Set the weights and the parameters of the branches to their values at the start of the next stage."""
        plan = graph.record.plan
        if graph.record.owner:
            raise PassError(
                f"{self.name}: this graph reads a live model; call cascade.transition(optimizer) instead",
                code="requirement-not-met",
            )
        named, slow = named_weights(graph.owner), absorb_branches(graph, plan)
        after, states = replace(plan, stage=plan.stage + 1), dict(slow.states)
        branches, new = graph.branches, {}
        for site in after.sites:
            state, branch = states[site.weight], branches[site.key]
            states[site.weight], values = begin_stage(state, branch, site, after.spec, after.stage)
            new[site.key] = branch.with_values(values)
        # Write all slow states, because weights without a branch may have noise too.
        for weight, state in states.items():
            graph.set_tensor(named.names[weight], start_weight(state, plan.spec, after.stage))
        graph.renew_branches(new)
        graph.record = replace(graph.record, slow=replace(slow, states=states), plan=after)
