"""Which rows of a packed weight a node reads: the way from the weight to it, walked with numbers of rows for values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from lorasc_fx.graph.forms import name_of

__all__ = ["parts_of", "rows_read"]

_CUTS = {"slice", "narrow", "split", "split_with_sizes", "unsafe_split", "unsafe_chunk", "chunk", "tensor_split"}
_CUTS |= {"select", "unbind", "getitem"}
_TURNS = {"view", "reshape", "t", "transpose", "permute", "contiguous", "clone", "detach", "squeeze", "unsqueeze"}
_TURNS |= {"flatten", "unflatten", "_unsafe_view", "alias", "swapaxes", "movedim", "expand"}

Rows = tuple[int, int]


def rows_read(node: fx.Node, weight: fx.Node, shape: tuple[int, ...]) -> Rows | None:
    """Return the first row that a node holds of a weight, and the one after the last; None for other ways to it.

    Args:
        node: made of the weight by cuts and turns alone, or None is returned.
        weight: where the way starts.
        shape: of the weight.
    """
    way: list[fx.Node] = []
    here = node
    while here is not weight:
        if name_of(here) not in _CUTS | _TURNS or len(here.all_input_nodes) != 1:
            return None
        way.append(here)
        here = here.all_input_nodes[0]
    if not any(name_of(each) in _CUTS for each in way):
        return (0, shape[0])
    value: Any = torch.arange(shape[0], dtype=torch.int32).view(-1, *(1 for _ in shape[1:])).expand(shape)
    for each in reversed(way):
        args, kwargs = _filled((each.args, each.kwargs), value)
        call: Any = getattr(args[0], str(each.target)) if each.op == "call_method" else each.target
        value = call(*args[each.op == "call_method" :], **kwargs)
    if not isinstance(value, torch.Tensor) or value.numel() == 0:
        return None
    first, last = int(value.min()), int(value.max())
    whole = value.numel() * shape[0] == (last + 1 - first) * torch.Size(shape).numel()
    return (first, last + 1) if whole and value.unique().numel() == last + 1 - first else None


def _filled(arguments: Any, value: Any) -> Any:
    """Return arguments with a value in place of the one node among them."""
    return fx.node.map_arg(arguments, lambda _: value)


def parts_of(reads: Iterable[Rows | None], rows: int) -> tuple[int, ...]:
    """Return the numbers of rows of the slices that divide a weight among its uses; () where they do not."""
    ranges: set[Rows] = set()
    for each in reads:
        if each is None:
            return ()
        ranges.add(each)
    ordered = sorted(ranges)
    ends = [0, *(end for _, end in ordered)]
    divides = all(start == end for (start, _), end in zip(ordered, ends, strict=False)) and ends[-1] == rows
    return tuple(end - start for start, end in ordered) if divides and len(ordered) > 1 else ()
