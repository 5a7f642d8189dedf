"""Insert the branches: one node beside each use of a site, B = 0, and the stage's noise in the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx, nn

from lorasc_fx.branch import Branch, branch_class
from lorasc_fx.errors import NoSites, PassError
from lorasc_fx.graph import (
    GraphEditor,
    Record,
    branch_nodes,
    call_template,
    named_weights,
    record_of,
    trained_by,
    use_of,
)
from lorasc_fx.graph.flow import expert_index
from lorasc_fx.graph.forms import ON_INDEXED_EXPERT, ON_WEIGHT, form_named
from lorasc_fx.graph.weights import module_at
from lorasc_fx.plan import Plan, Reason
from lorasc_fx.state import start_weight

from .base import CascadePass


@dataclass(frozen=True)
class InsertBranches(CascadePass):
    """Put `branches.KEY(base, x)` beside every marked node, or `branches.KEY(x, weight, bias)` in its place.

    Branches that the graph module holds already are wired, not made anew, so that several graphs can share them. In a
    graph module that owns its weights the noise of the plan's stage is added to new constants, and the clean weights
    are kept in the record. All its weights are then frozen, but for those under `spec.train`; the Parameters that it
    shares with the model it was traced from stay as they are. If the weights are live, the runtime owns values and
    flags.
    """

    name: ClassVar[str] = "insert-branches"
    requires: ClassVar[frozenset[str]] = frozenset({"sites-matched"})
    provides: ClassVar[frozenset[str]] = frozenset({"branches-inserted"})
    removes: ClassVar[frozenset[str]] = frozenset({"branches-folded"})

    def check(self, graph_module: fx.GraphModule) -> None:
        """Raise PassError for a missing fact, or if the branches are there and get their tensors as inputs."""
        super().check(graph_module)
        if record_of(graph_module).lifted is not None:
            raise PassError(
                f"{self.name}: the branches of this graph get their tensors as inputs; run bind-adapter before",
                code="requirement-not-met",
            )

    def rewrite(self, graph: GraphEditor) -> None:
        """Insert what is missing; a graph whose uses all have their branch stays as it is."""
        plan = graph.record.plan
        if plan is None or not plan.sites:
            raise NoSites(nothing_to_do(graph.record))
        have = {node if call_template(node) is not None else node.args[0] for node in branch_nodes(graph.module)}
        before = graph.branches
        branches = missing_branches(plan, before, named_weights(graph.owner).parameters)
        graph.set_branches(branches)
        for base in graph.nodes:
            use = use_of(base)
            if use is None or base in have or not base.users:  # dead code stays as it is
                continue
            site = plan.by_weight[use.weight]
            if use.form in (ON_WEIGHT, ON_INDEXED_EXPERT):
                expert = {} if use.form == ON_WEIGHT else {"expert": expert_index(base)}
                graph.insert_after(base, site.key, (base,), {"at": "on_weight", **expert})
                continue
            module = module_at(graph.module, str(base.target)) if base.op == "call_module" else None
            form = form_named(use.form)
            reading = form.reads(base, module)
            if use.merged:
                graph.replace_op(base, site.key, reading, form.product)
            else:
                graph.insert_after(base, site.key, (base, reading.x), {"at": "beside", **reading.options})
        if not graph.record.owner:
            start_values(graph, plan, [branch.weight_name for key, branch in branches.items() if key not in before])
            graph.freeze(trained_by(plan.spec, named_weights(graph.owner).names))
        branched = frozenset(branch.weight_name for branch in branch_nodes(graph.module).values())
        graph.record = replace(graph.record, branched=branched)


def nothing_to_do(record: Record) -> str:
    """Return the sentence for a spec that leaves no site: why each candidate is none."""
    reasons = [str(refusal) for refusal in record.refusals if refusal.reason is not Reason.NOT_TARGETED]
    reasons += [f"{weight}: unreached (no node of this graph uses it)" for weight in record.unreached]
    targets = record.plan.spec.targets if record.plan is not None else ()
    shown = reasons[:5] or [f"no weight that the graph uses is of a kind or name in targets={targets}"]
    return "the spec leaves no site to adapt:\n  " + "\n  ".join(shown)


def missing_branches(
    plan: Plan, known: Mapping[str, Branch], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Branch]:
    """Return the branches of a plan by key: those known already, and new ones for the other sites."""
    branches = dict(known)
    for site in plan.sites:
        if site.key not in branches:
            like = parameters[site.weight]
            branches[site.key] = branch_class(site)(site, plan.spec.seed, plan.stage, like)
    return branches


def without_branch(graph: GraphEditor, plan: Plan) -> tuple[str, ...]:
    """Return the matrices without a branch, but for those trained in full or excluded: noise.where="all" means them."""
    named = named_weights(graph.owner)
    skipped = (Reason.TRAINED, Reason.EXCLUDED)
    left_out = {refusal.weight for refusal in graph.record.refusals if refusal.reason in skipped} | set(plan.by_weight)
    return tuple(
        weight for weight in named.matrices if weight not in left_out and named.parameters[weight].is_floating_point()
    )


def start_values(graph: GraphEditor, plan: Plan, added: Sequence[str]) -> None:
    """Compute with the start of the stage, `W_t = W0 + S_{t-1} + N_t`; the clean weights stay in the record.

    Args:
        graph: which owns its weights.
        plan: of the stage.
        added: weights whose branches are new.
    """
    if plan.spec.noise.follows_steps:
        raise PassError(
            "insert-branches: noise.redraw='step' needs a training step; use a Cascade", code="requirement-not-met"
        )
    named, slow = named_weights(graph.owner), graph.record.slow
    branches = {branch.weight_name: branch for branch in graph.branches.values()}
    names = dict.fromkeys((*added, *(site.weight for site in plan.sites if site.weight not in slow.states)))
    if names:
        names |= dict.fromkeys(plan.spec.noise.on_others(without_branch(graph, plan)))
    parameters = {name: named.parameters[name] for name in names}
    slow = slow.with_weights(parameters, plan, {name: value.detach() for name, value in parameters.items()})
    slow, factors = slow.begin_stage(plan, {weight: branches[weight] for weight in added})
    with torch.no_grad():
        for weight, values in factors.items():
            for name, parameter in branches[weight].named_parameters():
                parameter.copy_(values[name])
    for weight in names:
        state = slow.states[weight]
        if state.differs_from_slow(plan.spec.noise.is_on):
            graph.set_tensor(named.names[weight], start_weight(state, plan.spec, plan.stage))
    graph.record = replace(graph.record, slow=slow)
