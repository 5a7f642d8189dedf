"""The stage transition: fold what was trained, and start the next stage with fresh, noisy weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from lorasc_fx.errors import PassError
from lorasc_fx.graph import GraphEditor, named_weights
from lorasc_fx.state import begin_stage, start_weight

from .fold_branches import EndsStage, absorb_branches


@dataclass(frozen=True)
class StageTransition(EndsStage):
    """Fold, then insert, with the nodes left in place: constants get new values, branches are reset in place.

    The Parameters of the branches stay the same objects, so that optimizers hold them still; this is the one pass that
    writes into what its input shares with its result.

    Raises:
        PassError: the graph reads a live model, whose transitions are the runtime's (`cascade.transition`).
        NonFiniteBranch: a branch holds inf or nan.
    """

    name: ClassVar[str] = "stage-transition"
    requires: ClassVar[frozenset[str]] = frozenset({"branches-inserted"})
    provides: ClassVar[frozenset[str]] = frozenset({"branches-inserted"})

    def rewrite(self, graph: GraphEditor) -> None:
        """Change values only: W_{t+1}, and the parameters of the branches."""
        plan = graph.record.plan
        if graph.record.owner or plan is None:
            raise PassError(
                f"{self.name}: this graph reads a live model; call cascade.transition(optimizer) instead",
                code="requirement-not-met",
            )
        named, slow = named_weights(graph.owner), absorb_branches(graph, plan, self.loss)
        after, states = plan.at_stage(plan.stage + 1), dict(slow.states)
        branches, new = graph.branches, {}
        for site in after.sites:
            left_out = site.weight in slow.left_out
            started = begin_stage(
                states[site.weight], branches[site.key], site, after.spec, after.stage, left_out=left_out
            )
            states[site.weight], new[site.key] = started
        for weight, state in states.items():
            graph.set_tensor(named.names[weight], start_weight(state, plan.spec, after.stage))
        graph.renew_branches(new)
        graph.record = replace(graph.record, slow=replace(slow, states=states), plan=after)
