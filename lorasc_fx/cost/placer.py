"""Chooses between beside and merged, site by site: merged only where it is cheaper by more than the model's error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from lorasc_fx.cost.model import ConvUse, LinearUse, Use, beside, merged
from lorasc_fx.cost.rates import Rates
from lorasc_fx.cost.reading import device_of, dtype_of, use_at
from lorasc_fx.cost.store import rates_of
from lorasc_fx.graph import Reading, form_of
from lorasc_fx.graph.targets import matches, targeted
from lorasc_fx.graph.weights import module_at
from lorasc_fx.plan import Site
from lorasc_fx.spec import CascadeSpec

__all__ = ["WORTH", "Cheapest", "is_worth_it"]

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
    """Tells the placement of a site, as `lorasc_fx.graph.match` asks for it.

    Always beside: where no sizes are known, in models too small to matter, and where the op computes in less than fp32,
    since the sum `W + s B A` would be rounded to that and small updates with it.

    Args:
        spec: what is asked; its targets tell which branches would share an input.
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
            before += beside(rates, use, self._sharing(x) if isinstance(use, LinearUse) else 1)
            after += merged(rates, use)
        return "merged" if before - after > max(MARGIN * before, LEAST) else "beside"

    def _sharing(self, x: fx.Node) -> int:
        """Return how many targeted products read this node: their branches beside would share its product."""
        return max(1, sum(self._shares(user, x) for user in x.users))

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
