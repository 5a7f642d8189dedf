"""Check a graph against its plan.

The rules derive the branch nodes again with functions of the passes (`uses_in`, `branch_call`), and compare them with
the graph. A rule yields one sentence per fault, with the node or weight. `verify` raises one error with all faults.

The rules also detect edits by foreign passes that a fold could not undo. A fold erases the branch nodes and recomputes
the weights. It is correct only if:

- this graph calls each inserted branch;
- each branch reads the same input as its op;
- the weights still have the values that they had at the start of the stage.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from lorasc_fx.errors import PassError, VerifyError
from lorasc_fx.graph.branch_calls import INPUT_OPTIONS, branch_nodes, call_template, replaced_call
from lorasc_fx.graph.matching import branch_call, uses_in
from lorasc_fx.graph.record import Record, Use, record_of
from lorasc_fx.graph.weights import BRANCHES, branches_in, called_module, named_weights, owner_of
from lorasc_fx.quantized import same_quantized
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.state import WeightState, start_weight


def _well_formed(module: fx.GraphModule, record: Record) -> Iterator[str]:
    """The graph passes `fx.Graph.lint`, and each `call_module` node names a submodule that exists."""
    try:
        module.graph.lint()
    except (RuntimeError, ValueError) as fault:
        yield f"the graph is malformed: {fault}"
    for node in module.graph.nodes:
        if node.op == "call_module" and called_module(node) is None:
            yield f"node {node.name} calls {node.target}, which the module does not have"


def _weights_fit_plan(module: fx.GraphModule, record: Record) -> Iterator[str]:
    """Each planned site exists in the model, with the planned shape and tied names."""
    weights = named_weights(owner_of(module, record))
    for site in record.plan.sites:
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


def _branches_fit_plan(module: fx.GraphModule, record: Record) -> Iterator[str]:
    """Each planned site has a branch, which is for the weight of the site and has the planned shapes."""
    branches = branches_in(module) or {}
    for site in record.plan.sites if _inserted(record) else ():
        branch = branches.get(site.key)
        if branch is None:
            yield f"{site.weight} is in the plan, but has no branch"
        elif (branch.weight_name, branch.weight_shape) != (site.weight, site.shape):
            yield (
                f"the branch of {site.weight} is for {branch.weight_name} of shape {branch.weight_shape}, but the "
                f"weight has {site.shape}"
            )
        else:
            shapes = {name: tuple(parameter.shape) for name, parameter in branch.named_parameters()}
            for name, shape in site.parameter_shapes.items():
                if shapes.get(name, shape) != shape:
                    yield f"{name} of {site.weight} has shape {shapes[name]}, but the plan says {shape}"


def _inserted(record: Record) -> bool:
    """Whether branches were inserted, with parameters or with tensors that are graph inputs."""
    return not record.facts.isdisjoint(("branches-inserted", "adapter-inputs"))


def _calls_are_derived(module: fx.GraphModule, record: Record) -> Iterator[str]:
    """The graph has exactly the branch nodes that `InsertBranches` would insert into it now."""
    try:
        uses = uses_in(module, record) if _inserted(record) else {}
    except PassError as fault:
        yield str(fault)
        return
    # A use is at the op or the weight, or at the branch node that replaced the op.
    calls: dict[Any, list[fx.Node]] = defaultdict(list)
    for node in branch_nodes(module):
        calls[node if call_template(node) is not None else next(iter(node.args), None)].append(node)
    weights = {use.weight for use in uses.values()}
    for source, use in uses.items():
        nodes, site = calls.pop(source, []), record.plan.by_weight[use.weight]
        if source.users and len(nodes) != 1:  # a use without users is dead code and has no branch
            form = f" (planned for the form {site.form})" if site.form else ""
            yield f"{use.weight} is used at node {source.name} with {len(nodes)} branches instead of one{form}"
        for node in nodes:
            yield from _call_is_derived(node, source, use, f"{BRANCHES}.{site.key}")
    for source, nodes in calls.items():
        for node in nodes:
            weights.add(branch_nodes(module)[node].weight_name)
            yield (
                f"branch node {node.name} is at {source}, where the plan and this graph need none; run fold-branches "
                "before a pass that changes the uses of weights, such as one that inserts observers"
            )
    for weight in sorted(record.branched - weights):
        yield (
            f"{weight} had a branch in this graph, but no node of it calls the branch any more; fold before the pass "
            "that removes the node or moves it into a module"
        )


def _call_is_derived(node: fx.Node, source: fx.Node, use: Use, target: str) -> Iterator[str]:
    """A branch node has the target, arguments and options that its use needs, and is the only user of `source`."""
    op = replaced_call(node) or source
    args, options = branch_call(use, op)
    # For the call of a module, `branch_call` returns the paths of weight and bias, not nodes.
    wanted = dict(enumerate(args))
    read = tuple(
        str(argument.target) if isinstance(argument, fx.Node) and isinstance(wanted.get(index), str) else argument
        for index, argument in enumerate(node.args)
    )
    keywords = {name: value for name, value in node.kwargs.items() if name not in INPUT_OPTIONS}
    if (node.target, read, keywords) != (target, args, options):
        yield (
            f"branch node {node.name} is {node.target}{read} with {keywords}, but the use of {use.weight} at {op.name} "
            f"needs {target}{args} with {options}"
        )
    bypassing = [user.name for user in source.users if user is not node] if source is not node else []
    if bypassing:
        yield f"node {source.name} has a branch, but is also read without it, by {', '.join(bypassing)}"
    if not node.users:
        yield f"branch node {node.name} has no users"


def _weights_are_unchanged(module: fx.GraphModule, record: Record) -> Iterator[str]:
    """The weights have the values that they had when the stage started. A fold would lose any other change."""
    plan = record.plan
    if not _inserted(record) or record.owner:
        return
    parameters = named_weights(module).parameters
    for weight, state in record.slow.states.items():
        parameter = parameters.get(weight)
        fits = parameter is not None and parameter.shape == state.base.shape  # otherwise another rule reports it
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
    if state.starts_at_base(spec.noise.strength > 0) and parameter.data_ptr() == state.base.data_ptr():
        return True
    with torch.no_grad():
        start = start_weight(state, spec, stage).to(parameter)
        return bool(((parameter == start) | (parameter.isnan() & start.isnan())).all())


RULES = (_well_formed, _weights_fit_plan, _branches_fit_plan, _calls_are_derived, _weights_are_unchanged)
"""All rules, in the order in which their faults are listed."""


def faults(graph_module: fx.GraphModule) -> list[str]:
    """Return one sentence per fault of a graph. An empty list means that the graph agrees with its plan."""
    record = record_of(graph_module)
    if record.inlined.calls:  # passes of others may change plain nodes; passes that need branches verify them later
        return []
    return [fault for rule in RULES for fault in rule(graph_module, record)]


def verify(graph_module: fx.GraphModule, when: str) -> None:
    """Raise VerifyError with all faults, if the graph does not agree with its plan.

    Args:
        graph_module: the graph to check.
        when: beginning of the message, such as `after insert-branches`.
    """
    sentences = faults(graph_module)
    if sentences:
        raise VerifyError(f"{when}, the graph does not agree with its plan:\n  " + "\n  ".join(sentences))
