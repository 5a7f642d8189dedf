"""Follow what is made of sizes through its ops: what a tensor holds at every size, as far as that is affine.

A mask is `key <= query`, `position >= 0`, or several such conditions at once. Each number on the way to it is
`start + sum(slope * index)`, and the mask is the set of those forms that must not be negative. Where that set is empty
it lets all through, whatever the sizes. An op that is not known here ends the proof, never the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from lorasc_fx.capture.affine import ALWAYS, NEVER, Form, Truth, Value

__all__ = ["follow"]

_EXACT = 256
"""Whole numbers up to here are exact in every floating dtype."""
_LARGE = 2**20
"""Slopes and starts up to here: their sums over indices overflow nowhere."""


def follow(nodes: Iterable[fx.Node]) -> dict[fx.Node, Value]:
    """Return what is known of the nodes' values at every size, if nothing writes into them.

    Args:
        nodes: in the graph's order, with all that they depend on.
    """
    known: dict[fx.Node, Value] = {}
    for node in nodes:
        value = _value(node, known)
        if value is not None:
            known[node] = value
    return known


def _value(node: fx.Node, known: Mapping[fx.Node, Value]) -> Value | None:
    made = node.meta.get("val")
    op = node.target
    if not isinstance(op, torch._ops.OpOverload) or op.namespace != "aten" or not isinstance(made, torch.Tensor):
        return None
    rule = _RULES.get(op.overloadpacket.__name__)
    if rule is None or op._schema.is_mutable:
        return None
    given = {
        argument.name: node.args[index]
        if index < len(node.args)
        else node.kwargs.get(argument.name, argument.default_value if argument.has_default_value() else None)
        for index, argument in enumerate(op._schema.arguments)
    }
    value = rule(_Call(given, made, known))
    for axis in range(-made.dim(), 0):
        if value is not None and isinstance(size := made.shape[axis], int) and size == 1:
            value = _each(value, partial(Form.first, axis=axis))  # it may be broadcast from here on
    return value if value is not None and _holds(value, made.dtype) else None


def _holds(value: Value, dtype: torch.dtype) -> bool:
    """Whether a dtype holds such values exactly."""
    if isinstance(value, Truth):
        return dtype is torch.bool
    if dtype.is_floating_point:
        return not value.slopes and abs(value.start) <= _EXACT
    return dtype is torch.int64 and max(map(abs, (value.start, *dict(value.slopes).values()))) <= _LARGE


def _each(value: Value, change: Callable[[Form], Form]) -> Value:
    return value.over(change) if isinstance(value, Truth) else change(value)


@dataclass(frozen=True)
class _Call:
    """One call: its arguments by name, the tensor that it makes (a fake one), and what is known of the others."""

    given: Mapping[str, Any]
    made: torch.Tensor
    known: Mapping[fx.Node, Value]

    def of(self, name: str) -> Value | None:
        """Return what is known of an argument."""
        found = self.given.get(name)
        if isinstance(found, fx.Node):
            return self.known.get(found)
        if isinstance(found, bool) or not isinstance(found, (int, float)) or not abs(found) <= _LARGE:
            return None
        return Form((), int(found)) if found == int(found) else None

    def form(self, name: str) -> Form | None:
        """Return an argument that is a whole number."""
        found = self.of(name)
        return found if isinstance(found, Form) else None

    def whole(self, name: str) -> int | None:
        """Return an argument that is a Python int."""
        found = self.given.get(name)
        return found if type(found) is int else None

    def axis(self, name: str = "dim") -> int:
        """Return an argument that names an axis of what is made, counted from the last."""
        axis = int(self.given[name])
        return axis if axis < 0 else axis - self.made.dim()


def _arange(call: _Call) -> Value | None:
    start, step = call.given.get("start", 0), call.given.get("step", 1)
    return Form.of({-1: step}, start) if type(start) is int and type(step) is int else None


def _filled(fill: float | None) -> Callable[[_Call], Value | None]:
    def rule(call: _Call) -> Value | None:
        value = call.given.get("fill_value") if fill is None else fill
        if call.made.dtype is torch.bool and isinstance(value, (bool, int, float)):
            return ALWAYS if value else NEVER
        return _Call({"fill": value}, call.made, call.known).of("fill")

    return rule


def _same(call: _Call) -> Value | None:
    """The values stay, and an axis that grows was of one index."""
    return call.of("self")


def _cast(call: _Call) -> Value | None:
    value = call.of("self")
    if isinstance(value, Truth) and call.made.dtype is not torch.bool:
        return Form((), int(value == ALWAYS)) if value in (ALWAYS, NEVER) else None
    if isinstance(value, Form) and call.made.dtype is torch.bool:
        return None if value.slopes else ALWAYS if value.start else NEVER
    return value


def _uniform(call: _Call) -> Value | None:
    """The elements go to other places, and all are one."""
    value = call.of("self")
    uniform = value in (ALWAYS, NEVER) or (isinstance(value, Form) and not value.slopes)
    return value if uniform else None


def _unsqueeze(call: _Call) -> Value | None:
    value, axis = call.of("self"), call.axis()
    return None if value is None else _each(value, lambda form: form.moved(lambda old: old - 1 if old <= axis else old))


def _transpose(call: _Call) -> Value | None:
    value, one, other = call.of("self"), call.axis("dim0"), call.axis("dim1")
    turned = {one: other, other: one}
    return None if value is None else _each(value, lambda form: form.moved(lambda old: turned.get(old, old)))


def _slice(call: _Call) -> Value | None:
    value, axis, step = call.of("self"), call.axis(), call.whole("step")
    start = call.whole("start") if call.given.get("start") is not None else 0
    if value is None or start is None or start < 0 or step is None:
        return None

    def part(form: Form) -> Form:
        slope = dict(form.slopes).get(axis, 0)
        return form.plus(Form.of({axis: slope * (step - 1)}, slope * start))

    return _each(value, part)


def _repeat(call: _Call) -> Value | None:
    value, repeats = call.of("self"), call.given["repeats"]
    if value is None:
        return None
    moving = {axis for form in (value.conditions if isinstance(value, Truth) else {value}) for axis, _ in form.slopes}
    return value if all(repeats[axis] == 1 for axis in moving) else None


def _sum(factor: int) -> Callable[[_Call], Value | None]:
    def rule(call: _Call) -> Value | None:
        one, other, alpha = call.form("self"), call.form("other"), call.whole("alpha")
        return None if one is None or other is None or alpha is None else one.plus(other, factor * alpha)

    return rule


def _mul(call: _Call) -> Value | None:
    one, other = call.form("self"), call.form("other")
    if one is None or other is None or (one.slopes and other.slopes):
        return None
    many, factor = (one, other.start) if not other.slopes else (other, one.start)
    return Form().plus(many, factor)


def _compare(conditions: Callable[[Form], Truth | None]) -> Callable[[_Call], Value | None]:
    def rule(call: _Call) -> Value | None:
        one, other = call.form("self"), call.form("other")
        return None if one is None or other is None else conditions(one.plus(other, -1))

    return rule


def _negative(form: Form) -> Form:
    """Return a form that is not negative where this one is."""
    return Form((), -1).plus(form, -1)


def _equal(gap: Form) -> Truth:
    return Truth.of((gap, Form().plus(gap, -1)))


def _not(truth: Truth) -> Truth | None:
    if truth in (ALWAYS, NEVER):
        return NEVER if truth == ALWAYS else ALWAYS
    return Truth.of(map(_negative, truth.conditions)) if len(truth.conditions) == 1 else None


def _unequal(gap: Form) -> Truth | None:
    return _not(_equal(gap))


def _and(call: _Call) -> Value | None:
    one, other = call.of("self"), call.of("other")
    if not isinstance(one, Truth) or not isinstance(other, Truth):
        return None
    return Truth.of(one.conditions | other.conditions)


def _inverse(call: _Call) -> Value | None:
    value = call.of("self")
    return _not(value) if isinstance(value, Truth) else None


def _triangle(sign: int) -> Callable[[_Call], Value | None]:
    def rule(call: _Call) -> Value | None:
        value, diagonal = call.of("self"), call.whole("diagonal")
        if not isinstance(value, Truth) or diagonal is None:
            return None
        return Truth.of({*value.conditions, Form.of({-2: sign, -1: -sign}, sign * diagonal)})

    return rule


def _diff(call: _Call) -> Value | None:
    value, axis = call.form("self"), call.axis()
    if value is None or call.given["n"] != 1 or call.given["append"] is not None:
        return None
    slope = Form((), dict(value.slopes).get(axis, 0))
    if call.given["prepend"] is not None:
        size, before = call.given["prepend"].meta["val"].shape[axis], call.form("prepend")
        if before is None or not isinstance(size, int) or size != 1 or value.first(axis).plus(before, -1) != slope:
            return None
    return slope


def _cumsum(call: _Call) -> Value | None:
    return Form() if call.of("self") in (NEVER, Form()) else None


def _index(call: _Call) -> Value | None:
    value, indices = call.of("self"), call.given["indices"]
    found = [call.known.get(each) if isinstance(each, fx.Node) else None for each in indices]
    places = [each for each in found if isinstance(each, Form) and each.never_negative]
    if value is None or len(places) != call.given["self"].meta["val"].dim() or len(places) != len(found):
        return None

    def picked(form: Form) -> Form:
        total = Form((), form.start)
        for axis, slope in form.slopes:
            total = total.plus(places[axis], slope)
        return total

    return _each(value, picked)


def _where(condition: str, yes: str, no: str) -> Callable[[_Call], Value | None]:
    def rule(call: _Call) -> Value | None:
        truth = call.of(condition)
        return call.of(yes if truth == ALWAYS else no) if truth in (ALWAYS, NEVER) else None

    return rule


_RULES: dict[str, Callable[[_Call], Value | None]] = {
    "arange": _arange,
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _filled(1)),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), _filled(0)),
    **dict.fromkeys(("full", "full_like", "new_full"), _filled(None)),
    **dict.fromkeys(("expand", "contiguous", "clone", "alias", "detach"), _same),
    **dict.fromkeys(("to", "_to_copy"), _cast),
    **dict.fromkeys(("view", "reshape", "flatten"), _uniform),
    "unsqueeze": _unsqueeze,
    "transpose": _transpose,
    "slice": _slice,
    "repeat": _repeat,
    "add": _sum(1),
    "sub": _sum(-1),
    "mul": _mul,
    "ge": _compare(lambda gap: Truth.of((gap,))),
    "lt": _compare(lambda gap: Truth.of((_negative(gap),))),
    "le": _compare(lambda gap: Truth.of((Form().plus(gap, -1),))),
    "gt": _compare(lambda gap: Truth.of((gap.plus(Form((), -1)),))),
    "eq": _compare(_equal),
    "ne": _compare(_unequal),
    **dict.fromkeys(("__and__", "bitwise_and", "logical_and"), _and),
    **dict.fromkeys(("logical_not", "bitwise_not"), _inverse),
    "tril": _triangle(1),
    "triu": _triangle(-1),
    "diff": _diff,
    "cumsum": _cumsum,
    "index": _index,
    "where": _where("condition", "self", "other"),
    "masked_fill": _where("mask", "value", "self"),
}
