"""Makes variants for the runtime: capture, match, insert; and folds them."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from lorasc_fx.adapt.pieces import insert, make_pieces
from lorasc_fx.branch import Branch
from lorasc_fx.capture import OWNER, Pieces, bind, capture, key_of, leaves
from lorasc_fx.errors import CaptureError
from lorasc_fx.graph import own_copy
from lorasc_fx.passes import FoldBranches
from lorasc_fx.plan import Plan, Refusal
from lorasc_fx.runtime import Made, Variant

__all__ = ["Compiler"]


@dataclass(frozen=True)
class Compiler:
    """Makes variants: capture, match, insert. The runtime holds one, and knows nothing of graphs.

    Args:
        frontend: a front end's name, or `auto`.
        signature: of the user's forward.
    """

    frontend: str
    signature: inspect.Signature

    def bind(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a call's arguments in canonical shape."""
        return bind(self.signature, args, kwargs)

    def key(self, model: nn.Module, args: Any, kwargs: Any) -> Hashable:
        """Return the call's signature; a graph that was given has one for all."""
        return None if isinstance(model, fx.GraphModule) else key_of(model, args, kwargs)

    def leaves(self, args: Any, kwargs: Any) -> list[Any]:
        """Return the leaves of a call's arguments."""
        return leaves(args, kwargs)

    def make(
        self,
        model: nn.Module,
        plan: Plan,
        branches: Mapping[str, Branch],
        refusals: tuple[Refusal, ...],
        args: Any,
        kwargs: Any,
        wide: bool,
    ) -> Made:
        """Capture the call and insert the branches, into graphs that nobody else holds yet."""
        captured = capture(model, args, kwargs, self.frontend, wide)
        if captured.pieces is not None:
            made = make_pieces(captured.pieces, plan, branches, refusals, args, kwargs)
            return replace(made, refused_frontends=captured.refused)
        made = insert(captured.module, plan, branches, refusals)
        variant = Variant(made.variant.module, captured.frontend, captured.guards, captured.sizes)
        return replace(made, variant=variant, refused_frontends=captured.refused)

    def fold(
        self, variant: Variant, model: nn.Module, values: Mapping[str, Any], args: Any, kwargs: Any
    ) -> fx.GraphModule:
        """Return the variant's captured graph with these values as constants of its own."""
        if isinstance(variant.module, Pieces):
            raise CaptureError(
                f"{type(model).__name__} runs in pieces, and a folded graph needs one whole graph; the first break is "
                f"{variant.module.first_break(args, kwargs)}. release() and folded_state_dict() need no graph"
            )
        assert isinstance(variant.module, fx.GraphModule)
        folded = FoldBranches()(variant.module).graph_module
        return own_copy(folded, OWNER, values)
