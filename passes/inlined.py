"""Branches as plain nodes: the formulas of branches, and the restoration of branch nodes.

`InlineBranches` replaces each branch node by the nodes of `formula`. `outlined` finds these nodes by the parameters
that they read and by their ops, and restores the branch nodes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from lorasc_fx.branch import Branch, Placement
from lorasc_fx.branch.lora import LowRankBranch
from lorasc_fx.branch.methods import SharedTensor
from lorasc_fx.branch.placements import ConvCall, MatrixOps, low_rank_conv
from lorasc_fx.errors import PassError, VerifyError
from lorasc_fx.graph import GraphEditor, branch_nodes, call_template, record_of, verify
from lorasc_fx.graph.editor import drop_nodes
from lorasc_fx.graph.matching import branch_call, uses_in
from lorasc_fx.graph.record import Inlined, Record, Use
from lorasc_fx.graph.weights import BRANCHES, module_at
from lorasc_fx.parameters import shallow

aten = torch.ops.aten

_CONSTANT = "the formula has a tensor that is neither a parameter nor a buffer of the branch"


def insert_calls(graph: GraphEditor) -> None:
    """Insert a branch node at each use of a site that has no branch node yet."""
    plan = graph.record.plan
    # The uses that already have a branch: the op or weight, or the branch node that replaced the op.
    done = {node if call_template(node) is not None else node.args[0] for node in branch_nodes(graph.module)}
    for source, use in uses_in(graph.module, graph.record).items():
        if source in done or not source.users:  # a node without users is dead code
            continue
        args, options = branch_call(use, source)
        insert = graph.replace_op if use.merged else graph.insert_after
        insert(source, plan.by_weight[use.weight].key, args, options)


def plain_call(branch: Branch, use: Use, source: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return (arguments, options) of the branch that is inlined at a use.

    An inlined branch does not replace the op. A low-rank branch is added to the output of the op, and any other branch
    to the weight of the op.

    Raises:
        PassError: the op is a call of a module, so its weight is not in the graph, and the branch is not low-rank.
    """
    args, options = branch_call(use, source)
    if not use.merged:
        return args, options
    if isinstance(branch, LowRankBranch):
        return branch_call(replace(use, merged=False), source)
    if source.op == "call_module":
        raise refusal(branch, f"node {source.name} calls a module, so its weight is not in the graph")
    return args[1:2], {"at": Placement.WEIGHT}


def formula(branch: Branch, record: Record, options: Mapping[str, Any]) -> fx.Graph:
    """Return the computation of a branch node with these options as a graph of plain nodes.

    Its inputs are the output and the input of the op, or the weight. The parameters are read as attributes. Raises
    PassError if the method has no plain formula for this placement.
    """
    graph, at = fx.Graph(), options["at"]
    tracer = fx.proxy.GraphAppendingTracer(graph)
    path = f"{BRANCHES}.{record.plan.by_weight[branch.weight_name].key}"
    names = ("weight",) if at is Placement.WEIGHT else ("y", "x")
    inputs = [fx.Proxy(graph.placeholder(name), tracer) for name in names]
    # Call the methods of the branch with proxies instead of tensors.
    plain, tensors = shallow(branch), {**dict(branch.named_parameters()), **dict(branch.named_buffers())}
    assert isinstance(plain, Branch)
    plain._parameters, plain._buffers = {}, {}
    vars(plain).update({name: tracer.create_proxy("get_attr", f"{path}.{name}", (), {}) for name in tensors})
    if any(isinstance(value, SharedTensor) for value in vars(branch).values()):
        raise refusal(branch, _CONSTANT)
    same_dtype = record.slow.states[branch.weight_name].base.dtype == next(branch.parameters()).dtype
    try:
        graph.output(_compute(plain, inputs, same_dtype, **options).node)
    except (TypeError, AttributeError, KeyError, ValueError) as fault:  # the method's code cannot use proxies
        reason = str(fault).partition(". ")[0]
        raise refusal(branch, f"torch.fx cannot record the formula of this method ({reason})") from fault
    if any(isinstance(value, torch.Tensor) for node in graph.nodes for value in _flat(node)[0]):
        raise refusal(branch, _CONSTANT)
    drop_nodes(graph, lambda node: node.op == "get_attr")
    return graph


def _compute(branch: Any, inputs: Sequence[Any], same_dtype: bool, at: Placement, **options: Any) -> Any:
    """Return what a branch computes at its placement, by plain operations. All tensors may be proxies."""
    if branch.magnitude or branch.grid:
        raise refusal(branch, "it rounds to a grid" if branch.grid else "it scales the rows of the weight")
    if at is Placement.WEIGHT and not options:
        weight, term = inputs[0], branch.dense_delta(inputs[0])
        return aten.add.Tensor(weight, term if same_dtype else aten.type_as.default(term, weight))
    if not isinstance(branch, LowRankBranch) or at not in (Placement.BESIDE, Placement.LOOKUP):
        raise refusal(branch, "it computes with stacked matrices" if branch.kind == "stacked" else f"it is {at}")
    y, x = inputs
    if at is Placement.LOOKUP:
        return MatrixOps.at_lookup(branch, y, x, **options)
    if branch.kind == "conv":
        call = ConvCall(**options)
        term = low_rank_conv(branch, call.padded(x), call)
    else:
        a, b = (t if same_dtype else aten.type_as.default(t, x) for t in (branch.down, branch.up))
        term = aten.linear.default(aten.linear.default(x, a), b)
    return aten.add.Tensor(y, aten.mul.Tensor(term, branch.scale))


def refusal(branch: Branch, reason: str) -> PassError:
    """Return the error for a branch that cannot be inlined."""
    return PassError(
        f"inline-branches: the branch of {branch.weight_name} ({type(branch).__name__}) cannot be written as plain "
        f"nodes: {reason}. Exclude it (exclude=({branch.weight_name!r},)), or fold the branches before other passes",
        code="method-not-supported",
    )


def outlined(graph_module: fx.GraphModule, when: str) -> fx.GraphModule:
    """Return a copy of a graph module with restored branch nodes. If no branch is inlined, return the module itself.

    Raises VerifyError if the nodes of a branch were changed. The message begins with `when`.
    """
    record = record_of(graph_module)
    if not record.inlined.calls:
        return graph_module
    editor = GraphEditor(graph_module, "insert-branches")
    plan = record.plan
    patterns = [(key, formula(record.inlined.branches[key], record, options)) for key, options in record.inlined.calls]
    matched = [(key, match) for key, pattern in patterns for match in _places(pattern, editor.module.graph)[0]]
    # {erased result of a formula: node that takes its place}
    replaced = {result: inputs[0] for _, (result, _, inputs) in matched}
    for _, (result, nodes, _) in matched:
        editor.remove_formula(result, _latest(result, replaced), nodes)
    branches = {key: _with_parameters(branch, editor.module, key) for key, branch in record.inlined.branches.items()}
    editor.module._modules.pop(BRANCHES, None)
    editor.set_branches(branches)
    editor.record = replace(record, inlined=Inlined(), facts=record.facts - {"branches-inlined"})
    wanted = defaultdict[str, dict[Any, fx.Node]](dict)
    for node, use in uses_in(editor.module, editor.record).items():
        if node.users:
            key = plan.by_weight[use.weight].key
            wanted[key][plain_call(branches[key], use, node)[0]] = node
    faults = []
    for key, pattern in patterns:
        results = {result: inputs for name, (result, _, inputs) in matched if name == key}
        places = {tuple(_latest(node, replaced) for node in inputs) for inputs in results.values()}
        # A branch that is added to the result of the same branch is unexpected too.
        places |= {inputs for inputs in results.values() if inputs[0] in results}
        missing, unexpected = wanted[key].keys() - places, places - wanted[key].keys()
        if unexpected:
            inputs = " and ".join(map(str, min(unexpected, key=str)))
            faults.append(f"{branches[key].weight_name}: its branch reads {inputs}, where no branch belongs")
        elif missing or not places:
            difference = _places(pattern, editor.module.graph)[1]
            used = [f", used at {wanted[key][inputs]}" for inputs in missing] or [""]
            faults += [f"{branches[key].weight_name}{where}: {difference}" for where in used]
    if faults:
        raise VerifyError(
            f"{when}, the nodes of inlined branches were changed. Fold before the pass that changes them:\n  "
            + "\n  ".join(faults)
        )
    insert_calls(editor)
    module = editor.finish()
    verify(module, when)
    return module


def _latest(node: fx.Node, replaced: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """Return the node that has replaced a node, perhaps in several steps."""
    while node in replaced:
        node = replaced[node]
    return node


def _with_parameters(branch: Branch, module: fx.GraphModule, key: str) -> Branch:
    """Return a copy of a branch with the parameters in the graph module, which may be a copy with new parameters."""
    new, holder = shallow(branch), module_at(module, f"{BRANCHES}.{key}") or nn.Module()
    assert isinstance(new, Branch)
    new._parameters |= {name: value for name, value in holder._parameters.items() if name in new._parameters}
    return new


Place = tuple[fx.Node, set[fx.Node], tuple[fx.Node, ...]]
"""A place where a graph computes a formula: (last node, all nodes, inputs)."""


def _places(pattern: fx.Graph, graph: fx.Graph) -> tuple[list[Place], str]:
    """Return the places where a graph computes a formula, and a text that says where the graph differs from it."""
    (result,) = next(iter(reversed(pattern.nodes))).args
    step = next(node for node in pattern.nodes if node.op == "get_attr")
    nodes = list(graph.find_nodes(op="get_attr", target=step.target))
    if not nodes:
        return [], f"no node of the graph reads {step.target}"
    while step is not result:
        step, previous = next(iter(step.users)), nodes
        nodes = list(dict.fromkeys(user for node in previous for user in node.users if _same_op(user, step)))
        if not nodes:
            readers = [f"{user} ({user.target})" for node in previous for user in node.users]
            return [], f"node {previous[0]} is read by {', '.join(readers) or 'no node'} instead of {step.target}"
    places = []
    for node in nodes:
        bound: dict[fx.Node, fx.Node] = {}
        if _unify(result, node, bound):
            inputs = [bound.pop(source) for source in pattern.nodes if source.op == "placeholder"]
            places.append((node, set(bound.values()), tuple(inputs)))
    return places, f"node {nodes[0]} or a node that it reads has other arguments than in the branch"


def _same_op(pattern: fx.Node, node: fx.Node) -> bool:
    return (pattern.op, pattern.target) == (node.op, node.target)


def _unify(pattern: object, value: object, bound: dict[fx.Node, fx.Node]) -> bool:
    """Whether a value equals a part of a formula. Adds {node of the formula: node of the graph} to `bound`."""
    if not isinstance(pattern, fx.Node) or not isinstance(value, fx.Node):
        return bool(type(pattern) is type(value) and pattern == value)
    if pattern in bound and pattern.op != "get_attr":
        return bound[pattern] is value
    bound[pattern] = value
    if pattern.op == "placeholder":
        return True
    (expected, structure), (actual, actual_structure) = _flat(pattern), _flat(value)
    fits = _same_op(pattern, value) and structure == actual_structure
    return fits and all(_unify(one, two, bound) for one, two in zip(expected, actual, strict=True))


def _flat(node: fx.Node) -> tuple[list[Any], Any]:
    """Return the flattened arguments of a node, and their structure with None in the place of each leaf."""
    leaves: list[Any] = []
    return leaves, fx.node.map_aggregate((node.args, node.kwargs), leaves.append)
