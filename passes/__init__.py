"""The passes of lorasc-fx, imported as `lorasc_fx.passes`.

A pass reads a GraphModule and returns a torch.fx PassResult; `Pipeline` runs several as one.
"""

if __name__ != "lorasc_fx.passes":
    raise ImportError(
        "this folder is imported as lorasc_fx.passes, not as 'passes': write 'from lorasc_fx.passes import Pipeline'"
    )

from lorasc_fx.errors import NoSites, PassOrderError, VerifyError

from .adapter_inputs import AdapterInputs, BindAdapter, adapter_inputs, adapter_values
from .attention_masks import AttentionMasks
from .base import CascadePass
from .fold_branches import FoldBranches
from .insert_branches import InsertBranches
from .match_sites import MatchSites
from .pipeline import Pipeline
from .share_inputs import ShareInputs, SplitInputs
from .stage_transition import StageTransition

__all__ = [
    "AdapterInputs",
    "AttentionMasks",
    "BindAdapter",
    "CascadePass",
    "FoldBranches",
    "InsertBranches",
    "MatchSites",
    "NoSites",
    "PassOrderError",
    "Pipeline",
    "ShareInputs",
    "SplitInputs",
    "StageTransition",
    "VerifyError",
    "adapter_inputs",
    "adapter_values",
]
