"""Find the uses of each weight matrix in a graph, and decide whether the weight is adapted.

A weight is adapted at all of its uses or at none. A fold changes the weight itself, so a use without a branch would
compute one thing in training and another after the fold.

If every use has a form, a branch is added to the output of each op that uses the weight (placement `beside`), or
replaces the op (placement `merged`). Otherwise a branch is added to the weight before all uses (placement `weight`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from lorasc_fx.branch import Branch, Placement
from lorasc_fx.errors import PassError, SpecError
from lorasc_fx.graph.branch_calls import (
    Kept,
    ReplacedCall,
    branch_nodes,
    call_template,
    made_by,
    mergeable,
    replaced_call,
)
from lorasc_fx.graph.flow import (
    Consumer,
    constants,
    kind_of,
    mutates,
    uses_of,
)
from lorasc_fx.graph.forms import (
    ON_WEIGHT,
    FunctionForm,
    ModuleForm,
    form_named,
    form_of,
    registered_form,
    registered_named,
    stored_layout,
    without_transposes,
)
from lorasc_fx.graph.patterns import check_patterns, matches, targeted
from lorasc_fx.graph.placement import by_shape
from lorasc_fx.graph.record import MADE_BY, REPLACED_CALL, Record, Use, record_of, set_record
from lorasc_fx.graph.weights import Weights, called_module, named_weights, owner_of, scripted_weights
from lorasc_fx.plan import Plan, Reason, Refusal, Site
from lorasc_fx.quantized import is_quantized, quantizer_of
from lorasc_fx.spec import KINDS, OWN_GRID, CascadeSpec


@dataclass(frozen=True)
class BesideUse:
    """A use of a weight with a form: a branch can be added to the output of the node, or replace a `mergeable` node."""

    node: fx.Node
    form: FunctionForm | ModuleForm
    layout: str
    mergeable: bool = False


@dataclass
class WeightUses:
    """The uses of one weight in one or several graphs.

    Args:
        sources: the get_attr nodes of the weight.
        beside: the uses with a form.
        contracted: (node, kind of site) for other nodes that multiply by the weight or look up its rows.
        others: nodes that use the weight in any other way.
        opaque: calls of leaf modules that own the weight. The graph does not show how a leaf module uses it.
        written: nodes that write into the weight.
        outside: kinds of site of uses in an eager run of the model, which no graph shows.
        script: path of the TorchScript module that owns the weight, or "".
        touched: whether an eager run uses the weight in any way.
        layer: whether the weight belongs to a linear, conv or embedding module of torch.nn.
    """

    sources: list[fx.Node] = field(default_factory=list)
    beside: list[BesideUse] = field(default_factory=list)
    contracted: list[tuple[fx.Node, str]] = field(default_factory=list)
    others: list[fx.Node] = field(default_factory=list)
    opaque: list[fx.Node] = field(default_factory=list)
    written: list[fx.Node] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    script: str = ""
    touched: bool = False
    layer: bool = False

    @property
    def reached(self) -> bool:
        """Whether anything uses the weight."""
        return any((self.beside, self.contracted, self.others, self.opaque, self.written, self.outside))

    def join(self, uses: WeightUses) -> None:
        """Add the uses of this weight in another graph."""
        for name in ("sources", "beside", "contracted", "others", "opaque", "written"):
            getattr(self, name).extend(getattr(uses, name))

    @property
    def kinds(self) -> list[str]:
        """The kind of site of each use."""
        return [use.form.kind for use in self.beside] + [kind for _, kind in self.contracted] + self.outside

    @property
    def all_beside(self) -> bool:
        """Whether every use has a form, and all uses read the weight in one layout."""
        return not (self.contracted or self.others or self.outside) and len({use.layout for use in self.beside}) == 1

    @property
    def registered_form(self) -> str:
        """Name of the first form among the uses that was added by `register_form`, or ""."""
        names = [use.form.name for use in self.beside if registered_named(use.form.name) is not None]
        forms = [form for node, _ in self.contracted if (form := registered_form(node.target)) is not None]
        return next(iter([*names, *(form.name for form in forms)]), "")

    @property
    def without_branch(self) -> list[fx.Node]:
        """The uses of no kind. If there are none, the uses without a form. If there are none either, all uses."""
        return self.others or [node for node, _ in self.contracted] or [use.node for use in self.beside]

    @property
    def called(self) -> list[fx.Node]:
        """Uses that call the module that owns the weight. They would bypass a branch that is added to the weight."""
        return [use.node for use in self.beside if (replaced_call(use.node) or use.node).op == "call_module"]


def kind_at(shape: tuple[int, ...], uses: WeightUses) -> str:
    """Return the kind of site of a weight with this shape. At least one of its uses must have a kind."""
    kind = uses.kinds[0]
    return "stacked" if kind == "linear" and len(shape) == 3 else kind


def _no_uses(owner: nn.Module, weights: Weights) -> dict[str, WeightUses]:
    """Return a defaultdict {weight: no uses yet}. It has an entry, with `script`, for each weight in TorchScript."""
    uses: dict[str, WeightUses] = defaultdict(WeightUses)
    for name, script in scripted_weights(owner).items():
        uses[weights.canonical[name]].script = script
    return uses


def read(graph_module: fx.GraphModule, record: Record, weights: Weights) -> dict[str, WeightUses]:
    """Return {name of a weight matrix that the graph reads: its uses}."""
    uses = _no_uses(owner_of(graph_module, record), weights)
    constant = constants(graph_module.graph)
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and node.target.startswith(record.prefix):
            weight = weights.canonical.get(node.target.removeprefix(record.prefix))
            if weight is not None and weights.parameters[weight].dim() > 1:
                uses[weight].sources.append(node)
                # In a graph with branches, the uses of an adapted weight come after the branch.
                for start in _after_branches(node):
                    for consumer in uses_of(start, constant | {start}):
                        # A branch that is added to an op's output may get the op's weight too. That is not a use.
                        is_branch = _adds_to_first_argument(consumer.node)
                        if not is_branch or consumer.reads != (consumer.node.kwargs.get("weight"),):
                            _read_consumer(consumer, start, weights.parameters[weight].dim(), uses[weight])
        elif node.op == "call_module":
            _read_module(node, record, weights, uses)
    return uses


def _after_branches(source: fx.Node) -> list[fx.Node]:
    """Return the branch nodes that are added to a weight. If there are none, return the weight's node."""
    return [user for user in source.users if user.args == (source,) and _adds_to_first_argument(user)] or [source]


def _adds_to_first_argument(node: fx.Node) -> bool:
    """Whether a node calls a branch that is added to the first argument, an op's output or a weight."""
    return isinstance(called_module(node), Branch) and call_template(node) is None


def _read_consumer(consumer: Consumer, start: fx.Node, dims: int, uses: WeightUses) -> None:
    """Add one consumer to the uses of a weight. `start` is the weight's node, or a branch node that is added to it."""
    node = consumer.node
    if any(mutates(node, source) for source in consumer.aliases):
        uses.written.append(node)
        return
    op = replaced_call(node)
    if op is not None and op.form is not None:  # a merged branch replaced the op in an earlier pass
        uses.beside.append(BesideUse(node, op.form, op.form.layout, mergeable=True))
        return
    # With a form, the op must read the weight itself. Only transposes may be in between, which change the layout.
    form, layout = form_of(node, None), None
    if isinstance(form, FunctionForm) and form.dims == dims and len(consumer.reads) == 1:
        read = consumer.reads[0]
        source, transposed = (read, False) if form.kind == "conv" else without_transposes(read, dims)
        if source is start and form.fits(node, read):
            layout = stored_layout(form.layout, transposed)
    if isinstance(form, FunctionForm) and layout is not None:
        uses.beside.append(BesideUse(node, form, layout, mergeable(node, form)))
    elif (kind := kind_of(consumer)) is not None:
        uses.contracted.append((node, kind))
    else:
        uses.others.append(node)


def _read_module(node: fx.Node, record: Record, weights: Weights, uses: dict[str, WeightUses]) -> None:
    """Add a `call_module` node to the uses of the matrices that the called module owns."""
    module = called_module(node)
    if module is None or isinstance(module, Branch):
        return
    name = str(node.target).removeprefix(record.prefix)
    form = form_of(node, module)
    form_weight = weights.canonical.get(f"{name}.weight") if form is not None else None
    if form is not None and form_weight is not None:
        uses[form_weight].beside.append(BesideUse(node, form, form.layout, mergeable(node, form)))
    for leaf, parameter in module.named_parameters(remove_duplicate=False):
        weight = weights.canonical.get(f"{name}.{leaf}")
        if weight is not None and weight != form_weight and parameter.dim() > 1:
            # An embedding with max_norm writes the renormalized rows into its weight.
            writes = leaf == "weight" and getattr(module, "max_norm", None) is not None
            (uses[weight].written if writes else uses[weight].opaque).append(node)


def candidates(owner: torch.nn.Module, spec: CascadeSpec) -> frozenset[str]:
    """Return the names of the weights that the spec selects and that may be adapted, if no graph shows their uses."""
    weights = named_weights(owner)
    uses = _no_uses(owner, weights)
    return frozenset(name for name in weights.matrices if _refuse(spec, weights, name, uses[name]) is None)


def survey(graph_modules: Sequence[fx.GraphModule], record: Record, outside: Mapping[str, str]) -> Record:
    """Return the record of a model that runs eagerly, with all weights classified. Sites of the old record are kept.

    Args:
        graph_modules: graphs of some uses of the weights.
        record: what earlier graphs have found.
        outside: {weight that a run of the model used: kind of its site, or "" if it was used in an unknown way}.
    """
    owner = owner_of(graph_modules[0], record)
    weights = named_weights(owner)
    uses = _no_uses(owner, weights)
    for path, module in owner.named_modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)):
            uses[weights.canonical.get(f"{path}.weight".lstrip("."), "")].layer = True
    for graph_module in graph_modules:
        for weight, graph_uses in read(graph_module, record, weights).items():
            uses[weight].join(graph_uses)
    for weight, kind in outside.items():
        if weight in weights.matrices and not uses[weight].kinds:
            uses[weight].touched = True
            uses[weight].outside += [kind] if kind else []
    return _classified(uses, weights, record)


def match(graph_module: fx.GraphModule, record: Record, partial: bool = False) -> Record:
    """Return the record with every weight matrix classified.

    The plan of the record is followed: its sites keep their branches, and refused weights stay refused. A weight that
    no earlier graph used becomes a site if this graph uses it.

    Raises:
        UnknownTarget: a pattern of the spec matches nothing.
        PassError: the graph uses a planned site in a way that its branch cannot follow.
    """
    weights = named_weights(owner_of(graph_module, record))
    if not partial:
        check_patterns(record.plan.spec, weights.matrices, weights.names)
    uses = read(graph_module, record, weights)
    record = _classified(uses, weights, record)
    _planned_uses(graph_module, uses, record.plan)  # raises an error for a use that a branch cannot follow
    return record


def uses_in(graph_module: fx.GraphModule, record: Record) -> dict[fx.Node, Use]:
    """Return {node that gets a branch: its use}, in the order of the graph. A merged branch node counts as the op.

    Raises:
        PassError: the graph uses a planned site in a way that its branch cannot follow.
    """
    weights = named_weights(owner_of(graph_module, record))
    return _planned_uses(graph_module, read(graph_module, record, weights), record.plan)


def _classified(uses_by_weight: Mapping[str, WeightUses], weights: Weights, record: Record) -> Record:
    """Classify each weight matrix by its uses, as a site, a refusal or unreached, and return the new record."""
    spec, planned = record.plan.spec, record.plan.by_weight
    earlier = {refusal.weight: refusal for refusal in record.refusals}
    sites: list[Site] = []
    refusals: list[Refusal] = []
    unreached: list[str] = []
    for weight, names in weights.matrices.items():
        uses = uses_by_weight.get(weight, WeightUses())
        refusal = earlier.get(weight) or _refuse(spec, weights, weight, uses)
        if weight in planned:
            # The weight has a branch from an earlier graph. It can be added to the weight unless a use bypasses it.
            bypassed = uses.written or uses.opaque or (uses.called and not uses.all_beside)
            if refusal is not None and bypassed:
                raise PassError(
                    f"{weight} has a branch, but this graph uses it in a way that the branch cannot follow: "
                    f"{refusal.sentence}. Exclude it (exclude=({weight!r},)), or avoid such calls",
                    code="method-not-supported",
                )
        elif refusal is not None:
            refusals.append(refusal)
        elif not uses.reached:
            unreached.append(weight)
        else:
            sites.append(_site(names, weights.parameters[weight], uses, spec))
    plan = record.plan.with_sites(tuple(sites))
    return replace(record, plan=plan, refusals=tuple(refusals), unreached=tuple(unreached))


def _site(names: tuple[str, ...], weight: torch.Tensor, uses: WeightUses, spec: CascadeSpec) -> Site:
    """Return the site of a weight. The options are from the first rule that matches, or from the spec itself."""
    shape = tuple(weight.shape)
    kind = kind_at(shape, uses)
    options = spec.site_options(next((rule for rule in spec.rules if targeted((rule.pattern,), kind, names)), None))
    layout = uses.beside[0].layout if uses.all_beside else "out_in"
    site = Site(names[0], kind, shape, options, names[1:], layout, form=uses.registered_form)
    return _with_placement(site, uses, weight, spec)


def _with_placement(site: Site, uses: WeightUses, weight: torch.Tensor, spec: CascadeSpec) -> Site:
    """Return the site with its placement, and with dropout if the placement supports dropout.

    The default placement is `beside`. For a weight that a graph also reads in an op without a form (see `Form`),
    `_planned_uses` adds the branch to the weight in that graph.

    Raises:
        SpecError: the adapter method does not support the kind of the site, its shape, or its uses.
    """
    method, adapter = site.options.method, site.options.adapter
    # Check the method.
    if site.kind not in method.kinds or (is_quantized(weight) and not method.beside_quantized):
        raise SpecError(
            f"adapter is {adapter!r}, but this method does not support {site.weight}, which is "
            f"{_use_phrase(site, uses, weight)}. Exclude it (exclude=({site.weight!r},)), or give adapter='lora'",
            code="method-not-supported",
        )
    if fault := method.fault(site):
        raise SpecError(f"adapter is {adapter!r}, and {site.weight} {fault}", code="method-not-supported")
    if site.options.grid_of(weight):
        if site.options.grid == OWN_GRID and quantizer_of(weight) is None:
            raise SpecError(
                f"grid is {OWN_GRID!r}, but {site.weight} cannot be quantized again without more information, such as "
                f"calibration data. Exclude it (exclude=({site.weight!r},)), or give grid=None",
                code="quantized-not-supported",
            )
        if uses.called and not _replaceable(site, uses):
            raise SpecError(
                f"grid is {site.options.grid!r}, but {site.weight} is {_use_phrase(site, uses, weight)} by a module "
                f"call. Exclude it (exclude=({site.weight!r},)), or capture the model with lx.adapt",
                code="method-not-supported",
            )
        return replace(site, placement="merged" if uses.called else "weight")
    # A method without the placement `beside`, such as DoRA, replaces the op if possible.
    if "beside" not in method.placements:
        if _replaceable(site, uses) and (spec.placement != "weight" or uses.called):
            return replace(site, placement="merged")
        if "weight" in method.placements and not uses.called:
            return replace(site, placement="weight")
        raise SpecError(
            f"adapter is {adapter!r}, but {site.weight} is {_use_phrase(site, uses, weight)}. This method replaces "
            "the op, and supports only linears and convolutions that read the stored weight directly. "
            f"Exclude it (exclude=({site.weight!r},)), or give adapter='lora'",
            code="method-not-supported",
        )
    if not _beside(site, uses):
        return site  # the branch is added to the weight
    if spec.placement == "weight" and not uses.called and not is_quantized(weight):
        return replace(site, placement="weight")
    if site.kind not in ("linear", "conv"):
        return site
    if spec.dropout and "dropout" in method.options:
        return replace(site, dropout=float(spec.dropout))
    if is_quantized(weight) or spec.placement == "beside" or not any(use.mergeable for use in uses.beside):
        return site
    # With "auto", a branch with frozen A is not merged: with placement `beside`, it saves only A x for the backward.
    if spec.placement != "merged" and not spec.train_A:
        return site
    merged = spec.placement == "merged" or by_shape(site, [use.node for use in uses.beside]) == "merged"
    return replace(site, placement="merged") if merged else site


def _replaceable(site: Site, uses: WeightUses) -> bool:
    """Whether a merged branch can replace the op at every use."""
    return site.kind in ("linear", "conv") and _beside(site, uses) and all(use.mergeable for use in uses.beside)


def _use_phrase(site: Site, uses: WeightUses, weight: torch.Tensor) -> str:
    """Return a phrase for an error: the kind of the site and a node that uses the weight."""
    if is_quantized(weight):
        return "quantized"
    nodes = uses.without_branch
    return f"of kind {site.kind!r}" + (f", used at node {_shown(nodes[0])}" if nodes else "")


def _beside(site: Site, uses: WeightUses) -> bool:
    """Whether a branch can be added to the output of every use. A stack of matrices needs forms of kind `stacked`."""
    kinds = {use.form.kind for use in uses.beside}
    return uses.all_beside and (site.kind != "stacked" or kinds == {"stacked"})


def _planned_uses(
    graph_module: fx.GraphModule, uses_by_weight: Mapping[str, WeightUses], plan: Plan
) -> dict[fx.Node, Use]:
    """Return {node that gets a branch: its use}, in the order of the graph.

    Raises:
        PassError: the graph uses a site in an op to which the branch of the site cannot be added.
    """
    planned: dict[fx.Node, Use] = {}
    for weight, site in plan.by_weight.items():
        uses = uses_by_weight.get(weight, WeightUses())
        method, replaceable = site.options.method, _replaceable(site, uses)
        if "weight" not in (*method.placements, site.placement) and uses.reached and not replaceable:
            raise PassError(
                f"the branch of {weight} replaces its op (adapter={site.options.adapter!r}), but this graph uses the "
                f"weight in an op that it cannot replace. Exclude it (exclude=({weight!r},)), or avoid such calls",
                code="method-not-supported",
            )
        # There is a branch at each op if all ops support it; otherwise one branch at the weight.
        at_op = replaceable or "beside" in method.placements
        at_op = at_op and _beside(site, uses) and uses.beside[0].layout == site.layout
        if at_op and (site.placement != "weight" or uses.called):
            merged = site.placement == "merged"
            planned |= {use.node: Use(weight, use.form.name, merged and use.mergeable) for use in uses.beside}
        elif uses.reached and not uses.called:
            planned |= dict.fromkeys(uses.sources, Use(weight, ON_WEIGHT))
        elif uses.reached:
            raise PassError(
                f"{weight}: node {uses.called[0].name} does not read it as {site.layout}, as its branch does. "
                f"Exclude it (exclude=({weight!r},)), or avoid such calls",
                code="method-not-supported",
            )
    order = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    return dict(sorted(planned.items(), key=lambda item: order[item[0]]))


def branch_call(use: Use, source: fx.Node | ReplacedCall) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return (arguments, options) of the branch node for a use. `source` is the op or weight that gets the branch."""
    if isinstance(source, fx.Node) and use.form == ON_WEIGHT:
        return (source,), {"at": Placement.WEIGHT}
    form = form_named(use.form)
    reading = form.reads(source, called_module(source) if isinstance(source, fx.Node) else source.module)
    if not use.merged:
        return (source, reading.x), {"at": Placement.BESIDE, **reading.options}
    tensors = (reading.weight,) if reading.bias is None else (reading.weight, reading.bias)
    return (reading.x, *tensors), {"at": Placement.MERGED, **reading.options, "op": form.product}


def recover(graph_module: fx.GraphModule, kept: Kept | None = None) -> None:
    """Restore the record of a graph module that other code rebuilt without metadata, and the marks of its nodes.

    Args:
        graph_module: gets a record if it has none, and marks if no branch node has one.
        kept: the metadata before the rebuild. The default is the metadata that its branches keep.
    """
    nodes = branch_nodes(graph_module)
    kept = kept or next((branch.kept for branch in nodes.values() if isinstance(branch.kept, Kept)), None)
    if kept is None or not nodes:
        return
    if not record_of(graph_module).facts:
        set_record(graph_module, kept.record)
    if any(made_by(node) for node in nodes):
        return
    templates = {weight: iter(calls) for weight, calls in kept.templates.items()}
    for node, branch in nodes.items():
        helpers = [node]
        if node.kwargs.get("at") == Placement.MERGED:
            node.meta[REPLACED_CALL] = template = next(templates.get(branch.weight_name, iter(())), None)
            reads_names = template is not None and template.op == "call_module"
            helpers += [source for source in node.all_input_nodes if reads_names and source.op == "get_attr"]
        for helper in helpers:
            helper.meta[MADE_BY] = "insert-branches"


_UNUSED = "uses it neither in a matrix product or convolution nor as an embedding table"


def _refuse(spec: CascadeSpec, weights: Weights, weight: str, uses: WeightUses) -> Refusal | None:
    """Return the refusal of a weight, or None if it can be adapted or has no uses."""
    names, parameter = weights.names[weight], weights.parameters[weight]

    def refusal(reason: Reason, sentence: str, node: fx.Node | None = None) -> Refusal:
        return Refusal(weight, node.name if node is not None else "", reason, sentence)

    # Reasons in the spec.
    if any(matches(pattern, names) for pattern in spec.exclude):
        return refusal(Reason.EXCLUDED, "excluded by the spec")
    if any(matches(pattern, names) for pattern in spec.train):
        return refusal(Reason.TRAINED, "the spec trains it in full")
    if uses.kinds:
        wanted = targeted(spec.targets, kind_at(tuple(parameter.shape), uses), names)
    else:  # the kind of the weight is unknown, so any target that is a kind may select it
        wanted = any(pattern in KINDS or matches(pattern, names) for pattern in spec.targets)
    if not wanted:
        return refusal(Reason.NOT_TARGETED, "matches no target of the spec")
    # Properties of the weight.
    if not parameter.numel():
        return refusal(Reason.EMPTY, f"its shape is {tuple(parameter.shape)}, so it has no entries")
    if uses.script:  # how often such a module has run decides whether torch.export sees its ops
        return refusal(
            Reason.OPAQUE,
            f"it belongs to the TorchScript module {uses.script}; use the nn.Module that was scripted",
        )
    if not parameter.is_floating_point():
        why = "but branches are real" if parameter.is_complex() else "which has no gradient"
        return refusal(Reason.NOT_FLOATING, f"its dtype is {parameter.dtype}, {why}")
    # Reasons in the uses of the weight.
    if uses.written:
        node = uses.written[0]
        return refusal(Reason.MUTATED, f"node {_shown(node)} writes into it while the model runs", node)
    if uses.opaque:
        node = uses.opaque[0]
        return refusal(
            Reason.OPAQUE,
            f"module {node.target} is called as one node, which hides its ops; use another front end to capture it",
            node,
        )
    if not uses.reached:
        return refusal(Reason.NO_FORM, f"the model {_UNUSED}") if uses.touched else None
    if not uses.kinds:
        node = uses.others[0]
        return refusal(Reason.NO_FORM, f"node {_shown(node)} {_UNUSED}", node)
    if is_quantized(parameter) and not (uses.all_beside and set(uses.kinds) == {"linear"}):
        nodes = uses.without_branch
        where = f"node {_shown(nodes[0])}" if nodes else "the model"
        sentence = f"{where} reads the quantized weight in an op other than a linear, where no branch is supported"
        return refusal(Reason.QUANTIZED, sentence, nodes[0] if nodes else None)
    if not uses.all_beside and uses.called:
        node = (uses.others or [node for node, _ in uses.contracted] or [uses.beside[-1].node])[0]
        sentence = f"module {uses.called[0].target} is called as one node, but node {_shown(node)} uses its weight too"
        return refusal(Reason.MIXED_USES, sentence, node)
    # A weight with only one axis longer than 1 is usually a scale or a bias. Exception: in a model that runs eagerly,
    # the weight of a layer of torch.nn with one output or input.
    single = parameter.numel() == max(parameter.shape, default=0)
    if single and not uses.all_beside and not (uses.layer and not uses.contracted and not uses.others):
        return refusal(Reason.VECTOR, f"its shape is {tuple(parameter.shape)}: only one axis is longer than 1")
    return None


def _shown(node: fx.Node) -> str:
    """Return the name, opcode and target of a node for a message."""
    target = fx.node._get_qualified_name(node.target) if callable(node.target) else str(node.target)
    return f"{node.name} ({node.op} {target})"
