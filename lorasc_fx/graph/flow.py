"""Where a weight goes: through nodes that compute with weights only, to the nodes at which it meets an input.

A weight may be transposed, sliced, cast, normalized or standardized before anything is multiplied by it. Nodes that
depend on weights, buffers and literals alone are `constant`; the nodes that read a constant and are none are where it
is used.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx
from torch.utils import _pytree as pytree

from lorasc_fx.graph.weights import module_at

__all__ = ["Meeting", "constants", "inside", "meetings", "mutates", "reads_shape_only"]

_SHAPE_ONLY = {torch.ops.aten.sym_size.int, torch.ops.aten._assert_tensor_metadata.default}
_SHAPE_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad"}
_SELECTIONS = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_select.default,
    torch.ops.aten.select.int,
    torch.ops.aten.gather.default,
    torch.index_select,
    torch.select,
    torch.gather,
    operator.getitem,
    "index_select",
    "select",
    "gather",
}
_SHAPE_METHODS = {"size", "dim", "numel", "is_floating_point", "stride"}


@dataclass(frozen=True)
class Meeting:
    """A node at which a weight meets an input, and the constants made of the weight that it reads there."""

    node: fx.Node
    reads: tuple[fx.Node, ...]


def constants(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that depend on no input: get_attr, and calls whose every argument is such a node."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        computed = node.op in ("call_function", "call_method") and node.all_input_nodes and not _impure(node)
        if node.op == "get_attr" or (computed and found.issuperset(node.all_input_nodes)):
            found.add(node)
    return found


def meetings(weight: fx.Node, constant: set[fx.Node]) -> Iterator[Meeting]:
    """Yield where a weight's get_attr node, or what is computed of it, meets an input; each node once."""
    derived, met = {weight: None}, dict[fx.Node, None]()
    waiting = [weight]
    while waiting:
        for user in waiting.pop().users:
            if reads_shape_only(user) or user in derived:
                continue
            made = user in constant or all(source in derived or source in constant for source in user.all_input_nodes)
            made = made and not any(mutates(user, source) for source in user.all_input_nodes if source in derived)
            if user.users and not stands_for_itself(user) and user.op != "output" and (made or selects(user, derived)):
                derived[user] = None
                waiting.append(user)
            else:
                met[user] = None
    for node in met:
        yield Meeting(node, tuple(source for source in node.all_input_nodes if source in derived))


def selects(node: fx.Node, derived: Container[fx.Node]) -> bool:
    """Whether a node takes a part of a weight, by an index that may depend on inputs (an expert, by a router)."""
    rest: list[fx.Node] = []
    fx.node.map_arg((node.args[1:], node.kwargs), rest.append)
    selection = node.op in ("call_function", "call_method") and node.target in _SELECTIONS
    return selection and node.args[0] in derived and not any(each in derived for each in rest)


def stands_for_itself(node: fx.Node) -> bool:
    """Whether a constant node is a use all the same: a lookup at constant places is a lookup."""
    return node.target in (torch.ops.aten.embedding.default, torch.embedding, F.embedding)


def reads_shape_only(node: fx.Node) -> bool:
    """Whether a node reads no value of its argument, only shape, dtype or device."""
    if node.op == "call_method":
        return node.target in _SHAPE_METHODS
    if node.op != "call_function":
        return False
    return node.target in _SHAPE_ONLY or (node.target is getattr and node.args[1] in _SHAPE_ATTRIBUTES)


def mutates(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node writes into this argument, itself or in a region that it runs."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return any(mutates(user, inner) for inner in inside(node, source) for user in inner.users)
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return node.op == "call_method" and str(node.target).endswith("_") and node.args[:1] == (source,)
    for position, argument in enumerate(schema.arguments):
        value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        if value is source and argument.alias_info is not None and argument.alias_info.is_write:
            return True
    return False


def inside(node: fx.Node, source: fx.Node) -> Iterator[fx.Node]:
    """Yield what stands for an argument inside the regions that a node runs, if it is a higher-order op."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return
    owner, given = node.graph.owning_module, pytree.tree_leaves(node.args)
    if owner is None:
        return
    named = [each for each in given if isinstance(each, fx.Node) and each.op == "get_attr"]
    bodies = {each: body for each in named if isinstance(body := module_at(owner, str(each.target)), fx.GraphModule)}
    for body in bodies.values():
        inputs = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
        passed = [outer for outer in given if outer not in bodies][-len(inputs) :]
        yield from (inner for inner, outer in zip(inputs, passed, strict=False) if outer is source)


def _impure(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return node.is_impure() or torch.Tag.nondeterministic_seeded in tags
