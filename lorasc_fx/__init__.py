"""LoRASC as a torch.fx compiler: cascaded, slow-fast, noisy low-rank adaptation by rewriting graphs."""

from lorasc_fx import export, import_, integrations
from lorasc_fx.adapt import adapt, load
from lorasc_fx.adapt.materialize import materialize
from lorasc_fx.adapt.merge import merge
from lorasc_fx.errors import (
    CaptureError,
    CheckpointError,
    ExportError,
    LorascError,
    LorascWarning,
    MissingExtra,
    NonFiniteBranch,
    NoSites,
    PassError,
    PassOrderError,
    SpecError,
    StateError,
    UnknownTarget,
    VerifyError,
)
from lorasc_fx.plan import Plan, Reason, Refusal, Site
from lorasc_fx.runtime import Cascade, Plateau, Rewarmed, Stage, save, shuffled_batches
from lorasc_fx.spec import CascadeSpec, Noise, Rule, TrainRule

__all__ = [
    "CaptureError",
    "Cascade",
    "CascadeSpec",
    "CheckpointError",
    "ExportError",
    "LorascError",
    "LorascWarning",
    "MissingExtra",
    "NoSites",
    "Noise",
    "NonFiniteBranch",
    "PassError",
    "PassOrderError",
    "Plan",
    "Plateau",
    "Reason",
    "Refusal",
    "Rewarmed",
    "Rule",
    "Site",
    "SpecError",
    "Stage",
    "StateError",
    "TrainRule",
    "UnknownTarget",
    "VerifyError",
    "adapt",
    "export",
    "import_",
    "integrations",
    "load",
    "materialize",
    "merge",
    "save",
    "shuffled_batches",
]
