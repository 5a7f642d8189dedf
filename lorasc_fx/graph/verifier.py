"""Check a graph against its plan, with a table of rules.

The rules derive uses and branch calls again with the functions of the passes (`read`, `branch_call`), and compare. A
rule yields one sentence per fault, with the name of the node or weight. `verify` raises one error that lists every
fault.

The rules also detect edits by foreign passes that a fold could not undo. A fold erases the branch nodes and recomputes
the weights. It is correct only if:

- this graph calls each inserted branch;
- each branch reads the same input as its op;
- the weights still have the values that they had at the start of the stage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from lorasc_fx.branch import Branch, ops_of
from lorasc_fx.errors import VerifyError
from lorasc_fx.graph.branch_calls import (
    INPUT_OPTIONS,
    ReplacedCall,
    branch_nodes,
    call_template,
    replaced_call,
    use_of,
)
from lorasc_fx.graph.flow import constants, expert_index, indexed_experts, uses_of, written_between
from lorasc_fx.graph.forms import ON_INDEXED_EXPERT, ON_WEIGHT, form_of, is_form
from lorasc_fx.graph.matching import BesideUse, WeightUses, branch_call, read
from lorasc_fx.graph.record import Record, record_of
from lorasc_fx.graph.weights import BRANCHES, Weights, called_module, module_at, named_weights, owner_of
from lorasc_fx.quantized import same_quantized
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.state import WeightState, start_weight


@dataclass(frozen=True)
class Subject:
    """The input of every rule: a graph module and lookup tables.

    Args:
        module: the graph module.
        record: its record.
        branches: the branch of each branch node.
        weights: the parameters of the model.
    """

    module: fx.GraphModule
    record: Record
    branches: dict[fx.Node, Branch]
    weights: Weights

    @cached_property
    def uses(self) -> dict[str, WeightUses]:
        """The uses of each weight, as `MatchSites` reads them."""
        return read(self.module, self.record, self.weights)

    @cached_property
    def use_at(self) -> dict[fx.Node, tuple[str, BesideUse | None]]:
        """The weight that each node reads, and its use if it has a form."""
        found: dict[fx.Node, tuple[str, BesideUse | None]] = {}
        for weight, uses in self.uses.items():
            found |= dict.fromkeys(
                (*uses.sources, *(node for s in uses.sources for node in indexed_experts(s))), (weight, None)
            )
            found |= dict.fromkeys((node for node, _ in uses.contracted), (weight, None))
        for weight, uses in self.uses.items():  # last, because the input of an op may be a weight too
            found |= {use.node: (weight, use) for use in uses.beside}
        return found

    @property
    def inserted(self) -> bool:
        """Whether branches were inserted, with parameters or with tensors that are graph inputs."""
        return not self.record.facts.isdisjoint(("branches-inserted", "adapter-inputs"))

    def has_inputs(self, weight: str) -> bool:
        """Whether the tensors of a weight's branch are graph inputs, so that the branch module holds no values."""
        return any(branch.weight_name == weight for branch in self.record.lifted.branches.values())


Check = Callable[[Subject], Iterator[str]]
"""A rule. Yields one sentence per fault, with the name of the node or weight."""


def _graph_is_well_formed(subject: Subject) -> Iterator[str]:
    """The graph passes `fx.Graph.lint`, and each `call_module` node names a submodule that exists."""
    try:
        subject.module.graph.lint()
    except (RuntimeError, ValueError) as fault:
        yield f"the graph is malformed: {fault}"
    for node in subject.module.graph.nodes:
        if node.op == "call_module" and called_module(node) is None:
            yield f"node {node.name} calls {node.target}, which the module does not have"


def _plan_fits_weights(subject: Subject) -> Iterator[str]:
    """Each planned site exists once in the model, with the planned shape and tied names."""
    if subject.record.plan.stage < 1:
        yield f"the plan is in stage {subject.record.plan.stage}, but stages are counted from 1"
    weights, seen = subject.weights, set()
    for site in subject.record.plan.sites:
        if site.weight in seen:
            yield f"{site.weight} is in the plan twice"
        seen.add(site.weight)
        parameter = weights.parameters.get(site.weight)
        if parameter is None:
            yield f"{site.weight} is in the plan, but the model has no weight of this name"
        elif tuple(parameter.shape) != site.shape:
            yield f"{site.weight} has shape {tuple(parameter.shape)}, but the plan says {site.shape}"
        # A planned alias may be missing: a traced graph module keeps only the names that its graph reads.
        elif set(weights.names[site.weight][1:]) - set(site.aliases) or any(
            weights.canonical.get(alias, site.weight) != site.weight for alias in site.aliases
        ):
            yield f"{site.weight} is tied to {weights.names[site.weight][1:]}, but the plan says {site.aliases}"


def _uses_fit_plan(subject: Subject) -> Iterator[str]:
    """Each node that is marked as a use has the form, weight, kind and layout that its mark and the plan say."""
    for node in subject.module.graph.nodes:
        use = use_of(node)
        if use is None:
            continue
        site, op = subject.record.plan.site(use.weight), replaced_call(node)
        weight, found = subject.use_at.get(node, ("", None))
        on_weight = ON_WEIGHT if node.op == "get_attr" else ON_INDEXED_EXPERT if expert_index(node) is not None else ""
        name = found.form.name if found is not None else on_weight or "an op without a form"
        if site is None:
            yield f"node {node.name} is marked as a use of {use.weight}, which is not in the plan"
        elif op is not None and not use.merged:
            yield f"node {node.name} is a merged branch that replaced {op.name}, but is not marked as merged"
        elif use.merged and site.placement != "merged":
            yield f"node {node.name} is marked as merged, but the plan has placement {site.placement} for {use.weight}"
        elif weight != use.weight:
            actual = weight or f"no weight of the model by the form {use.form}"
            yield f"node {node.name} is marked as a use of {use.weight}, but reads {actual}"
        elif found is None and form_of(node, called_module(node)) is not None:
            yield (
                f"node {node.name} is marked as a use of {use.weight}, but reads no weight of the model directly; run "
                "fold-branches before a pass that inserts nodes between them, such as observers"
            )
        elif name != use.form:
            yield f"node {node.name} is marked as {use.form}, but is {name}"
        elif found is not None and not _compatible(found.form.kind, site.kind):
            yield f"node {node.name} is of kind {found.form.kind}, but {use.weight} is planned as {site.kind}"
        elif found is not None and found.layout != site.layout:
            yield f"node {node.name} reads {use.weight} as {found.layout}, but the plan says {site.layout}"


def _compatible(used: str, planned: str) -> bool:
    """Whether a branch that was planned for one kind of op can be added to an op of another kind."""
    return ops_of(used) is ops_of(planned) and (used == "experts") == (planned == "experts")


def _readers_of_sites_are_marked(subject: Subject) -> Iterator[str]:
    """Each node that computes with a site's weight is marked as a use, so that it gets the branch."""
    constant = constants(subject.module.graph) if subject.inserted else set()
    for weight in subject.record.plan.by_weight if subject.inserted else ():
        uses = subject.uses.get(weight, WeightUses())
        readers = [node for node in (*uses.called, *uses.opaque, *uses.written) if node.op == "call_module"]
        for source in uses.sources:
            experts = indexed_experts(source)
            if any(use_of(expert) is not None for expert in experts):
                readers += experts
            elif use_of(source) is None:
                readers += [use.node for use in uses_of(source, constant)]
        for reader in readers:  # _branches_are_at_uses checks what a branch reads
            if use_of(reader) is None and reader not in subject.branches:
                yield f"node {reader.name} reads {weight}, a site, but no pass has marked it as a use"


def _slow_states_fit_plan(subject: Subject) -> Iterator[str]:
    """The record of a graph module that owns its weights has a valid slow state for each site."""
    plan = subject.record.plan
    if not subject.inserted or subject.record.owner:
        return
    for site in plan.sites:
        state = subject.record.slow.states.get(site.weight)
        if state is None:
            yield f"{site.weight} has a branch, but the record has no slow state for it"
        elif tuple(state.base.shape) != site.shape:
            yield (
                f"the slow state of {site.weight} has shape {tuple(state.base.shape)}, but the plan says {site.shape}"
            )
        else:
            yield from (f"the slow state of {site.weight} {fault}" for fault in state.faults())


def _branches_are_at_uses(subject: Subject) -> Iterator[str]:
    """Each branch node has the arguments that InsertBranches would write now, and is the only user of its op."""
    for node, branch in subject.branches.items():
        op = replaced_call(node)
        base: Any = node if op is not None else next(iter(node.args), None)
        use = use_of(base) if isinstance(base, fx.Node) else None
        site = subject.record.plan.site(use.weight) if use is not None else None
        if not subject.inserted:
            yield f"node {node.name} calls a branch, but no pass has inserted any"
        elif op is not None and (op.form is None or site is None):
            yield f"the op that branch node {node.name} replaced is not marked as a use of a site"
        elif use is None:
            yield f"the first argument of branch node {node.name} is not marked as a use of a site"
        elif site is None or node.target != f"{BRANCHES}.{site.key}":
            yield f"branch node {node.name} is at a use of {use.weight}, but calls {node.target}"
        elif branch.weight_name != use.weight:
            yield f"branch node {node.name} calls the branch of {branch.weight_name} at a use of {use.weight}"
        elif is_form(use.form):  # _uses_fit_plan reports another one
            yield from _call_fits(subject, node, op or base, *branch_call(use, op or base))
        bypassing = (
            [user.name for user in base.users if user is not node] if base is not node and use is not None else []
        )
        if bypassing:
            yield f"node {base.name} has a branch, but is also read without it, by {', '.join(bypassing)}"
        if not node.users:
            yield f"branch node {node.name} has no users"


def _call_fits(
    subject: Subject, node: fx.Node, op: fx.Node | ReplacedCall, args: tuple[Any, ...], options: Mapping[str, Any]
) -> Iterator[str]:
    """The arguments and options of a branch node are these, apart from tensors from inputs."""
    actual: tuple[Any, ...] = node.args
    # A call of a module reads weight and bias by name.
    named = [str(one.target) if isinstance(wanted, str) else one for one, wanted in zip(actual, args, strict=False)]
    if (*named, *actual[len(named) :]) != args:
        yield f"branch node {node.name} does not read the input of {op.name}"
    given = {name: value for name, value in node.kwargs.items() if name not in INPUT_OPTIONS}
    if given != options:
        yield f"branch node {node.name} has options {given}, but {op.name} needs {dict(options)}"


def _every_use_has_a_branch(subject: Subject) -> Iterator[str]:
    """Each use has one branch. A use without users is dead code and has none."""
    if not subject.inserted:
        return
    # The mark is on the op or weight, or on the branch node if the branch replaced the op.
    marked = [node if call_template(node) is not None else next(iter(node.args), None) for node in subject.branches]
    count = Counter(node for node in marked if isinstance(node, fx.Node))
    for node in subject.module.graph.nodes:
        use = use_of(node)
        if use is not None and count[node] != (1 if node.users else 0):
            yield f"{use.weight} is used at node {node.name} with {count[node]} branches instead of one"


def _branches_fit_plan(subject: Subject) -> Iterator[str]:
    """There is one branch per planned site, with the planned class, shapes, scale and options, and finite values."""
    holder = subject.module._modules.get(BRANCHES)
    plan = subject.record.plan
    if not subject.inserted or holder is None:
        return
    for site in plan.sites:
        branch = holder._modules.get(site.key)
        if not isinstance(branch, Branch):
            yield f"{site.weight} is in the plan, but has no branch"
            continue
        fits = type(branch) is site.options.method and _compatible(branch.kind, site.kind)
        if not fits or branch.weight_shape != site.shape:
            actual = f"{type(branch).__name__} for {branch.kind} of shape {branch.weight_shape}"
            yield f"the branch of {site.weight} is a {actual}, but the plan says {site.kind} of shape {site.shape}"
        parameters = dict(branch.named_parameters())
        for name, shape in site.parameter_shapes.items():
            if name in parameters and tuple(parameters[name].shape) != shape:
                yield f"{name} of {site.weight} has shape {tuple(parameters[name].shape)}, but the plan says {shape}"
        if branch.transposed != (site.layout == "in_out"):
            yield f"the branch of {site.weight} has transposed={branch.transposed}, but its layout is {site.layout}"
        for field in ("weight_name", "scale", "dropout", "slices"):
            actual, planned = getattr(branch, field), getattr(site, "weight" if field == "weight_name" else field)
            is_input = field == "scale" and subject.has_inputs(site.weight)
            if actual != planned and not is_input:
                yield f"the branch of {site.weight} has {field} {actual}, but the plan says {planned}"
        if plan.spec.on_nonfinite == "raise" and not branch.finite():
            yield f"the branch of {site.weight} has inf or nan values"
    keys = {site.key for site in plan.sites}
    for key in holder._modules:
        if key not in keys:
            yield f"branch {key} does not belong to a site of the plan"


def _branches_are_called_here(subject: Subject) -> Iterator[str]:
    """Each inserted branch is still called by a node of this graph, and not from inside another module."""
    called = {branch.weight_name for branch in subject.branches.values()}
    for node in subject.module.graph.nodes:
        module = called_module(node)
        inside = [inner.weight_name for inner in module.modules() if isinstance(inner, Branch)] if module else []
        if inside and node not in subject.branches:
            called |= set(inside)
            yield f"node {node.name} calls a module that contains the branch of {inside[0]}, where no fold reaches it"
    used = {use.weight for node in subject.module.graph.nodes if (use := use_of(node)) is not None}
    for weight in sorted(subject.record.branched - called - used):
        yield (
            f"{weight} had a branch in this graph, but no node calls it any more; fold before the pass that removes it"
        )


def _factors_are_read_by_branches(subject: Subject) -> Iterator[str]:
    """No node reads the parameters of a branch."""
    for node in subject.module.graph.nodes:
        if node.op != "get_attr" or not str(node.target).startswith(f"{BRANCHES}."):
            continue
        branch = module_at(subject.module, str(node.target).rpartition(".")[0])
        readers = [user.name for user in node.users]
        if isinstance(branch, Branch) and readers:
            yield f"node {readers[0]} reads {node.target} directly; only the branch of {branch.weight_name} may read it"


def _adapter_inputs_fit_record(subject: Subject) -> Iterator[str]:
    """The last placeholders are the adapter inputs of the record, and only the branch of their weight reads them."""
    inputs = subject.record.lifted.inputs
    last = [node for node in subject.module.graph.nodes if node.op == "placeholder"][-len(inputs) :] if inputs else []
    if [node.name for node in last] != [adapter_input.name for adapter_input in inputs]:
        recorded = [adapter_input.name for adapter_input in inputs]
        yield f"the last inputs are {[node.name for node in last]}, but the record says {recorded}"
        return
    by_weight: dict[str, dict[str, fx.Node]] = {}
    for node, adapter_input in zip(last, inputs, strict=True):
        by_weight.setdefault(adapter_input.weight, {})[adapter_input.tensor] = node
    for node, branch in subject.branches.items():
        tensors: Any = node.kwargs.get("tensors", {})
        read = {**tensors, **({"scale": node.kwargs["scale"]} if "scale" in node.kwargs else {})}
        if read != by_weight.get(branch.weight_name, {}):
            yield f"branch node {node.name} does not read the adapter inputs of {branch.weight_name}"
    for node in last:
        readers = [user.name for user in node.users if user not in subject.branches]
        if readers:
            yield f"node {readers[0]} reads {node.name}, an adapter input; only a branch may read it"


def _no_write_before_branch(subject: Subject) -> Iterator[str]:
    """No node between an op and its branch writes in place into a tensor that the branch reads."""
    for node in subject.branches:
        base = node.args[0] if node.args else None
        if call_template(node) is not None or not isinstance(base, fx.Node):
            continue
        inputs = [argument for argument in node.args[:2] if isinstance(argument, fx.Node)]
        writer = written_between(base, node, inputs)
        if writer is not None:
            yield (
                f"node {writer.name} writes in place into a tensor that branch node {node.name} reads, "
                f"after {base.name} was computed"
            )


def _weights_are_unchanged(subject: Subject) -> Iterator[str]:
    """The weights have the values of the start of the stage. A fold starts from W0 and would lose any other change."""
    plan = subject.record.plan
    if not subject.inserted or subject.record.owner:
        return
    for weight, state in subject.record.slow.states.items():
        parameter = subject.weights.parameters.get(weight)
        fits = parameter is not None and parameter.shape == state.base.shape
        fits = fits and not state.faults()  # _slow_states_fit_plan reports these
        if fits and parameter is not None and not _is_start(parameter, state, plan.spec, plan.stage):
            yield (
                f"{weight} was changed after stage {plan.stage} started; run passes that change weights before the "
                "branches are inserted, or after they are folded"
            )


def _is_start(parameter: nn.Parameter, state: WeightState, spec: CascadeSpec, stage: int) -> bool:
    """Whether a parameter has the value with which the stage starts."""
    if (same := same_quantized(parameter, state.base)) is not None:
        return same
    # If the start is W0 itself, the parameter usually shares its memory: avoid computing and comparing a copy.
    if state.starts_at_base(spec.noise.is_on) and parameter.data_ptr() == state.base.data_ptr():
        return True
    with torch.no_grad():
        start = start_weight(state, spec, stage).to(parameter)
        return bool(((parameter == start) | (parameter.isnan() & start.isnan())).all())


RULES: tuple[Check, ...] = (
    _graph_is_well_formed,
    _plan_fits_weights,
    _uses_fit_plan,
    _readers_of_sites_are_marked,
    _branches_are_at_uses,
    _every_use_has_a_branch,
    _branches_fit_plan,
    _slow_states_fit_plan,
    _branches_are_called_here,
    _factors_are_read_by_branches,
    _adapter_inputs_fit_record,
    _no_write_before_branch,
    _weights_are_unchanged,
)
"""All rules, in the order in which their faults are listed."""


def faults(graph_module: fx.GraphModule) -> list[str]:
    """Return one sentence per fault of a graph. An empty list means that the graph agrees with its plan."""
    record = record_of(graph_module)
    if record.inlined.calls:  # others may change plain nodes; a pass that needs the branches restores and verifies them
        return []
    subject = Subject(graph_module, record, branch_nodes(graph_module), named_weights(owner_of(graph_module, record)))
    return [fault for rule in RULES for fault in rule(subject)]


def verify(graph_module: fx.GraphModule, when: str) -> None:
    """Raise VerifyError with all faults, if the graph does not agree with its plan.

    Args:
        graph_module: the graph to check.
        when: beginning of the message, such as `after insert-branches`.
    """
    sentences = faults(graph_module)
    if sentences:
        raise VerifyError(f"{when}, the graph does not agree with its plan:\n  " + "\n  ".join(sentences))
