"""Read branch nodes, the `call_module` nodes that call a branch.

A branch node has one of these forms:

- added to the output of an op (placement `beside`): `%out = branches.KEY(%op, %x, at="beside")`;
- instead of the op (placement `merged`): `%out = branches.KEY(%x, %weight, %bias, at="merged", op=...)`. The call of
  the op is stored in the metadata of the node, so that a fold can restore it;
- added to a weight (placement `weight`): `%adapted = branches.KEY(%weight, at="weight")`.

If the tensors of a branch are inputs of the graph, the node also has `tensors={NAME: %input}` and `scale=%input`.

`GraphEditor` creates and erases these nodes.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from lorasc_fx.branch import Branch
from lorasc_fx.graph.forms import FunctionForm, ModuleForm, StoredCall, form_of, registered_named
from lorasc_fx.graph.record import MADE_BY, REPLACED_CALL, Record
from lorasc_fx.graph.weights import called_module, module_at
from lorasc_fx.util.torch_private import OpOverload

INPUT_OPTIONS = ("tensors", "scale")
"""Additional keyword arguments of a branch node if the tensors of the branch are inputs of the graph."""


def made_by(node: fx.Node) -> str:
    """Return the name of the pass that created the node, or "" if it came from a front end or a foreign pass."""
    name = node.meta.get(MADE_BY, "")
    return name if isinstance(name, str) else ""


def branch_nodes(graph_module: fx.GraphModule) -> dict[fx.Node, Branch]:
    """Return {branch node: its branch}, in the order of the graph."""
    modules = {node: called_module(node) for node in graph_module.graph.nodes}
    return {node: module for node, module in modules.items() if isinstance(module, Branch)}


@dataclass(frozen=True)
class Input:
    """Stands in a `CallTemplate` for the argument of the branch node at this index."""

    index: int


@dataclass(frozen=True)
class CallTemplate(StoredCall):
    """A stored call with an `Input` instead of each node. `inputs` is the number of arguments of the branch node."""

    inputs: int

    @classmethod
    def of(cls, node: fx.Node, inputs: Sequence[object]) -> CallTemplate:
        """Return the template of a node, which a branch node with the arguments `inputs` will replace."""

        def numbered(argument: fx.Node) -> Any:
            return Input(inputs.index(argument))

        args, kwargs = fx.node.map_arg(node.args, numbered), fx.node.map_arg(node.kwargs, numbered)
        return cls(node.name, node.op, node.target, args, kwargs, len(inputs))

    def __reduce__(self) -> tuple[Any, ...]:
        # An OpOverload cannot be pickled, so its name is pickled instead.
        is_op = isinstance(self.target, OpOverload)
        values = (self.name, self.op, str(self.target) if is_op else self.target, self.args, self.kwargs, self.inputs)
        return _template, (is_op, *values)


def _template(is_op: bool, name: str, op: str, target: Any, *values: Any) -> CallTemplate:
    """Rebuild a pickled template. If `is_op`, `target` is the name of an op, such as `aten.linear.default`."""
    return CallTemplate(name, op, operator.attrgetter(target)(torch.ops) if is_op else target, *values)


@dataclass(frozen=True)
class ReplacedCall(StoredCall):
    """A stored call with the current arguments of the branch node. `form` is None if their number has changed."""

    module: nn.Module | None = None
    form: FunctionForm | ModuleForm | None = None


def call_template(node: fx.Node) -> CallTemplate | None:
    """Return the stored template of the call that a branch node replaced, or None for any other node."""
    template = node.meta.get(REPLACED_CALL)
    return template if isinstance(template, CallTemplate) else None


def replaced_call(node: fx.Node) -> ReplacedCall | None:
    """Return the call that a branch node replaced, with the current arguments, or None for any other node."""
    template = call_template(node)
    if template is None:
        return None
    # The arguments may have changed since the op was replaced, for example by a pass that rewired the input.
    current = dict(enumerate(node.args))
    args, kwargs = fx.node.map_aggregate(
        (template.args, template.kwargs),
        lambda argument: current.get(argument.index) if isinstance(argument, Input) else argument,
    )
    owner = node.graph.owning_module
    module = module_at(owner, template.target) if owner is not None and template.op == "call_module" else None
    op = ReplacedCall(template.name, template.op, template.target, args, kwargs, module)
    return replace(op, form=form_of(op, module)) if len(node.args) == template.inputs else op


@dataclass(frozen=True)
class Kept:
    """Metadata that a graph module loses if other code rebuilds it. The branches keep it, and copies of them share it.

    Args:
        record: the record of the graph module.
        templates: {weight: templates of the calls that its branch replaced, in the order of the graph}.
    """

    record: Record
    templates: Mapping[str, tuple[CallTemplate, ...]]

    @classmethod
    def of(cls, graph_module: fx.GraphModule, record: Record) -> Kept:
        """Collect the metadata of a graph module."""
        templates: dict[str, tuple[CallTemplate, ...]] = defaultdict(tuple)
        for node, branch in branch_nodes(graph_module).items():
            if (template := call_template(node)) is not None:
                templates[branch.weight_name] += (template,)
        return cls(record, dict(templates))

    def __deepcopy__(self, memo: object) -> Kept:
        return self


def mergeable(node: fx.Node, form: FunctionForm | ModuleForm) -> bool:
    """Whether a merged branch can replace this node: its form is built in, and it reads the stored weight directly."""
    if not form.product or registered_named(form.name) is not None:  # a user's op may do more than the product
        return False
    if isinstance(form, ModuleForm):
        return True
    reading = form.reads(node, None)
    weight = reading.weight
    inputs = {reading.x, weight, reading.bias}
    return isinstance(weight, fx.Node) and weight.op == "get_attr" and set(node.all_input_nodes) <= inputs
