"""Remove redundant attention masks, and the repetition of key and value heads for grouped-query attention.

In eager mode, transformers omits a mask that is all true, and passes `is_causal=True` instead of a causal mask. Under
torch.export it cannot read the values of a mask, so it passes the mask. Attention with a mask runs in a slower kernel.
This pass removes a mask if it proves that the mask is all true or causal for all sizes of the inputs:

    %ge = ge(%query_index, %key_index)
    %out = scaled_dot_product_attention(%q, %k, %v, %ge)

becomes

    %out = scaled_dot_product_attention(%q, %k, %v, None, 0.0, True)

A sliding-window mask is not removed.

With a mask, transformers also repeats each head of keys and values for all query heads that read it. Without a mask,
this pass removes the repetition and passes `enable_gqa=True`:

    %k = reshape(expand(unsqueeze(%few_k, 2), ...), ...)
    %out = scaled_dot_product_attention(%q, %k, %v, %ge)

becomes

    %out = scaled_dot_product_attention(%q, %few_k, %few_v, None, 0.0, True, enable_gqa=True)

The proof is an abstract interpretation of the nodes that compute the mask from sizes. The value of an integer tensor
is an affine function of its index, `start + sum(slope * index)`. A bool tensor is a conjunction: it is true at an index
if none of several affine functions is negative there. `_RULES` has a rule per op. A mask that depends on an op without
a rule is kept.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from lorasc_fx.graph import GraphEditor
from lorasc_fx.graph.flow import may_alias, mutates, reached
from lorasc_fx.util.checks import is_number

from .base import CascadePass

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_METADATA = torch.ops.aten._assert_tensor_metadata.default
_SLICE = torch.ops.aten.slice.Tensor
_REPETITION = (torch.ops.aten.reshape.default, torch.ops.aten.expand.default, torch.ops.aten.unsqueeze.default)
_NUMBERS = (bool, int, float, torch.SymBool, torch.SymInt, torch.SymFloat)
_MAX_HEAD_SIZE = 256
"""Largest size of a head for which transformers passes fewer heads of keys than of queries to attention."""


@dataclass(frozen=True)
class AttentionMasks(CascadePass):
    """Remove attention masks that are all true or causal at any size, repeated heads, and the nodes that become dead.

    Needs the fake tensors in the metadata of torch.export. A graph without them is not changed.
    """

    name: ClassVar[str] = "attention-masks"

    def rewrite(self, graph: GraphEditor) -> None:
        """Simplify each attention call whose mask is proved to be redundant."""
        calls = [node for node in graph.nodes if node.target is _ATTENTION and _replaceable(node)]
        if not calls:
            return
        # A mask may be shared by several calls, and be redundant in some of them.
        proved = infer_values(graph.nodes)
        unneeded: set[fx.Node] = set()
        for mask in dict.fromkeys(_argument(call, "attn_mask") for call in calls):
            if mask not in proved or _written(_sources(mask, proved)):
                continue
            for call in calls:
                if _argument(call, "attn_mask") is mask and (replacement := _equivalent(proved[mask], call)):
                    _remove_mask(graph, call, replacement)
                    unneeded |= _remove_repetition(graph, call)
        _erase_dead(graph, unneeded.union(proved))


def _arguments(call: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call of an ATen op by name. A missing one has its default, or None."""
    return {
        argument.name: call.args[index]
        if index < len(call.args)
        else call.kwargs.get(argument.name, argument.default_value if argument.has_default_value() else None)
        for index, argument in enumerate(call.target._schema.arguments)  # type: ignore[union-attr]
    }


def _argument(call: fx.Node, name: str) -> Any:
    """Return an argument of a call of an ATen op by name."""
    return _arguments(call)[name]


def _shape(node: fx.Node) -> Sequence[Any]:
    """Return the shape of a node's tensor, of ints and SymInts. () for another value."""
    value = node.meta.get("val")
    return value.shape if isinstance(value, torch.Tensor) else ()


def _replaceable(call: fx.Node) -> bool:
    """Whether an attention call has a mask, and its output would have the same shape without it."""
    query = _shape(_argument(call, "query"))
    return (
        isinstance(_argument(call, "attn_mask"), fx.Node)
        and _argument(call, "is_causal") is False
        and len(query) > 1
        and _same_sizes(query[:-2], _shape(call)[:-2])
    )


def _same_sizes(sizes_a: Sequence[Any], sizes_b: Sequence[Any]) -> bool:
    """Whether sizes are the same ints or the same symbolic expressions. `==` of two SymInts would add a guard."""

    def expression(size: Any) -> Any:
        return size if isinstance(size, int) else size.node.expr

    return list(map(expression, sizes_a)) == list(map(expression, sizes_b))


def _equivalent(mask: Value, call: fx.Node) -> Literal["none", "causal"] | None:
    """Return what is equivalent to the mask, no mask or `is_causal=True`. None if the mask is needed."""
    if mask in _NO_MASK:
        return "none"
    # `is_causal` aligns the triangle at the top left, so queries, keys and mask must have equal sizes.
    rows = _shape(_argument(call, "query"))[-2:-1]
    mask_shape, keys = _shape(_argument(call, "attn_mask")), _shape(_argument(call, "key"))
    square = all(_same_sizes(sizes, rows) for sizes in (mask_shape[-2:-1], mask_shape[-1:], keys[-2:-1]))
    return "causal" if mask == _CAUSAL and square else None


def _remove_mask(graph: GraphEditor, call: fx.Node, replacement: Literal["none", "causal"]) -> None:
    """Remove the mask of an attention call, and set `is_causal` if the mask was causal."""
    dropout = _argument(call, "dropout_p")
    options = (None, dropout, True) if replacement == "causal" else (None, dropout) if dropout != 0.0 else ()
    replaced = {"attn_mask", "dropout_p", "is_causal"}
    kwargs = {name: value for name, value in call.kwargs.items() if name not in replaced}
    graph.set_arguments(call, (*call.args[:3], *options), kwargs)


def _remove_repetition(graph: GraphEditor, call: fx.Node) -> set[fx.Node]:
    """Make an attention call read keys and values before their heads are repeated. Return the nodes that repeat them.

    The conditions are the ones of `use_gqa_in_sdpa` in transformers: no mask, and heads of equal size up to 256.
    """
    query, key, value = call.args[:3]
    assert isinstance(query, fx.Node)
    chains = [_repetition(heads) for heads in (key, value)]
    keys, values = (chain[-1] if chain else None for chain in chains)
    if keys is None or values is None or not _same_sizes(_shape(keys)[:2], _shape(values)[:2]):
        return set()
    # With enable_gqa, keys and values need one head size, and the batch size of the queries.
    size = _shape(keys)[-1]
    small = isinstance(size, int) and size <= _MAX_HEAD_SIZE and _same_sizes(_shape(values)[-1:], [size])
    if not small or not _same_sizes(_shape(query)[:1], _shape(keys)[:1]) or _written([keys, values]):
        return set()
    graph.set_arguments(call, (query, keys, values, *call.args[3:]), {**call.kwargs, "enable_gqa": True})
    return {node for chain in chains for node in chain[:-1]}


def _repetition(node: Any) -> list[fx.Node]:
    """Match `reshape(expand(unsqueeze(heads)))`, which repeats each head of `heads` [batch, heads, length, size].

    Returns the matched nodes, from the reshape to `heads`, or an empty list. Slices of all entries may be in between.
    """
    chain: list[fx.Node] = []
    for target in (*_REPETITION, None):
        while isinstance(node, fx.Node) and _is_full_slice(node):
            chain.append(node)
            node = node.args[0]
        if not isinstance(node, fx.Node) or (target is not None and node.target is not target):
            return []
        chain.append(node)
        node = node.args[0] if target is not None else None
    reshape, expand, unsqueeze = (next(node for node in chain if node.target is target) for target in _REPETITION)
    shape, expanded = _shape(chain[-1]), _shape(expand)
    if len(shape) != 4 or unsqueeze.args[1] not in (2, -3):
        return []
    batch, heads, repeats = shape[0], shape[1], expanded[2]
    is_repetition = _same_sizes(expanded, (batch, heads, repeats, *shape[2:]))
    is_repetition = is_repetition and _same_sizes(_shape(reshape), (batch, heads * repeats, *shape[2:]))
    return chain if is_repetition else []


def _is_full_slice(node: fx.Node) -> bool:
    """Whether a node is a slice of all entries, `x[:]`."""
    return node.target is _SLICE and node.args[2:] == (0, sys.maxsize) and not node.kwargs


def _sources(mask: fx.Node, proved: Mapping[fx.Node, Value]) -> set[fx.Node]:
    """Return a mask and the nodes from which its value was inferred."""
    return reached([mask], lambda node: [source for source in node.all_input_nodes if source in proved])


def _written(nodes: Iterable[fx.Node]) -> bool:
    """Whether anything may write in place into one of these nodes, or into a tensor that shares their memory."""
    owners = reached(
        nodes, lambda node: [source for source in node.all_input_nodes if _shares(node) and not _is_number(source)]
    )
    if any(node.op != "call_function" for node in owners):
        return True  # inputs and buffers may have aliases outside the graph
    views = reached(owners, lambda node: [user for user in node.users if _shares(user)])
    return any(mutates(user, node) for node in views for user in node.users)


def _is_number(node: fx.Node) -> bool:
    """Whether a node computes a number, such as a size."""
    return isinstance(node.meta.get("val"), _NUMBERS)


def _shares(node: fx.Node) -> bool:
    """Whether a node's output may share memory with its arguments."""
    return node.op != "output" and may_alias(node)


def _erase_dead(graph: GraphEditor, candidates: set[fx.Node]) -> None:
    """Erase candidates and sizes that are dead: only dead nodes and assertions about metadata read them."""
    # In reverse order, so that all users of a node are visited before it.
    dead: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        number = node.op == "call_function" and _is_number(node)
        if (node in candidates or number) and all(user in dead or user.target is _METADATA for user in node.users):
            dead |= {node, *node.users}
    graph.drop_unused(dead.__contains__)


# ---- abstract values: affine functions of an index, and conditions on them


@dataclass(frozen=True)
class Affine:
    """An integer as an affine function of an index, `start + sum(slope * index)`.

    Args:
        slopes: pairs (axis, slope). Axes are negative, -1 is the last one. Slopes are not zero.
        start: the value at index 0.
    """

    slopes: tuple[tuple[int, int], ...] = ()
    start: int = 0

    @staticmethod
    def of(slopes: Mapping[int, int], start: int) -> Affine:
        """Return the function with these slopes by axis. Zero slopes are dropped."""
        return Affine(tuple(sorted((axis, slope) for axis, slope in slopes.items() if slope)), start)

    def plus(self, term: Affine, factor: int = 1) -> Affine:
        """Return `self + factor * term`."""
        slopes = dict(self.slopes)
        for axis, slope in term.slopes:
            slopes[axis] = slopes.get(axis, 0) + factor * slope
        return Affine.of(slopes, self.start + factor * term.start)

    def moved(self, axis_of: Callable[[int], int]) -> Affine:
        """Return the function with each axis renamed."""
        return Affine.of({axis_of(axis): slope for axis, slope in self.slopes}, self.start)

    def first(self, axis: int) -> Affine:
        """Return the function at index 0 of an axis."""
        return Affine(tuple((kept, slope) for kept, slope in self.slopes if kept != axis), self.start)

    @property
    def reduced(self) -> Affine:
        """The function with the smallest slopes that is negative at the same indices. Equal conditions become equal."""
        common = math.gcd(*(slope for _, slope in self.slopes)) or 1
        return Affine(tuple((axis, slope // common) for axis, slope in self.slopes), self.start // common)

    @property
    def never_negative(self) -> bool:
        """Whether it is zero or more at every index."""
        return self.start >= 0 and all(slope > 0 for _, slope in self.slopes)

    @property
    def always_negative(self) -> bool:
        """Whether it is below zero at every index."""
        return self.start < 0 and all(slope < 0 for _, slope in self.slopes)


@dataclass(frozen=True)
class Truth:
    """A bool as a function of an index: true if none of the conditions is negative there."""

    conditions: frozenset[Affine] = frozenset()

    @staticmethod
    def of(conditions: Iterable[Affine]) -> Truth:
        """Return the conjunction of conditions, without the ones that always hold."""
        unproved = frozenset(number.reduced for number in conditions if not number.never_negative)
        return NEVER if any(number.always_negative for number in unproved) else Truth(unproved)

    def over(self, change: Callable[[Affine], Affine]) -> Truth:
        """Return the conjunction of the changed conditions."""
        return Truth.of(map(change, self.conditions))


NEVER = Truth(frozenset({Affine((), -1)}))
ALWAYS = Truth()
Value = Affine | Truth
_NO_MASK = (ALWAYS, Affine())
"""Masks without an effect: a bool mask of true, or a float mask of zeros that is added."""
_CAUSAL = Truth(frozenset({Affine.of({-2: 1, -1: -1}, 0)}))
"""The causal mask: row - column is not negative."""


# ---- inference of values

_EXACT = 256
"""Integers up to this one are exact in every floating dtype."""
_LARGE = 2**20
"""Largest slope or start. With it, sums over indices do not overflow."""


def infer_values(nodes: Iterable[fx.Node]) -> dict[fx.Node, Value]:
    """Return the abstract values that hold for all sizes of the inputs, provided that nothing writes in place.

    Args:
        nodes: nodes in the order of the graph, with all their arguments.
    """
    proved: dict[fx.Node, Value] = {}
    for node in nodes:
        value = _value(node, proved)
        if value is not None:
            proved[node] = value
    return proved


def _value(node: fx.Node, proved: Mapping[fx.Node, Value]) -> Value | None:
    """Return the abstract value of a node from the values of its arguments, or None if it is unknown."""
    result = node.meta.get("val")
    op = node.target
    if not isinstance(op, torch._ops.OpOverload) or op.namespace != "aten" or not isinstance(result, torch.Tensor):
        return None
    rule = _RULES.get(op.overloadpacket.__name__)
    if rule is None or op._schema.is_mutable:
        return None
    value = rule(_Call(_arguments(node), result, proved))
    for axis in range(-result.dim(), 0):
        if value is not None and isinstance(size := result.shape[axis], int) and size == 1:
            # An axis of size 1 has only index 0. Without its slope, a later broadcast is correct.
            value = _changed(value, partial(Affine.first, axis=axis))
    return value if value is not None and _holds(value, result.dtype) else None


def _holds(value: Value, dtype: torch.dtype) -> bool:
    """Whether a dtype represents all values exactly."""
    if isinstance(value, Truth):
        return dtype is torch.bool
    if dtype.is_floating_point:
        return not value.slopes and abs(value.start) <= _EXACT
    return dtype is torch.int64 and max(map(abs, (value.start, *dict(value.slopes).values()))) <= _LARGE


def _changed(value: Value, change: Callable[[Affine], Affine]) -> Value:
    """Apply a change to an affine function, or to each condition of a bool."""
    return value.over(change) if isinstance(value, Truth) else change(value)


@dataclass(frozen=True)
class _Call:
    """One call of an op, as the rules see it.

    Args:
        arguments: arguments by name.
        result: the fake tensor that the call returns.
        proved: the inferred values of earlier nodes.
    """

    arguments: Mapping[str, Any]
    result: torch.Tensor
    proved: Mapping[fx.Node, Value]

    def of(self, name: str) -> Value | None:
        """Return the abstract value of an argument, or None if it is unknown."""
        argument = self.arguments.get(name)
        if isinstance(argument, fx.Node):
            return self.proved.get(argument)
        if not is_number(argument) or not abs(argument) <= _LARGE:
            return None
        return Affine((), int(argument)) if argument == int(argument) else None

    def number(self, name: str) -> Affine | None:
        """Return the affine function of an argument, or None if the argument is a bool or unknown."""
        value = self.of(name)
        return value if isinstance(value, Affine) else None

    def literal(self, name: str) -> int | None:
        """Return an argument that is a Python int, or None."""
        argument = self.arguments.get(name)
        return argument if type(argument) is int else None

    def axis(self, name: str = "dim") -> int:
        """Return an axis of the result from an argument, as a negative number."""
        axis = int(self.arguments[name])
        return axis if axis < 0 else axis - self.result.dim()


Rule = Callable[[_Call], Value | None]
Move = Callable[[Affine], Affine]


def _moved(rule: Callable[[_Call, Value], Move | None]) -> Rule:
    """Return a rule that applies a change to each affine function of the argument `self`.

    Args:
        rule: returns the change for a call and the value of `self`, or None if the result is unknown.
    """

    def moved(call: _Call) -> Value | None:
        value = call.of("self")
        move = rule(call, value) if value is not None else None
        return _changed(value, move) if value is not None and move is not None else None

    return moved


def _of_two(rule: Callable[[_Call, Affine, Affine], Value | None]) -> Rule:
    """Return a rule from a function of the two affine functions `self` and `other`."""

    def of_two(call: _Call) -> Value | None:
        lhs, rhs = call.number("self"), call.number("other")
        return rule(call, lhs, rhs) if lhs is not None and rhs is not None else None

    return of_two


def _arange(call: _Call) -> Value | None:
    """`start + step * index`, if both are Python ints."""
    start, step = call.arguments.get("start", 0), call.arguments.get("step", 1)
    return Affine.of({-1: step}, start) if type(start) is int and type(step) is int else None


def _filled(fill: float | None) -> Rule:
    """Return a rule for a constant tensor of `fill`. None reads the argument `fill_value`."""

    def rule(call: _Call) -> Value | None:
        value = call.arguments.get("fill_value") if fill is None else fill
        if call.result.dtype is torch.bool and isinstance(value, (bool, int, float)):
            return ALWAYS if value else NEVER
        return _Call({"fill": value}, call.result, call.proved).of("fill")

    return rule


def _same(call: _Call) -> Value | None:
    """Keep the value, also if an axis of size 1 is expanded."""
    return call.of("self")


def _cast(call: _Call) -> Value | None:
    """Keep the value, or convert a constant between bool and numbers."""
    value = call.of("self")
    if isinstance(value, Truth) and call.result.dtype is not torch.bool:
        return Affine((), int(value == ALWAYS)) if value in (ALWAYS, NEVER) else None
    if isinstance(value, Affine) and call.result.dtype is torch.bool:
        return None if value.slopes else ALWAYS if value.start else NEVER
    return value


def _uniform(call: _Call) -> Value | None:
    """Keep the value if all elements are equal, because the op reorders them."""
    value = call.of("self")
    uniform = value in (ALWAYS, NEVER) or (isinstance(value, Affine) and not value.slopes)
    return value if uniform else None


def _unsqueeze(call: _Call, value: Value) -> Move:
    """Renumber the axes before the new one. Axes are counted from the last one."""
    axis = call.axis()
    return lambda number: number.moved(lambda old: old - 1 if old <= axis else old)


def _transpose(call: _Call, value: Value) -> Move:
    """Swap two axes."""
    dim0, dim1 = call.axis("dim0"), call.axis("dim1")
    return lambda number: number.moved(lambda old: {dim0: dim1, dim1: dim0}.get(old, old))


def _slice(call: _Call, value: Value) -> Move | None:
    """Replace the index of an axis by `start + step * index`, if both are constant and start is not negative."""
    axis, step = call.axis(), call.literal("step")
    start = call.literal("start") if call.arguments.get("start") is not None else 0
    if start is None or start < 0 or step is None:
        return None

    def part(number: Affine) -> Affine:
        slope = dict(number.slopes).get(axis, 0)
        return number.plus(Affine.of({axis: slope * (step - 1)}, slope * start))

    return part


def _repeat(call: _Call, value: Value) -> Move | None:
    """Keep the value if it does not depend on the repeated axes."""
    numbers = value.conditions if isinstance(value, Truth) else {value}
    repeats = call.arguments["repeats"]
    axes = {axis for number in numbers for axis, _ in number.slopes}
    return (lambda number: number) if all(repeats[axis] == 1 for axis in axes) else None


def _index(call: _Call, value: Value) -> Move | None:
    """Replace the index of each axis by the affine function of the index tensor for this axis.

    All axes must be indexed, and no index may be negative, because it would count from the end.
    """
    indices = call.arguments["indices"]
    proved = [call.proved.get(index) if isinstance(index, fx.Node) else None for index in indices]
    rows = [index for index in proved if isinstance(index, Affine) and index.never_negative]
    if len(rows) != call.arguments["self"].meta["val"].dim() or len(rows) != len(proved):
        return None

    def picked(number: Affine) -> Affine:
        total = Affine((), number.start)
        for axis, slope in number.slopes:
            total = total.plus(rows[axis], slope)
        return total

    return picked


def _sum(call: _Call, lhs: Affine, rhs: Affine, sign: int) -> Value | None:
    """`lhs + sign * alpha * rhs`."""
    alpha = call.literal("alpha")
    return None if alpha is None else lhs.plus(rhs, sign * alpha)


def _mul(call: _Call, lhs: Affine, rhs: Affine) -> Value | None:
    """The product, if one factor is constant."""
    if lhs.slopes and rhs.slopes:
        return None  # not affine
    return Affine().plus(lhs, rhs.start) if not rhs.slopes else Affine().plus(rhs, lhs.start)


def _compare(conditions: Callable[[Affine], Truth | None]) -> Rule:
    """Return a rule from the conditions on the difference `self - other`."""
    return _of_two(lambda call, lhs, rhs: conditions(lhs.plus(rhs, -1)))


def _negated(number: Affine) -> Affine:
    """Return the condition that holds if and only if the function is negative: `-1 - number`."""
    return Affine((), -1).plus(number, -1)


def _equal(gap: Affine) -> Truth:
    """Whether a difference is zero: neither it nor its negative is below zero."""
    return Truth.of((gap, Affine().plus(gap, -1)))


def _not(truth: Value | None) -> Truth | None:
    """The negation, if there is at most one condition. The negation of several is not a conjunction."""
    if truth in (ALWAYS, NEVER):
        return NEVER if truth == ALWAYS else ALWAYS
    single = isinstance(truth, Truth) and len(truth.conditions) == 1
    return Truth.of(map(_negated, truth.conditions)) if single and isinstance(truth, Truth) else None


def _and(call: _Call) -> Value | None:
    """The conjunction of two bools."""
    lhs, rhs = call.of("self"), call.of("other")
    if not isinstance(lhs, Truth) or not isinstance(rhs, Truth):
        return None
    return Truth.of(lhs.conditions | rhs.conditions)


def _triangle(sign: int) -> Rule:
    """Return the rule of `tril` (sign 1) or `triu` (sign -1): true where `sign * (row - column + diagonal) >= 0`."""

    def rule(call: _Call) -> Value | None:
        value, diagonal = call.of("self"), call.literal("diagonal")
        if not isinstance(value, Truth) or diagonal is None:
            return None
        return Truth.of({*value.conditions, Affine.of({-2: sign, -1: -sign}, sign * diagonal)})

    return rule


def _diff(call: _Call) -> Value | None:
    """The slope along an axis. A prepended slice must continue the affine function."""
    value, axis = call.number("self"), call.axis()
    if value is None or call.arguments["n"] != 1 or call.arguments["append"] is not None:
        return None
    slope = Affine((), dict(value.slopes).get(axis, 0))
    if call.arguments["prepend"] is not None:
        size, before = call.arguments["prepend"].meta["val"].shape[axis], call.number("prepend")
        if before is None or not isinstance(size, int) or size != 1 or value.first(axis).plus(before, -1) != slope:
            return None
    return slope


def _where(condition: str, yes: str, no: str) -> Rule:
    """Return a rule that selects one of two arguments by a constant condition. The names are names of arguments."""

    def rule(call: _Call) -> Value | None:
        truth = call.of(condition)
        return call.of(yes if truth == ALWAYS else no) if truth in (ALWAYS, NEVER) else None

    return rule


_RULES: dict[str, Rule] = {
    "arange": _arange,
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _filled(1)),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), _filled(0)),
    **dict.fromkeys(("full", "full_like", "new_full"), _filled(None)),
    **dict.fromkeys(("expand", "contiguous", "clone", "alias", "detach"), _same),
    **dict.fromkeys(("to", "_to_copy"), _cast),
    **dict.fromkeys(("view", "reshape", "flatten"), _uniform),
    "unsqueeze": _moved(_unsqueeze),
    "transpose": _moved(_transpose),
    "slice": _moved(_slice),
    "repeat": _moved(_repeat),
    "index": _moved(_index),
    "add": _of_two(partial(_sum, sign=1)),
    "sub": _of_two(partial(_sum, sign=-1)),
    "mul": _of_two(_mul),
    "ge": _compare(lambda gap: Truth.of((gap,))),
    "lt": _compare(lambda gap: Truth.of((_negated(gap),))),
    "le": _compare(lambda gap: Truth.of((Affine().plus(gap, -1),))),
    "gt": _compare(lambda gap: Truth.of((gap.plus(Affine((), -1)),))),
    "eq": _compare(_equal),
    "ne": _compare(lambda gap: _not(_equal(gap))),
    **dict.fromkeys(("__and__", "bitwise_and", "logical_and"), _and),
    **dict.fromkeys(("logical_not", "bitwise_not"), lambda call: _not(call.of("self"))),
    "tril": _triangle(1),
    "triu": _triangle(-1),
    "diff": _diff,
    "cumsum": lambda call: Affine() if call.of("self") in (NEVER, Affine()) else None,
    "where": _where("condition", "self", "other"),
    "masked_fill": _where("mask", "value", "self"),
}
"""The rule of each op by name. A rule returns the abstract value of a call, or None if it is unknown."""
