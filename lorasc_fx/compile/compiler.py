"""Make the adapted graphs (variants) of a cascade: capture a call, match sites, insert branches. Fold and draw them."""

from __future__ import annotations

import glob
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from lorasc_fx.branch import Decided
from lorasc_fx.capture import EXPORT, Axis, Captured, capture, least_sizes
from lorasc_fx.check.isolation import has_values, written_by
from lorasc_fx.check.modes import is_data_dependent, same_in_current_mode
from lorasc_fx.check.projections import requiring_grad
from lorasc_fx.compile.eager import EagerModel, make_eager, with_uses
from lorasc_fx.compile.variants import NewVariant, Variant
from lorasc_fx.errors import CaptureError
from lorasc_fx.graph import faults, matches, named_weights, record_of, set_record, shared_memory
from lorasc_fx.graph.copies import standalone_copy
from lorasc_fx.graph.editor import assert_min_sizes
from lorasc_fx.graph.matching import candidates
from lorasc_fx.graph.placement import placements_of
from lorasc_fx.graph.record import AdapterInput, at_stage
from lorasc_fx.graph.weights import BRANCHES, branches_in
from lorasc_fx.passes import (
    AdapterInputs,
    AttentionMasks,
    FoldBranches,
    InsertBranches,
    MatchSites,
    Pipeline,
    adapter_inputs,
)
from lorasc_fx.pictures import draw_graphs
from lorasc_fx.plan import Plan, Reason, Refusal
from lorasc_fx.signature import Call, Calls, requires_grad
from lorasc_fx.spec import CascadeSpec


@dataclass(frozen=True)
class Compiler:
    """Makes, folds and draws variants. The cascade itself does not work with graphs.

    Args:
        frontend: name of a front end, or `auto`.
        calls: binds arguments to the signature of the user's forward.
    """

    frontend: str
    calls: Calls

    def decide(self, model: nn.Module, plan: Plan) -> Decided:
        """Make the branches of a saved plan without a capture. Also refuse weights by the spec or for shared memory."""
        decided = _with_refusals(Decided(plan, {}, (), ()), model, Reason.SHARED_MEMORY, shared_memory(model))
        return with_uses(decided, model, None)

    def faults(self, variant: Variant) -> list[str]:
        """Return one sentence per disagreement of a graph with its plan. A variant without a graph has none."""
        return faults(variant.module) if isinstance(variant.module, fx.GraphModule) else []

    def make(
        self,
        model: nn.Module,
        decided: Decided,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        dynamic: Collection[Axis] = (),
        existing: Sequence[Variant] = (),
    ) -> NewVariant:
        """Capture a call, insert the branches, and return the new variant.

        Args:
            model: the model. It is left unchanged.
            decided: the plan to follow, the existing branches, and the refusals so far.
            args, kwargs: arguments of the call, in canonical form.
            dynamic: axes to make dynamic, see `capture`.
            existing: the earlier variants of this model.

        Raises:
            CaptureError: no front end works, or the model raises.
            PassError: the graph cannot follow the plan.
        """
        decided = _with_refusals(decided, model, Reason.SHARED_MEMORY, shared_memory(model))
        trained = _trained(model, decided)
        captured = capture(model, args, kwargs, self.frontend, dynamic, trained, rewrites=(AttentionMasks(),))
        # A graph does not show every write. But the preflight has found the parameters that forward writes into.
        written = dict.fromkeys(sorted(written_by(model)), "forward writes into it")
        decided = _with_refusals(decided, model, Reason.MUTATED, written)
        if captured.module is None:
            earlier = next((variant.module for variant in existing if isinstance(variant.module, EagerModel)), None)
            return make_eager(captured, model, decided, args, kwargs, earlier)
        return insert(captured, captured.module, decided)

    def reuse(self, model: nn.Module, decided: Decided, call: Call, variant: Variant) -> Variant | None:
        """Return a variant that reuses the graph of an earlier one, or None if the model computes something else now.

        The new variant serves only the sizes of this call, because in this mode the model may also depend on sizes. The
        comparison runs the model twice.

        Args:
            model: the model. It is left unchanged.
            decided: the plan.
            call: the call.
            variant: the earlier variant. It accepts the inputs, but was captured in another mode of the model.
        """
        conditions = variant.conditions
        graph = variant.module.graph if isinstance(variant.module, fx.GraphModule) else None
        if variant.frontend is not EXPORT or graph is None or conditions.state is None or not has_values(model):
            return None
        if is_data_dependent(graph):
            return None
        with requiring_grad(model, _trained(model, decided)):
            same = same_in_current_mode(model, call.args, call.kwargs, conditions.state)
        if same is None:
            return None
        state, seen = same
        conditions = replace(
            conditions,
            sizes=tuple([tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else None for leaf in call.leaves]),
            requested=frozenset(),
            state=state,
            grad=torch.is_grad_enabled(),
            requires_grad=requires_grad(call.leaves) if seen.reads_grad_state else conditions.requires_grad,
        )
        return replace(variant, conditions=conditions)

    def fold(
        self,
        variant: Variant,
        model: nn.Module,
        stage: int,
        values: Mapping[str, Any] | None,
        args: Any,
        kwargs: Any,
    ) -> tuple[fx.GraphModule, dict[Axis, int]]:
        """Return the variant's graph without branches, and {axis of an input: its smallest valid size}.

        Args:
            variant: the variant to fold.
            model, args, kwargs: the call that it was captured for.
            stage: the current stage.
            values: {weight name: value} for the constants of the new graph, which then raises for sizes that are too
                small. None to keep reading the model's parameters.

        Raises:
            CaptureError: the variant has no graph.
        """
        module = _graph_of(variant, model)
        at_stage(module, stage)  # the graph may be from an earlier stage
        folded = FoldBranches()(module).graph_module
        least = {} if variant.frontend.serves_all_calls else least_sizes(folded, model, args, kwargs)
        if values is None:
            return folded, least
        copy = standalone_copy(folded, values)
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
        args: object,
        kwargs: object,
    ) -> tuple[fx.GraphModule, tuple[AdapterInput, ...], dict[Axis, int]]:
        """Return (graph whose inputs include the LoRA factors of its sites, these inputs, smallest sizes as in `fold`).

        Unlike the graph of `fold`, this one does not raise for smaller sizes.

        Args:
            variant, model, stage, args, kwargs: as for `fold`.
            values: {weight name: value} for the constants of the graph.
            max_rank: rank of the factors. Adapters of smaller ranks are padded with zeros.
        """
        # Remove the branches of the cascade, and insert LoRA branches of the maximum rank at the same sites.
        folded, least = self.fold(variant, model, stage, None, args, kwargs)
        targets = tuple(glob.escape(site.weight) for site in record_of(folded).plan.sites)
        spec = CascadeSpec(targets, rank=max_rank, lora_alpha=float(max_rank), placement="beside")
        passes = Pipeline([MatchSites(spec), InsertBranches(), AdapterInputs(max_rank)])
        lifted = passes(folded).graph_module
        return standalone_copy(lifted, values), adapter_inputs(lifted), least

    def draw(self, variant: Variant, plan: Plan, sites: Sequence[str], radius: int) -> str:
        """Return Graphviz text of the nodes around some sites."""
        module = variant.module
        graphs = getattr(module, "rewritten", None) or [module]  # a graph split for FSDP has several graphs
        return draw_graphs([graph for graph in graphs if isinstance(graph, fx.GraphModule)], plan, sites, radius)


def _graph_of(variant: Variant, model: nn.Module) -> fx.GraphModule:
    """Return the graph of a variant. Raise CaptureError if the model runs eagerly."""
    if isinstance(variant.module, EagerModel):
        raise CaptureError(
            f"{type(model).__name__} has no graph to fold, draw or export, because it runs eagerly: "
            f"{variant.module.reason}. release() and folded_state_dict() need no graph.",
            code="no-graph",
        )
    assert isinstance(variant.module, fx.GraphModule)
    return variant.module


def insert(captured: Captured, module: fx.GraphModule, decided: Decided) -> NewVariant:
    """Match sites and insert branches in a captured graph.

    Args:
        captured: the result of the capture.
        module: the captured graph module, which is changed.
        decided: the plan to follow, the existing branches, and the refusals so far.
    """
    plan = decided.plan
    if decided.branches:
        module._modules[BRANCHES] = nn.ModuleDict(dict(decided.branches))
    set_record(module, replace(record_of(module), plan=plan, refusals=decided.refusals))
    adapted = Pipeline([MatchSites(plan.spec), InsertBranches()])(module).graph_module
    record = record_of(adapted)
    variant = Variant(adapted, captured.frontend, captured.conditions, placements=placements_of(adapted))
    return NewVariant(
        record.plan, branches_in(adapted) or {}, record.refusals, record.unreached, variant, captured.refused
    )


def _with_refusals(decided: Decided, model: nn.Module, reason: Reason, sentences: Mapping[str, str]) -> Decided:
    """Add a refusal for each weight matrix in `sentences`, which is {weight name: sentence of the refusal}.

    Weights that are already sites or refused are skipped, and weights that the spec excludes or trains in full.
    """
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
    """Return the names of the parameters that training may change, directly or by a branch."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return trainable | (candidates(model, decided.plan.spec) - {refusal.weight for refusal in decided.refusals})
