"""Which nodes use which weights, and what becomes of every weight matrix: site, refusal, or unreached.

A weight is adapted at all of its uses or at none: a fold moves the weight itself, so one use without a branch would
make the folded model differ from the trained one. Where every use has a form, branches stand beside the uses; else
one branch stands on the weight, before all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from lorasc_fx.branch import Branch, is_quantized
from lorasc_fx.errors import PassError
from lorasc_fx.graph.flow import Meeting, constants, mutates
from lorasc_fx.graph.forms import ON_WEIGHT, FunctionForm, form_of, transposes
from lorasc_fx.graph.record import Record, Use
from lorasc_fx.graph.slices import Rows, parts_of, rows_read
from lorasc_fx.graph.targets import check_patterns, describe, matches, targeted
from lorasc_fx.graph.uses import kind_of, uses_of
from lorasc_fx.graph.weights import Weights, module_at, named_weights, owner_of
from lorasc_fx.plan import Plan, Reason, Refusal, Site
from lorasc_fx.spec import KINDS, CascadeSpec

__all__ = ["Matching", "match", "survey"]


@dataclass(frozen=True)
class Matching:
    """Outcome of a match: the plan with its sites, the use of each node that has one, and the rest of the matrices."""

    plan: Plan
    uses: dict[fx.Node, Use]
    refusals: tuple[Refusal, ...]
    unreached: tuple[str, ...]


@dataclass(frozen=True)
class _Beside:
    """A node beside which a branch can stand."""

    node: fx.Node
    form: str
    kind: str
    layout: str


@dataclass
class _Found:
    """All that the graph says of one weight: its get_attr nodes, and what uses it."""

    sources: list[fx.Node] = field(default_factory=list)
    beside: list[_Beside] = field(default_factory=list)
    contracted: list[tuple[fx.Node, str]] = field(default_factory=list)
    others: list[fx.Node] = field(default_factory=list)
    opaque: list[fx.Node] = field(default_factory=list)
    written: list[fx.Node] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    rows: list[Rows | None] = field(default_factory=list)
    touched: bool = False

    @property
    def reached(self) -> bool:
        seen = (self.beside, self.contracted, self.others, self.opaque, self.written, self.outside)
        return any(seen)

    @property
    def can_follow(self) -> bool:
        """Whether a branch that the weight has already can stand here: on the weight at least, or nothing reads it."""
        return not (self.written or self.opaque or (self.called and not self.all_beside))

    def join(self, other: _Found) -> None:
        """Take in what another graph says of the same weight."""
        for name in ("sources", "beside", "contracted", "others", "opaque", "written", "rows"):
            getattr(self, name).extend(getattr(other, name))

    @property
    def kinds(self) -> list[str]:
        return [each.kind for each in self.beside] + [kind for _, kind in self.contracted] + self.outside

    @property
    def all_beside(self) -> bool:
        return not (self.contracted or self.others or self.outside) and len({each.layout for each in self.beside}) == 1

    def parts(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The rows of the slices in which all uses together read the weight, or ()."""
        sliced = not (self.beside or self.others or self.outside) and _kind(shape, self) != "experts"
        return parts_of(self.rows, shape[0]) if sliced else ()

    @property
    def called(self) -> list[fx.Node]:
        """Nodes that call a module which holds the weight: a branch on the weight would not be seen by them."""
        return [each.node for each in self.beside if each.node.op == "call_module"]


def survey(
    graph_modules: Sequence[fx.GraphModule], record: Record, spec: CascadeSpec, outside: Mapping[str, str]
) -> Matching:
    """Classify the weights of a model that several graphs make up; no node is marked.

    Args:
        graph_modules: that read one live model.
        record: with the plan to be followed, if any.
        spec: what is asked.
        outside: kinds of the weights that the model is seen to use, in graphs or in between; empty for other uses.

    Raises:
        UnknownTarget: a pattern of the spec matches nothing.
    """
    weights = named_weights(owner_of(graph_modules[0], record))
    check_patterns(spec, weights.matrices, weights.names)
    found: dict[str, _Found] = defaultdict(_Found)
    for graph_module in graph_modules:
        for weight, seen in _read(graph_module, record, weights).items():
            found[weight].join(seen)
    for weight, kind in outside.items():
        if weight in weights.matrices and not found[weight].kinds:
            found[weight].touched = True
            found[weight].outside += [kind] if kind else []
    return _classify(found, weights, record, spec)


def match(graph_module: fx.GraphModule, record: Record, spec: CascadeSpec) -> Matching:
    """Classify every weight matrix that the graph module's owner has.

    A plan in the record is followed: its sites keep their branches, what was refused stays refused, and a weight that
    was unreached becomes a site when this graph uses it.

    Raises:
        UnknownTarget: a pattern of the spec matches nothing.
        PassError: a planned site is used here in a way that no branch can follow.
    """
    weights = named_weights(owner_of(graph_module, record))
    check_patterns(spec, weights.matrices, weights.names)
    found = _read(graph_module, record, weights)
    matching = _classify(found, weights, record, spec)
    return replace(matching, uses=_marks(graph_module, found, matching.plan))


def _classify(found: Mapping[str, _Found], weights: Weights, record: Record, spec: CascadeSpec) -> Matching:
    plan = record.plan if record.plan is not None else Plan(spec)
    known = plan.by_weight
    earlier = {refusal.weight: refusal for refusal in record.refusals}
    sites: list[Site] = []
    refusals: list[Refusal] = []
    unreached: list[str] = []
    for weight, names in weights.matrices.items():
        seen = found.get(weight, _Found())
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
            sites.append(describe(spec, weight, _kind(shape, seen), shape, names[1:], layout, seen.parts(shape)))
    return Matching(plan.with_sites(tuple(sites)), {}, tuple(refusals), tuple(unreached))


def _marks(graph_module: fx.GraphModule, found: Mapping[str, _Found], plan: Plan) -> dict[fx.Node, Use]:
    marks: dict[fx.Node, Use] = {}
    for weight, site in plan.by_weight.items():
        seen = found.get(weight, _Found())
        if seen.all_beside and seen.beside[0].layout == site.layout and site.kind != "experts":
            marks |= {each.node: Use(weight, each.form) for each in seen.beside}
        elif seen.reached and not seen.called:
            marks |= {source: Use(weight, ON_WEIGHT) for source in seen.sources}
        elif seen.reached:
            raise PassError(f"{weight}: node {seen.called[0].name} reads it in another layout than its branch has")
    order = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    return dict(sorted(marks.items(), key=lambda item: order[item[0]]))


def _kind(shape: tuple[int, ...], seen: _Found) -> str:
    kind = seen.kinds[0]
    return "experts" if kind == "linear" and len(shape) == 3 else kind


def _refuse(spec: CascadeSpec, weights: Weights, weight: str, seen: _Found) -> Refusal | None:
    """Return why a weight gets no branch, or None where it can have one (or is not reached)."""
    names, parameter = weights.names[weight], weights.parameters[weight]
    if any(matches(pattern, names) for pattern in spec.exclude):
        return Refusal(weight, "", Reason.EXCLUDED, "excluded by the spec")
    if any(matches(pattern, names) for pattern in spec.train):
        return Refusal(weight, "", Reason.TRAINED, "trained in full, as the spec asks")
    kinds = {_kind(tuple(parameter.shape), seen)} if seen.kinds else set()
    wanted = any(targeted(spec.targets, kind, names) for kind in kinds)
    if not kinds:
        wanted = any(pattern in KINDS or matches(pattern, names) for pattern in spec.targets)
    if not wanted:
        return Refusal(weight, "", Reason.NOT_TARGETED, "matches no target of the spec")
    if not parameter.is_floating_point():
        return Refusal(weight, "", Reason.NOT_FLOATING, f"holds {parameter.dtype}, which has no gradient")
    if seen.written:
        sentence = f"node {_told(seen.written[0])} writes into it while the model runs"
        return Refusal(weight, seen.written[0].name, Reason.MUTATED, sentence)
    if seen.opaque:
        sentence = f"module {seen.opaque[0].target} is called whole; capture with another front end sees inside it"
        return Refusal(weight, seen.opaque[0].name, Reason.OPAQUE, sentence)
    if not seen.reached and seen.touched:
        sentence = "Python between the graphs neither multiplies by it nor looks it up"
        return Refusal(weight, "", Reason.NO_FORM, sentence)
    if not seen.reached:
        return None
    if not seen.kinds:
        sentence = f"node {_told(seen.others[0])} neither multiplies by it nor looks it up"
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
    if not seen.all_beside and parameter.numel() == max(parameter.shape, default=0):
        return Refusal(weight, "", Reason.VECTOR, f"of shape {tuple(parameter.shape)}, has one axis longer than 1")
    return None


def _told(node: fx.Node) -> str:
    target = fx.node._get_qualified_name(node.target) if callable(node.target) else str(node.target)
    return f"{node.name} ({node.op} {target})"


def _read(graph_module: fx.GraphModule, record: Record, weights: Weights) -> dict[str, _Found]:
    found: dict[str, _Found] = defaultdict(_Found)
    constant = constants(graph_module.graph)
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and node.target.startswith(record.prefix):
            weight = weights.canonical.get(node.target.removeprefix(record.prefix))
            if weight is not None and weights.parameters[weight].dim() > 1:
                found[weight].sources.append(node)
                start, shape = _behind_branch(graph_module, node), tuple(weights.parameters[weight].shape)
                for meeting in uses_of(start, constant | {start}):
                    _read_meeting(meeting, start, shape, found[weight])
        elif node.op == "call_module":
            _read_module(graph_module, node, record, weights, found)
    return found


def _behind_branch(graph_module: fx.GraphModule, source: fx.Node) -> fx.Node:
    """Return the branch node that stands on a weight already, or the weight's own node."""
    for user in source.users:
        if user.op == "call_module" and isinstance(module_at(graph_module, str(user.target)), Branch):
            return user
    return source


def _read_meeting(meeting: Meeting, start: fx.Node, shape: tuple[int, ...], found: _Found) -> None:
    node, dims = meeting.node, len(shape)
    if any(mutates(node, source) for source in meeting.aliases):
        found.written.append(node)
        return
    form, layout = form_of(node, None), None
    if isinstance(form, FunctionForm) and form.dims == dims and len(meeting.reads) == 1:
        source, turned = meeting.reads[0], False
        fits = form.fits(node, source)
        while source is not start and transposes(source) and dims == 2:
            source, turned = source.all_input_nodes[0], not turned
        if fits and source is start:
            layout = form.layout if not turned else {"out_in": "in_out", "in_out": "out_in"}[form.layout]
    if isinstance(form, FunctionForm) and layout is not None:
        found.beside.append(_Beside(node, form.name, form.kind, layout))
    elif (kind := kind_of(meeting)) is not None:
        found.contracted.append((node, kind))
        found.rows += [rows_read(source, start, shape) for source in meeting.reads]
    else:
        found.others.append(node)


def _read_module(
    graph_module: fx.GraphModule, node: fx.Node, record: Record, weights: Weights, found: dict[str, _Found]
) -> None:
    module = module_at(graph_module, str(node.target))
    if module is None or isinstance(module, Branch):
        return
    name = str(node.target).removeprefix(record.prefix)
    form = form_of(node, module)
    used = weights.canonical.get(f"{name}.weight") if form is not None else None
    if form is not None and used is not None:
        found[used].beside.append(_Beside(node, form.name, form.kind, form.layout))
    for own, parameter in module.named_parameters(remove_duplicate=False):
        weight = weights.canonical.get(f"{name}.{own}")
        if weight is not None and weight != used and parameter.dim() > 1:
            renormed = own == "weight" and getattr(module, "max_norm", None) is not None
            (found[weight].written if renormed else found[weight].opaque).append(node)
