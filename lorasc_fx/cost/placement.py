"""Where a branch computes, by cost: the choice between beside and merged, and the expected cost of an adapted graph.

Merged only where it is cheaper by more than the model's error. The expected ratio is that of a training step (forward,
and backward to the input) over the same graph frozen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from lorasc_fx.branch import Branch
from lorasc_fx.branch.products import gains
from lorasc_fx.cost.measure import rates_of
from lorasc_fx.cost.model import (
    CONVOLUTIONS,
    TRANSPOSED_CONVOLUTIONS,
    ConvUse,
    LinearUse,
    Rates,
    Use,
    beside,
    device_of,
    dtype_of,
    merged,
    use_at,
    work_of,
)
from lorasc_fx.graph import Reading, branch_nodes, call_template, entries, form_of, shared_input
from lorasc_fx.graph.flow import shape_of
from lorasc_fx.graph.forms import name_of
from lorasc_fx.graph.targets import matches, targeted
from lorasc_fx.graph.weights import module_at
from lorasc_fx.plan import Site
from lorasc_fx.spec import CascadeSpec

WORTH = 1 << 25
"""Multiply-adds of an op below which its placement matters too little to measure anything."""
MARGIN = 0.05
"""Share of a branch's seconds that merging must save."""
LEAST = 2e-5
"""Seconds that merging must save."""


def is_worth_it(use: Use) -> bool:
    """Whether where the branch stands can be felt; grouped convolutions are slow for their work."""
    return use.work * (8 if isinstance(use, ConvUse) and use.groups > 1 else 1) >= WORTH


@dataclass(frozen=True)
class Cheapest:
    """Chooses the placement of a site, as `lorasc_fx.graph.match` asks for it.

    Always beside: where no sizes are known, in models too small to matter, and where the op computes in less than fp32,
    since the sum `W + s B A` would be rounded to that and small updates with it.

    Args:
        spec: what is asked; its targets say which branches would share an input.
        rates: returns the rates of a device and dtype.
    """

    spec: CascadeSpec
    rates: Callable[[torch.device, torch.dtype], Rates] = rates_of

    def __call__(self, site: Site, nodes: Sequence[fx.Node]) -> str:
        """Return `merged` or `beside`."""
        before = after = 0.0
        for node in nodes:
            reading = _reading(node)
            x = reading.x if reading is not None and isinstance(reading.x, fx.Node) else None
            use = use_at(x, node, site.shape, site.rank)
            device = device_of(x)
            if x is None or use is None or device is None or not is_worth_it(use):
                return "beside"
            if any(dtype not in (torch.float32, torch.float64) for dtype in (dtype_of(x), dtype_of(node))):
                return "beside"
            if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
                return "beside"
            dtype = dtype_of(node)
            assert dtype is not None
            rates = self.rates(device, dtype)
            sharing = max(1, sum(self._shares(user, x) for user in x.users))  # branches beside that share its product
            before += beside(rates, use, sharing if isinstance(use, LinearUse) else 1)
            after += merged(rates, use)
        return "merged" if before - after > max(MARGIN * before, LEAST) else "beside"

    def _shares(self, node: fx.Node, x: fx.Node) -> bool:
        reading = _reading(node)
        if reading is None or reading.x is not x or reading.weight is None:
            return False
        weight = reading.weight
        if isinstance(weight, fx.Node) and weight.op != "get_attr":
            return False
        name = str(weight.target) if isinstance(weight, fx.Node) else weight
        names = (name, name.partition(".")[2])  # a graph may read its weights from a child
        excluded = any(matches(pattern, names) for pattern in (*self.spec.exclude, *self.spec.train))
        return not excluded and targeted(self.spec.targets, "linear", names)


def _reading(node: fx.Node) -> Reading | None:
    """Return what the node's form reads off it; None for a node without one."""
    owner = node.graph.owning_module
    module = module_at(owner, str(node.target)) if owner is not None and node.op == "call_module" else None
    form = form_of(node, module)
    return form.reads(node, module) if form is not None else None


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
        branches: seconds of the branches, less what products of frozen weights gain.
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
    machine = rates(device, dtype)
    if machine.guessed:  # good enough to choose by, not to report
        return Expectation(placements)
    frozen = sum(_frozen(machine, node, work) for node, work in works.items())
    branches = sum(_branch(machine, node, branch) for node, branch in branch_nodes(adapted).items())
    branches -= sum(_gain(machine, node, work) for node, work in works.items())
    return Expectation(placements, frozen, branches)


def _placement(node: fx.Node) -> str:
    if call_template(node) is not None:
        return "merged"
    return "weight" if len(node.args) == 1 else "beside"


def _frozen(rates: Rates, node: fx.Node, work: int) -> float:
    """Return the seconds of a node without branches."""
    name = name_of(node)
    if work and name in (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS):
        x, kernel = (shape_of(arg) if isinstance(arg, fx.Node) else None for arg in node.args[:2])
        assert x is not None
        assert kernel is not None
        if math.prod(kernel[2:]) == 1:
            return 2 * rates.seconds("dense", work)
        grouped = name in CONVOLUTIONS and x[1] > kernel[1]
        return rates.seconds("depthwise" if grouped else "convolve", work)
    if work:
        constant = any(isinstance(arg, fx.Node) and arg.op == "get_attr" for arg in node.args[:3])
        return (2 if constant else 3) * rates.seconds("dense", work)
    if node.op not in ("call_function", "call_method", "call_module") or name in VIEWS:
        return 0.0
    moved = entries(node) + sum(entries(source) for source in node.all_input_nodes if source.op != "get_attr")
    return PASSES * rates.seconds("add", moved / 3) if moved else 0.0


def _gain(rates: Rates, node: fx.Node, work: int) -> float:
    """Return the seconds that forward and backward of a product take less, by `lorasc_fx.branch.products`."""
    device, dtype = device_of(node), dtype_of(node)
    if work < WORTH or device is None or not gains(node.target, device, dtype):
        return 0.0
    constant = any(isinstance(arg, fx.Node) and arg.op == "get_attr" for arg in node.args[:3])
    return 2 * (rates.seconds("dense", work) - rates.seconds("frozen", work)) if constant else 0.0


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
