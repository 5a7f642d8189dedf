"""Holds a graph against its plan. A table of rules, separate from the code that edits, run after every pass.

A rule yields a sentence for each fault that it finds, naming the node or the weight; `verify` raises them all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lorasc_fx.branch import Branch
from lorasc_fx.errors import VerifyError
from lorasc_fx.graph.edit import branch_nodes, made_by, use_of
from lorasc_fx.graph.flow import constants
from lorasc_fx.graph.forms import BRANCH_OF, ON_WEIGHT, FunctionForm, ModuleForm, form_named, form_of, transposes
from lorasc_fx.graph.record import Record, record_of
from lorasc_fx.graph.uses import uses_of
from lorasc_fx.graph.weights import BRANCHES, module_at, named_weights, owner_of

__all__ = ["RULES", "faults", "verify"]


@dataclass(frozen=True)
class _View:
    """What a rule looks at."""

    module: fx.GraphModule
    record: Record
    branches: dict[fx.Node, Branch]
    canonical: dict[str, str]

    @property
    def inserted(self) -> bool:
        return "branches-inserted" in self.record.facts


Rule = Callable[[_View], Iterator[str]]


def _graph_is_sound(view: _View) -> Iterator[str]:
    try:
        view.module.graph.lint()
    except (RuntimeError, ValueError) as fault:
        yield f"the graph is malformed: {fault}"


def _targets_exist(view: _View) -> Iterator[str]:
    for node in view.module.graph.nodes:
        if node.op == "call_module" and module_at(view.module, node.target) is None:
            yield f"node {node.name} calls {node.target}, which the module does not have"


def _plan_fits_weights(view: _View) -> Iterator[str]:
    if view.record.plan is None:
        return
    weights = named_weights(owner_of(view.module, view.record))
    for site in view.record.plan.sites:
        parameter = weights.parameters.get(site.weight)
        if parameter is None:
            yield f"{site.weight} is planned, but the model has no weight of this name"
        elif tuple(parameter.shape) != site.shape:
            yield f"{site.weight} is {tuple(parameter.shape)}, planned as {site.shape}"
        elif weights.names[site.weight][1:] != site.aliases:
            yield f"{site.weight} is tied to {weights.names[site.weight][1:]}, planned with {site.aliases}"


def _uses_fit_plan(view: _View) -> Iterator[str]:
    plan = view.record.plan
    for node in view.module.graph.nodes:
        use = use_of(node)
        if use is None:
            continue
        site = plan.site(use.weight) if plan is not None else None
        if site is None:
            yield f"node {node.name} is marked as a use of {use.weight}, which is not planned"
            continue
        module = module_at(view.module, node.target) if node.op == "call_module" else None
        form = form_of(node, module)
        name = ON_WEIGHT if node.op == "get_attr" else form.name if form is not None else "in no form"
        if name != use.form:
            yield f"node {node.name} is marked as {use.form}, but is {name}"
        elif _weight_of(view, node) != use.weight:
            yield f"node {node.name} is marked as a use of {use.weight}, but computes with {_weight_of(view, node)}"
        elif form is not None and BRANCH_OF[form.kind] is not BRANCH_OF[site.kind]:
            yield f"node {node.name} is a {form.kind}, but {use.weight} is planned as a {site.kind}"
        elif form is not None and _layout_of(node, form) != site.layout:
            yield f"node {node.name} reads {use.weight} as {_layout_of(node, form)}, planned as {site.layout}"


def _readers_of_sites_are_marked(view: _View) -> Iterator[str]:
    plan = view.record.plan
    if not view.inserted or plan is None:
        return
    planned, constant = plan.by_weight, constants(view.module.graph)
    for node in view.module.graph.nodes:
        name = str(node.target).removeprefix(view.record.prefix)
        if node.op == "get_attr" and view.canonical.get(name) in planned:
            met = [] if use_of(node) is not None else [use.node for use in uses_of(node, constant)]
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


def _weight_of(view: _View, node: fx.Node) -> str | None:
    if node.op == "call_module":
        return view.canonical.get(f"{str(node.target).removeprefix(view.record.prefix)}.weight")
    form = form_of(node, None)
    source, _ = _turned_back(form.argument(node, form.weight) if isinstance(form, FunctionForm) else node)
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return None
    return view.canonical.get(str(source.target).removeprefix(view.record.prefix))


def _layout_of(node: fx.Node, form: FunctionForm | ModuleForm) -> str:
    """Return how a use reads its weight, with the transposes on the way to it."""
    turned = isinstance(form, FunctionForm) and _turned_back(form.argument(node, form.weight))[1]
    return {"out_in": "in_out", "in_out": "out_in"}[form.layout] if turned else form.layout


def _turned_back(source: Any) -> tuple[Any, bool]:
    """Return what a chain of transposes starts from, and whether it turns it around."""
    turned = False
    while isinstance(source, fx.Node) and source.op != "get_attr" and transposes(source):
        source, turned = source.all_input_nodes[0], not turned
    return source, turned


def _branches_stand_at_sites(view: _View) -> Iterator[str]:
    plan = view.record.plan
    for node, branch in view.branches.items():
        if not view.inserted:
            yield f"node {node.name} calls a branch, but no pass has inserted any"
            continue
        base = node.args[0] if node.args else None
        use = use_of(base) if isinstance(base, fx.Node) else None
        if use is None or not isinstance(base, fx.Node):
            yield f"branch node {node.name} does not stand beside the use of a site"
            continue
        site = plan.site(use.weight) if plan is not None else None
        if site is None or node.target != f"{BRANCHES}.{site.key}":
            yield f"branch node {node.name} stands beside {use.weight}, but calls {node.target}"
            continue
        if branch.weight_name != use.weight:
            yield f"branch node {node.name} calls the branch of {branch.weight_name} beside {use.weight}"
        inputs, options = _reading(view, use.form, base)
        if node.args[1:] != inputs:
            yield f"branch node {node.name} does not read the input of {base.name}"
        if dict(node.kwargs) != options:
            yield f"branch node {node.name} has {dict(node.kwargs)}, but {base.name} has {options}"
        strays = [user.name for user in base.users if user is not node]
        if strays:
            yield f"node {base.name} has a branch, but {', '.join(strays)} read it without"
        if not node.users:
            yield f"branch node {node.name} is read by nobody"


def _reading(view: _View, form: str, base: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what a branch at this use must read besides its base, and with which options."""
    if form == ON_WEIGHT:
        return (), {}
    module = module_at(view.module, str(base.target)) if base.op == "call_module" else None
    reading = form_named(form).reads(base, module)
    return (reading.x,), dict(reading.options)


def _every_use_has_a_branch(view: _View) -> Iterator[str]:
    if not view.inserted:
        return
    count: dict[fx.Node, int] = {}
    for node in view.branches:
        if node.args and isinstance(node.args[0], fx.Node):
            count[node.args[0]] = count.get(node.args[0], 0) + 1
    for node in view.module.graph.nodes:
        use = use_of(node)
        if use is not None and count.get(node, 0) != (1 if node.users else 0):  # dead code needs no branch
            yield f"{use.weight} is used at node {node.name} with {count.get(node, 0)} branches instead of one"


def _branches_fit_plan(view: _View) -> Iterator[str]:
    holder = view.module._modules.get(BRANCHES)
    plan = view.record.plan
    if not view.inserted or plan is None or holder is None:
        return
    for site in plan.sites:
        branch = holder._modules.get(site.key)
        if not isinstance(branch, Branch):
            yield f"{site.weight} is planned, but has no branch"
            continue
        if type(branch) is not BRANCH_OF[site.kind] or branch.weight_shape != site.shape:
            made = f"{type(branch).__name__} for {branch.weight_shape}"
            yield f"the branch of {site.weight} is a {made}, planned for a {site.kind} of {site.shape}"
        a_shape, b_shape = site.factor_shapes
        if tuple(branch.lora_A.shape) != a_shape:
            yield f"lora_A of {site.weight} is {tuple(branch.lora_A.shape)}, planned as {a_shape}"
        if tuple(branch.lora_B.shape) != b_shape:
            yield f"lora_B of {site.weight} is {tuple(branch.lora_B.shape)}, planned as {b_shape}"
        if branch.transposed != (site.layout == "in_out"):
            yield f"the branch of {site.weight} is turned the other way than its layout, {site.layout}, says"
        if branch.scale != site.scale:
            yield f"the branch of {site.weight} has scale {branch.scale}, planned as {site.scale}"
        if plan.spec.on_nonfinite == "raise" and not branch.finite():
            yield f"the branch of {site.weight} holds inf or nan"
    keys = {site.key for site in plan.sites}
    for key in holder._modules:
        if key not in keys:
            yield f"branch {key} belongs to no planned site"


def _slow_state_is_kept(view: _View) -> Iterator[str]:
    plan = view.record.plan
    if not view.inserted or plan is None or view.record.owner:
        return
    for site in plan.sites:
        state = view.record.slow.get(site.weight)
        if state is None:
            yield f"{site.weight} has a branch, but the record holds no slow state of it"
        elif tuple(state.base.shape) != site.shape:
            yield f"the slow state of {site.weight} is {tuple(state.base.shape)}, planned as {site.shape}"


def _metadata_is_the_base_ops(view: _View) -> Iterator[str]:
    for node in view.branches:
        base = node.args[0] if node.args else None
        if not isinstance(base, fx.Node):
            continue
        if not made_by(node):
            yield f"branch node {node.name} was made by no pass of ours"
        own, theirs = node.meta.get("val"), base.meta.get("val")
        if own is not theirs and _shape(own) != _shape(theirs):
            yield f"branch node {node.name} is said to be {_shape(own)}, {base.name} is {_shape(theirs)}"


def _shape(value: Any) -> tuple[str, torch.dtype] | None:
    return (str(tuple(value.shape)), value.dtype) if isinstance(value, torch.Tensor) else None


RULES: tuple[Rule, ...] = (
    _graph_is_sound,
    _targets_exist,
    _plan_fits_weights,
    _uses_fit_plan,
    _readers_of_sites_are_marked,
    _branches_stand_at_sites,
    _every_use_has_a_branch,
    _branches_fit_plan,
    _slow_state_is_kept,
    _metadata_is_the_base_ops,
)
"""Every rule, in the order in which faults are told."""


def faults(graph_module: fx.GraphModule) -> list[str]:
    """Return a sentence for each way in which the graph does not agree with its plan."""
    record = record_of(graph_module)
    canonical = named_weights(owner_of(graph_module, record)).canonical
    view = _View(graph_module, record, branch_nodes(graph_module), canonical)
    return [fault for rule in RULES for fault in rule(view)]


def verify(graph_module: fx.GraphModule, when: str) -> None:
    """Raise if the graph does not agree with its plan.

    Raises:
        VerifyError: lists every fault, and says `when` it was found.
    """
    found = faults(graph_module)
    if found:
        raise VerifyError(f"{when}, the graph does not agree with its plan:\n  " + "\n  ".join(found))
