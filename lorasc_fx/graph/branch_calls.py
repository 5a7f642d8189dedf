"""Nodes that call a branch: which they are, what they stand in place of, and where their input comes from.

- beside an op: `%out = branches.KEY(%base, %x, at="beside")`;
- with a shared product: `%low = shared_down(%x, (A, ...))`, `branches.KEY(%base, %low[i], at="after_shared")`;
- in place of an op: `%out = branches.KEY(%x, %weight, %bias, at="in_place", op=...)`. The replaced call is kept in the
  metadata of the node, so that a fold can write it again;
- on a weight: `%adapted = branches.KEY(%weight, at="on_weight")`.

A branch whose tensors are inputs of the graph has two more options, `tensors={NAME: %input}` and `scale=%input`.

Everything here only reads; `GraphEditor` makes and erases the nodes.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from lorasc_fx.branch import Branch, shared_down
from lorasc_fx.graph.forms import FunctionForm, ModuleForm, Reading, form_of, registered_named
from lorasc_fx.graph.record import MADE_BY, REPLACED_CALL, USE, Use
from lorasc_fx.graph.weights import BRANCHES, module_at

GIVEN = ("tensors", "scale", "rows")
"""Options of a branch node whose tensors are inputs of the graph; `rows` says where the rows of the batch are."""


def use_of(node: fx.Node) -> Use | None:
    """Return the use that a match marked on the node."""
    use = node.meta.get(USE)
    return use if isinstance(use, Use) else None


def made_by(node: fx.Node) -> str:
    """Return the name of the pass of ours that made the node, or ""."""
    name = node.meta.get(MADE_BY, "")
    return name if isinstance(name, str) else ""


def branch_nodes(graph_module: fx.GraphModule) -> dict[fx.Node, Branch]:
    """Return the nodes that call a branch, with their branches."""
    nodes: dict[fx.Node, Branch] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            module = module_at(graph_module, node.target)
            if isinstance(module, Branch):
                nodes[node] = module
    return nodes


def calls_branches(graph_module: fx.GraphModule) -> fx.Node | None:
    """Return the first node that calls a branch, or a module inside which one stands."""
    for node in graph_module.graph.nodes:
        module = module_at(graph_module, str(node.target)) if node.op == "call_module" else None
        if module is not None and any(isinstance(inner, Branch) for inner in module.modules()):
            caller: fx.Node = node
            return caller
    return None


@dataclass(frozen=True)
class Input:
    """In a `CallTemplate`, the branch node's argument of this number."""

    index: int


@dataclass(frozen=True)
class CallTemplate:
    """A node's name, op, target and arguments, with an `Input` for each node among them; and the number of the branch's
    own inputs.
    """

    name: str
    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: int

    @classmethod
    def of(cls, node: fx.Node, inputs: Sequence[Any]) -> CallTemplate:
        """Read a node that a branch with these arguments shall stand in place of."""

        def numbered(argument: fx.Node) -> Any:
            return Input(inputs.index(argument))

        args, kwargs = fx.node.map_arg(node.args, numbered), fx.node.map_arg(node.kwargs, numbered)
        return cls(node.name, node.op, node.target, args, kwargs, len(inputs))


@dataclass(frozen=True)
class ReplacedCall:
    """A replaced call as it would be written now, and what its form reads off it."""

    name: str
    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    form: FunctionForm | ModuleForm | None = None
    reading: Reading | None = None


def call_template(node: fx.Node) -> CallTemplate | None:
    """Return the call that this branch node replaced, without its inputs; None for any other node."""
    template = node.meta.get(REPLACED_CALL)
    return template if isinstance(template, CallTemplate) else None


def replaced_call(node: fx.Node) -> ReplacedCall | None:
    """Return the call that this branch node replaced, with the inputs of the node; None for any other node."""
    template = call_template(node)
    if template is None:
        return None
    args, kwargs = _filled(template.args, node.args), _filled(template.kwargs, node.args)
    op = ReplacedCall(template.name, template.op, template.target, args, kwargs)
    owner = node.graph.owning_module
    module = module_at(owner, template.target) if owner is not None and template.op == "call_module" else None
    form = form_of(op, module)
    if form is None or len(node.args) != template.inputs:
        return op
    return replace(op, form=form, reading=form.reads(op, module))


def mergeable(node: fx.Node, form: FunctionForm | ModuleForm) -> bool:
    """Whether a branch can stand in place of this node: it reads the weight as the model stores it."""
    if not form.product or registered_named(form.name) is not None:  # what a user's op is merged into, nobody said
        return False
    if isinstance(form, ModuleForm):
        return True
    reading = form.reads(node, None)
    weight = reading.weight
    known = {reading.x, weight, reading.bias}
    return isinstance(weight, fx.Node) and weight.op == "get_attr" and set(node.all_input_nodes) <= known


def _filled(value: Any, inputs: Sequence[Any]) -> Any:
    if isinstance(value, Input):
        return inputs[value.index] if value.index < len(inputs) else None
    if isinstance(value, (tuple, list)):
        return type(value)(_filled(item, inputs) for item in value)
    if isinstance(value, Mapping):
        return {key: _filled(item, inputs) for key, item in value.items()}
    return value


@dataclass(frozen=True)
class SharedInput:
    """Where a branch's input comes from: the node of the shared product, its x, and the key of the branch whose factor
    it was multiplied by.
    """

    group: fx.Node
    x: fx.node.Argument
    factor: str


def shared_input(node: fx.Node) -> SharedInput | None:
    """Return the shared input of a branch node; None for one that has its own, or whose input is no group's."""
    if node.kwargs.get("at") != "after_shared" or len(node.args) < 2:
        return None
    part = node.args[1]
    if not isinstance(part, fx.Node) or part.target is not operator.getitem:
        return None
    group, index = part.args
    if not isinstance(group, fx.Node) or group.target is not shared_down or not isinstance(index, int):
        return None
    x, factors = group.args
    if not isinstance(factors, (tuple, list)) or not 0 <= index < len(factors):
        return None
    factor = factors[index]
    name = str(factor.target) if isinstance(factor, fx.Node) else ""
    return SharedInput(group, x, name.removeprefix(f"{BRANCHES}.").rpartition(".")[0])
