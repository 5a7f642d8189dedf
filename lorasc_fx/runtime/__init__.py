"""What runs: the cascade, its slow weights, stages and checkpoints. Graphs are made by `compile`, for the cascade."""

from lorasc_fx.runtime.cascade import Cascade, Stage, cascade_class, save
from lorasc_fx.runtime.checkpoint import list_versions
from lorasc_fx.runtime.checkpoint_read import check_base, check_plan, read
from lorasc_fx.runtime.dropped import Flags

__all__ = [
    "Cascade",
    "Flags",
    "Stage",
    "cascade_class",
    "check_base",
    "check_plan",
    "list_versions",
    "read",
    "save",
]
