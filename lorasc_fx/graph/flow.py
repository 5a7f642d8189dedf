"""Data flow analysis: follow a weight to the nodes that use it, and find nodes that may share memory.

A weight may be transposed, sliced, cast, normalized or standardized before it is used. A node is `constant` if it
depends on weights, buffers and literals only. A consumer of a weight is a node that combines a value derived from the
weight with a value that depends on inputs.

A value derived from the weight may be used in several ways. `uses_of` takes the first of four rules that gives a site:

1. The value is multiplied by an input, or rows of it are looked up. A value that is the weight of an op with a form
   also counts if the input of the op is constant.
2. The value is multiplied by a constant in an op without a form.
3. The value is scaled by an input, and the product is the weight of a linear or a convolution (modulated convolution).
4. An input selects rows of the value.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx
from torch.utils import _pytree as pytree

from lorasc_fx.graph.branch_calls import call_template, replaced_call
from lorasc_fx.graph.forms import LIKE_ANOTHER, SCALES, FunctionForm, contraction, form_of, has_weight_argument, name_of
from lorasc_fx.graph.weights import module_at
from lorasc_fx.util.torch_private import HigherOrderOperator


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Return the shape of a node's tensor in the captured call, or None if the metadata does not contain it."""
    for name in ("val", "example_value", "tensor_meta"):
        value = node.meta.get(name)
        shape = getattr(value, "shape", None)
        if isinstance(shape, (tuple, list, torch.Size)):
            sizes = [_number(size) for size in shape]
            return None if None in sizes else tuple(size for size in sizes if size is not None)
    return None


def _number(size: int | torch.SymInt) -> int | None:
    """Return the size of an axis in the captured call, or None for an unbacked symbol or a ragged axis."""
    hint = size if isinstance(size, int) else getattr(size.node, "hint", None)
    return hint if isinstance(hint, int) else None


# Names of attributes, functions and methods that read only the shape, dtype or device of a tensor.
_SHAPE_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad"}
_SHAPE_FUNCTIONS = {"sym_size", "_assert_tensor_metadata"}
_SHAPE_METHODS = {"size", "dim", "numel", "is_floating_point", "stride"}
# Names of ops that select a part of their first argument by an index.
_SELECTIONS = {"index", "index_select", "select", "gather", "getitem"}
_LOOKUPS = {torch.ops.aten.embedding.default, torch.embedding, F.embedding}
"""Lookup ops. They count as a use of their table even if the indices are constant."""
# Names of ops that create a constant tensor.
_FACTORIES = {"eye", "ones", "zeros", "full", "arange", "linspace", "tensor", "scalar_tensor", "tril_indices"}
_INPLACE_OPERATORS = {"iadd", "isub", "imul", "itruediv", "imatmul", "setitem"}
_INPLACE_METHODS = {f"__{name}__" for name in _INPLACE_OPERATORS}


@dataclass(frozen=True)
class Consumer:
    """A node that uses a weight. `reads` are its arguments derived from the weight. `aliases` may share its memory."""

    node: fx.Node
    reads: tuple[fx.Node, ...]
    aliases: tuple[fx.Node, ...] = ()


def constants(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that do not depend on values of inputs: get_attr nodes, sizes, and calls that read only these.

    A tensor that is computed from sizes alone, such as zeros of the batch size, is not constant.
    """
    constant: set[fx.Node] = set()
    sizes: set[fx.Node] = set()  # ints and SymInts, a subset of `constant`
    for node in graph.nodes:
        read = read_values(node)
        computed = node.op in ("call_function", "call_method") and read and not is_impure(node)
        is_new = node.op == "call_function" and not node.all_input_nodes and name_of(node) in _FACTORIES
        module, name = getattr(node.target, "__module__", ""), name_of(node)
        on_numbers = module in ("_operator", "builtins", "math") or name.startswith("sym_")
        if reads_shape_only(node) or (computed and sizes.issuperset(read) and on_numbers):
            sizes.add(node)
            constant.add(node)
        elif node.op == "get_attr" or is_new or (computed and constant.issuperset(read) and not sizes.issuperset(read)):
            constant.add(node)
    return constant


def read_values(node: fx.Node) -> list[fx.Node]:
    """Return the arguments whose values a node reads. For example, `x.type_as(y)` reads only x."""
    if name_of(node) not in LIKE_ANOTHER:
        return node.all_input_nodes
    return [source for source in node.all_input_nodes if source is node.args[0]]


def reached(nodes: Iterable[fx.Node], neighbours: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """Return `nodes` and all nodes that can be reached from them by steps to `neighbours`."""
    reached, waiting = set[fx.Node](), list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in reached:
            reached.add(node)
            waiting += neighbours(node)
    return reached


NodeTest = Callable[[fx.Node, Collection[fx.Node]], bool]
"""A condition on a node. The second argument has those arguments of the node that are derived from the weight."""


def consumers(
    weight: fx.Node,
    constant: set[fx.Node],
    is_use: NodeTest = lambda node, reads: False,
    is_passed: NodeTest = lambda node, reads: False,
) -> Iterator[Consumer]:
    """Yield each node that combines a value derived from a weight with an input, once.

    Args:
        weight: the get_attr node of the weight.
        constant: the nodes that do not depend on inputs.
        is_use: whether a node counts as a consumer even if it depends on no input.
        is_passed: whether a node counts as derived from the weight even if it depends on an input.
    """
    derived = {weight: True}  # nodes computed from the weight, and whether they may share its memory
    consuming = dict[fx.Node, None]()  # consumers, in the order of discovery
    waiting = [weight]
    while waiting:
        for user in waiting.pop().users:
            if reads_shape_only(user) or user in derived:
                continue
            # A user is derived too if it depends only on the weight and on constants.
            sources = [source for source in read_values(user) if source in derived]
            follows = all(source in derived or source in constant for source in read_values(user))
            follows = (follows or is_passed(user, sources)) and not any(
                derived[source] and mutates(user, source) for source in sources
            )
            # A lookup, a merged branch or an op of `is_use` is a consumer even if its input is constant.
            consumes = user.target in _LOOKUPS or call_template(user) is not None or is_use(user, sources)
            if user.users and not consumes and user.op != "output" and (follows or selects(user, derived)):
                derived[user] = any(derived[source] for source in sources) and may_alias(user)
                waiting.append(user)
            else:
                consuming[user] = None
    for node in consuming:
        reads = tuple(source for source in node.all_input_nodes if source in derived)
        yield Consumer(node, reads, tuple(source for source in reads if derived[source]))


def may_alias(node: fx.Node) -> bool:
    """Whether a node's output may share memory with an argument. True for an op without a schema."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(result.alias_info is not None for result in schema.returns)


def looks_up(node: fx.Node, constant: Container[fx.Node]) -> bool:
    """Whether a node selects rows of its first argument by an index that depends on inputs."""
    return any(index not in constant for index in _indices(node))


def selects(node: fx.Node, derived: Container[fx.Node]) -> bool:
    """Whether a node selects a part of a derived value by an index, as a router selects a matrix of a stack."""
    return _is_selection(node) and node.args[0] in derived and not any(index in derived for index in _indices(node))


def _is_selection(node: fx.Node) -> bool:
    """Whether a node selects a part of its first argument by an index."""
    return node.op in ("call_function", "call_method") and name_of(node) in _SELECTIONS


def _indices(node: fx.Node) -> list[fx.Node]:
    """Return the index nodes of a selection; an empty list for another node."""
    indices: list[fx.Node] = []
    if _is_selection(node):
        fx.node.map_arg((node.args[1:], node.kwargs), indices.append)
    return indices


def reads_shape_only(node: fx.Node) -> bool:
    """Whether a node reads only shape, dtype or device of its argument."""
    if node.op == "call_method":
        return node.target in _SHAPE_METHODS
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return any(name in _SHAPE_ATTRIBUTES for name in node.args[1:2])
    return name_of(node) in _SHAPE_FUNCTIONS


def mutates(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node writes into its argument `source`, directly or in the body of a higher-order op."""
    if isinstance(node.target, HigherOrderOperator):
        return any(mutates(user, inner) for inner in inside(node, source) for user in inner.users)
    if node.target in (F.embedding, F.embedding_bag):
        renorm = node.args[3] if len(node.args) > 3 else node.kwargs.get("max_norm")
        return renorm is not None and source in (*node.args[1:2], node.kwargs.get("weight"))
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        name = str(node.target)
        writes = name in _INPLACE_METHODS or (name.endswith("_") and not name.endswith("__"))
        return node.op == "call_method" and writes and node.args[:1] == (source,)
    for position, argument in enumerate(schema.arguments):
        value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        if value is source and argument.alias_info is not None and argument.alias_info.is_write:
            return True
    return False


def inside(node: fx.Node, source: fx.Node) -> Iterator[fx.Node]:
    """Yield the placeholders to which a higher-order op passes `source`, in the graphs that the op runs."""
    if not isinstance(node.target, HigherOrderOperator):
        return
    owner, operands = node.graph.owning_module, pytree.tree_leaves(node.args)
    if owner is None:
        return
    named = [region for region in operands if isinstance(region, fx.Node) and region.op == "get_attr"]
    bodies = {
        region: body for region in named if isinstance(body := module_at(owner, str(region.target)), fx.GraphModule)
    }
    for body in bodies.values():
        inputs = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
        passed = [outer for outer in operands if outer not in bodies][-len(inputs) :]
        yield from (inner for inner, outer in zip(inputs, passed, strict=False) if outer is source)


def is_impure(node: fx.Node) -> bool:
    """Whether a node writes in place or draws random numbers."""
    tags = getattr(node.target, "tags", ())
    return node.is_impure() or torch.Tag.nondeterministic_seeded in tags


def uses_of(weight: fx.Node, constant: set[fx.Node]) -> list[Consumer]:
    """Return the consumers of a weight or of the branch node after it, by the first rule above that gives a site."""
    # Rule 1.
    with_inputs = list(consumers(weight, constant, is_use=_fits))
    if any(kind_of(consumer) for consumer in with_inputs):
        return with_inputs
    # Rule 2.
    with_constants = list(consumers(weight, constant, is_use=lambda node, reads: contraction(node, reads) is not None))
    if any(kind_of(consumer) for consumer in with_constants):
        return with_constants
    # Rule 3.
    scaled = list(consumers(weight, constant, is_passed=lambda node, reads: name_of(node) in SCALES))
    for consumer in scaled:
        args, reads = consumer.node.args, consumer.reads
        is_product = has_weight_argument(name_of(consumer.node)) and len(args) > 1
        if is_product and args[1] in reads and args[0] not in reads:  # it is the weight of the op, not the input
            return scaled
    # Rule 4. If there is no site, the consumers by rule 1 show the reason of the refusal.
    looked_up = list(
        consumers(weight, constant, is_use=lambda node, reads: looks_up(node, constant) and node.args[0] in reads)
    )
    return looked_up if any(kind_of(consumer) for consumer in looked_up) else with_inputs


def kind_of(consumer: Consumer) -> str | None:
    """Return the kind of site that a consumer makes of the weight, or None. Looks into graphs of higher-order ops."""
    replaced = replaced_call(consumer.node)
    if replaced is not None and replaced.form is not None:
        return replaced.form.kind
    kind = contraction(consumer.node, consumer.reads)
    if kind is not None:
        return kind
    if looks_up(consumer.node, ()) and consumer.node.args[0] in consumer.reads:
        return "embedding"
    for inner in (argument for source in consumer.reads for argument in inside(consumer.node, source)):
        inner_consumers = consumers(inner, constants(inner.graph) | {inner})
        kind = next((kind for kind in map(kind_of, inner_consumers) if kind is not None), None)
        if kind is not None:
            return kind
    return None


def _fits(node: fx.Node, reads: Collection[fx.Node]) -> bool:
    """Whether a node has a form and the node's weight is one of `reads`."""
    form = form_of(node, None)
    return isinstance(form, FunctionForm) and any(form.fits(node, source) for source in reads)
