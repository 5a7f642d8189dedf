"""What a graph says of each weight: the nodes that read it, and what they do with it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from torch import fx

from lorasc_fx.branch import Branch
from lorasc_fx.graph.chosen import choices
from lorasc_fx.graph.flow import Meeting, constants, mutates
from lorasc_fx.graph.form import FunctionForm
from lorasc_fx.graph.forms import form_of, transposes
from lorasc_fx.graph.own_forms import own_form, own_named
from lorasc_fx.graph.record import Record
from lorasc_fx.graph.slices import Rows, parts_of, rows_read
from lorasc_fx.graph.spelling import mergeable, spelled, spelling_of
from lorasc_fx.graph.uses import kind_of, uses_of
from lorasc_fx.graph.weights import Weights, module_at

__all__ = ["Beside", "Found", "kind_at", "read"]


@dataclass(frozen=True)
class Beside:
    """A node beside which a branch can stand."""

    node: fx.Node
    form: str
    kind: str
    layout: str
    mergeable: bool = False


@dataclass
class Found:
    """All that the graph says of one weight: its get_attr nodes, and what uses it.

    `layer`: it is the weight of a linear, conv or embedding module of torch.nn.
    """

    sources: list[fx.Node] = field(default_factory=list)
    beside: list[Beside] = field(default_factory=list)
    contracted: list[tuple[fx.Node, str]] = field(default_factory=list)
    others: list[fx.Node] = field(default_factory=list)
    opaque: list[fx.Node] = field(default_factory=list)
    written: list[fx.Node] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    rows: list[Rows | None] = field(default_factory=list)
    touched: bool = False
    layer: bool = False

    @property
    def reached(self) -> bool:
        """Whether anything uses the weight."""
        seen = (self.beside, self.contracted, self.others, self.opaque, self.written, self.outside)
        return any(seen)

    @property
    def can_follow(self) -> bool:
        """Whether a branch that the weight has already can stand here: on the weight at least, or nothing reads it."""
        return not (self.written or self.opaque or (self.called and not self.all_beside))

    def join(self, other: Found) -> None:
        """Take in what another graph says of the same weight."""
        for name in ("sources", "beside", "contracted", "others", "opaque", "written", "rows"):
            getattr(self, name).extend(getattr(other, name))

    @property
    def kinds(self) -> list[str]:
        """The kind of site that each use makes."""
        return [each.kind for each in self.beside] + [kind for _, kind in self.contracted] + self.outside

    @property
    def all_beside(self) -> bool:
        """Whether a branch can stand beside every use, in one layout."""
        return not (self.contracted or self.others or self.outside) and len({each.layout for each in self.beside}) == 1

    def parts(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The rows of the slices in which all uses together read the weight, or ()."""
        sliced = not (self.beside or self.others or self.outside) and kind_at(shape, self) != "experts"
        return parts_of(self.rows, shape[0]) if sliced else ()

    @property
    def own_form(self) -> str:
        """Name of the first form that a user has registered among those of the uses, or ""."""
        names = [each.form for each in self.beside if own_named(each.form) is not None]
        forms = [form for node, _ in self.contracted if (form := own_form(node.target)) is not None]
        return next(iter([*names, *(form.name for form in forms)]), "")

    @property
    def called(self) -> list[fx.Node]:
        """Nodes that call a module which holds the weight: a branch on the weight would not be seen by them."""
        return [each.node for each in self.beside if (spelled(each.node) or each.node).op == "call_module"]


def kind_at(shape: tuple[int, ...], seen: Found) -> str:
    """Return the kind of site that a weight of this shape makes, used so."""
    kind = seen.kinds[0]
    return "experts" if kind == "linear" and len(shape) == 3 else kind


def read(graph_module: fx.GraphModule, record: Record, weights: Weights) -> dict[str, Found]:
    """Return what the graph says of each weight matrix that it shows, by the weight's name."""
    found: dict[str, Found] = defaultdict(Found)
    constant = constants(graph_module.graph)
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and node.target.startswith(record.prefix):
            weight = weights.canonical.get(node.target.removeprefix(record.prefix))
            if weight is not None and weights.parameters[weight].dim() > 1:
                found[weight].sources.append(node)
                shape = tuple(weights.parameters[weight].shape)
                for start in _behind_branches(graph_module, node):
                    for meeting in uses_of(start, constant | {start}):
                        _read_meeting(meeting, start, shape, found[weight])
        elif node.op == "call_module":
            _read_module(graph_module, node, record, weights, found)
    return found


def _behind_branches(graph_module: fx.GraphModule, source: fx.Node) -> list[fx.Node]:
    """Return the branch nodes that stand on a weight already, or on what is chosen of it; or the weight's own node."""
    for holders in ([source], choices(source)):
        found = [user for holder in holders for user in holder.users if _stands_on(graph_module, user, holder)]
        if found:
            return found
    return [source]


def _stands_on(graph_module: fx.GraphModule, node: fx.Node, holder: fx.Node) -> bool:
    branch = node.op == "call_module" and isinstance(module_at(graph_module, str(node.target)), Branch)
    return branch and spelling_of(node) is None and node.args == (holder,)


def _read_meeting(meeting: Meeting, start: fx.Node, shape: tuple[int, ...], found: Found) -> None:
    node, dims = meeting.node, len(shape)
    if any(mutates(node, source) for source in meeting.aliases):
        found.written.append(node)
        return
    op = spelled(node)
    if op is not None and op.form is not None:  # a branch stands in place of the op already
        found.beside.append(Beside(node, op.form.name, op.form.kind, op.form.layout, mergeable=True))
        return
    form, layout = form_of(node, None), None
    if isinstance(form, FunctionForm) and form.dims == dims and len(meeting.reads) == 1:
        source, turned = meeting.reads[0], False
        fits = form.fits(node, source)
        while source is not start and form.kind != "conv" and transposes(source, dims):
            source, turned = source.all_input_nodes[0], not turned
        if fits and source is start:
            layout = form.layout if not turned else {"out_in": "in_out", "in_out": "out_in"}[form.layout]
    if isinstance(form, FunctionForm) and layout is not None:
        found.beside.append(Beside(node, form.name, form.kind, layout, mergeable(node, form)))
    elif (kind := kind_of(meeting)) is not None:
        found.contracted.append((node, kind))
        found.rows += [rows_read(source, start, shape) for source in meeting.reads]
    else:
        found.others.append(node)


def _read_module(
    graph_module: fx.GraphModule, node: fx.Node, record: Record, weights: Weights, found: dict[str, Found]
) -> None:
    module = module_at(graph_module, str(node.target))
    if module is None or isinstance(module, Branch):
        return
    name = str(node.target).removeprefix(record.prefix)
    form = form_of(node, module)
    used = weights.canonical.get(f"{name}.weight") if form is not None else None
    if form is not None and used is not None:
        found[used].beside.append(Beside(node, form.name, form.kind, form.layout, mergeable(node, form)))
    for own, parameter in module.named_parameters(remove_duplicate=False):
        weight = weights.canonical.get(f"{name}.{own}")
        if weight is not None and weight != used and parameter.dim() > 1:
            renormed = own == "weight" and getattr(module, "max_norm", None) is not None
            (found[weight].written if renormed else found[weight].opaque).append(node)
