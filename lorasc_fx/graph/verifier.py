"""Checks a graph against its plan: a table of rules, separate from the code that edits, run around every pass.

A rule yields a sentence for each fault that it finds, naming the node or the weight; `verify` raises them all at once.
Besides the plan, the rules look at what other people's passes do that a fold cannot follow. A fold erases branches and
writes the weights anew, so each inserted branch must be called in this graph, compute what its op computed when they
were put together, and stand over the weights that its stage began with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import fx, nn

from lorasc_fx.branch import BRANCH_OF, Branch, branch_class, shared_down
from lorasc_fx.errors import VerifyError
from lorasc_fx.graph.branch_calls import branch_nodes, call_template, made_by, replaced_call, shared_input, use_of
from lorasc_fx.graph.flow import constants, expert_index, indexed_experts, uses_of, written_between
from lorasc_fx.graph.forms import (
    ON_INDEXED_EXPERT,
    ON_WEIGHT,
    FunctionForm,
    ModuleForm,
    form_named,
    form_of,
    is_form,
    transposes,
)
from lorasc_fx.graph.record import Record, record_of
from lorasc_fx.graph.weights import BRANCHES, Weights, module_at, named_weights, owner_of
from lorasc_fx.plan import Site
from lorasc_fx.quantized import dense, is_quantized
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.state import WeightState, start_weight


@dataclass(frozen=True)
class View:
    """What a rule looks at."""

    module: fx.GraphModule
    record: Record
    branches: dict[fx.Node, Branch]
    canonical: dict[str, str]

    @property
    def inserted(self) -> bool:
        """Whether branches are there."""
        return "branches-inserted" in self.record.facts


Rule = Callable[[View], Iterator[str]]
"""Yields a sentence for each fault that it finds, naming the node or the weight."""


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
        op = replaced_call(node)
        module = module_at(view.module, node.target) if node.op == "call_module" else None
        form = op.form if op is not None else form_of(node, module)
        indexed = form is None and expert_index(node) is not None
        on = ON_INDEXED_EXPERT if indexed else ON_WEIGHT if node.op == "get_attr" else "in no form"
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
            experts = indexed_experts(node)
            if use_of(node) is not None:
                readers = []
            elif any(use_of(expert) is not None for expert in experts):
                readers = experts
            else:
                readers = [use.node for use in uses_of(node, constant)]
            weight = view.canonical[name]
        elif node.op == "call_module" and node not in view.branches:
            inside = module_at(view.module, node.target)
            held = [f"{name}.{leaf}" for leaf, _ in inside.named_parameters(remove_duplicate=False)] if inside else []
            sites = [view.canonical[name] for name in held if view.canonical.get(name) in planned]
            readers, weight = [node] if sites else [], sites[0] if sites else ""
        else:
            continue
        for reader in readers:  # what a branch reads is held against its op by _branches_stand_at_sites
            if use_of(reader) is None and reader not in view.branches:
                yield f"node {reader.name} reads {weight}, a site, but no pass has marked it as a use"


def _weight_of(view: View, node: fx.Node) -> str | None:
    op = replaced_call(node)
    if op is None and node.op == "call_module":
        return view.canonical.get(f"{str(node.target).removeprefix(view.record.prefix)}.weight")
    form = form_of(node, None)
    source: Any = node
    if isinstance(form, FunctionForm):
        source, _ = _without_transposes(form.argument(node, form.weight), form.dims)
    if form is None and expert_index(node) is not None:
        source = node.args[0]
    if op is not None:
        source = node.args[1] if len(node.args) > 1 else None
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return None
    return view.canonical.get(str(source.target).removeprefix(view.record.prefix))


def _layout_of(node: fx.Node, form: FunctionForm | ModuleForm) -> str:
    """Return how a use reads its weight, with the transposes on the way to it."""
    if replaced_call(node) is not None or isinstance(form, ModuleForm):
        return form.layout
    transposed = _without_transposes(form.argument(node, form.weight), form.dims)[1]
    return {"out_in": "in_out", "in_out": "out_in"}[form.layout] if transposed else form.layout


def _without_transposes(source: Any, dims: int) -> tuple[Any, bool]:
    """Return what a chain of transposes starts from, and whether it transposes it."""
    transposed = False
    while isinstance(source, fx.Node) and source.all_input_nodes and transposes(source, dims):
        source, transposed = source.all_input_nodes[0], not transposed
    return source, transposed


def _slow_state_is_kept(view: View) -> Iterator[str]:
    plan = view.record.plan
    if not view.inserted or plan is None or view.record.owner:
        return
    for site in plan.sites:
        state = view.record.slow.states.get(site.weight)
        if state is None:
            yield f"{site.weight} has a branch, but the record holds no slow state of it"
        elif tuple(state.base.shape) != site.shape:
            yield f"the slow state of {site.weight} is {tuple(state.base.shape)}, planned as {site.shape}"
        else:
            yield from (f"the slow state of {site.weight} {fault}" for fault in state.faults())


def _branches_stand_at_sites(view: View) -> Iterator[str]:
    """Each branch stands beside, on or in place of a use of its own site, and reads what the op reads."""
    plan = view.record.plan
    for node, branch in view.branches.items():
        if not view.inserted:
            yield f"node {node.name} calls a branch, but no pass has inserted any"
            continue
        if call_template(node) is not None:
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
            continue  # a fault of _uses_fit_plan
        reading = _reading(view, use.form, base)
        if reading is None:
            yield f"node {base.name} has not the arguments of {use.form}"
            continue
        inputs, options = reading
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
    plan, use, op = view.record.plan, use_of(node), replaced_call(node)
    site = plan.site(use.weight) if plan is not None and use is not None else None
    if op is None or op.form is None or op.reading is None or use is None or site is None:
        yield f"branch node {node.name} stands in place of an op that is no use of a site"
        return
    if node.target != f"{BRANCHES}.{site.key}" or branch.weight_name != use.weight:
        yield f"branch node {node.name} computes with {use.weight}, but calls {node.target}"
    reading = op.reading
    wanted = [read for read in (reading.x, reading.weight, reading.bias) if read is not None]
    if [_named(read, had) for read, had in zip_longest(node.args, wanted)] != wanted:
        yield f"branch node {node.name} does not read what {op.name}, in whose place it stands, would read"
    if dict(node.kwargs) != {**reading.options, "op": op.form.product}:
        yield f"branch node {node.name} has {dict(node.kwargs)}, but {op.name} has {dict(reading.options)}"
    if not node.users:
        yield f"branch node {node.name} is read by nobody"


def _named(read: Any, wanted: Any) -> Any:
    """Return what a node reads by name where a name is wanted."""
    return read.target if isinstance(read, fx.Node) and isinstance(wanted, str) else read


def _reading(view: View, form: str, base: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return what a branch at this use must read besides its base, and with which options; None without any input."""
    if form == ON_WEIGHT:
        return (), {}
    if form == ON_INDEXED_EXPERT:
        return (), {"expert": expert_index(base)}
    module = module_at(view.module, str(base.target)) if base.op == "call_module" else None
    if base.op == "call_module" and not (base.args or "input" in base.kwargs):
        return None
    reading = form_named(form).reads(base, module)
    return (reading.x,), dict(reading.options)


def _every_use_has_a_branch(view: View) -> Iterator[str]:
    """Each use has one branch; dead code needs none."""
    if not view.inserted:
        return
    count: dict[fx.Node, int] = {}
    for node in view.branches:
        stands = node if call_template(node) is not None else node.args[0] if node.args else None
        if isinstance(stands, fx.Node):
            count[stands] = count.get(stands, 0) + 1
    for node in view.module.graph.nodes:
        use = use_of(node)
        if use is not None and count.get(node, 0) != (1 if node.users else 0):  # dead code needs no branch
            yield f"{use.weight} is used at node {node.name} with {count.get(node, 0)} branches instead of one"


def _branches_fit_plan(view: View) -> Iterator[str]:
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
        parameters = dict(branch.named_parameters())
        for name, shape in site.parameter_shapes.items():
            if name in parameters and tuple(parameters[name].shape) != shape:
                yield f"{name} of {site.weight} is {tuple(parameters[name].shape)}, planned as {shape}"
        if branch.transposed != (site.layout == "in_out"):
            yield f"the branch of {site.weight} is stored transposed against its layout, {site.layout}"
        for what in ("weight_name", "scale", "dropout", "slices"):
            made, planned = getattr(branch, what), getattr(site, "weight" if what == "weight_name" else what)
            if made != planned:
                yield f"the branch of {site.weight} has {what} {made}, planned as {planned}"
        if plan.spec.on_nonfinite == "raise" and not branch.finite():
            yield f"the branch of {site.weight} holds inf or nan"
    keys = {site.key for site in plan.sites}
    for key in holder._modules:
        if key not in keys:
            yield f"branch {key} belongs to no planned site"


def _metadata_is_the_base_ops(view: View) -> Iterator[str]:
    """A branch's node says of itself what its op's node says."""
    for node in view.branches:
        base = node.args[0] if node.args else None
        if not isinstance(base, fx.Node):
            continue
        if call_template(node) is not None:
            base = node
        if not made_by(node):
            yield f"branch node {node.name} was made by no pass of ours"
        made, theirs = node.meta.get("val"), base.meta.get("val")
        use, plan = use_of(base), view.record.plan
        site = plan.site(use.weight) if plan is not None and use is not None else None
        if site is not None and base is node and isinstance(made, torch.Tensor):
            axis = made.dim() - (len(site.shape) - 1 if site.kind == "conv" else 1)
            if not 0 <= axis < made.dim() or made.shape[axis] != site.matrix_shape[0]:
                outputs = f"{site.weight} has {site.matrix_shape[0]} outputs"
                yield f"branch node {node.name} is said to be {_shape(made)}, but {outputs}"
        if made is not theirs and _shape(made) != _shape(theirs):
            yield f"branch node {node.name} is said to be {_shape(made)}, {base.name} is {_shape(theirs)}"


def _nothing_is_left_over(view: View) -> Iterator[str]:
    """What passes made for a branch is read by one."""
    for node in view.module.graph.nodes:
        if made_by(node) and node not in view.branches and not node.users:
            yield f"node {node.name} was made by {made_by(node)} for a branch, and is read by nobody"


def _shape(value: Any) -> tuple[str, torch.dtype] | None:
    return (str(tuple(value.shape)), value.dtype) if isinstance(value, torch.Tensor) else None


def _branches_stand_in_this_graph(view: View) -> Iterator[str]:
    """Each branch that was inserted is called by a node of this graph, not by one of a graph inside it, or by none."""
    called = {branch.weight_name for branch in view.branches.values()}
    for node in view.module.graph.nodes:
        module = module_at(view.module, str(node.target)) if node.op == "call_module" else None
        inside = [inner.weight_name for inner in module.modules() if isinstance(inner, Branch)] if module else []
        if inside and node not in view.branches:
            called |= set(inside)
            yield f"node {node.name} calls a module inside which the branch of {inside[0]} stands; no fold reaches it"
    used = {use.weight for node in view.module.graph.nodes if (use := use_of(node)) is not None}
    for weight in sorted(view.record.branched - called - used):
        yield f"{weight} had a branch in this graph, and no node calls it any more; fold before what takes it out"


def _factors_are_read_by_branches(view: View) -> Iterator[str]:
    """No node but a branch, or a product that branches share, reads the factors of one."""
    for node in view.module.graph.nodes:
        if node.op != "get_attr" or not str(node.target).startswith(f"{BRANCHES}."):
            continue
        branch = module_at(view.module, str(node.target).rpartition(".")[0])
        strays = [user.name for user in node.users if user.target is not shared_down]
        if isinstance(branch, Branch) and strays:
            yield f"node {strays[0]} reads {node.target} past the branch of {branch.weight_name}"


def _nothing_is_written_in_between(view: View) -> Iterator[str]:
    """What an op read is still the same where its branch reads it."""
    for node in view.branches:
        base = node.args[0] if node.args else None
        if call_template(node) is not None or not isinstance(base, fx.Node):
            continue
        shared = shared_input(node)
        x = shared.x if shared is not None else node.args[1] if len(node.args) > 1 else None
        inputs = [node for node in (x, base) if isinstance(node, fx.Node)]
        for first, last in ((base, node),) if shared is None else ((base, node), sorted((base, shared.group))):
            writer = written_between(first, last, inputs)
            if writer is not None:
                yield f"node {writer.name} writes into what {base.name} and its branch node {node.name} read in turn"
                break


def _weights_are_the_stages(view: View) -> Iterator[str]:
    """The weights are those that the stage began with: a fold starts from W0, and would lose what was done to them."""
    plan = view.record.plan
    if not view.inserted or plan is None or view.record.owner:
        return
    parameters = named_weights(owner_of(view.module, view.record)).parameters
    for weight, state in view.record.slow.states.items():
        parameter = parameters.get(weight)
        fits = parameter is not None and parameter.shape == state.base.shape
        fits = fits and not state.faults()  # these are faults of _slow_state_is_kept
        if fits and parameter is not None and not _is_start(parameter, state, plan.spec, plan.stage):
            yield (
                f"{weight} holds other numbers than stage {plan.stage} began with; run what changes weights before the "
                "branches are inserted, or after they are folded"
            )


def _is_start(parameter: nn.Parameter, state: WeightState, spec: CascadeSpec, stage: int) -> bool:
    if parameter.is_meta:
        return True
    if is_quantized(parameter) or is_quantized(state.base):
        both = is_quantized(parameter) and is_quantized(state.base)
        return both and torch.equal(dense(parameter), dense(state.base))
    plain = not (spec.noise.is_on or state.experts or state.noises or state.initial or state.start_differs)
    plain = plain and state.scale() is None
    if plain and state.start.dense is None and parameter.data_ptr() == state.base.data_ptr():
        return True  # the very memory
    with torch.no_grad():
        start = start_weight(state, spec, stage).to(parameter)
        same = (parameter == start) | (parameter.isnan() & start.isnan())
        return bool(same.all())


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
    _nothing_is_left_over,
    _branches_stand_in_this_graph,
    _factors_are_read_by_branches,
    _nothing_is_written_in_between,
    _weights_are_the_stages,
)
"""Every rule, in the order in which faults are listed."""


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
    sentences = faults(graph_module)
    if sentences:
        raise VerifyError(f"{when}, the graph does not agree with its plan:\n  " + "\n  ".join(sentences))
