"""Rules of the verifier about what other people's passes do to a graph that holds branches, and a fold cannot follow.

A fold erases branches and writes the weights anew. So each branch that was inserted has to be called in this graph,
compute what its op computed when they stood together, and stand over the weights that its stage began with.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx, nn

from lorasc_fx.branch import Branch, dense, is_quantized, shared_down
from lorasc_fx.graph.marks import use_of
from lorasc_fx.graph.shared import shared_input
from lorasc_fx.graph.spelling import spelling_of
from lorasc_fx.graph.view import View
from lorasc_fx.graph.weights import BRANCHES, module_at, named_weights, owner_of
from lorasc_fx.graph.writes import written_between
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.state import SlowWeight, slow_faults, start_differs, start_weight

__all__ = [
    "branches_stand_in_this_graph",
    "factors_are_read_by_branches",
    "nothing_is_written_in_between",
    "weights_are_the_stages",
]


def branches_stand_in_this_graph(view: View) -> Iterator[str]:
    """Each branch that was inserted is called by a node of this graph, not by one of a graph inside it, or by none."""
    called = {branch.weight_name for branch in view.branches.values()}
    for node in view.module.graph.nodes:
        module = module_at(view.module, str(node.target)) if node.op == "call_module" else None
        inside = [each.weight_name for each in module.modules() if isinstance(each, Branch)] if module else []
        if inside and node not in view.branches:
            called |= set(inside)
            yield f"node {node.name} calls a module inside which the branch of {inside[0]} stands; no fold reaches it"
    used = {use.weight for node in view.module.graph.nodes if (use := use_of(node)) is not None}
    for weight in sorted(view.record.branched - called - used):
        yield f"{weight} had a branch in this graph, and no node calls it any more; fold before what takes it out"


def factors_are_read_by_branches(view: View) -> Iterator[str]:
    """No node but a branch, or a product that branches share, reads the factors of one."""
    for node in view.module.graph.nodes:
        if node.op != "get_attr" or not str(node.target).startswith(f"{BRANCHES}."):
            continue
        branch = module_at(view.module, str(node.target).rpartition(".")[0])
        strays = [user.name for user in node.users if user.target is not shared_down]
        if isinstance(branch, Branch) and strays:
            yield f"node {strays[0]} reads {node.target} past the branch of {branch.weight_name}"


def nothing_is_written_in_between(view: View) -> Iterator[str]:
    """What an op read is still the same where its branch reads it."""
    for node in view.branches:
        base = node.args[0] if node.args else None
        if spelling_of(node) is not None or not isinstance(base, fx.Node):
            continue
        shared = shared_input(node)
        x = shared.x if shared is not None else node.args[1] if len(node.args) > 1 else None
        inputs = [each for each in (x, base) if isinstance(each, fx.Node)]
        for first, last in ((base, node),) if shared is None else ((base, node), _ordered(base, shared.group)):
            writer = written_between(first, last, inputs)
            if writer is not None:
                yield f"node {writer.name} writes into what {base.name} and its branch node {node.name} read in turn"
                break


def _ordered(one: fx.Node, other: fx.Node) -> tuple[fx.Node, fx.Node]:
    return (one, other) if one < other else (other, one)


def weights_are_the_stages(view: View) -> Iterator[str]:
    """The weights are those that the stage began with: a fold starts from W0, and would lose what was done to them."""
    plan = view.record.plan
    if not view.inserted or plan is None or view.record.owner:
        return
    parameters = named_weights(owner_of(view.module, view.record)).parameters
    for weight, state in view.record.slow.items():
        parameter = parameters.get(weight)
        fits = parameter is not None and parameter.shape == state.base.shape
        fits = fits and not slow_faults(state)  # told where the slow state is held against the plan
        if fits and parameter is not None and not _is_start(parameter, state, plan.spec, plan.stage):
            yield (
                f"{weight} holds other numbers than stage {plan.stage} began with; run what changes weights before the "
                "branches are inserted, or after they are folded"
            )


def _is_start(parameter: nn.Parameter, state: SlowWeight, spec: CascadeSpec, stage: int) -> bool:
    if parameter.is_meta:
        return True
    if is_quantized(parameter) or is_quantized(state.base):
        both = is_quantized(parameter) and is_quantized(state.base)
        return both and torch.equal(dense(parameter), dense(state.base))
    plain = not (spec.noise.strength or state.experts or state.kept or state.began or start_differs(state))
    plain = plain and state.scale() is None
    if plain and state.dense_start is None and parameter.data_ptr() == state.base.data_ptr():
        return True  # the very memory
    with torch.no_grad():
        start = start_weight(state, spec, stage).to(parameter)
        same = (parameter == start) | (parameter.isnan() & start.isnan())
        return bool(same.all())
