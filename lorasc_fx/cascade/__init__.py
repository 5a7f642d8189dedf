"""What runs: the cascade, its slow weights and its stages. Graphs are made by `compile`, for the cascade."""

from lorasc_fx.cascade.cascade import Cascade, Stage
from lorasc_fx.cascade.dropped import Flags

__all__ = ["Cascade", "Flags", "Stage"]
