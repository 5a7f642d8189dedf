"""What runs: the cascade, its slow weights and its stages. Graphs are made by `compile`, for the cascade."""

from lorasc_fx.cascade.cascade import CascadeModule, Stage
from lorasc_fx.cascade.dropped import Flags

__all__ = ["CascadeModule", "Flags", "Stage"]
