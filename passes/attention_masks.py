"""Remove attention masks that mask nothing, and copies of keys and values for several heads of queries.

The eager code of transformers leaves out a mask that lets everything through, and asks for `is_causal` instead of a
triangle. Under torch.export it does not, because it sees no values then. Attention with a mask uses a slower kernel. So
this pass removes a mask if it is proved to mask nothing more, whatever the sizes of the inputs:

    %ge = ge(%query_index, %key_index)
    %out = scaled_dot_product_attention(%q, %k, %v, %ge)

becomes

    %out = scaled_dot_product_attention(%q, %k, %v, None, 0.0, True)

A mask with a sliding window stays. The proof follows tensors that are made from sizes through their ops. An element of
such a tensor is a number `start + sum(slope * index)`, or a truth: none of several such numbers is negative. A mask
without a condition lets everything through. An op that is not in the table ends the proof, and the mask stays.

With a mask, transformers also copies each head of keys and values for all heads of queries that read it. Without one,
attention reads the few heads directly.
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
from lorasc_fx.graph.flow import may_alias, mutates
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
    """Remove attention masks that mask nothing at any size, copies of heads for such attention, and their dead nodes.

    It needs the metadata that torch.export leaves on nodes. A graph without them is not changed.
    """

    name: ClassVar[str] = "attention-masks"

    def rewrite(self, graph: GraphEditor) -> None:
        """Simplify each attention whose mask is proved to be redundant."""
        calls = [node for node in graph.nodes if node.target is _ATTENTION and _replaceable(node)]
        if not calls:
            return
        proved = follow(graph.nodes)
        spare: set[fx.Node] = set()
        for mask in dict.fromkeys(_argument(call, "attn_mask") for call in calls):
            if mask not in proved or _written(_sources(mask, proved)):
                continue
            for call in calls:
                if _argument(call, "attn_mask") is mask and (instead := _equivalent(proved[mask], call)):
                    _simplify(graph, call, instead)
                    spare |= _share_heads(graph, call)
        _erase(graph, spare.union(proved))


def _argument(call: fx.Node, name: str) -> Any:
    """Return an argument of a node by its name in the schema."""
    for index, argument in enumerate(call.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == name:
            return call.args[index] if index < len(call.args) else call.kwargs.get(name, argument.default_value)
    raise KeyError(name)


def _shape(node: fx.Node) -> Sequence[Any]:
    """Return the sizes of a node's tensor, numbers or symbols; () for another value."""
    value = node.meta.get("val")
    return value.shape if isinstance(value, torch.Tensor) else ()


def _replaceable(call: fx.Node) -> bool:
    """Whether attention has a mask, and would have an output of the same shape without it."""
    query = _shape(_argument(call, "query"))
    return (
        isinstance(_argument(call, "attn_mask"), fx.Node)
        and _argument(call, "is_causal") is False
        and len(query) > 1
        and _alike(query[:-2], _shape(call)[:-2])
    )


def _alike(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether sizes are the same numbers or the same symbols. Comparing the symbols themselves would add a guard."""

    def plain(size: Any) -> Any:
        return size if isinstance(size, int) else size.node.expr

    return list(map(plain, one)) == list(map(plain, other))


def _equivalent(mask: Value, call: fx.Node) -> Literal["none", "causal"] | None:
    """Return what attention may use instead of a mask, or None if it needs the mask."""
    if mask in _NOTHING:
        return "none"
    rows = _shape(_argument(call, "query"))[-2:-1]
    seen, keys = _shape(_argument(call, "attn_mask")), _shape(_argument(call, "key"))
    square = all(_alike(sizes, rows) for sizes in (seen[-2:-1], seen[-1:], keys[-2:-1]))
    return "causal" if mask == _TRIANGLE and square else None


def _simplify(graph: GraphEditor, call: fx.Node, instead: Literal["none", "causal"]) -> None:
    dropout = _argument(call, "dropout_p")
    options = (None, dropout, True) if instead == "causal" else (None, dropout) if dropout != 0.0 else ()
    replaced = {"attn_mask", "dropout_p", "is_causal"}
    kwargs = {name: value for name, value in call.kwargs.items() if name not in replaced}
    graph.set_arguments(call, (*call.args[:3], *options), kwargs)


def _share_heads(graph: GraphEditor, call: fx.Node) -> set[fx.Node]:
    """Let attention read keys and values before their heads are copied. Return the nodes that copy them.

    The eager code of transformers does so without a mask (`use_gqa_in_sdpa`), for heads of the same sizes.
    """
    query, key, value = call.args[:3]
    assert isinstance(query, fx.Node)
    chains = [_repetition(heads) for heads in (key, value)]
    keys, values = (chain[-1] if chain else None for chain in chains)
    if keys is None or values is None or not _alike(_shape(keys)[:2], _shape(values)[:2]):
        return set()
    size = _shape(keys)[-1]
    narrow = isinstance(size, int) and size <= _MAX_HEAD_SIZE and _alike(_shape(values)[-1:], [size])
    if not narrow or not _alike(_shape(query)[:1], _shape(keys)[:1]) or _written([keys, values]):
        return set()
    graph.set_arguments(call, (query, keys, values, *call.args[3:]), {**call.kwargs, "enable_gqa": True})
    return {node for chain in chains for node in chain[:-1]}


def _repetition(last: Any) -> list[fx.Node]:
    """Return the nodes, last first, that copy each head of a tensor, with the tensor; [] for other nodes."""
    chain: list[fx.Node] = []
    for target in (*_REPETITION, None):
        while isinstance(last, fx.Node) and _is_whole(last):
            chain.append(last)
            last = last.args[0]
        if not isinstance(last, fx.Node) or (target is not None and last.target is not target):
            return []
        chain.append(last)
        last = last.args[0] if target is not None else None
    whole, spread, apart = (next(node for node in chain if node.target is target) for target in _REPETITION)
    few, many = _shape(chain[-1]), _shape(spread)
    if len(few) != 4 or apart.args[1] not in (2, -3):
        return []
    heads, times = few[1], many[2]
    expected = [(few[0], heads, times, *few[2:]), (few[0], heads * times, *few[2:])]
    return chain if _alike(many, expected[0]) and _alike(_shape(whole), expected[1]) else []


def _is_whole(node: fx.Node) -> bool:
    """Whether a node is a slice of all entries."""
    return node.target is _SLICE and node.args[2:] == (0, sys.maxsize) and not node.kwargs


def _sources(mask: fx.Node, proved: Mapping[fx.Node, Value]) -> set[fx.Node]:
    """Return a mask and the nodes that its value was proved from."""
    return _reached([mask], lambda node: [source for source in node.all_input_nodes if source in proved])


def _written(nodes: Iterable[fx.Node]) -> bool:
    """Whether anything may write into one of these nodes, or into a tensor that shares their memory."""
    owners = _reached(nodes, lambda node: node.all_input_nodes if _shares(node) else [])
    if any(node.op != "call_function" for node in owners):
        return True  # an input or a buffer may be written under another name
    views = _reached(owners, lambda node: [user for user in node.users if _shares(user)])
    return any(mutates(user, node) for node in views for user in node.users)


def _reached(nodes: Iterable[fx.Node], near: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """Return these nodes and all reached from them. Numbers share no memory, so they are left out."""
    waiting = list(nodes)
    reached = set(waiting)
    while waiting:
        new = [node for node in near(waiting.pop()) if node not in reached]
        new = [node for node in new if not isinstance(node.meta.get("val"), _NUMBERS)]
        reached.update(new)
        waiting.extend(new)
    return reached


def _shares(node: fx.Node) -> bool:
    """Whether a node's value may share memory with its arguments."""
    return node.op != "output" and may_alias(node)


def _erase(graph: GraphEditor, spare: set[fx.Node]) -> None:
    """Erase nodes among these, and sizes, that only each other and assertions read."""
    dead: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        number = node.op == "call_function" and isinstance(node.meta.get("val"), _NUMBERS)
        if (node in spare or number) and all(user in dead or user.target is _METADATA for user in node.users):
            dead |= {node, *node.users}
    graph.drop_unused(dead.__contains__)


# ---- numbers that are affine in an index, and conditions on them


@dataclass(frozen=True)
class Affine:
    """An integer for each index: `start + sum(slope * index)`.

    Args:
        slopes: pairs of an axis, counted from the last one (-1), and its slope, which is not zero.
        start: the number at index 0.
    """

    slopes: tuple[tuple[int, int], ...] = ()
    start: int = 0

    @staticmethod
    def of(slopes: Mapping[int, int], start: int) -> Affine:
        """Return the number with these slopes by axis."""
        return Affine(tuple(sorted((axis, slope) for axis, slope in slopes.items() if slope)), start)

    def plus(self, other: Affine, factor: int = 1) -> Affine:
        """Return the sum with a multiple of another number."""
        slopes = dict(self.slopes)
        for axis, slope in other.slopes:
            slopes[axis] = slopes.get(axis, 0) + factor * slope
        return Affine.of(slopes, self.start + factor * other.start)

    def moved(self, axis_of: Callable[[int], int]) -> Affine:
        """Return the number with each axis renamed."""
        return Affine.of({axis_of(axis): slope for axis, slope in self.slopes}, self.start)

    def first(self, axis: int) -> Affine:
        """Return the number at the first index of an axis."""
        return Affine(tuple((other, slope) for other, slope in self.slopes if other != axis), self.start)

    @property
    def reduced(self) -> Affine:
        """The number with the smallest slopes that is negative at the same indices."""
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
    """True at an index if none of these numbers is negative there."""

    conditions: frozenset[Affine] = frozenset()

    @staticmethod
    def of(conditions: Iterable[Affine]) -> Truth:
        """Return the truth of these conditions, without those that always hold."""
        unproved = frozenset(number.reduced for number in conditions if not number.never_negative)
        return NEVER if any(number.always_negative for number in unproved) else Truth(unproved)

    def over(self, change: Callable[[Affine], Affine]) -> Truth:
        """Return the truth with each condition changed."""
        return Truth.of(map(change, self.conditions))


NEVER = Truth(frozenset({Affine((), -1)}))
ALWAYS = Truth()
Value = Affine | Truth
_NOTHING = (ALWAYS, Affine())
_TRIANGLE = Truth(frozenset({Affine.of({-2: 1, -1: -1}, 0)}))


# ---- the proof

_EXACT = 256
"""Integers up to this one are exact in every floating dtype."""
_LARGE = 2**20
"""Largest slope or start. Sums over indices do not overflow then."""


def follow(nodes: Iterable[fx.Node]) -> dict[fx.Node, Value]:
    """Return the values that are known at every size, if nothing writes into them.

    Args:
        nodes: in the graph's order, with all their arguments.
    """
    proved: dict[fx.Node, Value] = {}
    for node in nodes:
        value = _value(node, proved)
        if value is not None:
            proved[node] = value
    return proved


def _value(node: fx.Node, proved: Mapping[fx.Node, Value]) -> Value | None:
    result = node.meta.get("val")
    op = node.target
    if not isinstance(op, torch._ops.OpOverload) or op.namespace != "aten" or not isinstance(result, torch.Tensor):
        return None
    rule = _RULES.get(op.overloadpacket.__name__)
    if rule is None or op._schema.is_mutable:
        return None
    arguments = {
        argument.name: node.args[index]
        if index < len(node.args)
        else node.kwargs.get(argument.name, argument.default_value if argument.has_default_value() else None)
        for index, argument in enumerate(op._schema.arguments)
    }
    value = rule(_Call(arguments, result, proved))
    for axis in range(-result.dim(), 0):
        if value is not None and isinstance(size := result.shape[axis], int) and size == 1:
            value = _changed(value, partial(Affine.first, axis=axis))  # later it may be broadcast
    return value if value is not None and _holds(value, result.dtype) else None


def _holds(value: Value, dtype: torch.dtype) -> bool:
    """Whether a dtype holds such values exactly."""
    if isinstance(value, Truth):
        return dtype is torch.bool
    if dtype.is_floating_point:
        return not value.slopes and abs(value.start) <= _EXACT
    return dtype is torch.int64 and max(map(abs, (value.start, *dict(value.slopes).values()))) <= _LARGE


def _changed(value: Value, change: Callable[[Affine], Affine]) -> Value:
    return value.over(change) if isinstance(value, Truth) else change(value)


@dataclass(frozen=True)
class _Call:
    """One call: its arguments by name, the fake tensor that it returns, and the known values."""

    arguments: Mapping[str, Any]
    result: torch.Tensor
    proved: Mapping[fx.Node, Value]

    def of(self, name: str) -> Value | None:
        """Return the value of an argument, if it is known."""
        argument = self.arguments.get(name)
        if isinstance(argument, fx.Node):
            return self.proved.get(argument)
        if not is_number(argument) or not abs(argument) <= _LARGE:
            return None
        return Affine((), int(argument)) if argument == int(argument) else None

    def number(self, name: str) -> Affine | None:
        """Return the value of an argument that is an integer for each index."""
        value = self.of(name)
        return value if isinstance(value, Affine) else None

    def literal(self, name: str) -> int | None:
        """Return an argument that is a Python int."""
        argument = self.arguments.get(name)
        return argument if type(argument) is int else None

    def axis(self, name: str = "dim") -> int:
        """Return an axis of the result that an argument names, counted from the last one."""
        axis = int(self.arguments[name])
        return axis if axis < 0 else axis - self.result.dim()


Rule = Callable[[_Call], Value | None]
Move = Callable[[Affine], Affine]


def _moved(rule: Callable[[_Call, Value], Move | None]) -> Rule:
    """Make a rule of a function that returns how each number of `self` changes."""

    def moved(call: _Call) -> Value | None:
        value = call.of("self")
        move = rule(call, value) if value is not None else None
        return _changed(value, move) if value is not None and move is not None else None

    return moved


def _of_two(rule: Callable[[_Call, Affine, Affine], Value | None]) -> Rule:
    """Make a rule of a function of two numbers, `self` and `other`."""

    def of_two(call: _Call) -> Value | None:
        one, other = call.number("self"), call.number("other")
        return rule(call, one, other) if one is not None and other is not None else None

    return of_two


def _arange(call: _Call) -> Value | None:
    start, step = call.arguments.get("start", 0), call.arguments.get("step", 1)
    return Affine.of({-1: step}, start) if type(start) is int and type(step) is int else None


def _filled(fill: float | None) -> Rule:
    def rule(call: _Call) -> Value | None:
        value = call.arguments.get("fill_value") if fill is None else fill
        if call.result.dtype is torch.bool and isinstance(value, (bool, int, float)):
            return ALWAYS if value else NEVER
        return _Call({"fill": value}, call.result, call.proved).of("fill")

    return rule


def _same(call: _Call) -> Value | None:
    """The values stay. An axis that grows had one index."""
    return call.of("self")


def _cast(call: _Call) -> Value | None:
    value = call.of("self")
    if isinstance(value, Truth) and call.result.dtype is not torch.bool:
        return Affine((), int(value == ALWAYS)) if value in (ALWAYS, NEVER) else None
    if isinstance(value, Affine) and call.result.dtype is torch.bool:
        return None if value.slopes else ALWAYS if value.start else NEVER
    return value


def _uniform(call: _Call) -> Value | None:
    """The elements are reordered, which does not matter if all are equal."""
    value = call.of("self")
    uniform = value in (ALWAYS, NEVER) or (isinstance(value, Affine) and not value.slopes)
    return value if uniform else None


def _unsqueeze(call: _Call, value: Value) -> Move:
    axis = call.axis()
    return lambda number: number.moved(lambda old: old - 1 if old <= axis else old)


def _transpose(call: _Call, value: Value) -> Move:
    one, other = call.axis("dim0"), call.axis("dim1")
    return lambda number: number.moved(lambda old: {one: other, other: one}.get(old, old))


def _slice(call: _Call, value: Value) -> Move | None:
    axis, step = call.axis(), call.literal("step")
    start = call.literal("start") if call.arguments.get("start") is not None else 0
    if start is None or start < 0 or step is None:
        return None

    def part(number: Affine) -> Affine:
        slope = dict(number.slopes).get(axis, 0)
        return number.plus(Affine.of({axis: slope * (step - 1)}, slope * start))

    return part


def _repeat(call: _Call, value: Value) -> Move | None:
    """Repeat along axes on which nothing depends."""
    numbers = value.conditions if isinstance(value, Truth) else {value}
    repeats = call.arguments["repeats"]
    return (lambda number: number) if all(repeats[axis] == 1 for each in numbers for axis, _ in each.slopes) else None


def _index(call: _Call, value: Value) -> Move | None:
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


def _sum(call: _Call, one: Affine, other: Affine, sign: int) -> Value | None:
    alpha = call.literal("alpha")
    return None if alpha is None else one.plus(other, sign * alpha)


def _mul(call: _Call, one: Affine, other: Affine) -> Value | None:
    if one.slopes and other.slopes:
        return None
    return Affine().plus(one, other.start) if not other.slopes else Affine().plus(other, one.start)


def _compare(conditions: Callable[[Affine], Truth | None]) -> Rule:
    """Make a rule of the conditions on `self - other`."""
    return _of_two(lambda call, one, other: conditions(one.plus(other, -1)))


def _negative(number: Affine) -> Affine:
    """Return a number that is not negative exactly where this one is negative."""
    return Affine((), -1).plus(number, -1)


def _equal(gap: Affine) -> Truth:
    return Truth.of((gap, Affine().plus(gap, -1)))


def _not(truth: Value | None) -> Truth | None:
    if truth in (ALWAYS, NEVER):
        return NEVER if truth == ALWAYS else ALWAYS
    single = isinstance(truth, Truth) and len(truth.conditions) == 1
    return Truth.of(map(_negative, truth.conditions)) if single and isinstance(truth, Truth) else None


def _and(call: _Call) -> Value | None:
    one, other = call.of("self"), call.of("other")
    both = isinstance(one, Truth) and isinstance(other, Truth)
    return Truth.of(one.conditions | other.conditions) if both else None  # type: ignore[union-attr]


def _triangle(sign: int) -> Rule:
    def rule(call: _Call) -> Value | None:
        value, diagonal = call.of("self"), call.literal("diagonal")
        if not isinstance(value, Truth) or diagonal is None:
            return None
        return Truth.of({*value.conditions, Affine.of({-2: sign, -1: -sign}, sign * diagonal)})

    return rule


def _diff(call: _Call) -> Value | None:
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
    "lt": _compare(lambda gap: Truth.of((_negative(gap),))),
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
"""By name of an op: returns the value of a call from the values of its arguments, or None if it is unknown."""
