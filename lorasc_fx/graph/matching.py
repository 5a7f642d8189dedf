"""Which nodes use which weights, and what becomes of every weight matrix: site, refusal, or unreached.

A weight is adapted at all of its uses or at none: a fold moves the weight itself, so one use without a branch would
make the folded model differ from the trained one. Where every use has a form, branches stand beside the uses; else
one branch stands on the weight, before all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from lorasc_fx.branch import is_quantized
from lorasc_fx.errors import PassError, SpecError
from lorasc_fx.graph.chosen import choices
from lorasc_fx.graph.forms import ON_CHOSEN, ON_WEIGHT
from lorasc_fx.graph.reading import Found, kind_at, read
from lorasc_fx.graph.record import Record, Use
from lorasc_fx.graph.targets import check_patterns, describe, matches, targeted
from lorasc_fx.graph.weights import Weights, named_weights, owner_of
from lorasc_fx.plan import Plan, Reason, Refusal, Site
from lorasc_fx.spec import KINDS, CascadeSpec

__all__ = ["Matching", "Placer", "candidates", "match", "survey"]

Placer = Callable[[Site, Sequence[fx.Node]], str]
"""Tells, of a site and the nodes beside which its branch could stand, which placement is cheapest."""


def reference(site: Site, nodes: Sequence[fx.Node]) -> str:
    """Place every branch beside its op."""
    return "beside"


@dataclass(frozen=True)
class Matching:
    """Outcome of a match: the plan with its sites, the use of each node that has one, and the rest of the matrices."""

    plan: Plan
    uses: dict[fx.Node, Use]
    refusals: tuple[Refusal, ...]
    unreached: tuple[str, ...]


def candidates(owner: torch.nn.Module, spec: CascadeSpec) -> frozenset[str]:
    """Return the weights to which the spec may give a branch, before a graph shows how they are used."""
    weights = named_weights(owner)
    return frozenset(name for name in weights.matrices if _refuse(spec, weights, name, Found()) is None)


def survey(
    graph_modules: Sequence[fx.GraphModule],
    record: Record,
    spec: CascadeSpec,
    outside: Mapping[str, str],
    place: Placer = reference,
) -> Matching:
    """Classify the weights of a model that several graphs make up; no node is marked.

    Args:
        graph_modules: that read one live model.
        record: with the plan to be followed, if any.
        spec: what is asked.
        outside: kinds of the weights that the model is seen to use, in graphs or in between; empty for other uses.
        place: tells where a new site's branch stands, where the spec leaves it open.

    Raises:
        UnknownTarget: a pattern of the spec matches nothing.
    """
    owner = owner_of(graph_modules[0], record)
    weights = named_weights(owner)
    check_patterns(spec, weights.matrices, weights.names)
    found: dict[str, Found] = defaultdict(Found)
    for path, module in owner.named_modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)):
            found[weights.canonical.get(f"{path}.weight".lstrip("."), "")].layer = True
    for graph_module in graph_modules:
        for weight, seen in read(graph_module, record, weights).items():
            found[weight].join(seen)
    for weight, kind in outside.items():
        if weight in weights.matrices and not found[weight].kinds:
            found[weight].touched = True
            found[weight].outside += [kind] if kind else []
    return _classify(found, weights, record, spec, place)


def match(graph_module: fx.GraphModule, record: Record, spec: CascadeSpec, place: Placer = reference) -> Matching:
    """Classify every weight matrix that the graph module's owner has.

    A plan in the record is followed: its sites keep their branches, what was refused stays refused, and a weight that
    was unreached becomes a site when this graph uses it. `place` tells where a new site's branch stands, where the spec
    leaves it open.

    Raises:
        UnknownTarget: a pattern of the spec matches nothing.
        PassError: a planned site is used here in a way that no branch can follow.
    """
    weights = named_weights(owner_of(graph_module, record))
    check_patterns(spec, weights.matrices, weights.names)
    found = read(graph_module, record, weights)
    matching = _classify(found, weights, record, spec, place)
    return replace(matching, uses=_marks(graph_module, found, matching.plan))


def _classify(
    found: Mapping[str, Found], weights: Weights, record: Record, spec: CascadeSpec, place: Placer
) -> Matching:
    plan = record.plan if record.plan is not None else Plan(spec)
    known = plan.by_weight
    earlier = {refusal.weight: refusal for refusal in record.refusals}
    sites: list[Site] = []
    refusals: list[Refusal] = []
    unreached: list[str] = []
    for weight, names in weights.matrices.items():
        seen = found.get(weight, Found())
        refusal = earlier.get(weight) or _refuse(spec, weights, weight, seen)
        if weight in known:
            if refusal is not None and not seen.can_follow:
                raise PassError(
                    f"{weight} has a branch, but this graph uses it where none can stand: {refusal.sentence}. "
                    f"Exclude it (exclude=({weight!r},)), or do not run the model in this mode"
                )
        elif refusal is not None:
            refusals.append(refusal)
        elif not seen.reached:
            unreached.append(weight)
        else:
            layout = seen.beside[0].layout if seen.all_beside else "out_in"
            shape = tuple(weights.parameters[weight].shape)
            site = describe(spec, weight, kind_at(shape, seen), shape, names[1:], layout, seen.parts(shape))
            site = replace(site, form=seen.own_form)
            sites.append(_placed(site, seen, weights.parameters[weight], spec, place))
    return Matching(plan.with_sites(tuple(sites)), {}, tuple(refusals), tuple(unreached))


def _placed(site: Site, seen: Found, weight: torch.Tensor, spec: CascadeSpec, place: Placer) -> Site:
    """Return the site with its placement, and with dropout where the branch sees an input that can be dropped.

    Raises:
        SpecError: it is to have magnitudes, and is used where none can stand.
    """
    if site.use_dora:
        if not _in_place(site, seen) or is_quantized(weight):
            raise SpecError(
                f"use_dora is True, and {site.weight} is {_seen_as(site, seen, weight)}, where no magnitude can stand: "
                "only products and convolutions that read the weight as it is stored. "
                f"Exclude it (exclude=({site.weight!r},)), or give use_dora=False"
            )
        return replace(site, placement="merged")
    if not _beside(site, seen):
        return site  # on the weight wherever it is used so
    if spec.placement == "weight" and not seen.called and not is_quantized(weight):
        return replace(site, placement="weight")
    if site.kind not in ("linear", "conv"):
        return site
    if spec.dropout:
        return replace(site, dropout=float(spec.dropout))
    if is_quantized(weight) or spec.placement == "beside" or not any(each.mergeable for each in seen.beside):
        return site
    if spec.placement != "merged" and not spec.train_A:
        return site  # where only A x is kept
    merged = spec.placement == "merged" or place(site, [each.node for each in seen.beside]) == "merged"
    return replace(site, placement="merged") if merged else site


def _in_place(site: Site, seen: Found) -> bool:
    """Whether a branch can stand in place of every use."""
    return site.kind in ("linear", "conv") and _beside(site, seen) and all(each.mergeable for each in seen.beside)


def _seen_as(site: Site, seen: Found, weight: torch.Tensor) -> str:
    if is_quantized(weight):
        return "quantized"
    odd = [node for node, _ in seen.contracted] or seen.others or [each.node for each in seen.beside]
    return f"of kind {site.kind!r}, used at node {_told(odd[0])}" if odd else f"of kind {site.kind!r}"


def _beside(site: Site, seen: Found) -> bool:
    """Whether a branch can stand beside every use: a stack of experts only where all forms are of experts."""
    kinds = {each.kind for each in seen.beside}
    return seen.all_beside and (site.kind != "experts" or kinds == {"experts"})


def _marks(graph_module: fx.GraphModule, found: Mapping[str, Found], plan: Plan) -> dict[fx.Node, Use]:
    marks: dict[fx.Node, Use] = {}
    for weight, site in plan.by_weight.items():
        seen = found.get(weight, Found())
        if site.use_dora and seen.reached and not _in_place(site, seen):
            raise PassError(
                f"{weight} has magnitudes, and this graph uses it where none can stand. "
                f"Exclude it (exclude=({weight!r},)), or do not run the model in this mode"
            )
        if _beside(site, seen) and seen.beside[0].layout == site.layout and (site.placement != "weight" or seen.called):
            merged = site.placement == "merged"
            marks |= {each.node: Use(weight, each.form, merged and each.mergeable) for each in seen.beside}
        elif seen.reached and not seen.called:
            for source in seen.sources:
                chosen = choices(source) if site.kind == "experts" else []
                marks |= dict.fromkeys(chosen, Use(weight, ON_CHOSEN)) or {source: Use(weight, ON_WEIGHT)}
        elif seen.reached:
            raise PassError(
                f"{weight}: node {seen.called[0].name} reads it in another layout than its branch has. "
                f"Exclude it (exclude=({weight!r},)), or do not run the model in this mode"
            )
    order = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    return dict(sorted(marks.items(), key=lambda item: order[item[0]]))


_UNUSED = "uses it neither in a matrix product or convolution nor as a table"


def _refuse(spec: CascadeSpec, weights: Weights, weight: str, seen: Found) -> Refusal | None:
    """Return why a weight gets no branch, or None where it can have one (or is not reached)."""
    names, parameter = weights.names[weight], weights.parameters[weight]
    if any(matches(pattern, names) for pattern in spec.exclude):
        return Refusal(weight, "", Reason.EXCLUDED, "excluded by the spec")
    if any(matches(pattern, names) for pattern in spec.train):
        return Refusal(weight, "", Reason.TRAINED, "trained in full, as the spec asks")
    kinds = {kind_at(tuple(parameter.shape), seen)} if seen.kinds else set()
    wanted = any(targeted(spec.targets, kind, names) for kind in kinds)
    if not kinds:
        wanted = any(pattern in KINDS or matches(pattern, names) for pattern in spec.targets)
    if not wanted:
        return Refusal(weight, "", Reason.NOT_TARGETED, "matches no target of the spec")
    if not parameter.numel():
        return Refusal(weight, "", Reason.EMPTY, f"of shape {tuple(parameter.shape)}, holds no numbers")
    if not parameter.is_floating_point():
        why = "and branches are real" if parameter.is_complex() else "which has no gradient"
        return Refusal(weight, "", Reason.NOT_FLOATING, f"holds {parameter.dtype}, {why}")
    if seen.written:
        sentence = f"node {_told(seen.written[0])} writes into it while the model runs"
        return Refusal(weight, seen.written[0].name, Reason.MUTATED, sentence)
    if seen.opaque:
        sentence = f"module {seen.opaque[0].target} is called whole; capture with another front end sees inside it"
        return Refusal(weight, seen.opaque[0].name, Reason.OPAQUE, sentence)
    if not seen.reached and seen.touched:
        sentence = f"Python between the graphs {_UNUSED}"
        return Refusal(weight, "", Reason.NO_FORM, sentence)
    if not seen.reached:
        return None
    if not seen.kinds:
        sentence = f"node {_told(seen.others[0])} {_UNUSED}"
        return Refusal(weight, seen.others[0].name, Reason.NO_FORM, sentence)
    if is_quantized(parameter) and not (seen.all_beside and set(seen.kinds) == {"linear"}):
        told = next(
            iter(seen.others or [node for node, _ in seen.contracted] or [each.node for each in seen.beside]), None
        )
        where = f"node {_told(told)} computes" if told is not None else "Python between the graphs computes"
        sentence = f"{where} with its quantized numbers, and no branch can stand beside that"
        return Refusal(weight, told.name if told is not None else "", Reason.QUANTIZED, sentence)
    if not seen.all_beside and seen.called:
        other = (seen.others or [node for node, _ in seen.contracted] or [seen.beside[-1].node])[0]
        sentence = f"module {seen.called[0].target} is called whole, and node {_told(other)} uses its weight as well"
        return Refusal(weight, other.name, Reason.MIXED_USES, sentence)
    # a layer of one output that only Python between the graphs calls is no vector: its branch stands on the weight
    single = parameter.numel() == max(parameter.shape, default=0)
    if single and not seen.all_beside and not (seen.layer and not seen.contracted and not seen.others):
        return Refusal(weight, "", Reason.VECTOR, f"of shape {tuple(parameter.shape)}, has one axis longer than 1")
    return None


def _told(node: fx.Node) -> str:
    target = fx.node._get_qualified_name(node.target) if callable(node.target) else str(node.target)
    return f"{node.name} ({node.op} {target})"
