"""Choose the placement of a branch by the shapes of its ops, and read the placements of a graph."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import fx

from lorasc_fx.graph.branch_calls import branch_nodes, call_template
from lorasc_fx.graph.flow import shape_of
from lorasc_fx.graph.forms import form_of
from lorasc_fx.graph.weights import called_module
from lorasc_fx.plan import Site

MIN_WORK = 1 << 25
"""Minimum multiply-adds of an op for the placement `merged`."""
MIN_RATIO = 2.0
"""Minimum of (input entries + output entries) / weight entries for the placement `merged`."""


def by_shape(site: Site, nodes: Sequence[fx.Node]) -> str:
    """Return `merged` if input and output of each op are large compared with its weight, otherwise `beside`.

    With `beside`, the branch reads the input and writes the output a second time. With `merged`, it reads the weight
    and writes the merged weight. Ops of unknown shape and small ops always get `beside`, and so do dtypes narrower than
    fp32, which would round `W + s B A`.
    """
    for node in nodes:
        module = called_module(node)
        form = form_of(node, module)
        x = form.reads(node, module).x if form is not None else None
        if not isinstance(x, fx.Node) or not _is_full_precision(x) or not _is_full_precision(node):
            return "beside"
        read, written = shape_of(x), shape_of(node)
        if not read or not written or len(site.shape) not in (2, len(read)):
            return "beside"
        # Multiply-adds of the op, and entries that a branch with placement `beside` reads and writes beside the op.
        work = math.prod(written) * (read[-1] if len(site.shape) == 2 else math.prod(site.shape[1:]))
        moved = math.prod(read) + math.prod(written)
        if work < MIN_WORK or moved < MIN_RATIO * math.prod(site.shape):
            return "beside"
    return "merged"


def _is_full_precision(node: fx.Node) -> bool:
    """Whether a node's tensor is fp32 or fp64, and autocast is off."""
    value = node.meta.get("val", node.meta.get("example_value"))
    if not isinstance(value, torch.Tensor) or value.dtype not in (torch.float32, torch.float64):
        return False
    kind = value.device.type
    return not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind))


def placements_of(module: fx.GraphModule) -> dict[str, str]:
    """Return {weight name: placement of its branch in this graph, `beside`, `merged` or `weight`}."""
    return {branch.weight_name: placement_of(node) for node, branch in branch_nodes(module).items()}


def placement_of(node: fx.Node) -> str:
    """Return the placement of a branch node: `beside`, `merged` or `weight`."""
    if call_template(node) is not None:
        return "merged"
    return "weight" if len(node.args) == 1 else "beside"
