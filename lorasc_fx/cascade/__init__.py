"""The cascade: the adapted model as an nn.Module, with its slow weights and stages. `compile` makes the graphs."""

from lorasc_fx.cascade.cascade import (
    CascadeModule,
    Flags,
    example_or,
    flags_of,
    fold_graph,
    graphs_of,
    run_of,
    watch_model,
)
from lorasc_fx.cascade.graphs import Graphs
from lorasc_fx.cascade.transition import Stage

__all__ = [
    "CascadeModule",
    "Flags",
    "Graphs",
    "Stage",
    "example_or",
    "flags_of",
    "fold_graph",
    "graphs_of",
    "run_of",
    "watch_model",
]
