"""MatchSites: which weights become sites by form and by the patterns of a spec, which are refused, and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.func import functional_call

import lorasc_fx as lx
from lorasc_fx import CascadeSpec, PassError, Rule, SpecError, UnknownTarget
from lorasc_fx.graph import FORMS, FunctionForm, record_of, text
from lorasc_fx.graph.forms import ON_WEIGHT
from lorasc_fx.graph.record import strip
from lorasc_fx.passes import FoldBranches, InsertBranches, MatchSites, NoSites, Pipeline
from lorasc_fx.plan import Reason
from tests.kit.errors import raises
from tests.kit.models import mlp
from tests.kit.operators.case import Of
from tests.kit.state import exact_slow, weight_states
from tests.passes.cases import BY_NAME, CASES, Case, tracer
from tests.passes.kit import (
    Snapshot,
    assert_close,
    branches_of,
    deltas,
    fill,
    insert,
    run,
    run_eager,
    same_bits,
    sites_of,
    uses_of,
    weights_of,
)

MODES = ("own", "live")
NARROW = [
    form for form in FORMS if isinstance(form, FunctionForm) and dict(form.options).get("by") == "aten::_grouped_mm"
]
"""Rows of ops without fp64 kernels. Their cases are in test_grouped."""
QUANTIZED = [form for form in FORMS if form.name == "quantized_linear"]
"""The row of quantized layers, which have no fp64 kernels either. Its cases are in tests/quantized."""


def parts(graph_module: fx.GraphModule) -> tuple[set[str], dict[str, Reason], tuple[str, ...]]:
    """Return the sites, the reasons of refusals by weight, and the unreached weights of a graph."""
    record = record_of(graph_module)
    refused = {refusal.weight: refusal.reason for refusal in record.refusals}
    return {site.weight for site in record.plan.sites}, refused, record.unreached


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_match(case: Case, mode: str) -> None:
    graph_module = case.graph(mode)
    before, snapshot = text(graph_module), Snapshot(graph_module)
    result = MatchSites(case.spec)(graph_module)
    matched = result.graph_module
    assert result.modified  # 1 truthful: marks and record are new
    snapshot.assert_unchanged()

    assert uses_of(matched) == case.sites  # 2 the intended nodes are marked
    assert parts(matched) == (set(case.sites), case.refusals, case.row.unreached)
    plan = record_of(matched).plan
    assert {site.weight: site.aliases for site in plan.sites if site.aliases} == case.aliases
    for site in plan.sites:
        assert site.shape == tuple(weights_of(matched)[site.weight].shape)
        assert site.kind == case.kind(site.weight)
        assert site.layout == ("in_out" if site.weight in case.transposed else "out_in")
    assert text(matched) == before  # and no node is made

    assert same_bits(run(matched, case), run(graph_module, case))  # 3 numerics
    assert same_bits(run(matched, case), run(case.model, case)) == case.row.exact
    assert_close(run(matched, case), run(case.model, case))
    again = MatchSites(case.spec)(matched)
    assert not again.modified  # 4 a fixed point
    assert again.graph_module is matched
    strip(matched)  # 5 the inverse
    assert uses_of(matched) == {}
    assert matched.meta == {}
    assert [dict(node.meta) for node in matched.graph.nodes] == [dict(node.meta) for node in graph_module.graph.nodes]


def test_every_row_of_the_table_has_a_case() -> None:
    seen = {form for case in CASES for uses in case.sites.values() for _, form in uses}
    assert seen == {form.name for form in FORMS if form not in NARROW + QUANTIZED} | {ON_WEIGHT}


def test_every_target_of_a_row_has_a_case() -> None:
    nodes = [node for case in CASES for node in case.own().graph.nodes if node.op.startswith("call_")]
    seen = {node.target for node in nodes} | {getattr(node.target, "_name", "") for node in nodes}
    targets = {target for form in FORMS if isinstance(form, FunctionForm) for target in form.targets}
    assert targets - {target for form in NARROW + QUANTIZED for target in form.targets} <= seen


class Standardized(nn.Linear):
    """Overrides what `nn.Linear` computes, and is called as one node."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight / self.weight.std(), self.bias)


def _hooks(model: nn.Module) -> None:
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model[2].register_forward_hook(lambda module, args, out: out.tanh())


def _forward(model: nn.Module) -> None:
    model[2].forward = lambda x: x @ model[2].weight.t() * 2  # type: ignore[method-assign]


def _weight_norm(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model[0])


def _subclass(model: nn.Module) -> None:
    model[2] = Standardized(7, 6).double()


@pytest.mark.parametrize(
    ("change", "opaque"),
    [
        (_hooks, {"0.weight", "2.weight"}),
        (_forward, {"2.weight"}),
        (_weight_norm, {"0.parametrizations.weight.original0", "0.parametrizations.weight.original1"}),
        (_subclass, {"2.weight"}),
    ],
)
def test_a_module_that_computes_something_else_is_opaque(change: Any, opaque: set[str]) -> None:
    model = mlp()
    change(model)
    graph = tracer(("Standardized", "ParametrizedLinear")).trace(model)
    matched = MatchSites()(fx.GraphModule(model, graph)).graph_module
    assert parts(matched)[1] == dict.fromkeys(opaque, Reason.OPAQUE)


def test_a_weight_times_itself_has_its_branch_on_the_weight() -> None:
    model = Of(lambda x, w, v: F.linear(F.linear(x, F.linear(w, w)), F.linear(v, w)), (4, 5), (6, 5)).double()
    inserted = fill(insert(fx.symbolic_trace(model), CascadeSpec(rank=2)))
    assert uses_of(inserted) == {"w0": (("w0", "on-weight"),), "w1": (("w1", "on-weight"),)}
    weights = {name: value.detach() + deltas(inserted)[name] for name, value in model.named_parameters()}
    x = torch.randn(3, 4, dtype=torch.float64)
    assert_close(inserted(x).detach(), functional_call(model, weights, (x,)).detach())


# --- a graph that carries a plan --------------------------------------------------------------------------------------


def test_an_unreached_weight_becomes_a_site_when_a_graph_uses_it() -> None:
    case = BY_NAME["aten_encoder"]
    matched = MatchSites(case.spec)(case.own()).graph_module
    graph = matched.graph
    output = next(iter(reversed(graph.nodes)))
    features = next(node for node in graph.nodes if node.name == "linear_8")
    weight = next(node for node in graph.nodes if node.target == "head.weight")
    with graph.inserting_before(output):
        spare = graph.get_attr("spare.weight")
        graph.call_function(torch.ops.aten.linear.default, (features.args[0], spare))
    again = MatchSites(case.spec)(matched)
    assert again.modified
    assert parts(again.graph_module)[0] == {*case.sites, "spare.weight"}
    assert record_of(again.graph_module).unreached == ()
    assert record_of(again.graph_module).plan.sites[:5] == record_of(matched).plan.sites
    assert weight in features.all_input_nodes


@pytest.mark.parametrize(("row", "form"), [(None, "F.embedding"), (0, "F.embedding"), (-2, "on-weight")])
def test_a_negative_padding_index_has_no_form(row: int | None, form: str) -> None:
    model = Of(lambda index, w: F.embedding(index, w, row), (6, 4)).double()
    inserted = fill(insert(fx.symbolic_trace(model), CascadeSpec(rank=2)))
    assert [name for uses in uses_of(inserted).values() for _, name in uses] == [form]
    inserted(torch.tensor([0, 4, 3])).sum().backward()
    moved = branches_of(inserted)["w0"].lora_B.grad.abs().sum(-1).nonzero().flatten().tolist()
    assert moved == [index for index in (0, 3, 4) if row is None or index != row % 6]


def _used_twice(case: Case, weight: str) -> fx.GraphModule:
    """The matched graph of a case, in which the weight is also an input of a sigmoid."""
    matched = MatchSites(case.spec)(case.own()).graph_module
    start = next(iter(matched.graph.nodes))
    with matched.graph.inserting_before(start):
        matched.graph.call_function(torch.sigmoid, (matched.graph.get_attr(weight),))
    return matched


def test_a_planned_weight_in_an_unsupported_use_is_an_error() -> None:
    case = BY_NAME["module_linear"]
    with raises(PassError, "method-not-supported", "0.weight", "node sigmoid (call_function torch.sigmoid)"):
        MatchSites(case.spec)(_used_twice(case, "0.weight"))


def test_a_planned_weight_in_another_use_gets_its_branch_on_the_weight() -> None:
    case = BY_NAME["functional_shape_reads"]
    again = MatchSites(case.spec)(_used_twice(case, "w0"))
    assert uses_of(again.graph_module) == {"w0": (("w0_1", "on-weight"), ("w0", "on-weight"))}
    inserted = fill(InsertBranches()(again.graph_module).graph_module)
    assert_close(run(inserted, case), run_eager(case, deltas(inserted)))


def test_a_plan_fixes_the_branch_but_not_its_node() -> None:
    case = BY_NAME["functional_two_layouts"]
    matched = MatchSites(case.spec)(case.own()).graph_module
    assert uses_of(matched) == {"w0": (("w0", "on-weight"),)}
    for node in list(matched.graph.nodes):  # without this use, a branch fits the output of the other
        if node.name == "matmul":
            node.replace_all_uses_with(node.args[0])
            matched.graph.erase_node(node)
    assert uses_of(MatchSites(case.spec)(matched).graph_module) == {"w0": (("linear", "F.linear"),)}


def test_another_spec_over_branches_is_an_error() -> None:
    inserted = insert(BY_NAME["aten_linear"].own(), BY_NAME["aten_linear"].spec)
    with raises(SpecError, "spec-differs"):
        MatchSites(CascadeSpec(rank=1))(inserted)


def test_after_a_fold_another_spec_keeps_the_experts() -> None:
    case = BY_NAME["aten_conv1d"]
    original = case.own()
    folded = FoldBranches()(fill(insert(original, case.spec))).graph_module
    spec = CascadeSpec(targets=("0", "3"), train=("2",), rank=2, seed=4)
    inserted = Pipeline([MatchSites(spec), InsertBranches()])(folded).graph_module
    plan = record_of(inserted).plan
    assert [(site.weight, site.rank) for site in plan.sites] == [("0.weight", 2), ("3.weight", 2)]
    assert plan.stage == 2
    slow = weight_states(inserted)
    assert set(slow) == {"0.weight", "3.weight"}
    for weight, state in slow.items():
        assert same_bits(state.base, weights_of(original)[weight])
        assert same_bits(exact_slow(inserted, weight), weights_of(folded)[weight])
        assert not same_bits(state.base, weights_of(folded)[weight])
    with torch.no_grad():
        weights_of(inserted)["2.weight"].mul_(2)  # trained in full: a fold must not restore an old value
    after = FoldBranches()(inserted).graph_module
    assert same_bits(weights_of(after)["2.weight"], weights_of(inserted)["2.weight"])


def test_a_refused_weight_stays_refused() -> None:
    """The plan holds for every variant, also for one without the use that was the reason of the refusal."""
    case = BY_NAME["aten_max_norm"]
    graph_module = case.own()
    matched = MatchSites(case.spec)(graph_module).graph_module
    (weight,) = (name for name, reason in parts(matched)[1].items() if reason is Reason.MUTATED)
    matched.graph.erase_node(next(node for node in matched.graph.nodes if "renorm" in node.name))
    assert parts(MatchSites(case.spec)(matched).graph_module)[1][weight] is Reason.MUTATED
    strip(matched)
    assert weight in parts(MatchSites(case.spec)(matched).graph_module)[0]  # without that plan it is one


class Mixed(nn.Module):
    """Convolutions and linears."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(3, 4, 2), nn.Conv1d(4, 5, 2))
        self.body = nn.ModuleDict({"up": nn.Linear(5, 9), "down": nn.Linear(9, 5)})
        self.head = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).mean(-1)
        return self.head(self.body["down"](torch.relu(self.body["up"](x))))


def mixed() -> fx.GraphModule:
    return fx.symbolic_trace(Mixed().double())


# fmt: off
TARGETS = [
    (("linear",), {"body.up", "body.down", "head"}),
    (("stem.0.weight",), {"stem.0"}),
    (("stem",), {"stem.0", "stem.1"}),
    (("*.up", "head"), {"body.up", "head"}),
    (("conv", "head.weight"), {"stem.0", "stem.1", "head"}),
    (("stem.[1-9].*",), {"stem.1"}),
    (("*",), {"stem.0", "stem.1", "body.up", "body.down", "head"}),
]
# fmt: on


@pytest.mark.parametrize(("targets", "expected"), TARGETS)
def test_kinds_and_globs(targets: tuple[str, ...], expected: set[str]) -> None:
    names = {f"{name}.weight" for name in expected}
    sites, refused, _ = parts(MatchSites(CascadeSpec(targets=targets))(mixed()).graph_module)
    everything = {name for name, value in Mixed().named_parameters() if value.dim() > 1}
    assert (sites, refused) == (names, dict.fromkeys(everything - names, Reason.NOT_TARGETED))


@pytest.mark.parametrize("pattern", ["first", "first.weight", "second", "second.weight"])
def test_a_tied_weight_matches_by_each_of_its_names(pattern: str) -> None:
    for spec, expected in (
        (CascadeSpec(targets=(pattern,)), {"first.weight"}),
        (CascadeSpec(exclude=(pattern,)), {"back.weight"}),
    ):
        assert parts(MatchSites(spec)(BY_NAME["aten_tied"].own()).graph_module)[0] == expected


def test_the_first_rule_that_matches_counts() -> None:
    rules = (
        Rule("body.up", rank=2),
        Rule("body", lora_alpha=9.0),
        Rule("linear", rank=1, lora_alpha=2.0),
        Rule("body.down", rank=3),
    )
    inserted = insert(mixed(), CascadeSpec(rank=4, lora_alpha=6.0, rules=rules))
    options = {weight: (site.rank, site.options.lora_alpha) for weight, site in sites_of(inserted).items()}
    expected = {"stem.0": (4, 6.0), "stem.1": (4, 6.0), "body.up": (2, 6.0), "body.down": (4, 9.0), "head": (1, 2.0)}
    assert options == {f"{name}.weight": pair for name, pair in expected.items()}
    for weight, branch in branches_of(inserted).items():
        rank, alpha = options[weight]
        assert (branch.lora_A.shape[0], branch.scale) == (rank, alpha / rank)


# fmt: off
UNKNOWN: list[tuple[CascadeSpec, tuple[str, ...]]] = [
    (CascadeSpec(targets=("blocks.*.attn.qvk",)), ("targets", "'blocks.*.attn.qvk'", "'blocks.1.attn.qkv'")),
    (CascadeSpec(targets=("linaer",)), ("targets", "'linaer'", "'linear'")),
    (CascadeSpec(targets=("zzz",)), ("targets", "'zzz'", "'pos', 'blocks.0.attn.qkv.weight'", "6 more")),
    (CascadeSpec(targets=("head.bias",)), ("targets", "'head.bias'", "'head', 'head.weight'")),
    (CascadeSpec(exclude=("head.bais",)), ("exclude", "'head.bais'", "'head.bias'")),
    (CascadeSpec(exclude=("linear",)), ("exclude", "'linear'", "'pos', 'blocks.0.norm.weight'", "20 more")),
    (CascadeSpec(train=("heads.*",)), ("train", "'heads.*'", "'head', 'head.bias'")),
    (CascadeSpec(rules=(Rule("*.fc3", rank=2),)), ("rules", "'*.fc3'", "'pos'")),
]
WITHOUT_SITES: list[tuple[str, CascadeSpec, tuple[str, ...]]] = [
    ("module_mixed_uses", CascadeSpec(exclude=("back",)), ("lin.weight: mixed-uses", "back.weight: excluded")),
    ("module_linear", CascadeSpec(targets=("conv",)), ("targets=('conv',)",)),
    ("module_linear", CascadeSpec(exclude=("0",), train=("2.*",)), ("0.weight: excluded", "2.weight: trained-in-full")),
    ("aten_bare_matrices", CascadeSpec(exclude=("w[0-2]",)), ("w0: excluded", "w1: excluded", "w3: unreached")),
]
# fmt: on
REFUSED = [("aten_encoder", spec, UnknownTarget, "unknown-target", names) for spec, names in UNKNOWN]
REFUSED += [(case, spec, NoSites, "no-sites", names) for case, spec, names in WITHOUT_SITES]


@pytest.mark.parametrize(("case", "spec", "kind", "code", "names"), REFUSED)
def test_a_spec_that_matches_nothing(
    case: str, spec: CascadeSpec, kind: type[SpecError], code: str, names: tuple[str, ...]
) -> None:
    graph_module = BY_NAME[case].live()
    snapshot = Snapshot(graph_module)
    with raises(kind, code, *names):
        Pipeline([MatchSites(spec), InsertBranches()])(graph_module)
    snapshot.assert_unchanged()


class Odd(nn.Module):
    """One weight for each reason, and linear layers with one output."""

    def __init__(self) -> None:
        super().__init__()
        self.single, self.called, self.opaque = nn.Linear(5, 1), nn.Linear(5, 1), nn.Bilinear(5, 5, 5)
        shapes = {"vector": (1, 5), "empty": (0, 5), "rows": (4, 5), "scale": (3, 5), "left": (4, 5), "all": (4, 5)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.phases = nn.Parameter(torch.randn(5, 5, dtype=torch.complex64))

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        y = self.called(x) * (x @ self.called.weight.detach().T) + self.opaque(x, x) + self.single(x)
        y = y + torch.einsum("ij,kj->ik", x, self.vector) + F.linear(x, self.empty).sum()
        y = y + F.embedding(index, self.rows, None, 1.0) * self.scale
        y = y + F.linear(x, self.left).sum() + F.linear(x, self.all).sum()
        return y + torch.matmul(x.to(torch.complex64), self.phases).real


UNUSED = "uses it neither in a matrix product or convolution nor as an embedding table"
ANYWHERE = {
    "vector": ("", Reason.VECTOR, "its shape is (1, 5): only one axis is longer than 1"),
    "empty": ("", Reason.EMPTY, "its shape is (0, 5), so it has no entries"),
    "rows": ("", Reason.MUTATED, "forward writes into it"),
    "scale": ("", Reason.NO_FORM, f"the model {UNUSED}"),
    "left": ("", Reason.EXCLUDED, "excluded by the spec"),
    "all": ("", Reason.TRAINED, "the spec trains it in full"),
    "phases": ("", Reason.NOT_FLOATING, "its dtype is torch.complex64, but branches are real"),
}
IN_A_GRAPH = {
    "rows": ("embedding", Reason.MUTATED, "node embedding (call_function torch.nn.functional.embedding) writes into it "
        "while the model runs"),
    "scale": ("mul_1", Reason.NO_FORM, f"node mul_1 (call_function _operator.mul) {UNUSED}"),
    "called.weight": ("matmul", Reason.MIXED_USES, "module called is called as one node, but node matmul "
        "(call_function _operator.matmul) uses its weight too"),
    "opaque.weight": ("opaque", Reason.OPAQUE, "module opaque is called as one node, which hides its ops; use another "
        "front end to capture it"),
}  # fmt: skip


def test_refusals() -> None:
    """In a graph that calls modules, and in a model that runs eagerly."""
    spec, args = CascadeSpec(rank=2, exclude=("left",), train=("all",)), (torch.randn(3, 5), torch.tensor([0, 2, 3]))
    graph = record_of(MatchSites(spec)(fx.symbolic_trace(Odd())).graph_module)
    cascade = lx.adapt(Odd(), args, spec=spec, frontend="eager")
    for found, expected in ((graph.refusals, ANYWHERE | IN_A_GRAPH), (cascade.refusals, ANYWHERE)):
        assert {refusal.weight: (refusal.node, refusal.reason, refusal.sentence) for refusal in found} == expected
    assert [site.weight for site in cascade.sites] == ["single.weight", "called.weight", "opaque.weight"]
    assert [site.weight for site in graph.plan.sites] == ["single.weight"]
