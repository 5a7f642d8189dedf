"""Insert one branch node at each use of a site.

The node depends on the placement of the site:

    %fc = linear(%x, %weight, %bias)

becomes, with placement `beside` (the branch is added to the output of the op),

    %fc = linear(%x, %weight, %bias)
    %fc_lora = branches.fc/weight(%fc, %x, at="beside")

with placement `merged` (the branch replaces the op),

    %fc_lora = branches.fc/weight(%x, %weight, %bias, at="merged", op="linear")

and with placement `weight` (the branch is added to the weight before the op),

    %weight_lora = branches.fc/weight(%weight, at="weight")
    %fc = linear(%x, %weight_lora, %bias)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx, nn

from lorasc_fx.branch import BUILT_IN, Branch, Decided, check_registered
from lorasc_fx.errors import NoSites, PassError, SpecError
from lorasc_fx.graph import GraphEditor, Record, branch_nodes, named_weights, record_of, trained_by
from lorasc_fx.plan import Plan, Reason
from lorasc_fx.spec import OWN_GRID
from lorasc_fx.state import start_weight

from .base import CascadePass
from .inlined import insert_calls


@dataclass(frozen=True)
class InsertBranches(CascadePass):
    """Insert a branch node at every use of a site of the plan. A new branch starts with B = 0.

    If the graph module already has a branch for a site, this branch is reused, so that several graphs can share it.

    If the graph module owns its weights, this pass also:

    - adds the noise of the stage to the weights, as new Parameters. The clean weights are stored in the record;
    - freezes all weights except those in `spec.train`, by new Parameters. The Parameters of the traced model keep
      their flags.

    If the graph module reads a live model, the cascade sets the weights and `requires_grad`.

    Raises:
        NoSites: no weight was matched as a site.
        PassError: the graph has branches whose tensors are inputs (`AdapterInputs`).
    """

    name: ClassVar[str] = "insert-branches"
    requires: ClassVar[frozenset[str]] = frozenset({"sites-matched"})
    provides: ClassVar[frozenset[str]] = frozenset({"branches-inserted"})
    removes: ClassVar[frozenset[str]] = frozenset({"branches-folded"})

    def check(self, graph_module: fx.GraphModule) -> None:
        """Raise PassError for a missing fact, or if the tensors of the branches are inputs of the graph."""
        super().check(graph_module)
        if record_of(graph_module).lifted.branches:
            raise PassError(
                f"{self.name}: the tensors of the branches are inputs of this graph; use the graph before "
                "adapter-inputs",
                code="requirement-not-met",
            )

    def rewrite(self, graph: GraphEditor) -> None:
        """Insert the branch nodes that are missing."""
        plan = graph.record.plan
        if not plan.sites:
            raise NoSites(no_sites_message(graph.record))
        existing = graph.branches
        branches = all_branches(plan, existing, named_weights(graph.owner).parameters)
        graph.set_branches(branches)
        insert_calls(graph)
        if not graph.record.owner:
            new_weights = [branch.weight_name for key, branch in branches.items() if key not in existing]
            _start_values(graph, plan, new_weights)
            graph.freeze(trained_by(plan.spec, named_weights(graph.owner).names))
        branched = frozenset(branch.weight_name for branch in branch_nodes(graph.module).values())
        graph.record = replace(graph.record, branched=branched)


def no_sites_message(decided: Record | Decided) -> str:
    """Return the message of `NoSites`, which says for up to five weights why they are not adapted."""
    reasons = [str(refusal) for refusal in decided.refusals if refusal.reason is not Reason.NOT_TARGETED]
    reasons += [f"{weight}: unreached (no node of this graph uses it)" for weight in decided.unreached]
    shown = reasons[:5] or [f"no weight that the graph uses matches targets={decided.plan.spec.targets}"]
    if not decided.refusals and not decided.unreached:
        shown = [
            "the graph has no weight matrices as attributes. If they are inputs of the graph, as in "
            "ExportedProgram.graph_module, run lorasc_fx.passes.weights_as_attributes first"
        ]
    return "the spec leaves no site to adapt:\n  " + "\n  ".join(shown)


def all_branches(
    plan: Plan, existing: Mapping[str, Branch], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Branch]:
    """Return {key: branch} of a plan: the existing branches, and new ones on the devices of their weights."""
    branches = dict(existing)
    for site in plan.sites:
        if site.key not in branches:
            like = parameters[site.weight]
            branches[site.key] = branch = site.options.method(site, plan.spec.seed, plan.stage, like)
            if type(branch) not in BUILT_IN:
                check_registered(branch, site, like.detach)
    if plan.spec.grid == OWN_GRID and branches and not any(branch.grid for branch in branches.values()):
        raise SpecError(
            f"grid is {OWN_GRID!r}, the grid of quantized weights, but none of the adapted weights is quantized. Give "
            "a dtype or a function, or quantize the model before you adapt it"
        )
    return branches


def _without_branch(graph: GraphEditor, plan: Plan) -> tuple[str, ...]:
    """Return the matrices without a branch that are not excluded or trained in full: noise.where="all" adds noise."""
    named = named_weights(graph.owner)
    skipped = (Reason.TRAINED, Reason.EXCLUDED)
    left_out = {refusal.weight for refusal in graph.record.refusals if refusal.reason in skipped} | set(plan.by_weight)
    return tuple(
        weight for weight in named.matrices if weight not in left_out and named.parameters[weight].is_floating_point()
    )


def _start_values(graph: GraphEditor, plan: Plan, added: Sequence[str]) -> None:
    """Set each weight to its value at the start of the stage, `W_t = W0 + S_{t-1} + N_t`, and initialize new branches.

    `added` are the names of the weights with a new branch. The record of the graph keeps the weights without noise.
    """
    # Add a slow state for each new branch, and for the other weights that get noise.
    named, slow = named_weights(graph.owner), graph.record.slow
    branches = {branch.weight_name: branch for branch in graph.branches.values()}
    names = dict.fromkeys((*added, *(site.weight for site in plan.sites if site.weight not in slow.states)))
    if names:
        names |= dict.fromkeys(plan.spec.noise.on_others(_without_branch(graph, plan)))
    parameters = {name: named.parameters[name] for name in names}
    slow = slow.with_weights(parameters, plan, "device")
    # Initialize the factors of the new branches.
    slow, factors = slow.begin_stage(plan, {weight: branches[weight] for weight in added})
    with torch.no_grad():
        for weight, values in factors.items():
            for name, parameter in branches[weight].named_parameters():
                parameter.copy_(values[name])
    # Write the start values that differ from the slow weights, because of noise or of initial factors.
    for weight in names:
        state = slow.states[weight]
        if state.differs_from_slow(plan.spec.noise.strength > 0):
            graph.set_tensor(named.names[weight], start_weight(state, plan.spec, plan.stage))
    graph.record = replace(graph.record, slow=slow)
