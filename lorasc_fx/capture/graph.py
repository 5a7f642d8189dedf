"""Front end `graph`: the input is a graph module already; its own weights are the live ones, under their names."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from lorasc_fx.capture.live import Captured, read_live
from lorasc_fx.graph import copy_graph

__all__ = ["capture_graph"]


def capture_graph(model: nn.Module, args: Any, kwargs: Any) -> Captured:
    """Return the module's graph, reading the module itself; one graph serves every signature."""
    assert isinstance(model, fx.GraphModule)
    return Captured(read_live(model, copy_graph(model.graph), model), "graph")
