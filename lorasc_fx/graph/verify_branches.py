"""Rules of the verifier about branches: where they stand, what they read, and whether they are those of the plan."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import torch
from torch import fx

from lorasc_fx.branch import Branch
from lorasc_fx.graph.chosen import chosen_by
from lorasc_fx.graph.forms import ON_CHOSEN, ON_WEIGHT, branch_class, form_named, is_form
from lorasc_fx.graph.marks import made_by, use_of
from lorasc_fx.graph.shared import shared_input
from lorasc_fx.graph.spelling import spelled, spelling_of
from lorasc_fx.graph.view import View
from lorasc_fx.graph.weights import BRANCHES, module_at

__all__ = [
    "branches_fit_plan",
    "branches_stand_at_sites",
    "every_use_has_a_branch",
    "metadata_is_the_base_ops",
    "nothing_is_left_over",
]


def branches_stand_at_sites(view: View) -> Iterator[str]:
    """Each branch stands beside, on or in place of a use of its own site, and reads what the op reads."""
    plan = view.record.plan
    for node, branch in view.branches.items():
        if not view.inserted:
            yield f"node {node.name} calls a branch, but no pass has inserted any"
            continue
        if spelling_of(node) is not None:
            yield from _stands_in_place(view, node, branch)
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
        if not is_form(use.form):
            continue  # told where uses are held against the plan
        found = _reading(view, use.form, base)
        if found is None:
            yield f"node {base.name} has not the arguments of {use.form}"
            continue
        inputs, options = found
        shared = shared_input(node)
        if shared is not None:
            options |= {"shared": True}
            if shared.factor != site.key:
                yield f"branch node {node.name} gets what the lora_A of {shared.factor} makes, not its own"
        if ((shared.x,) if shared is not None else node.args[1:]) != inputs:
            yield f"branch node {node.name} does not read the input of {base.name}"
        if dict(node.kwargs) != options:
            yield f"branch node {node.name} has {dict(node.kwargs)}, but {base.name} has {options}"
        strays = [user.name for user in base.users if user is not node]
        if strays:
            yield f"node {base.name} has a branch, but {', '.join(strays)} read it without"
        if not node.users:
            yield f"branch node {node.name} is read by nobody"


def _stands_in_place(view: View, node: fx.Node, branch: Branch) -> Iterator[str]:
    """Hold a branch node that stands in place of an op against the op as it would be written now."""
    plan, use, op = view.record.plan, use_of(node), spelled(node)
    site = plan.site(use.weight) if plan is not None and use is not None else None
    if op is None or op.form is None or op.reading is None or use is None or site is None:
        yield f"branch node {node.name} stands in place of an op that is no use of a site"
        return
    if node.target != f"{BRANCHES}.{site.key}" or branch.weight_name != use.weight:
        yield f"branch node {node.name} computes with {use.weight}, but calls {node.target}"
    reading = op.reading
    own = [each for each in (reading.x, reading.weight, reading.bias) if each is not None]
    if [_named(each, had) for each, had in zip_longest(node.args, own)] != own:
        yield f"branch node {node.name} does not read what {op.name}, in whose place it stands, would read"
    if dict(node.kwargs) != {**reading.options, "op": op.form.product}:
        yield f"branch node {node.name} has {dict(node.kwargs)}, but {op.name} has {dict(reading.options)}"
    if not node.users:
        yield f"branch node {node.name} is read by nobody"


def _named(found: Any, wanted: Any) -> Any:
    """Return what a node reads by name where a name is wanted."""
    return found.target if isinstance(found, fx.Node) and isinstance(wanted, str) else found


def _reading(view: View, form: str, base: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return what a branch at this use must read besides its base, and with which options; None without any input."""
    if form == ON_WEIGHT:
        return (), {}
    if form == ON_CHOSEN:
        return (), {"expert": chosen_by(base)}
    module = module_at(view.module, str(base.target)) if base.op == "call_module" else None
    if base.op == "call_module" and not (base.args or "input" in base.kwargs):
        return None
    reading = form_named(form).reads(base, module)
    return (reading.x,), dict(reading.options)


def every_use_has_a_branch(view: View) -> Iterator[str]:
    """Each use has one branch; dead code needs none."""
    if not view.inserted:
        return
    count: dict[fx.Node, int] = {}
    for node in view.branches:
        stands = node if spelling_of(node) is not None else node.args[0] if node.args else None
        if isinstance(stands, fx.Node):
            count[stands] = count.get(stands, 0) + 1
    for node in view.module.graph.nodes:
        use = use_of(node)
        if use is not None and count.get(node, 0) != (1 if node.users else 0):  # dead code needs no branch
            yield f"{use.weight} is used at node {node.name} with {count.get(node, 0)} branches instead of one"


def branches_fit_plan(view: View) -> Iterator[str]:
    """The branches are those of the plan, in shape, scale and numbers."""
    holder = view.module._modules.get(BRANCHES)
    plan = view.record.plan
    if not view.inserted or plan is None or holder is None:
        return
    for site in plan.sites:
        branch = holder._modules.get(site.key)
        if not isinstance(branch, Branch):
            yield f"{site.weight} is planned, but has no branch"
            continue
        if type(branch) is not branch_class(site) or branch.weight_shape != site.shape:
            made = f"{type(branch).__name__} for {branch.weight_shape}"
            yield f"the branch of {site.weight} is a {made}, planned for a {site.kind} of {site.shape}"
        own = dict(branch.named_parameters())
        for name, shape in site.parameter_shapes.items():
            if name in own and tuple(own[name].shape) != shape:
                yield f"{name} of {site.weight} is {tuple(own[name].shape)}, planned as {shape}"
        if branch.transposed != (site.layout == "in_out"):
            yield f"the branch of {site.weight} is turned the other way than its layout, {site.layout}, says"
        for what in ("weight_name", "scale", "dropout", "parts"):
            made, planned = getattr(branch, what), getattr(site, "weight" if what == "weight_name" else what)
            if made != planned:
                yield f"the branch of {site.weight} has {what} {made}, planned as {planned}"
        if plan.spec.on_nonfinite == "raise" and not branch.finite():
            yield f"the branch of {site.weight} holds inf or nan"
    keys = {site.key for site in plan.sites}
    for key in holder._modules:
        if key not in keys:
            yield f"branch {key} belongs to no planned site"


def metadata_is_the_base_ops(view: View) -> Iterator[str]:
    """A branch's node says of itself what its op's node says."""
    for node in view.branches:
        base = node.args[0] if node.args else None
        if not isinstance(base, fx.Node):
            continue
        if spelling_of(node) is not None:
            base = node
        if not made_by(node):
            yield f"branch node {node.name} was made by no pass of ours"
        own, theirs = node.meta.get("val"), base.meta.get("val")
        use, plan = use_of(base), view.record.plan
        site = plan.site(use.weight) if plan is not None and use is not None else None
        if site is not None and base is node and isinstance(own, torch.Tensor):
            axis = own.dim() - (len(site.shape) - 1 if site.kind == "conv" else 1)
            if not 0 <= axis < own.dim() or own.shape[axis] != site.matrix_shape[0]:
                outputs = f"{site.weight} has {site.matrix_shape[0]} outputs"
                yield f"branch node {node.name} is said to be {_shape(own)}, but {outputs}"
        if own is not theirs and _shape(own) != _shape(theirs):
            yield f"branch node {node.name} is said to be {_shape(own)}, {base.name} is {_shape(theirs)}"


def nothing_is_left_over(view: View) -> Iterator[str]:
    """What passes made for a branch is read by one."""
    for node in view.module.graph.nodes:
        if made_by(node) and node not in view.branches and not node.users:
            yield f"node {node.name} was made by {made_by(node)} for a branch, and is read by nobody"


def _shape(value: Any) -> tuple[str, torch.dtype] | None:
    return (str(tuple(value.shape)), value.dtype) if isinstance(value, torch.Tensor) else None
