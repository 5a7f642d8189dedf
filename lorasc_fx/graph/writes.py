"""What may be written into memory between two nodes: a branch that computes later than its op has to read the same."""

from __future__ import annotations

import operator
from collections.abc import Collection

from torch import fx, nn

from lorasc_fx.branch import Branch
from lorasc_fx.graph.flow import may_alias, mutates
from lorasc_fx.graph.forms import form_of, name_of
from lorasc_fx.graph.weights import module_at

__all__ = ["written_between"]

_INTO = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.imatmul, operator.setitem}


def written_between(first: fx.Node, last: fx.Node, values: Collection[fx.Node]) -> fx.Node | None:
    """Return a node after `first` and before `last` that may write into the memory of one of `values`, or None.

    What a node without a schema returns may share memory with its arguments, but for the ops that have a form.
    """
    roots: set[fx.Node] | None = None
    node = first.next
    while node is not last and node.op != "root":
        written = [each for each in node.all_input_nodes if _writes(node, each)]
        if written:
            roots = _roots(values) if roots is None else roots
            if roots & _roots(written):
                return node
        node = node.next
    return None


def _writes(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node may write into this argument."""
    if node.op == "call_module":
        return bool(getattr(_called(node), "inplace", False))
    name = name_of(node)
    into = node.target in _INTO or (name.endswith("_") and not name.endswith("__"))
    told = node.kwargs.get("inplace") is True or node.kwargs.get("out") is source
    return told or mutates(node, source) or (into and node.args[:1] == (source,))


def _roots(values: Collection[fx.Node]) -> set[fx.Node]:
    """Return the nodes whose memory these values may share, themselves among them."""
    found, waiting = set[fx.Node](), list(values)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes if _shares(node) else ()
    return found


def _shares(node: fx.Node) -> bool:
    """Whether a node's value may share memory with an argument."""
    if node.op == "call_module":
        module = _called(node)
        return not isinstance(module, Branch) and form_of(node, module) is None
    return node.op in ("call_function", "call_method") and form_of(node, None) is None and may_alias(node)


def _called(node: fx.Node) -> nn.Module | None:
    owner = node.graph.owning_module
    return module_at(owner, str(node.target)) if owner is not None else None
