"""Holds a graph against its plan. A table of rules, separate from the code that edits, run after every pass.

A rule yields a sentence for each fault that it finds, naming the node or the weight; `verify` raises them all at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from lorasc_fx.errors import VerifyError
from lorasc_fx.graph.chosen import choices, chosen_by
from lorasc_fx.graph.flow import constants
from lorasc_fx.graph.form import FunctionForm, ModuleForm
from lorasc_fx.graph.forms import BRANCH_OF, ON_CHOSEN, ON_WEIGHT, form_of, transposes
from lorasc_fx.graph.marks import branch_nodes, use_of
from lorasc_fx.graph.record import record_of
from lorasc_fx.graph.spelling import spelled
from lorasc_fx.graph.uses import uses_of
from lorasc_fx.graph.verify_branches import (
    branches_fit_plan,
    branches_stand_at_sites,
    every_use_has_a_branch,
    metadata_is_the_base_ops,
    nothing_is_left_over,
)
from lorasc_fx.graph.verify_foreign import (
    branches_stand_in_this_graph,
    factors_are_read_by_branches,
    nothing_is_written_in_between,
    weights_are_the_stages,
)
from lorasc_fx.graph.view import Rule, View
from lorasc_fx.graph.weights import Weights, module_at, named_weights, owner_of
from lorasc_fx.plan import Site
from lorasc_fx.state import slow_faults

__all__ = ["RULES", "faults", "verify"]


def _graph_is_sound(view: View) -> Iterator[str]:
    try:
        view.module.graph.lint()
    except (RuntimeError, ValueError) as fault:
        yield f"the graph is malformed: {fault}"


def _targets_exist(view: View) -> Iterator[str]:
    for node in view.module.graph.nodes:
        if node.op == "call_module" and module_at(view.module, node.target) is None:
            yield f"node {node.name} calls {node.target}, which the module does not have"


def _plan_fits_weights(view: View) -> Iterator[str]:
    if view.record.plan is None:
        return
    if view.record.plan.stage < 1:
        yield f"the plan is in stage {view.record.plan.stage}; the first one is 1"
    weights, seen = named_weights(owner_of(view.module, view.record)), set()
    for site in view.record.plan.sites:
        if site.weight in seen:
            yield f"{site.weight} is planned twice"
        seen.add(site.weight)
        parameter = weights.parameters.get(site.weight)
        if parameter is None:
            yield f"{site.weight} is planned, but the model has no weight of this name"
        elif tuple(parameter.shape) != site.shape:
            yield f"{site.weight} is {tuple(parameter.shape)}, planned as {site.shape}"
        elif _ties_differ(weights, site):
            yield f"{site.weight} is tied to {weights.names[site.weight][1:]}, planned with {site.aliases}"


def _ties_differ(weights: Weights, site: Site) -> bool:
    """Whether a name is tied that was not, or the other way; one that nobody reads may be gone from a graph module."""
    new = set(weights.names[site.weight][1:]) - set(site.aliases)
    return bool(new) or any(weights.canonical.get(alias, site.weight) != site.weight for alias in site.aliases)


def _uses_fit_plan(view: View) -> Iterator[str]:
    plan = view.record.plan
    for node in view.module.graph.nodes:
        use = use_of(node)
        if use is None:
            continue
        site = plan.site(use.weight) if plan is not None else None
        if site is None:
            yield f"node {node.name} is marked as a use of {use.weight}, which is not planned"
            continue
        op = spelled(node)
        module = module_at(view.module, node.target) if node.op == "call_module" else None
        form = op.form if op is not None else form_of(node, module)
        on_chosen = form is None and chosen_by(node) is not None
        on = ON_CHOSEN if on_chosen else ON_WEIGHT if node.op == "get_attr" else "in no form"
        name = form.name if form is not None else on
        if op is not None and not use.merged:
            yield f"node {node.name} stands in place of {op.name}, but no pass has marked it so"
        elif use.merged and site.placement != "merged":
            yield f"node {node.name} is merged with the branch of {use.weight}, planned {site.placement}"
        elif name != use.form:
            yield f"node {node.name} is marked as {use.form}, but is {name}"
        elif _weight_of(view, node) != use.weight:
            yield f"node {node.name} is marked as a use of {use.weight}, but computes with {_weight_of(view, node)}"
        elif form is not None and not _alike(form.kind, site.kind):
            yield f"node {node.name} is a {form.kind}, but {use.weight} is planned as a {site.kind}"
        elif form is not None and _layout_of(node, form) != site.layout:
            yield f"node {node.name} reads {use.weight} as {_layout_of(node, form)}, planned as {site.layout}"


def _alike(used: str, planned: str) -> bool:
    """Whether the branch of a site of one kind can stand beside a use of another."""
    return BRANCH_OF[used] is BRANCH_OF[planned] and (used == "experts") == (planned == "experts")


def _readers_of_sites_are_marked(view: View) -> Iterator[str]:
    plan = view.record.plan
    if not view.inserted or plan is None:
        return
    planned, constant = plan.by_weight, constants(view.module.graph)
    for node in view.module.graph.nodes:
        name = str(node.target).removeprefix(view.record.prefix)
        if node.op == "get_attr" and view.canonical.get(name) in planned:
            chosen = choices(node)
            if use_of(node) is not None:
                met = []
            elif any(use_of(each) is not None for each in chosen):
                met = chosen
            else:
                met = [use.node for use in uses_of(node, constant)]
            readers, weight = met, view.canonical[name]
        elif node.op == "call_module" and node not in view.branches:
            inside = module_at(view.module, node.target)
            held = [f"{name}.{own}" for own, _ in inside.named_parameters(remove_duplicate=False)] if inside else []
            found = [view.canonical[each] for each in held if view.canonical.get(each) in planned]
            readers, weight = [node] if found else [], found[0] if found else ""
        else:
            continue
        for reader in readers:
            if use_of(reader) is None:
                yield f"node {reader.name} reads {weight}, a site, but no pass has marked it as a use"


def _weight_of(view: View, node: fx.Node) -> str | None:
    op = spelled(node)
    if op is None and node.op == "call_module":
        return view.canonical.get(f"{str(node.target).removeprefix(view.record.prefix)}.weight")
    form = form_of(node, None)
    source: Any = node
    if isinstance(form, FunctionForm):
        source, _ = _turned_back(form.argument(node, form.weight), form.dims)
    if form is None and chosen_by(node) is not None:
        source = node.args[0]
    if op is not None:
        source = node.args[1] if len(node.args) > 1 else None
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return None
    return view.canonical.get(str(source.target).removeprefix(view.record.prefix))


def _layout_of(node: fx.Node, form: FunctionForm | ModuleForm) -> str:
    """Return how a use reads its weight, with the transposes on the way to it."""
    if spelled(node) is not None or isinstance(form, ModuleForm):
        return form.layout
    turned = _turned_back(form.argument(node, form.weight), form.dims)[1]
    return {"out_in": "in_out", "in_out": "out_in"}[form.layout] if turned else form.layout


def _turned_back(source: Any, dims: int) -> tuple[Any, bool]:
    """Return what a chain of transposes starts from, and whether it turns it around."""
    turned = False
    while isinstance(source, fx.Node) and source.op != "get_attr" and transposes(source, dims):
        source, turned = source.all_input_nodes[0], not turned
    return source, turned


def _slow_state_is_kept(view: View) -> Iterator[str]:
    plan = view.record.plan
    if not view.inserted or plan is None or view.record.owner:
        return
    for site in plan.sites:
        state = view.record.slow.get(site.weight)
        if state is None:
            yield f"{site.weight} has a branch, but the record holds no slow state of it"
        elif tuple(state.base.shape) != site.shape:
            yield f"the slow state of {site.weight} is {tuple(state.base.shape)}, planned as {site.shape}"
        else:
            yield from (f"the slow state of {site.weight} {fault}" for fault in slow_faults(state))


RULES: tuple[Rule, ...] = (
    _graph_is_sound,
    _targets_exist,
    _plan_fits_weights,
    _uses_fit_plan,
    _readers_of_sites_are_marked,
    branches_stand_at_sites,
    every_use_has_a_branch,
    branches_fit_plan,
    _slow_state_is_kept,
    metadata_is_the_base_ops,
    nothing_is_left_over,
    branches_stand_in_this_graph,
    factors_are_read_by_branches,
    nothing_is_written_in_between,
    weights_are_the_stages,
)
"""Every rule, in the order in which faults are told."""


def faults(graph_module: fx.GraphModule) -> list[str]:
    """Return a sentence for each way in which the graph does not agree with its plan."""
    record = record_of(graph_module)
    canonical = named_weights(owner_of(graph_module, record)).canonical
    view = View(graph_module, record, branch_nodes(graph_module), canonical)
    return [fault for rule in RULES for fault in rule(view)]


def verify(graph_module: fx.GraphModule, when: str) -> None:
    """Raise if the graph does not agree with its plan.

    Raises:
        VerifyError: lists every fault, and says `when` it was found.
    """
    found = faults(graph_module)
    if found:
        raise VerifyError(f"{when}, the graph does not agree with its plan:\n  " + "\n  ".join(found))
