"""Attention as the eager model has it: without masks that say nothing, and with keys and values that no copy repeats.

transformers leaves out a mask that lets all through, and asks for `is_causal` in place of a triangle, but not under
torch.export, which sees no values. Attention with a mask takes a slower kernel. So a mask goes if it is proved
(`follow`) to say nothing more at any size of the inputs; one with a sliding window stays.

Where there is a mask, transformers also copies each head of the keys and values for all the queries' heads that read
it. Without one, attention reads the few heads as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import fx

from lorasc_fx.capture.affine import ALWAYS, Form, Truth, Value
from lorasc_fx.capture.follow import follow
from lorasc_fx.graph import drop_nodes, give_arguments
from lorasc_fx.graph.flow import mutates

__all__ = ["without_masks"]

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_METADATA = torch.ops.aten._assert_tensor_metadata.default
_SLICE = torch.ops.aten.slice.Tensor
_REPETITION = (torch.ops.aten.reshape.default, torch.ops.aten.expand.default, torch.ops.aten.unsqueeze.default)
_NUMBERS = (bool, int, float, torch.SymBool, torch.SymInt, torch.SymFloat)
_NOTHING = (ALWAYS, Form())
_TRIANGLE = Truth(frozenset({Form.of({-2: 1, -1: -1}, 0)}))
_WIDEST = 256
"""Up to this size of a head, transformers gives attention fewer heads of keys than of queries."""


def without_masks(graph: fx.Graph) -> None:
    """Take out the masks that say nothing at any size, the repetition of heads for such attention, and what is dead.

    Args:
        graph: of torch.export, with metadata; is changed.
    """
    calls = [node for node in graph.nodes if node.target is _ATTENTION and _replaceable(node)]
    if not calls:
        return
    known = follow(graph.nodes)
    spare: set[fx.Node] = set()
    for mask in dict.fromkeys(_argument(call, "attn_mask") for call in calls):
        if mask not in known or _written(_sources(mask, known)):
            continue
        for call in calls:
            if _argument(call, "attn_mask") is mask and (told := _told(known[mask], call)):
                _simplify(call, told)
                spare |= _share_heads(call)
    _erase(graph, spare.union(known))


def _argument(call: fx.Node, name: str) -> Any:
    """Return an argument of a node by its name in the schema."""
    for index, argument in enumerate(call.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == name:
            return call.args[index] if index < len(call.args) else call.kwargs.get(name, argument.default_value)
    raise KeyError(name)


def _shape(node: fx.Node) -> Sequence[Any]:
    """Return the sizes of a node's value, numbers or symbols; none if it is no tensor."""
    value = node.meta.get("val")
    return value.shape if isinstance(value, torch.Tensor) else ()


def _replaceable(call: fx.Node) -> bool:
    """Whether attention has a mask, and its output has the batch and heads of its query without it."""
    query = _shape(_argument(call, "query"))
    return (
        isinstance(_argument(call, "attn_mask"), fx.Node)
        and _argument(call, "is_causal") is False
        and len(query) > 1
        and _alike(query[:-2], _shape(call)[:-2])
    )


def _alike(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether sizes are the same numbers or the same symbols; asks nothing of the symbols, which would be a guard."""

    def plain(size: Any) -> Any:
        return size if isinstance(size, int) else size.node.expr

    return list(map(plain, one)) == list(map(plain, other))


def _told(mask: Value, call: fx.Node) -> Literal["all", "causal"] | None:
    """Return what attention needs to be told in place of a mask, or None if it needs the mask."""
    if mask in _NOTHING:
        return "all"
    rows = _shape(_argument(call, "query"))[-2:-1]
    seen, keys = _shape(_argument(call, "attn_mask")), _shape(_argument(call, "key"))
    square = all(_alike(sizes, rows) for sizes in (seen[-2:-1], seen[-1:], keys[-2:-1]))
    return "causal" if mask == _TRIANGLE and square else None


def _simplify(call: fx.Node, told: Literal["all", "causal"]) -> None:
    args = (*call.args[:3], None, _argument(call, "dropout_p"), told == "causal")
    kept = args if args[5] else args[:5] if args[4] != 0.0 else args[:3]
    given = {"attn_mask", "dropout_p", "is_causal"}
    give_arguments(call, kept, {name: value for name, value in call.kwargs.items() if name not in given})


def _share_heads(call: fx.Node) -> set[fx.Node]:
    """Let attention read keys and values whose heads are not repeated yet; return the nodes that repeat them.

    It is what transformers' eager code does without a mask (`use_gqa_in_sdpa`), for heads of the same sizes.
    """
    query, key, value = call.args[:3]
    assert isinstance(query, fx.Node)
    chains = [_repetition(each) for each in (key, value)]
    keys, values = (chain[-1] if chain else None for chain in chains)
    if keys is None or values is None or not _alike(_shape(keys)[:2], _shape(values)[:2]):
        return set()
    size = _shape(keys)[-1]
    narrow = isinstance(size, int) and size <= _WIDEST and _alike(_shape(values)[-1:], [size])
    if not narrow or not _alike(_shape(query)[:1], _shape(keys)[:1]) or _written([keys, values]):
        return set()
    give_arguments(call, (query, keys, values, *call.args[3:]), {**call.kwargs, "enable_gqa": True})
    return {node for chain in chains for node in chain[:-1]}


def _repetition(last: Any) -> list[fx.Node]:
    """Return the nodes, last first, that repeat each head of what the last of them makes; none if it is no such."""
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
    """Whether a node is a slice from the first to the last."""
    return node.target is _SLICE and node.args[2:] == (0, sys.maxsize) and not node.kwargs


def _sources(mask: fx.Node, known: Mapping[fx.Node, Value]) -> set[fx.Node]:
    """Return a mask and the nodes that what is known of it comes from."""
    return _reached([mask], lambda node: [each for each in node.all_input_nodes if each in known])


def _written(nodes: Iterable[fx.Node]) -> bool:
    """Whether anything may write into one of these nodes, or into what shares their memory."""
    owners = _reached(nodes, lambda node: node.all_input_nodes if _shares(node) else [])
    if any(node.op != "call_function" for node in owners):
        return True  # an input or a buffer may have another name, by which it is written into
    views = _reached(owners, lambda node: [user for user in node.users if _shares(user)])
    return any(mutates(user, node) for node in views for user in node.users)


def _reached(nodes: Iterable[fx.Node], near: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """Return these nodes and what is reached from them; numbers share nothing, and lead nowhere."""
    waiting = list(nodes)
    found = set(waiting)
    while waiting:
        new = [each for each in near(waiting.pop()) if each not in found]
        new = [each for each in new if not isinstance(each.meta.get("val"), _NUMBERS)]
        found.update(new)
        waiting.extend(new)
    return found


def _shares(node: fx.Node) -> bool:
    """Whether what a node makes may share memory with what it reads."""
    schema = getattr(node.target, "_schema", None)
    return node.op != "output" and (schema is None or any(each.alias_info is not None for each in schema.returns))


def _erase(graph: fx.Graph, spare: set[fx.Node]) -> None:
    """Erase those of these nodes, and of the sizes, that nothing needs but each other, and assertions on them."""
    dead: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        number = node.op == "call_function" and isinstance(node.meta.get("val"), _NUMBERS)
        if (node in spare or number) and all(user in dead or user.target is _METADATA for user in node.users):
            dead |= {node, *node.users}
    drop_nodes(graph, dead.__contains__)
