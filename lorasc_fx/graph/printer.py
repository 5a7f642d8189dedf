"""Print a graph as canonical text: name, dtype, shape, op, target and arguments of each node.

Symbolic sizes are renamed s0, s1, ... in order of appearance, so that two traces of one model give the same text.
"""

from __future__ import annotations

import re

import torch
from torch import fx

_SYMBOL = re.compile(r"\b[su]\d+\b")


def text(graph: fx.Graph | fx.GraphModule) -> str:
    """Return one line per node, `%name : dtype[shape] = op[target](arguments)`."""
    nodes = graph.graph.nodes if isinstance(graph, fx.GraphModule) else graph.nodes
    symbols: dict[str, str] = {}
    lines = [_line(node, symbols) for node in nodes]
    return "\n".join(lines) + "\n"


def type_text(value: object, symbols: dict[str, str]) -> str:
    """Return dtype and shape of a tensor, such as `float32[s0, 4]`, or "" for another value.

    Args:
        value: a tensor or fake tensor.
        symbols: {symbolic size: new name}. This function adds the symbols of the value that are missing.
    """
    if not isinstance(value, torch.Tensor):
        return ""
    sizes = ", ".join(
        _SYMBOL.sub(lambda match: symbols.setdefault(match[0], f"s{len(symbols)}"), str(size)) for size in value.shape
    )
    return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"


def _line(node: fx.Node, symbols: dict[str, str]) -> str:
    arguments = [_show(argument) for argument in node.args]
    arguments += [f"{name}={_show(value)}" for name, value in node.kwargs.items()]
    name = node.target if isinstance(node.target, str) else fx.node._get_qualified_name(node.target)
    target = "" if node.op == "output" else f"[{name}]"
    dtype_shape = type_text(node.meta.get("val"), symbols)
    suffix = f" : {dtype_shape}" if dtype_shape else ""
    return f"%{node.name}{suffix} = {node.op}{target}({', '.join(arguments)})"


def _show(value: object) -> str:
    """Return an argument as text, with `%name` for each node."""
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        inside = ", ".join(_show(item) for item in value)
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_show(item)}" for key, item in value.items()) + "}"
    return repr(value)
