"""What a graph with branches is expected to cost, over the same graph frozen: forward, and backward to the input."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from lorasc_fx.branch import Branch
from lorasc_fx.cost.model import beside, merged
from lorasc_fx.cost.placer import WORTH
from lorasc_fx.cost.rates import Rates
from lorasc_fx.cost.reading import CONVOLUTIONS, TURNED, device_of, dtype_of, use_at, work_of
from lorasc_fx.cost.store import rates_of
from lorasc_fx.graph import branch_nodes, call_template, entries, shared_input
from lorasc_fx.graph.flow import shape_of
from lorasc_fx.graph.forms import name_of

__all__ = ["Expectation", "expect"]

VIEWS = {
    *("view", "reshape", "transpose", "permute", "t", "expand", "unsqueeze", "squeeze", "getitem", "select", "slice"),
    *("flatten", "unflatten", "chunk", "split", "split_with_sizes", "unbind", "detach", "size", "sym_size", "getattr"),
    *("swapaxes", "numpy_T", "alias", "expand_as", "view_as", "narrow", "movedim", "contiguous", "dropout"),
}
"""Names of the ops that move no numbers, or none that count."""
PASSES = 2.5
"""How often an op that only moves numbers does so in forward and backward, over its inputs and outputs once."""


@dataclass(frozen=True)
class Expectation:
    """Where the branches of a graph, or of several, compute; and seconds of a step by the model.

    Args:
        placements: by weight: `beside`, `merged` or `weight`, as it is in the graph.
        frozen: seconds of the model without branches; 0 where it is not known.
        branches: seconds of the branches.
    """

    placements: Mapping[str, str] = field(default_factory=dict)
    frozen: float = 0.0
    branches: float = 0.0

    @property
    def ratio(self) -> float | None:
        """A step over that of the frozen model; None where it is not known."""
        return 1 + self.branches / self.frozen if self.frozen else None

    def __add__(self, other: Expectation) -> Expectation:
        """Return what is expected of both graphs together."""
        placements = {**self.placements, **other.placements}
        return Expectation(placements, self.frozen + other.frozen, self.branches + other.branches)


def expect(
    plain: fx.GraphModule,
    adapted: fx.GraphModule,
    rates: Callable[[torch.device, torch.dtype], Rates] = rates_of,
) -> Expectation:
    """Return what is expected of a graph; seconds only where sizes are noted and an op is large enough to matter.

    Args:
        plain: the graph without branches.
        adapted: the same with branches.
        rates: returns the rates of a device and dtype.
    """
    placements = {branch.weight_name: _placement(node) for node, branch in branch_nodes(adapted).items()}
    works = {node: work_of(node, name_of(node)) for node in plain.graph.nodes}
    largest = max(works, key=lambda node: works[node], default=None)
    if largest is None or works[largest] < WORTH:
        return Expectation(placements)
    device, dtype = device_of(largest), dtype_of(largest)
    if device is None or dtype is None:
        return Expectation(placements)
    found = rates(device, dtype)
    if found.guessed:  # good enough to choose by, not to tell
        return Expectation(placements)
    frozen = sum(_frozen(found, node, work) for node, work in works.items())
    branches = sum(_branch(found, node, branch) for node, branch in branch_nodes(adapted).items())
    return Expectation(placements, frozen, branches)


def _placement(node: fx.Node) -> str:
    if call_template(node) is not None:
        return "merged"
    return "weight" if len(node.args) == 1 else "beside"


def _frozen(rates: Rates, node: fx.Node, work: int) -> float:
    """Return the seconds of a node without branches."""
    name = name_of(node)
    if work and name in (*CONVOLUTIONS, *TURNED):
        x, kernel = (shape_of(each) if isinstance(each, fx.Node) else None for each in node.args[:2])
        assert x is not None
        assert kernel is not None
        if math.prod(kernel[2:]) == 1:
            return 2 * rates.seconds("dense", work)
        grouped = name in CONVOLUTIONS and x[1] > kernel[1]
        return rates.seconds("depthwise" if grouped else "convolve", work)
    if work:
        constant = any(isinstance(each, fx.Node) and each.op == "get_attr" for each in node.args[:3])
        return (2 if constant else 3) * rates.seconds("dense", work)
    if node.op not in ("call_function", "call_method", "call_module") or name in VIEWS:
        return 0.0
    moved = entries(node) + sum(entries(each) for each in node.all_input_nodes if each.op != "get_attr")
    return PASSES * rates.seconds("add", moved / 3) if moved else 0.0


def _branch(rates: Rates, node: fx.Node, branch: Branch) -> float:
    """Return the seconds of a branch node; 0 where sizes are not known."""
    rank, weight = branch.rank, math.prod(branch.weight_shape)
    if len(node.args) == 1:
        works = sum(work_of(user, name_of(user)) for user in node.users)
        return 3 * rates.seconds("merge", weight, rank) + rates.seconds("dense", works)
    if node.kwargs.get("lookup"):
        return sum(rates.seconds(op, entries(node), rank) for op in ("raise", "add", "down", "gradient"))
    in_place = call_template(node) is not None
    shared = shared_input(node)
    x = shared.x if shared is not None else node.args[0 if in_place else 1]
    stacked = "offs" in node.kwargs  # each row meets one matrix of the stack
    use = use_at(x, node, branch.weight_shape[stacked:], rank)
    if use is None:
        return 0.0
    if in_place:
        return merged(rates, use)
    group = shared.group.args[1] if shared is not None else ()
    return beside(rates, use, len(group) if isinstance(group, (tuple, list)) and group else 1)
