"""Where a weight goes: through nodes that compute with weights only, to the nodes at which it meets an input.

A weight may be transposed, sliced, cast, normalized or standardized before anything is multiplied by it. Nodes that
depend on weights, buffers and literals alone are `constant`; the nodes that read a constant and are none are where it
is used.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Container, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx
from torch.utils import _pytree as pytree

from lorasc_fx.graph.forms import LIKE_ANOTHER, name_of
from lorasc_fx.graph.weights import module_at

__all__ = ["Meeting", "constants", "inside", "looks_up", "may_alias", "meetings", "mutates", "reads_shape_only"]

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
_FACTORIES = {"eye", "ones", "zeros", "full", "arange", "linspace", "tensor", "scalar_tensor", "tril_indices"}
_INTO = ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__imatmul__", "__setitem__")


@dataclass(frozen=True)
class Meeting:
    """A node at which a weight meets an input, and the constants made of the weight that it reads there; `aliases` are
    those that may share the weight's memory.
    """

    node: fx.Node
    reads: tuple[fx.Node, ...]
    aliases: tuple[fx.Node, ...] = ()


def constants(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that depend on no input's values: get_attr, sizes, and calls whose arguments are such nodes.

    What is made of sizes alone (a state of zeros for this batch) is none of them.
    """
    found: set[fx.Node] = set()
    sizes: set[fx.Node] = set()
    for node in graph.nodes:
        read = read_values(node)
        computed = node.op in ("call_function", "call_method") and read and not _impure(node)
        made = node.op == "call_function" and not node.all_input_nodes and name_of(node) in _FACTORIES
        if reads_shape_only(node) or (computed and sizes.issuperset(read) and _arithmetic(node)):
            sizes.add(node)
            found.add(node)
        elif node.op == "get_attr" or made or (computed and found.issuperset(read) and not sizes.issuperset(read)):
            found.add(node)
    return found


def read_values(node: fx.Node) -> list[fx.Node]:
    """Return the inputs whose values a node reads: of `x.type_as(y)`, only x."""
    if name_of(node) not in LIKE_ANOTHER:
        return node.all_input_nodes
    return [each for each in node.all_input_nodes if each is node.args[0]]


def _arithmetic(node: fx.Node) -> bool:
    """Whether a node computes numbers of numbers."""
    home = getattr(node.target, "__module__", "")
    return home in ("_operator", "builtins", "math") or name_of(node).startswith("sym_")


Stands = Callable[[fx.Node, Collection[fx.Node]], bool]


def meetings(
    weight: fx.Node,
    constant: set[fx.Node],
    stands: Stands = lambda node, reads: False,
    passes: Stands = lambda node, reads: False,
) -> Iterator[Meeting]:
    """Yield where a weight's get_attr node, or what is computed of it, meets an input; each node once.

    Args:
        weight: the node.
        constant: nodes that depend on no input.
        stands: nodes that are to count as uses though they depend on no input.
        passes: nodes that are to be passed though they depend on one. Both are given the arguments made of the weight.
    """
    derived, met = {weight: True}, dict[fx.Node, None]()  # whether it may share the weight's memory
    waiting = [weight]
    while waiting:
        for user in waiting.pop().users:
            if reads_shape_only(user) or user in derived:
                continue
            sources = [source for source in read_values(user) if source in derived]
            made = all(source in derived or source in constant for source in read_values(user))
            made = (made or passes(user, sources)) and not any(
                derived[source] and mutates(user, source) for source in sources
            )
            apart = stands_for_itself(user) or stands(user, sources)
            if user.users and not apart and user.op != "output" and (made or selects(user, derived)):
                derived[user] = any(derived[source] for source in sources) and may_alias(user)
                waiting.append(user)
            else:
                met[user] = None
    for node in met:
        reads = tuple(source for source in node.all_input_nodes if source in derived)
        yield Meeting(node, reads, tuple(source for source in reads if derived[source]))


def may_alias(node: fx.Node) -> bool:
    """Whether a node's value may share memory with an argument; unknown where the op has no schema."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(each.alias_info is not None for each in schema.returns)


def looks_up(node: fx.Node, constant: Container[fx.Node]) -> bool:
    """Whether a node takes rows out of its first argument by an index that inputs choose."""
    rest: list[fx.Node] = []
    fx.node.map_arg((node.args[1:], node.kwargs), rest.append)
    known = node.op in ("call_function", "call_method") and node.target in _SELECTIONS
    return known and any(each not in constant for each in rest)


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
    return node.target in _SHAPE_ONLY or (
        node.target is getattr and any(each in _SHAPE_ATTRIBUTES for each in node.args[1:2])
    )


def mutates(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node writes into this argument, itself or in a region that it runs."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return any(mutates(user, inner) for inner in inside(node, source) for user in inner.users)
    if node.target in (F.embedding, F.embedding_bag):
        renorm = node.args[3] if len(node.args) > 3 else node.kwargs.get("max_norm")
        return renorm is not None and source in (*node.args[1:2], node.kwargs.get("weight"))
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        name = str(node.target)
        writes = name in _INTO or (name.endswith("_") and not name.endswith("__"))
        return node.op == "call_method" and writes and node.args[:1] == (source,)
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
