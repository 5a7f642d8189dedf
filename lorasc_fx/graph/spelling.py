"""How an op read in whose place a branch stands: kept with the branch's node, so that a fold can write it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from lorasc_fx.graph.form import FunctionForm, ModuleForm, Reading
from lorasc_fx.graph.forms import form_of
from lorasc_fx.graph.own_forms import own_named
from lorasc_fx.graph.record import SPELLING
from lorasc_fx.graph.weights import module_at

__all__ = ["Spelled", "Spelling", "mergeable", "spelled", "spelling_of"]


@dataclass(frozen=True)
class Slot:
    """Stands in a spelling for the branch node's argument of this number."""

    index: int


@dataclass(frozen=True)
class Spelling:
    """A node's name, op, target and arguments, with a `Slot` for each node among them; and the number of the branch's
    own inputs.
    """

    name: str
    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: int

    @classmethod
    def of(cls, node: fx.Node, inputs: Sequence[Any]) -> Spelling:
        """Read a node that a branch with these arguments shall stand in place of."""

        def slot(each: fx.Node) -> Any:
            return Slot(inputs.index(each))

        args, kwargs = fx.node.map_arg(node.args, slot), fx.node.map_arg(node.kwargs, slot)
        return cls(node.name, node.op, node.target, args, kwargs, len(inputs))


@dataclass(frozen=True)
class Spelled:
    """An op as it would be written now, and what its form reads off it."""

    name: str
    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    form: FunctionForm | ModuleForm | None
    reading: Reading | None


def spelling_of(node: fx.Node) -> Spelling | None:
    """Return how the op in place of this node read, or None for any other node."""
    found = node.meta.get(SPELLING)
    return found if isinstance(found, Spelling) else None


def spelled(node: fx.Node) -> Spelled | None:
    """Return the op in whose place a branch node stands, with the node's own inputs; None for any other node."""
    found = spelling_of(node)
    if found is None:
        return None
    args, kwargs = _filled(found.args, node.args), _filled(found.kwargs, node.args)
    op = Spelled(found.name, found.op, found.target, args, kwargs, None, None)
    owner = node.graph.owning_module
    module = module_at(owner, found.target) if owner is not None and found.op == "call_module" else None
    form = form_of(op, module)
    if form is None or len(node.args) != found.inputs:
        return op
    return Spelled(found.name, found.op, found.target, args, kwargs, form, form.reads(op, module))


def mergeable(node: fx.Node, form: FunctionForm | ModuleForm) -> bool:
    """Whether a branch can stand in place of this node: it reads the weight as the model stores it."""
    if not form.product or own_named(form.name) is not None:  # what a user's op is merged into, nobody said
        return False
    if isinstance(form, ModuleForm):
        return True
    reading = form.reads(node, None)
    weight = reading.weight
    known = {reading.x, weight, reading.bias}
    return isinstance(weight, fx.Node) and weight.op == "get_attr" and set(node.all_input_nodes) <= known


def _filled(value: Any, inputs: Sequence[Any]) -> Any:
    if isinstance(value, Slot):
        return inputs[value.index] if value.index < len(inputs) else None
    if isinstance(value, (tuple, list)):
        return type(value)(_filled(each, inputs) for each in value)
    if isinstance(value, Mapping):
        return {key: _filled(each, inputs) for key, each in value.items()}
    return value
