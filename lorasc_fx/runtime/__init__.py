"""What runs: the cascade, its slow weights, stages and checkpoints. No graph and no passes in here."""

from lorasc_fx.runtime.cascade import Cascade, Flags, Stage, cascade_class, save
from lorasc_fx.runtime.checkpoint import list_versions
from lorasc_fx.runtime.checkpoint_read import check_base, check_plan, read
from lorasc_fx.runtime.variants import Made, Variant

__all__ = [
    "Cascade",
    "Flags",
    "Made",
    "Stage",
    "Variant",
    "cascade_class",
    "check_base",
    "check_plan",
    "list_versions",
    "read",
    "save",
]
