"""Makes variants for a cascade: capture, match, insert; and folds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from lorasc_fx.branch import Branch, Decided
from lorasc_fx.capture import (
    OWNER,
    Axis,
    Calls,
    Captured,
    Conditions,
    GraphBreakFallback,
    bind,
    capture,
    least_sizes,
    one_line,
    read_live,
    written_by,
)
from lorasc_fx.compile.fallback import insert, make_fallback
from lorasc_fx.compile.variants import Made, Variant
from lorasc_fx.errors import CaptureError, LorascError, PassError, VerifyError
from lorasc_fx.graph import (
    Record,
    at_stage,
    candidates,
    faults,
    matches,
    named_weights,
    own_copy,
    refuse_smaller,
    shared_memory,
    survey,
)
from lorasc_fx.passes import AttentionMasks, FoldBranches
from lorasc_fx.passes.insert_branches import missing_branches
from lorasc_fx.pictures import cascade_html, draw_graphs
from lorasc_fx.plan import Plan, Reason, Refusal

_FAULT = (
    "{name} was captured, but its graph cannot be adapted: {fault}. Try another front end (frontend=...), or exclude "
    "the weights of the part that is named; a fault that the model does not raise itself is one of lorasc-fx to report"
)
_HIDDEN = (Reason.OPAQUE, Reason.MIXED_USES)
"""Reasons, at a node, of a symbolic graph that graph breaks do not have: `auto` then tries the fallback first."""


def _refused(
    model: nn.Module, plan: Plan, refusals: tuple[Refusal, ...], reason: Reason, sentences: Mapping[str, str]
) -> tuple[Refusal, ...]:
    """Return refusals with those of other parameters, as far as they are matrices of which the spec leaves it open."""
    weights, spec = named_weights(model), plan.spec
    known = {refusal.weight for refusal in refusals} | plan.by_weight.keys()
    return (
        *refusals,
        *(
            Refusal(name, "", reason, sentence)
            for name, sentence in sentences.items()
            if name in weights.matrices and name not in known
            if not any(matches(pattern, weights.names[name]) for pattern in (*spec.exclude, *spec.train))
        ),
    )


def _trained(model: nn.Module, plan: Plan, refusals: tuple[Refusal, ...]) -> set[str]:
    """Return the parameters that training moves, by themselves or by a branch, as far as is known before a capture."""
    moved = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return moved | (candidates(model, plan.spec) - {refusal.weight for refusal in refusals})


def _of_fallback(
    captured: Captured,
    plan: Plan,
    branches: Mapping[str, Branch],
    refusals: tuple[Refusal, ...],
    args: Any,
    kwargs: Any,
) -> Made:
    functions, whole = bool(captured.functions), captured.whole_elsewhere
    made = make_fallback(captured.fallback, plan, branches, refusals, args, kwargs, functions, universal=not whole)
    variant = made.variant
    if not variant.universal:  # dynamo has guards of its own on inputs
        variant = replace(variant, conditions=Conditions(state=captured.conditions.state))
    return replace(made, variant=variant, refused_frontends=captured.refused)


@dataclass(frozen=True)
class Compiler:
    """Makes variants: capture, match, insert. A cascade holds one, and knows nothing of graphs.

    Args:
        frontend: a front end's name, or `auto`.
        calls: of the user's forward.
    """

    frontend: str
    calls: Calls

    def bind(self, args: Any, kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a call's arguments in canonical shape; plain enough for dynamo to trace."""
        return bind(self.calls.signature, args, kwargs)

    def decide(self, model: nn.Module, plan: Plan) -> Decided:
        """Make the branches of a plan without a graph: what is refused is what the spec leaves out."""
        refusals = _refused(model, plan, (), Reason.SHARED_MEMORY, shared_memory(model))
        record, nothing = Record(owner=OWNER, plan=plan, refusals=refusals), read_live(nn.Module(), fx.Graph(), model)
        matching = survey([nothing], record, plan.spec, {})
        branches = missing_branches(plan, {}, named_weights(model).parameters)
        return Decided(plan, branches, matching.refusals, matching.unreached)

    def faults(self, variant: Variant) -> list[str]:
        """Return where a variant disagrees with its plan; a subgraph is verified when it is rewritten."""
        return list(faults(variant.module)) if isinstance(variant.module, fx.GraphModule) else []

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
        """Capture the call and insert the branches, into graphs that nobody else holds yet.

        Raises:
            CaptureError: among others, for what torch or the model raises on the way.
        """
        try:
            return self._make(model, plan, branches, refusals, args, kwargs, wide)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except LorascError as fault:
            if isinstance(fault, VerifyError) and not plan.sites:  # of a saved plan, it tells what does not fit
                raise CaptureError(_FAULT.format(name=type(model).__name__, fault=fault)) from fault
            raise
        except Exception as fault:
            raise CaptureError(_FAULT.format(name=type(model).__name__, fault=one_line(fault))) from fault

    def _make(
        self,
        model: nn.Module,
        plan: Plan,
        branches: Mapping[str, Branch],
        refusals: tuple[Refusal, ...],
        args: Any,
        kwargs: Any,
        wide: bool,
    ) -> Made:
        refusals = _refused(model, plan, refusals, Reason.SHARED_MEMORY, shared_memory(model))
        trained = _trained(model, plan, refusals)
        captured = capture(model, args, kwargs, self.frontend, wide, trained, rewrites=(AttentionMasks(),))
        written = dict.fromkeys(sorted(written_by(model)), "forward writes into it")  # which no node may show
        refusals = _refused(model, plan, refusals, Reason.MUTATED, written)
        if captured.fallback is not None:
            return _of_fallback(captured, plan, branches, refusals, args, kwargs)
        whole: Made | None = None
        fault: PassError | None = None
        try:
            whole = insert(captured.module, plan, branches, refusals)
            variant = replace(whole.variant, frontend=captured.frontend, conditions=captured.conditions)
            whole = replace(whole, variant=variant, refused_frontends=captured.refused)
            hidden = next(
                (str(refusal) for refusal in whole.refusals if refusal.reason in _HIDDEN and refusal.node), ""
            )
        except PassError as raised:  # NoSites, or a branch that exists already cannot be placed in this graph
            hidden, fault = str(raised).splitlines()[-1].strip(), raised
        if hidden and self.frontend == "auto" and captured.frontend == "symbolic":
            try:
                fallback = capture(model, args, kwargs, "graph-breaks", wide, trained)
                made = _of_fallback(fallback, plan, branches, refusals, args, kwargs)
                return replace(made, refused_frontends=(*captured.refused, ("symbolic", hidden)))
            except (CaptureError, PassError):  # what the symbolic graph said stands
                pass
        if whole is None:
            assert fault is not None
            raise fault
        return whole

    def fold(
        self,
        variant: Variant,
        model: nn.Module,
        stage: int,
        values: Mapping[str, Any] | None,
        args: Any,
        kwargs: Any,
    ) -> tuple[fx.GraphModule, dict[Axis, int]]:
        """Return the variant's captured graph without branches, and the smallest sizes that it may be called with.

        Args:
            variant: whose graph is meant.
            model, args, kwargs: of the call that it was captured for.
            stage: of the branches.
            values: constants of its own for the graph, which then refuses smaller sizes. None to read the live model.
        """
        if isinstance(variant.module, GraphBreakFallback):
            raise CaptureError(
                f"{type(model).__name__} has graph breaks, and a folded graph needs one whole graph; "
                f"{variant.module.why_not_whole(args, kwargs)}. release() and folded_state_dict() need no graph",
                code="no-whole-graph",
            )
        assert isinstance(variant.module, fx.GraphModule)
        at_stage(variant.module, stage)  # the plan of the stage that it was made in may have other ranks
        folded = FoldBranches()(variant.module).graph_module
        least = {} if variant.frontend == "graph" else least_sizes(folded, model, args, kwargs)
        if values is None:
            return folded, least
        own = own_copy(folded, OWNER, values)
        refuse_smaller(own.graph, [node.name for node in own.graph.nodes if node.op == "placeholder"], least)
        own.recompile()
        return own, least

    def html(
        self, text: str, model: nn.Module, plan: Plan, variant: Variant | None, refusals: tuple[Refusal, ...]
    ) -> str:
        """Return what a notebook shows: `text`, the weights as a drawing, sites and refusals as tables."""
        names = [name for name, _ in model.named_parameters()]
        return cascade_html(text, names, plan, variant.placements if variant is not None else {}, refusals)

    def draw(self, variant: Variant, plan: Plan, file: str | PathLike[str], sites: Sequence[str], radius: int) -> Path:
        """Draw the variant around some sites into an SVG file; of a fallback, the graphs that have run."""
        module = variant.module
        graphs = getattr(module, "rewritten", [module])  # of a fallback, and of what shards have split
        return draw_graphs([graph for graph in graphs if isinstance(graph, fx.GraphModule)], plan, file, sites, radius)
