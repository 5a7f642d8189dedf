"""Makes variants for a cascade (capture, match, insert), and folds and draws them."""

from __future__ import annotations

import glob
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from lorasc_fx.branch import Decided
from lorasc_fx.capture import (
    GRAPH_BREAKS,
    OWNER,
    Axis,
    Captured,
    Conditions,
    GraphBreakFallback,
    capture,
    forget,
    least_sizes,
    read_live,
)
from lorasc_fx.check.isolation import written_by
from lorasc_fx.check.observe import one_line
from lorasc_fx.compile.fallback import insert, make_fallback
from lorasc_fx.compile.variants import Made, Variant
from lorasc_fx.errors import CaptureError, LorascError, PassError, VerifyError
from lorasc_fx.graph import Record, faults, matches, named_weights, record_of, shared_memory
from lorasc_fx.graph.copies import standalone_copy
from lorasc_fx.graph.editor import assert_min_sizes
from lorasc_fx.graph.matching import candidates, survey
from lorasc_fx.graph.record import AdapterInput, at_stage
from lorasc_fx.passes import (
    AdapterInputs,
    AttentionMasks,
    FoldBranches,
    InsertBranches,
    MatchSites,
    Pipeline,
    adapter_inputs,
)
from lorasc_fx.passes.insert_branches import all_branches
from lorasc_fx.pictures import Picture, draw_graphs
from lorasc_fx.plan import Plan, Reason, Refusal
from lorasc_fx.signature import Calls, bind
from lorasc_fx.spec import CascadeSpec

_FAULT = (
    "{name} was captured, but its graph cannot be adapted: {fault}. Try another front end (frontend=...), or exclude "
    "the weights of the part that is named; a fault that the model does not raise itself is one of lorasc-fx to report"
)


@dataclass(frozen=True)
class Compiler:
    """Makes variants. A cascade holds one, and knows nothing of graphs itself.

    Args:
        frontend: name of a front end, or `auto`.
        calls: binds the arguments of the user's forward.
    """

    frontend: str
    calls: Calls

    def bind(self, args: Any, kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a call's arguments in canonical shape. Simple enough for dynamo to trace."""
        return bind(self.calls.signature, args, kwargs)

    def decide(self, model: nn.Module, plan: Plan) -> Decided:
        """Make the branches of a plan without a graph. Only the spec refuses weights then."""
        refusals = _with_refusals(Decided(plan, {}, (), ()), model, Reason.SHARED_MEMORY, shared_memory(model)).refusals
        record, empty = Record(owner=OWNER, plan=plan, refusals=refusals), read_live(nn.Module(), fx.Graph(), model)
        matching = survey([empty], record, plan.spec, {})
        branches = all_branches(plan, {}, named_weights(model).parameters)
        return Decided(plan, branches, matching.refusals, matching.unreached)

    def faults(self, variant: Variant) -> list[str]:
        """Return where a variant disagrees with its plan. Subgraphs of a fallback were verified when rewritten."""
        return list(faults(variant.module)) if isinstance(variant.module, fx.GraphModule) else []

    def make(
        self,
        model: nn.Module,
        decided: Decided,
        args: Any,
        kwargs: Any,
        dynamic: Collection[Axis] = (),
        required: bool = False,
    ) -> Made:
        """Capture a call and insert the branches, into graphs that nothing else holds yet.

        Args:
            model: is left unchanged.
            decided: the plan to follow, the branches that exist, and what was refused.
            args, kwargs: of the call, in canonical shape.
            dynamic: axes to make dynamic, see `capture`.
            required: whether these have to be dynamic. Otherwise a cached graph may serve the sizes of this call only.

        Raises:
            CaptureError: no graph can be made, or torch or the model raises.
            PassError: the graph cannot follow the plan.
        """
        if required:
            forget()
        try:
            return self._make(model, decided, args, kwargs, dynamic)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except LorascError as fault:
            if isinstance(fault, VerifyError) and not decided.plan.sites:  # with sites, it says what a saved plan lacks
                raise CaptureError(_FAULT.format(name=type(model).__name__, fault=fault)) from fault
            raise
        except Exception as fault:
            raise CaptureError(_FAULT.format(name=type(model).__name__, fault=one_line(fault))) from fault

    def _make(self, model: nn.Module, decided: Decided, args: Any, kwargs: Any, dynamic: Collection[Axis]) -> Made:
        decided = _with_refusals(decided, model, Reason.SHARED_MEMORY, shared_memory(model))
        trained = _trained(model, decided)
        captured = capture(model, args, kwargs, self.frontend, dynamic, trained, rewrites=(AttentionMasks(),))
        # Forward may write into a parameter in ways that no node of a graph shows.
        written = dict.fromkeys(sorted(written_by(model)), "forward writes into it")
        decided = _with_refusals(decided, model, Reason.MUTATED, written)
        if captured.fallback is not None:
            return _of_fallback(captured, decided, args, kwargs)
        made: Made | None = None
        fault: PassError | None = None
        try:
            made = insert(captured.module, decided)
            variant = replace(made.variant, frontend=captured.frontend, conditions=captured.conditions)
            made = replace(made, variant=variant, refused_frontends=captured.refused)
            # A graph that sees inside modules might adapt a weight that is refused for these reasons.
            reasons = (Reason.OPAQUE, Reason.MIXED_USES)
            hidden = next((str(one) for one in made.refusals if one.node and one.reason in reasons), "")
        except PassError as raised:  # no sites, or an existing branch cannot be placed in this graph
            hidden, fault = str(raised).splitlines()[-1].strip(), raised
        if hidden and self.frontend == "auto" and not captured.frontend.sees_inside:
            # Graphs with breaks show what a module hides that this graph calls whole.
            try:
                fallback = capture(model, args, kwargs, GRAPH_BREAKS.name, dynamic, trained)
                more = _of_fallback(fallback, decided, args, kwargs)
                return replace(more, refused_frontends=(*captured.refused, (captured.frontend.name, hidden)))
            except (CaptureError, PassError):  # the first result is the better one
                pass
        if made is None:
            assert fault is not None
            raise fault
        return made

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
            variant: whose graph is folded.
            model, args, kwargs: of the call that it was captured for.
            stage: of the branches.
            values: constants of the new graph, which then refuses smaller sizes. None to read the live model.
        """
        if isinstance(variant.module, GraphBreakFallback):
            raise CaptureError(
                f"{type(model).__name__} has graph breaks, and a folded graph needs one whole graph; "
                f"{variant.module.why_not_whole(args, kwargs)}. release() and folded_state_dict() need no graph",
                code="no-whole-graph",
            )
        assert isinstance(variant.module, fx.GraphModule)
        at_stage(variant.module, stage)  # ranks differ by stage, and the graph may be of an earlier one
        folded = FoldBranches()(variant.module).graph_module
        least = {} if variant.frontend.serves_all_calls else least_sizes(folded, model, args, kwargs)
        if values is None:
            return folded, least
        copy = standalone_copy(folded, OWNER, values)
        assert_min_sizes(copy.graph, [node.name for node in copy.graph.nodes if node.op == "placeholder"], least)
        copy.recompile()
        return copy, least

    def lift(
        self,
        variant: Variant,
        model: nn.Module,
        stage: int,
        values: Mapping[str, torch.Tensor],
        max_rank: int,
        args: Any,
        kwargs: Any,
    ) -> tuple[fx.GraphModule, tuple[AdapterInput, ...], dict[Axis, int]]:
        """Return the variant's graph with a LoRA adapter for its sites as inputs, these inputs, and smallest sizes.

        Args:
            variant, model, stage, args, kwargs: as for `fold`.
            values: of the weights; they become constants of the graph.
            max_rank: of the inputs.
        """
        folded, least = self.fold(variant, model, stage, None, args, kwargs)
        plan = record_of(folded).plan
        assert plan is not None
        targets = tuple(glob.escape(site.weight) for site in plan.sites)
        spec = CascadeSpec(targets, rank=max_rank, lora_alpha=float(max_rank), placement="beside")
        passes = Pipeline([MatchSites(spec), InsertBranches(), AdapterInputs(max_rank)])
        lifted = passes(folded).graph_module
        copy, inputs = standalone_copy(lifted, OWNER, values), adapter_inputs(lifted)
        own = [node.name for node in copy.graph.nodes if node.op == "placeholder"][: -len(inputs)]
        assert_min_sizes(copy.graph, own, least)
        copy.recompile()
        return copy, inputs, least

    def draw(
        self, variant: Variant, plan: Plan, file: str | PathLike[str] | None, sites: Sequence[str], radius: int
    ) -> Path | Picture:
        """Draw the variant around some sites; of a fallback, the graphs that have run."""
        module = variant.module
        graphs = getattr(module, "rewritten", [module])  # of a fallback, or of a graph split for shards
        return draw_graphs([graph for graph in graphs if isinstance(graph, fx.GraphModule)], plan, file, sites, radius)


def _with_refusals(decided: Decided, model: nn.Module, reason: Reason, sentences: Mapping[str, str]) -> Decided:
    """Refuse the matrices that have a sentence, unless they are sites or refused already or the spec names them."""
    weights, spec = named_weights(model), decided.plan.spec
    decided_weights = {refusal.weight for refusal in decided.refusals} | decided.plan.by_weight.keys()
    added = [
        Refusal(name, "", reason, sentence)
        for name, sentence in sentences.items()
        if name in weights.matrices and name not in decided_weights
        if not any(matches(pattern, weights.names[name]) for pattern in (*spec.exclude, *spec.train))
    ]
    return replace(decided, refusals=(*decided.refusals, *added))


def _trained(model: nn.Module, decided: Decided) -> set[str]:
    """Return the parameters that training changes, directly or by a branch, as far as is known before a capture."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return trainable | (candidates(model, decided.plan.spec) - {refusal.weight for refusal in decided.refusals})


def _of_fallback(captured: Captured, decided: Decided, args: Any, kwargs: Any) -> Made:
    """Return the variant of a model with graph breaks."""
    serves_all = not captured.whole_elsewhere
    made = make_fallback(captured.fallback, decided, args, kwargs, swap_all=captured.own_backward, universal=serves_all)
    variant = made.variant
    if not variant.universal:  # dynamo has its own guards on inputs
        variant = replace(variant, conditions=Conditions(state=captured.conditions.state))
    return replace(made, variant=variant, refused_frontends=captured.refused)
