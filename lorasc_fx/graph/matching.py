"""Which nodes use which weights, and what becomes of every weight matrix: site, refusal, or unreached.

A weight is adapted at all of its uses or at none: a fold moves the weight itself, so one use without a branch would
make the folded model differ from the trained one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from lorasc_fx.branch import Branch
from lorasc_fx.errors import PassError
from lorasc_fx.graph.forms import FunctionForm, form_of
from lorasc_fx.graph.record import Record, Use
from lorasc_fx.graph.targets import check_patterns, describe, matches, targeted
from lorasc_fx.graph.weights import Weights, module_at, named_weights, owner_of
from lorasc_fx.plan import Plan, Reason, Refusal, Site
from lorasc_fx.spec import KINDS, CascadeSpec

__all__ = ["Matching", "match", "shape_only"]

_SHAPE_ONLY = {torch.ops.aten.sym_size.int, torch.ops.aten._assert_tensor_metadata.default}
_SHAPE_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad"}
_SHAPE_METHODS = {"size", "dim", "numel", "is_floating_point", "stride"}


@dataclass(frozen=True)
class Matching:
    """Outcome of a match: the plan with its sites, the use of each node that has one, and the rest of the matrices."""

    plan: Plan
    uses: dict[fx.Node, Use]
    refusals: tuple[Refusal, ...]
    unreached: tuple[str, ...]


@dataclass(frozen=True)
class _Foreign:
    """A node that uses a weight in no known form."""

    node: fx.Node
    opaque: bool


@dataclass
class _Found:
    uses: dict[str, list[tuple[fx.Node, str, str]]]
    foreign: dict[str, list[_Foreign]]


def match(graph_module: fx.GraphModule, record: Record, spec: CascadeSpec) -> Matching:
    """Classify every weight matrix that the graph module's owner has.

    A plan in the record is followed: its sites keep their branches, what was refused stays refused, and a weight that
    was unreached becomes a site when this graph uses it.

    Raises:
        UnknownTarget: a pattern of the spec matches nothing.
        PassError: a planned site is used here in a form that the table does not have.
    """
    weights = named_weights(owner_of(graph_module, record))
    check_patterns(spec, weights.matrices, weights.names)
    found = _read(graph_module, record, weights)
    plan = record.plan if record.plan is not None else Plan(spec)
    known = plan.by_weight
    earlier = {refusal.weight: refusal for refusal in record.refusals}
    sites: list[Site] = []
    refusals: list[Refusal] = []
    unreached: list[str] = []
    for weight, names in weights.matrices.items():
        uses, foreign = found.uses.get(weight, []), found.foreign.get(weight, [])
        refusal = earlier.get(weight) or _refuse(spec, weights, weight, uses, foreign)
        if weight in known:
            if refusal is not None and foreign:
                raise PassError(
                    f"{weight} has a branch, but this graph uses it at node {foreign[0].node.name} in a form that has "
                    f"none: {refusal.sentence}. Exclude it (exclude=({weight!r},)) or do not run the model in this mode"
                )
            continue
        if refusal is not None:
            refusals.append(refusal)
        elif uses:
            shape = tuple(weights.parameters[weight].shape)
            sites.append(describe(spec, weight, uses[0][2], shape, names[1:]))
        else:
            unreached.append(weight)
    plan = plan.with_sites(tuple(sites))
    planned = plan.by_weight
    marks = {node: Use(weight, form) for weight in planned for node, form, _ in found.uses.get(weight, [])}
    order = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    marks = dict(sorted(marks.items(), key=lambda item: order[item[0]]))
    return Matching(plan, marks, tuple(refusals), tuple(unreached))


def _refuse(
    spec: CascadeSpec,
    weights: Weights,
    weight: str,
    uses: list[tuple[fx.Node, str, str]],
    foreign: list[_Foreign],
) -> Refusal | None:
    names = weights.names[weight]
    node = foreign[0].node.name if foreign else ""
    if any(matches(pattern, names) for pattern in spec.exclude):
        return Refusal(weight, "", Reason.EXCLUDED, "excluded by the spec")
    if any(matches(pattern, names) for pattern in spec.train):
        return Refusal(weight, "", Reason.TRAINED, "trained in full, as the spec asks")
    kinds = {kind for _, _, kind in uses}
    wanted = any(targeted(spec.targets, kind, names) for kind in kinds)
    if not kinds:
        wanted = any(pattern in KINDS or matches(pattern, names) for pattern in spec.targets)
    if not wanted:
        return Refusal(weight, "", Reason.NOT_TARGETED, "matches no target of the spec")
    if not weights.parameters[weight].is_floating_point():
        sentence = f"holds {weights.parameters[weight].dtype}, which has no gradient"
        return Refusal(weight, node, Reason.NOT_FLOATING, sentence)
    if not foreign:
        return None
    first = foreign[0]
    if first.opaque:
        sentence = f"module {first.node.target} is called whole; capture with another front end sees inside it"
        return Refusal(weight, node, Reason.OPAQUE, sentence)
    what = f"{first.node.op} {fx.node._get_qualified_name(first.node.target)}" if callable(first.node.target) else ""
    what = what or f"{first.node.op} {first.node.target}"
    if uses:
        sentence = f"node {node} ({what}) uses it beside {len(uses)} known uses, and would see the folded weight only"
        return Refusal(weight, node, Reason.MIXED_USES, sentence)
    return Refusal(
        weight, node, Reason.NO_FORM, f"used by node {node} ({what}), which is in no row of the table of forms"
    )


def _read(graph_module: fx.GraphModule, record: Record, weights: Weights) -> _Found:
    found = _Found(defaultdict(list), defaultdict(list))
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and node.target.startswith(record.prefix):
            weight = weights.canonical.get(node.target.removeprefix(record.prefix))
            if weight is not None and weights.parameters[weight].dim() > 1:
                _read_attribute(node, weight, weights, found)
        elif node.op == "call_module":
            _read_module(graph_module, node, record, weights, found)
    return found


def _read_attribute(node: fx.Node, weight: str, weights: Weights, found: _Found) -> None:
    for user in node.users:
        if shape_only(user):
            continue
        form = form_of(user, None)
        fits = isinstance(form, FunctionForm) and form.weight(user) is node and user.all_input_nodes.count(node) == 1
        if fits and isinstance(form, FunctionForm) and weights.parameters[weight].dim() == form.dims:
            others = [argument for argument in _flat(user) if argument is node]
            if len(others) == 1:
                found.uses[weight].append((user, form.name, form.kind))
                continue
        found.foreign[weight].append(_Foreign(user, opaque=False))


def _read_module(graph_module: fx.GraphModule, node: fx.Node, record: Record, weights: Weights, found: _Found) -> None:
    assert isinstance(node.target, str)
    module = module_at(graph_module, node.target)
    if module is None or isinstance(module, Branch):
        return
    name = node.target.removeprefix(record.prefix)
    form = form_of(node, module)
    used = weights.canonical.get(f"{name}.weight") if form is not None else None
    if form is not None and used is not None:
        found.uses[used].append((node, form.name, form.kind))
    for own, parameter in module.named_parameters(remove_duplicate=False):
        weight = weights.canonical.get(f"{name}.{own}")
        if weight is not None and weight != used and parameter.dim() > 1:
            found.foreign[weight].append(_Foreign(node, opaque=True))


def shape_only(node: fx.Node) -> bool:
    """Whether the node reads no value of the weight, only its shape, dtype or device."""
    if node.op == "call_method":
        return node.target in _SHAPE_METHODS
    if node.op != "call_function":
        return False
    return node.target in _SHAPE_ONLY or (node.target is getattr and node.args[1] in _SHAPE_ATTRIBUTES)


def _flat(node: fx.Node) -> Iterable[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found
