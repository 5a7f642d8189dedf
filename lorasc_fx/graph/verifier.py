"""Checks a graph against its plan: a table of rules, independent of the code that edits, run before and after a pass.

A rule yields a sentence for each fault, which names the node or the weight. `verify` raises all of them at once.
Besides the plan, the rules check what passes of other people may do that a fold cannot follow. A fold erases branches
and computes the weights again. So each inserted branch has to be called in this graph and to compute what its op
computed, and the weights have to be those that the stage began with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import fx, nn

from lorasc_fx.branch import Branch, branch_class, ops_of, shared_down
from lorasc_fx.errors import VerifyError
from lorasc_fx.graph.branch_calls import (
    GIVEN,
    branch_nodes,
    call_template,
    made_by,
    replaced_call,
    shared_input,
    use_of,
)
from lorasc_fx.graph.flow import constants, expert_index, indexed_experts, uses_of, written_between
from lorasc_fx.graph.forms import (
    ON_INDEXED_EXPERT,
    ON_WEIGHT,
    FunctionForm,
    ModuleForm,
    form_named,
    form_of,
    is_form,
    turned,
    without_transposes,
)
from lorasc_fx.graph.record import Record, record_of
from lorasc_fx.graph.weights import BRANCHES, module_at, named_weights, owner_of
from lorasc_fx.quantized import same_quantized
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.state import WeightState, start_weight


@dataclass(frozen=True)
class Subject:
    """What the rules look at: a graph module, its record, its branch nodes, and the first name of every weight name."""

    module: fx.GraphModule
    record: Record
    branches: dict[fx.Node, Branch]
    canonical: dict[str, str]

    @property
    def inserted(self) -> bool:
        """Whether branches were inserted, with tensors of their own or given as inputs."""
        return not self.record.facts.isdisjoint(("branches-inserted", "adapter-inputs"))

    def options(self, node: fx.Node) -> dict[str, Any]:
        """Return the options of a branch node, except the inputs of the graph that it reads."""
        return {name: value for name, value in node.kwargs.items() if name not in GIVEN}

    def is_given(self, weight: str) -> bool:
        """Whether a weight's branch has no values of its own."""
        lifted = self.record.lifted
        return lifted is not None and any(branch.weight_name == weight for branch in lifted.branches.values())


Check = Callable[[Subject], Iterator[str]]
"""A rule: yields a sentence for each fault, which names the node or the weight."""


def _graph_is_sound(subject: Subject) -> Iterator[str]:
    try:
        subject.module.graph.lint()
    except (RuntimeError, ValueError) as fault:
        yield f"the graph is malformed: {fault}"


def _targets_exist(subject: Subject) -> Iterator[str]:
    for node in subject.module.graph.nodes:
        if node.op == "call_module" and module_at(subject.module, node.target) is None:
            yield f"node {node.name} calls {node.target}, which the module does not have"


def _plan_fits_weights(subject: Subject) -> Iterator[str]:
    if subject.record.plan is None:
        return
    if subject.record.plan.stage < 1:
        yield f"the plan is in stage {subject.record.plan.stage}; the first one is 1"
    weights, seen = named_weights(owner_of(subject.module, subject.record)), set()
    for site in subject.record.plan.sites:
        if site.weight in seen:
            yield f"{site.weight} is planned twice"
        seen.add(site.weight)
        parameter = weights.parameters.get(site.weight)
        if parameter is None:
            yield f"{site.weight} is planned, but the model has no weight of this name"
        elif tuple(parameter.shape) != site.shape:
            yield f"{site.weight} is {tuple(parameter.shape)}, planned as {site.shape}"
        # A name that nothing reads may be missing in a graph module.
        elif set(weights.names[site.weight][1:]) - set(site.aliases) or any(
            weights.canonical.get(alias, site.weight) != site.weight for alias in site.aliases
        ):
            yield f"{site.weight} is tied to {weights.names[site.weight][1:]}, planned with {site.aliases}"


def _uses_fit_plan(subject: Subject) -> Iterator[str]:
    plan = subject.record.plan
    for node in subject.module.graph.nodes:
        use = use_of(node)
        if use is None:
            continue
        site = plan.site(use.weight) if plan is not None else None
        if site is None:
            yield f"node {node.name} is marked as a use of {use.weight}, which is not planned"
            continue
        op = replaced_call(node)
        module = module_at(subject.module, node.target) if node.op == "call_module" else None
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
        elif _weight_of(subject, node) != use.weight:
            yield f"node {node.name} is marked as a use of {use.weight}, but computes with {_weight_of(subject, node)}"
        elif form is not None and not _alike(form.kind, site.kind):
            yield f"node {node.name} is a {form.kind}, but {use.weight} is planned as a {site.kind}"
        elif form is not None and _layout_of(node, form) != site.layout:
            yield f"node {node.name} reads {use.weight} as {_layout_of(node, form)}, planned as {site.layout}"


def _alike(used: str, planned: str) -> bool:
    """Whether the branch of a site of one kind can stand beside a use of another."""
    return ops_of(used) is ops_of(planned) and (used == "experts") == (planned == "experts")


def _readers_of_sites_are_marked(subject: Subject) -> Iterator[str]:
    plan = subject.record.plan
    if not subject.inserted or plan is None:
        return
    planned, constant = plan.by_weight, constants(subject.module.graph)
    for node in subject.module.graph.nodes:
        name = str(node.target).removeprefix(subject.record.prefix)
        if node.op == "get_attr" and subject.canonical.get(name) in planned:
            experts = indexed_experts(node)
            if use_of(node) is not None:
                readers = []
            elif any(use_of(expert) is not None for expert in experts):
                readers = experts
            else:
                readers = [use.node for use in uses_of(node, constant)]
            weight = subject.canonical[name]
        elif node.op == "call_module" and node not in subject.branches:
            inside = module_at(subject.module, node.target)
            names = [f"{name}.{leaf}" for leaf, _ in inside.named_parameters(remove_duplicate=False)] if inside else []
            sites = [subject.canonical[name] for name in names if subject.canonical.get(name) in planned]
            readers, weight = [node] if sites else [], sites[0] if sites else ""
        else:
            continue
        for reader in readers:  # _branches_stand_at_sites checks what a branch reads
            if use_of(reader) is None and reader not in subject.branches:
                yield f"node {reader.name} reads {weight}, a site, but no pass has marked it as a use"


def _weight_of(subject: Subject, node: fx.Node) -> str | None:
    op = replaced_call(node)
    if op is None and node.op == "call_module":
        return subject.canonical.get(f"{str(node.target).removeprefix(subject.record.prefix)}.weight")
    form = form_of(node, None)
    source: Any = node
    if isinstance(form, FunctionForm):
        source, _ = without_transposes(form.argument(node, form.weight), form.dims)
    if form is None and expert_index(node) is not None:
        source = node.args[0]
    if op is not None:
        source = node.args[1] if len(node.args) > 1 else None
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return None
    return subject.canonical.get(str(source.target).removeprefix(subject.record.prefix))


def _layout_of(node: fx.Node, form: FunctionForm | ModuleForm) -> str:
    """Return the layout in which a use reads its weight, including transposes."""
    if replaced_call(node) is not None or isinstance(form, ModuleForm):
        return form.layout
    return turned(form.layout, without_transposes(form.argument(node, form.weight), form.dims)[1])


def _slow_state_is_kept(subject: Subject) -> Iterator[str]:
    plan = subject.record.plan
    if not subject.inserted or plan is None or subject.record.owner:
        return
    for site in plan.sites:
        state = subject.record.slow.states.get(site.weight)
        if state is None:
            yield f"{site.weight} has a branch, but the record holds no slow state of it"
        elif tuple(state.base.shape) != site.shape:
            yield f"the slow state of {site.weight} is {tuple(state.base.shape)}, planned as {site.shape}"
        else:
            yield from (f"the slow state of {site.weight} {fault}" for fault in state.faults())


def _branches_stand_at_sites(subject: Subject) -> Iterator[str]:
    """Each branch stands beside, on or in place of a use of its own site, and reads what the op reads."""
    plan = subject.record.plan
    for node, branch in subject.branches.items():
        if not subject.inserted:
            yield f"node {node.name} calls a branch, but no pass has inserted any"
            continue
        if call_template(node) is not None:
            yield from _stands_in_place(subject, node, branch)
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
        reading = _reading(subject, use.form, base)
        if reading is None:
            yield f"node {base.name} has not the arguments of {use.form}"
            continue
        inputs, options = reading
        shared = shared_input(node)
        if shared is not None:
            options |= {"at": "after_shared"}
            if shared.factor != site.key:
                yield f"branch node {node.name} gets the product of {shared.factor}, not its own"
        if ((shared.x,) if shared is not None else node.args[1:]) != inputs:
            yield f"branch node {node.name} does not read the input of {base.name}"
        if subject.options(node) != options:
            yield f"branch node {node.name} has {subject.options(node)}, but {base.name} has {options}"
        strays = [user.name for user in base.users if user is not node]
        if strays:
            yield f"node {base.name} has a branch, but {', '.join(strays)} read it without"
        if not node.users:
            yield f"branch node {node.name} is read by nobody"


def _stands_in_place(subject: Subject, node: fx.Node, branch: Branch) -> Iterator[str]:
    """Compare a merged branch with the op that it replaced, as a fold would write it now."""
    plan, use, op = subject.record.plan, use_of(node), replaced_call(node)
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
    if subject.options(node) != {"at": "in_place", **reading.options, "op": op.form.product}:
        yield f"branch node {node.name} has {subject.options(node)}, but {op.name} has {dict(reading.options)}"
    if not node.users:
        yield f"branch node {node.name} is read by nobody"


def _named(read: Any, wanted: Any) -> Any:
    """Return the name of a node if a name is wanted, otherwise the node."""
    return read.target if isinstance(read, fx.Node) and isinstance(wanted, str) else read


def _reading(subject: Subject, form: str, base: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return the inputs and options that a branch at this use must have, or None if the op has no input."""
    if form == ON_WEIGHT:
        return (), {"at": "on_weight"}
    if form == ON_INDEXED_EXPERT:
        return (), {"at": "on_weight", "expert": expert_index(base)}
    module = module_at(subject.module, str(base.target)) if base.op == "call_module" else None
    if base.op == "call_module" and not (base.args or "input" in base.kwargs):
        return None
    reading = form_named(form).reads(base, module)
    return (reading.x,), {"at": "beside", **reading.options}


def _every_use_has_a_branch(subject: Subject) -> Iterator[str]:
    """Each use has one branch, unless it is dead code."""
    if not subject.inserted:
        return
    count: dict[fx.Node, int] = {}
    for node in subject.branches:
        stands = node if call_template(node) is not None else node.args[0] if node.args else None
        if isinstance(stands, fx.Node):
            count[stands] = count.get(stands, 0) + 1
    for node in subject.module.graph.nodes:
        use = use_of(node)
        if use is not None and count.get(node, 0) != (1 if node.users else 0):
            yield f"{use.weight} is used at node {node.name} with {count.get(node, 0)} branches instead of one"


def _branches_fit_plan(subject: Subject) -> Iterator[str]:
    """The branches are those of the plan, in shape, scale and values."""
    holder = subject.module._modules.get(BRANCHES)
    plan = subject.record.plan
    if not subject.inserted or plan is None or holder is None:
        return
    for site in plan.sites:
        branch = holder._modules.get(site.key)
        if not isinstance(branch, Branch):
            yield f"{site.weight} is planned, but has no branch"
            continue
        alike = type(branch) is branch_class(site) and _alike(branch.kind, site.kind)
        if not alike or branch.weight_shape != site.shape:
            actual = f"{type(branch).__name__} for a {branch.kind} of {branch.weight_shape}"
            yield f"the branch of {site.weight} is a {actual}, planned for a {site.kind} of {site.shape}"
        parameters = dict(branch.named_parameters())
        for name, shape in site.parameter_shapes.items():
            if name in parameters and tuple(parameters[name].shape) != shape:
                yield f"{name} of {site.weight} is {tuple(parameters[name].shape)}, planned as {shape}"
        if branch.transposed != (site.layout == "in_out"):
            yield f"the branch of {site.weight} is stored transposed against its layout, {site.layout}"
        for field in ("weight_name", "scale", "dropout", "slices"):
            actual, planned = getattr(branch, field), getattr(site, "weight" if field == "weight_name" else field)
            given = field == "scale" and subject.is_given(site.weight)
            if actual != planned and not given:
                yield f"the branch of {site.weight} has {field} {actual}, planned as {planned}"
        if plan.spec.on_nonfinite == "raise" and not branch.finite():
            yield f"the branch of {site.weight} holds inf or nan"
    keys = {site.key for site in plan.sites}
    for key in holder._modules:
        if key not in keys:
            yield f"branch {key} belongs to no planned site"


def _metadata_is_the_base_ops(subject: Subject) -> Iterator[str]:
    """The metadata of a branch node are those of its op."""
    for node in subject.branches:
        base = node.args[0] if node.args else None
        if not isinstance(base, fx.Node):
            continue
        if call_template(node) is not None:
            base = node
        if not made_by(node):
            yield f"branch node {node.name} was made by no pass of ours"
        ours, theirs = node.meta.get("val"), base.meta.get("val")
        use, plan = use_of(base), subject.record.plan
        site = plan.site(use.weight) if plan is not None and use is not None else None
        if site is not None and base is node and isinstance(ours, torch.Tensor):
            axis = ours.dim() - (len(site.shape) - 1 if site.kind == "conv" else 1)
            if not 0 <= axis < ours.dim() or ours.shape[axis] != site.matrix_shape[0]:
                outputs = f"{site.weight} has {site.matrix_shape[0]} outputs"
                yield f"branch node {node.name} is said to be {_shape(ours)}, but {outputs}"
        if ours is not theirs and _shape(ours) != _shape(theirs):
            yield f"branch node {node.name} is said to be {_shape(ours)}, {base.name} is {_shape(theirs)}"


def _nothing_is_left_over(subject: Subject) -> Iterator[str]:
    """Nodes that passes made for a branch are read."""
    for node in subject.module.graph.nodes:
        if made_by(node) and node not in subject.branches and not node.users:
            yield f"node {node.name} was made by {made_by(node)} for a branch, and is read by nobody"


def _shape(value: Any) -> tuple[str, torch.dtype] | None:
    return (str(tuple(value.shape)), value.dtype) if isinstance(value, torch.Tensor) else None


def _branches_stand_in_this_graph(subject: Subject) -> Iterator[str]:
    """Each inserted branch is called by a node of this graph, and not only inside another module."""
    called = {branch.weight_name for branch in subject.branches.values()}
    for node in subject.module.graph.nodes:
        module = module_at(subject.module, str(node.target)) if node.op == "call_module" else None
        inside = [inner.weight_name for inner in module.modules() if isinstance(inner, Branch)] if module else []
        if inside and node not in subject.branches:
            called |= set(inside)
            yield f"node {node.name} calls a module inside which the branch of {inside[0]} stands; no fold reaches it"
    used = {use.weight for node in subject.module.graph.nodes if (use := use_of(node)) is not None}
    for weight in sorted(subject.record.branched - called - used):
        yield f"{weight} had a branch in this graph, and no node calls it any more; fold before what takes it out"


def _factors_are_read_by_branches(subject: Subject) -> Iterator[str]:
    """Only a branch, or the shared product of several, reads the factors of a branch."""
    for node in subject.module.graph.nodes:
        if node.op != "get_attr" or not str(node.target).startswith(f"{BRANCHES}."):
            continue
        branch = module_at(subject.module, str(node.target).rpartition(".")[0])
        strays = [user.name for user in node.users if user.target is not shared_down]
        if isinstance(branch, Branch) and strays:
            yield f"node {strays[0]} reads {node.target} past the branch of {branch.weight_name}"


def _inputs_are_the_adapters(subject: Subject) -> Iterator[str]:
    """The last inputs of the graph are those of the record, and each branch node reads those of its weight."""
    lifted = subject.record.lifted
    inputs = lifted.inputs if lifted is not None else ()
    last = [node for node in subject.module.graph.nodes if node.op == "placeholder"][-len(inputs) :] if inputs else []
    if [node.name for node in last] != [each.name for each in inputs]:
        yield f"the last inputs are {[node.name for node in last]}, recorded as {[each.name for each in inputs]}"
        return
    by_weight: dict[str, dict[str, fx.Node]] = {}
    for node, each in zip(last, inputs, strict=True):
        by_weight.setdefault(each.weight, {})[each.tensor] = node
    for node, branch in subject.branches.items():
        tensors: Any = node.kwargs.get("tensors", {})
        read = {**tensors, **({"scale": node.kwargs["scale"]} if "scale" in node.kwargs else {})}
        if read != by_weight.get(branch.weight_name, {}):
            yield f"branch node {node.name} does not read the inputs of {branch.weight_name}"
    for node in last:
        strays = [user.name for user in node.users if user not in subject.branches]
        if strays:
            yield f"node {strays[0]} reads {node.name}, an input of a branch"


def _nothing_is_written_in_between(subject: Subject) -> Iterator[str]:
    """Nothing writes into the input of an op before its branch reads it."""
    for node in subject.branches:
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


def _weights_are_the_stages(subject: Subject) -> Iterator[str]:
    """The weights are those that the stage began with: a fold starts from W0, and would lose any other change."""
    plan = subject.record.plan
    if not subject.inserted or plan is None or subject.record.owner:
        return
    parameters = named_weights(owner_of(subject.module, subject.record)).parameters
    for weight, state in subject.record.slow.states.items():
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
    if (same := same_quantized(parameter, state.base)) is not None:
        return same
    plain = not (spec.noise.is_on or state.experts or state.noises or state.initial or state.start_differs)
    plain = plain and state.scale() is None
    if plain and state.start.dense is None and parameter.data_ptr() == state.base.data_ptr():
        return True  # the same memory
    with torch.no_grad():
        start = start_weight(state, spec, stage).to(parameter)
        return bool(((parameter == start) | (parameter.isnan() & start.isnan())).all())


RULES: tuple[Check, ...] = (
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
    _inputs_are_the_adapters,
    _nothing_is_written_in_between,
    _weights_are_the_stages,
)
"""Every rule, in the order in which faults are listed."""


def faults(graph_module: fx.GraphModule) -> list[str]:
    """Return a sentence for each fault."""
    record = record_of(graph_module)
    canonical = named_weights(owner_of(graph_module, record)).canonical
    subject = Subject(graph_module, record, branch_nodes(graph_module), canonical)
    return [fault for rule in RULES for fault in rule(subject)]


def verify(graph_module: fx.GraphModule, when: str) -> None:
    """Raise VerifyError, with every fault and `when` it was found, if the graph does not agree with its plan."""
    sentences = faults(graph_module)
    if sentences:
        raise VerifyError(f"{when}, the graph does not agree with its plan:\n  " + "\n  ".join(sentences))
