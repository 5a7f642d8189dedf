"""The graph passes of lorasc-fx, imported as `lorasc_fx.passes`.

A pass is a callable from a GraphModule to a torch.fx `PassResult`. `Pipeline` runs several passes as one transaction.
"""

if __name__ != "lorasc_fx.passes":
    raise ImportError(
        "import this package as lorasc_fx.passes, not as 'passes', for example: from lorasc_fx.passes import Pipeline"
    )

from lorasc_fx.errors import NoSites, PassOrderError, VerifyError

from .adapter_inputs import AdapterInputs, adapter_inputs, adapter_values
from .attention_masks import AttentionMasks
from .base import CascadePass
from .fold_branches import FoldBranches
from .inline_branches import InlineBranches
from .insert_branches import InsertBranches
from .match_sites import MatchSites
from .pipeline import Pipeline
from .stage_transition import StageTransition
from .weights_as_attributes import weights_as_attributes

__all__ = [
    "AdapterInputs",
    "AttentionMasks",
    "CascadePass",
    "FoldBranches",
    "InlineBranches",
    "InsertBranches",
    "MatchSites",
    "NoSites",
    "PassOrderError",
    "Pipeline",
    "StageTransition",
    "VerifyError",
    "adapter_inputs",
    "adapter_values",
    "weights_as_attributes",
]
