"""LoRASC (arXiv 2407.01491) as a torch.fx compiler pass: low-rank adaptation in stages with slow and fast weights.

`adapt` captures a model as a graph and inserts trainable low-rank branches. After each stage, a share of each branch's
delta is merged into the slow weights, and new branches start.

Less common names are in submodules: `passes` has the errors of passes, `export` has `ExportError`, `errors` has
`MissingExtra` and the warning category, and `plan` has the reasons of refusals and the options of sites.
"""

from lorasc_fx import errors as errors
from lorasc_fx import export, integrations, parallel, passes, recipes
from lorasc_fx import plan as plan
from lorasc_fx import schedules as schedules
from lorasc_fx.adapt import adapt, load
from lorasc_fx.adapt.merge import from_peft, merge
from lorasc_fx.bank import AdapterBank
from lorasc_fx.branch import register_branch
from lorasc_fx.errors import (
    CaptureError,
    CheckpointError,
    LorascError,
    NonFiniteBranch,
    PassError,
    SpecError,
    StateError,
    UnknownTarget,
)
from lorasc_fx.facade import Cascade, save
from lorasc_fx.graph import register_form
from lorasc_fx.passes.backend import backend
from lorasc_fx.plan import Plan, Refusal, Site
from lorasc_fx.schedules import StageSchedule
from lorasc_fx.spec import CascadeSpec, Noise, Rule, register_grid
from lorasc_fx.util.environment import version as _version

__version__ = _version()

__all__ = [
    "AdapterBank",
    "CaptureError",
    "Cascade",
    "CascadeSpec",
    "CheckpointError",
    "LorascError",
    "Noise",
    "NonFiniteBranch",
    "PassError",
    "Plan",
    "Refusal",
    "Rule",
    "Site",
    "SpecError",
    "StageSchedule",
    "StateError",
    "UnknownTarget",
    "adapt",
    "backend",
    "export",
    "from_peft",
    "integrations",
    "load",
    "merge",
    "parallel",
    "passes",
    "recipes",
    "register_branch",
    "register_form",
    "register_grid",
    "save",
]
