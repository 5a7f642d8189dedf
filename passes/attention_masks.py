"""Remove redundant attention masks, and the repetition of key and value heads for grouped-query attention.

In eager mode, transformers omits a mask that is all true, and passes `is_causal=True` instead of a causal mask. Under
torch.export it cannot read the values of a mask, so it passes the mask. Attention with a mask runs in a slower kernel.
This pass computes the masks that depend on sizes only. It removes a mask that is all true or causal:

    %out = scaled_dot_product_attention(%q, %k, %v, %mask)

becomes

    %out = scaled_dot_product_attention(%q, %k, %v, None, 0.0, True)

With a mask, transformers also repeats each head of keys and values for all query heads that read it. Without a mask,
this pass replaces `%k = reshape(expand(unsqueeze(%few_k, 2)))` by `%few_k`, and passes `enable_gqa=True`.

The pass computes the mask once. If all sizes are constant, every call has this mask. Symbolic sizes are set to
`_SIZE`. The result is valid for every size, because `_bound` accepts only nodes with these properties:

1. No value depends on a size. Sizes are only ends of ranges and shapes, so an entry is a function of its indices.
2. Integers are affine functions of the indices. An integer op turns affine functions into a polynomial of degree two at
   most. It is affine everywhere if it is affine at three values of each index. All other numbers are constant.
3. Bools are formed by logical ops from conditions `index >= c` and `index - index >= c` with `abs(c) <= bound`.

Proof: take any entry of the mask at any size. Sort its indices and 0, and shorten each gap between neighbours to at
most `bound + 1`. No condition changes, and the indices are now at most `axes * (bound + 1)`, less than `_SIZE`. So if
a mask is true, or equal to the condition `row - column >= 0`, at all computed entries, it also is at all others.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import filterfalse
from typing import Any, ClassVar, Literal

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from lorasc_fx.graph import GraphEditor
from lorasc_fx.graph.flow import is_impure, may_alias, mutates, reached
from lorasc_fx.graph.forms import name_of
from lorasc_fx.util.torch_private import OpOverload

from .base import CascadePass

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_METADATA = torch.ops.aten._assert_tensor_metadata.default
_SLICE = torch.ops.aten.slice.Tensor
_REPETITION = (torch.ops.aten.reshape.default, torch.ops.aten.expand.default, torch.ops.aten.unsqueeze.default)
_NUMBERS = (int, float, torch.SymBool, torch.SymInt, torch.SymFloat)
_MAX_HEAD_SIZE = 256
"""Largest size of a head for which transformers passes fewer heads of keys than of queries to attention."""
_SIZE = 32
"""The value of symbolic sizes for which a mask is computed."""

_FILLS = {"ones", "ones_like", "new_ones", "zeros", "zeros_like", "new_zeros", "full", "full_like", "new_full"}
_MOVES = {"unsqueeze", "expand", "transpose", "slice", "alias", "clone", "contiguous", "detach", "to", "_to_copy"}
_ARITHMETIC = {"arange", "add", "sub", "mul"}
_COMPARISONS = {"ge", "gt", "le", "lt", "eq", "ne"}
_LOGIC = {"__and__", "bitwise_and", "logical_and", "bitwise_not", "logical_not", "tril", "triu"}
_OF_CONSTANTS = {"cumsum", "where", "masked_fill", "view", "reshape", "flatten", "index", "diff"}
_OF_CONSTANTS |= _MOVES | _ARITHMETIC | _COMPARISONS  # the ops map constants to constants


@dataclass(frozen=True)
class AttentionMasks(CascadePass):
    """Remove masks that are all true or causal at every size, repetitions of heads, and the nodes that become dead.

    Needs the fake tensors that torch.export stores in `node.meta["val"]`. A graph without them is not changed.
    """

    name: ClassVar[str] = "attention-masks"

    def rewrite(self, graph: GraphEditor) -> None:
        """Simplify each attention call whose mask is proved to be redundant."""
        calls = [node for node in graph.nodes if node.target is _ATTENTION and _replaceable(node)]
        unneeded: set[fx.Node] = set()
        with torch.no_grad(), _disable_current_modes():
            for mask in dict.fromkeys(_arguments(call)["attn_mask"] for call in calls):
                values = _computed(mask, graph.nodes)
                if values is None or _written(filterfalse(_is_number, values)):
                    continue
                unneeded.update(values)
                for call in calls:  # calls may share a mask that is redundant in only some of them
                    if _arguments(call)["attn_mask"] is mask and (replacement := _equivalent(values[mask], call)):
                        _remove_mask(graph, call, replacement)
                        unneeded |= _remove_repetition(graph, call)
        _erase_dead(graph, unneeded)


def _arguments(call: fx.Node) -> dict[str, Any]:
    """Return {name: argument} of a call of an ATen op. A missing argument has its default, or None."""
    return {
        argument.name: call.args[index]
        if index < len(call.args)
        else call.kwargs.get(argument.name, argument.default_value if argument.has_default_value() else None)
        for index, argument in enumerate(call.target._schema.arguments)  # type: ignore[union-attr]
    }


def _shape(node: fx.Node) -> Sequence[Any]:
    """Return the shape of a node's tensor, with ints and SymInts. () if the value is not a tensor."""
    value = node.meta.get("val")
    return value.shape if isinstance(value, torch.Tensor) else ()


def _replaceable(call: fx.Node) -> bool:
    """Whether an attention call has a mask, and the output would have the same shape without the mask."""
    arguments, query = _arguments(call), _shape(_arguments(call)["query"])
    is_masked = isinstance(arguments["attn_mask"], fx.Node) and arguments["is_causal"] is False
    return is_masked and _same_sizes(query[:-2], _shape(call)[:-2])


def _same_sizes(sizes_a: Sequence[Any], sizes_b: Sequence[Any]) -> bool:
    """Whether sizes are the same ints or the same symbolic expressions. `==` of two SymInts would add a guard."""
    a, b = ([size if isinstance(size, int) else size.node.expr for size in sizes] for sizes in (sizes_a, sizes_b))
    return a == b


def _equivalent(mask: torch.Tensor, call: fx.Node) -> Literal["none", "causal"] | None:
    """Return `none` if the call needs no mask, `causal` if `is_causal=True` replaces the mask, otherwise None."""
    if mask.all() if mask.dtype is torch.bool else not mask.any():
        return "none"
    # `is_causal` aligns the triangle at the top left, so queries, keys and mask must have equal sizes.
    query, key, mask_sizes = (_shape(_arguments(call)[name]) for name in ("query", "key", "attn_mask"))
    square = all(_same_sizes(sizes, query[-2:-1]) for sizes in (mask_sizes[-2:-1], mask_sizes[-1:], key[-2:-1]))
    is_causal = mask.dtype is torch.bool and square and torch.equal(mask, torch.ones_like(mask).tril())
    return "causal" if is_causal else None


def _remove_mask(graph: GraphEditor, call: fx.Node, replacement: Literal["none", "causal"]) -> None:
    """Remove the mask of an attention call, and set `is_causal` if the mask was causal."""
    dropout = _arguments(call)["dropout_p"]
    options = (None, dropout, True) if replacement == "causal" else (None, dropout) if dropout != 0.0 else ()
    replaced = {"attn_mask", "dropout_p", "is_causal"}
    kwargs = {name: value for name, value in call.kwargs.items() if name not in replaced}
    graph.set_arguments(call, (*call.args[:3], *options), kwargs)


def _remove_repetition(graph: GraphEditor, call: fx.Node) -> set[fx.Node]:
    """Make a call read keys and values before their heads are repeated. Return the nodes that may be dead now."""
    query, repeated = call.args[0], [node for node in call.args[1:3] if isinstance(node, fx.Node)]
    keys, values = map(_heads, repeated)
    if keys is None or values is None or not _same_sizes(_shape(keys)[:2], _shape(values)[:2]):
        return set()
    # Check the conditions of `use_gqa_in_sdpa` in transformers, and that batch sizes are equal, as enable_gqa requires.
    size, batch = _shape(keys)[-1], _shape(_arguments(call)["query"])[:1]
    is_small = isinstance(size, int) and size <= _MAX_HEAD_SIZE and _same_sizes(_shape(values)[-1:], [size])
    if not is_small or not _same_sizes(batch, _shape(keys)[:1]) or _written([keys, values]):
        return set()
    graph.set_arguments(call, (query, keys, values, *call.args[3:]), {**call.kwargs, "enable_gqa": True})
    return reached(repeated, lambda node: node.all_input_nodes)


def _heads(node: Any) -> fx.Node | None:
    """Return `heads` [batch, heads, length, size] if a node is `reshape(expand(unsqueeze(heads, 2)))`, or None."""
    chain: list[fx.Node] = []  # reshape, expand, unsqueeze; full slices may be in between
    while isinstance(node, fx.Node) and (_is_full_slice(node) or node.target is (*_REPETITION, None)[len(chain)]):
        chain += [] if _is_full_slice(node) else [node]
        node = node.args[0]
    if len(chain) < len(_REPETITION) or not isinstance(node, fx.Node) or len(_shape(node)) != 4:
        return None
    (batch, heads, *inner_sizes), expanded = _shape(node), _shape(chain[1])
    is_repetition = chain[2].args[1] in (2, -3) and _same_sizes(expanded, (batch, heads, expanded[2], *inner_sizes))
    return node if is_repetition and _same_sizes(_shape(chain[0]), (batch, heads * expanded[2], *inner_sizes)) else None


def _is_full_slice(node: fx.Node) -> bool:
    """Whether a node slices all entries, as `x[:]` does."""
    return node.target is _SLICE and node.args[2:] == (0, sys.maxsize) and not node.kwargs


def _written(nodes: Iterable[fx.Node]) -> bool:
    """Whether anything may write in place into one of these nodes, or into a tensor that shares memory with one."""
    owners = reached(nodes, lambda node: [*filterfalse(_is_number, node.all_input_nodes)] if may_alias(node) else ())
    if any(node.op != "call_function" for node in owners):
        return True  # inputs and buffers may have aliases outside the graph
    views = reached(owners, lambda node: filter(may_alias, node.users))
    return any(mutates(user, node) for node in views for user in node.users)


def _is_number(node: fx.Node) -> bool:
    """Whether a node computes a number, such as a size."""
    return isinstance(node.meta.get("val"), _NUMBERS)


def _erase_dead(graph: GraphEditor, candidates: set[fx.Node]) -> None:
    """Erase dead candidates and dead sizes. A node is dead if only dead nodes and metadata assertions read it."""
    # Visit nodes in reverse order, so that all users of a node come before the node.
    dead: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        number = node.op == "call_function" and _is_number(node)
        if (node in candidates or number) and all(user in dead or user.target is _METADATA for user in node.users):
            dead |= {node, *node.users}
    graph.drop_unused(dead.__contains__)


def _computed(mask: fx.Node, nodes: Iterable[fx.Node]) -> dict[fx.Node, Any] | None:
    """Return {node: value} of a mask and of the nodes that it depends on. None if a call may have other values."""
    read = reached([mask], lambda node: () if _is_number(node) else node.all_input_nodes)
    if not all(map(_is_known, read)):
        return None
    is_dynamic = any(isinstance(size, torch.SymInt) for node in read for size in (*_shape(node), node.meta["val"]))
    values, cpu = dict[fx.Node, Any](), torch.device("cpu")

    def value_of(arg: object) -> Any:
        return values[arg] if isinstance(arg, fx.Node) else cpu if isinstance(arg, torch.device) else arg

    try:
        for node in (node for node in nodes if node in read):
            if isinstance(size := node.meta["val"], torch.SymInt):
                values[node] = int(size.node.expr.subs(dict.fromkeys(size.node.expr.free_symbols, _SIZE)))
            elif isinstance(size, int):
                values[node] = size
            elif isinstance(node.target, OpOverload):
                args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), value_of)
                values[node] = node.target(*args, **kwargs)
    except (RuntimeError, IndexError):
        if is_dynamic:  # the graph does not accept `_SIZE`
            return None
        raise
    return None if is_dynamic and not _holds_at_every_size(values) else values


def _is_known(node: fx.Node) -> bool:
    """Whether a node is a size, or an ATen op whose result depends only on the arguments."""
    value, op = node.meta.get("val"), node.target
    is_op = isinstance(op, OpOverload) and op.namespace == "aten" and "empty" not in name_of(node)
    is_tensor = is_op and isinstance(value, torch.Tensor) and not is_impure(node)
    return is_tensor or isinstance(value, (int, torch.SymInt))


def _holds_at_every_size(values: Mapping[fx.Node, Any]) -> bool:
    """Whether nodes have the properties 1 to 3 of this file's docstring. `values` was computed for `_SIZE`."""
    tensors = {node: value for node, value in values.items() if isinstance(value, torch.Tensor)}
    bounds = [_bound(node, tensors) if value.numel() else None for node, value in tensors.items()]
    axes, bound = max(value.dim() for value in tensors.values()), max(bound or 0 for bound in bounds)
    sizes = ((size, tensors[node].shape[axis]) for node in tensors for axis, size in enumerate(_shape(node)))
    lengths = [length for size, length in sizes if not isinstance(size, int)]
    return None not in bounds and min(lengths, default=_SIZE) > axes * (bound + 1) + 1


def _bound(node: fx.Node, tensors: Mapping[fx.Node, torch.Tensor]) -> int | None:
    """Return the largest constant in the conditions that a node adds, or None if the node may lack a property."""
    name, arguments, value = name_of(node), _arguments(node), tensors[node]
    if any(isinstance(arg, fx.Node) and _is_number(arg) for key, arg in arguments.items() if key != "end"):
        return None  # a value depends on a size
    inputs = [tensors[source] for source in node.all_input_nodes if source in tensors]
    if name in _FILLS or (name in _OF_CONSTANTS and all(_slopes(tensor) == [] for tensor in (value, *inputs))):
        return 0
    dtypes = {tensor.dtype for tensor in inputs}
    if name in _COMPARISONS and dtypes == {torch.int64}:
        gap = tensors[arguments["self"]] - tensors.get(arguments["other"], arguments["other"])
        slopes = _slopes(gap) if gap.dtype is torch.int64 else None
        common = math.gcd(*map(int, slopes or ())) or 1
        is_unit = slopes is not None and sorted(slope / common for slope in slopes) in ([], [-1], [1], [-1, 1])
        return abs(int(gap.flatten()[0])) // common + 1 if is_unit else None
    # A slice from index 0 with step 1 keeps the index of each entry. Entries put in front change it by their number.
    moves = name in _MOVES and (arguments.get("start") or 0, arguments.get("step", 1)) == (0, 1)
    if dtypes | {value.dtype} == {torch.bool}:
        return abs(arguments.get("diagonal", -1)) + 1 if moves or name in _LOGIC else None
    if name == "diff" and arguments["append"] is None and arguments["n"] == 1:
        moves = arguments["prepend"] is None or _shape(arguments["prepend"])[arguments["dim"]] == 1
    if name == "index":  # a negative index would count from the end
        moves = all(index.min() >= 0 and min(_slopes(index) or [0]) >= 0 for index in inputs)
    is_affine = dtypes | {value.dtype} == {torch.int64} and _slopes(value) is not None
    return 0 if is_affine and (moves or name in _ARITHMETIC) else None


def _slopes(value: torch.Tensor) -> list[float] | None:
    """Return the nonzero slopes if the entries are an affine function of their indices, otherwise None."""
    value, slopes = value.double(), list[float]()
    for axis in range(value.dim()):
        steps = value.diff(dim=axis).unique().tolist()
        if len(steps) > 1:
            return None
        slopes += [step for step in steps if step]
    return slopes
