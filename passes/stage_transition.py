"""The stage transition: fold what was trained, and start the next stage with fresh, noisy weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from lorasc_fx.branch import Branch, fresh_a
from lorasc_fx.errors import PassError
from lorasc_fx.graph import GraphEditor, named_weights
from lorasc_fx.plan import Plan, Site
from lorasc_fx.state import start_weight

from .base import CascadePass
from .fold_branches import absorb_branches, check_branches
from .insert_branches import begun

__all__ = ["StageTransition"]


@dataclass(frozen=True)
class StageTransition(CascadePass):
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

    def check(self, graph_module: fx.GraphModule) -> None:
        """Raise for a missing fact, or for a branch that cannot be folded."""
        super().check(graph_module)
        check_branches(graph_module)

    def rewrite(self, graph: GraphEditor) -> None:
        """Change values only: W_{t+1}, lora_A by the spec's restart_A, lora_B = 0."""
        plan = graph.record.plan
        if graph.record.owner or plan is None:
            raise PassError(
                f"{self.name}: this graph reads a live model; call cascade.transition(optimizer) instead",
                code="live-model",
            )
        if plan.spec.restart_A == "gradient":
            raise PassError(
                f"{self.name}: restart_A='gradient' needs a training step; use a Cascade", code="needs-training-step"
            )
        named, slow = named_weights(graph.owner), absorb_branches(graph, plan)
        after = plan.at_stage(plan.stage + 1)
        branches = graph.branches
        new = {site.key: renewed(branches[site.key], site, after) for site in after.sites}
        if plan.spec.start != "lora" or plan.spec.use_dora:
            slow |= {branch.weight_name: begun(slow[branch.weight_name], branch, after) for branch in new.values()}
        for weight, state in slow.items():
            graph.set_tensor(named.names[weight], start_weight(state, plan.spec, after.stage))
        graph.renew_branches(new)
        graph.record = replace(graph.record, slow=slow, plan=after)


def renewed(branch: Branch, site: Site, plan: Plan) -> Branch:
    """Return a copy of the branch as the plan's stage starts it."""
    new = copy.deepcopy(branch)
    resized = branch.rank != site.rank
    new.to_rank(site)
    with torch.no_grad():
        new.lora_B.zero_()
        if plan.spec.restart_A == "fresh" or resized or not torch.isfinite(new.lora_A).all():
            start = fresh_a(plan.spec.seed, plan.stage, site.weight, site.factor_shapes[0])
            new.lora_A.copy_(start)
    return new
