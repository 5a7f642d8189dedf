"""The patterns of a spec: targets, exclude, train and rules, and errors for patterns that match nothing."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from lorasc_fx import CascadeSpec, Rule, SpecError, UnknownTarget
from lorasc_fx.graph import record_of
from lorasc_fx.passes import InsertBranches, MatchSites, NoSites, Pipeline
from lorasc_fx.plan import Reason
from tests.passes.cases import BY_NAME, CASES, Case, Encoder
from tests.passes.kit import Photograph, branches_of, insert, sites_of, weights_of

ENCODER = BY_NAME["aten_encoder"]


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


def chosen(graph_module: fx.GraphModule, spec: CascadeSpec) -> set[str]:
    plan = record_of(MatchSites(spec)(graph_module).graph_module).plan
    assert plan is not None
    return {site.weight for site in plan.sites}


def reasons(graph_module: fx.GraphModule, spec: CascadeSpec) -> dict[str, Reason]:
    return {
        refusal.weight: refusal.reason for refusal in record_of(MatchSites(spec)(graph_module).graph_module).refusals
    }


# fmt: off
TARGETS = [
    (("linear", "conv"), {"stem.0", "stem.1", "body.up", "body.down", "head"}),
    (("linear",), {"body.up", "body.down", "head"}),
    (("conv",), {"stem.0", "stem.1"}),
    (("stem.0.weight",), {"stem.0"}),
    (("stem",), {"stem.0", "stem.1"}),
    (("body.up",), {"body.up"}),
    (("body.*",), {"body.up", "body.down"}),
    (("*.up", "head"), {"body.up", "head"}),
    (("conv", "head.weight"), {"stem.0", "stem.1", "head"}),
    (("stem.[1-9].*",), {"stem.1"}),
    (("*",), {"stem.0", "stem.1", "body.up", "body.down", "head"}),
]
# fmt: on


@pytest.mark.parametrize(("targets", "expected"), TARGETS)
def test_kinds_and_globs(targets: tuple[str, ...], expected: set[str]) -> None:
    spec = CascadeSpec(targets=targets)
    names = {f"{name}.weight" for name in expected}
    assert chosen(mixed(), spec) == names
    everything = {name for name, value in Mixed().named_parameters() if value.dim() > 1}
    assert reasons(mixed(), spec) == dict.fromkeys(everything - names, Reason.NOT_TARGETED)


@pytest.mark.parametrize("pattern", ["first", "first.weight", "second", "second.weight"])
def test_a_tied_weight_matches_by_each_of_its_names(pattern: str) -> None:
    assert chosen(BY_NAME["aten_tied"].own(), CascadeSpec(targets=(pattern,))) == {"first.weight"}
    excluded = CascadeSpec(exclude=(pattern,))
    assert chosen(BY_NAME["aten_tied"].own(), excluded) == {"back.weight"}


def test_exclude_and_train() -> None:
    spec = CascadeSpec(exclude=("stem.0", "head.bias"), train=("head", "stem.0"))
    assert chosen(mixed(), spec) == {"stem.1.weight", "body.up.weight", "body.down.weight"}
    assert reasons(mixed(), spec) == {"stem.0.weight": Reason.EXCLUDED, "head.weight": Reason.TRAINED}
    inserted = insert(mixed(), spec)
    assert set(branches_of(inserted)) == chosen(mixed(), spec)
    assert weights_of(inserted).keys() == dict(Mixed().named_parameters()).keys()


def test_the_first_rule_that_matches_counts() -> None:
    spec = CascadeSpec(
        rank=4,
        lora_alpha=6.0,
        rules=(
            Rule("body.up", rank=2),
            Rule("body", lora_alpha=9.0),
            Rule("linear", rank=1, lora_alpha=2.0),
            Rule("body.down", rank=3),
        ),
    )
    options = {weight: (site.rank, site.options.lora_alpha) for weight, site in sites_of(insert(mixed(), spec)).items()}
    assert options == {
        "stem.0.weight": (4, 6.0),
        "stem.1.weight": (4, 6.0),
        "body.up.weight": (2, 6.0),
        "body.down.weight": (4, 9.0),
        "head.weight": (1, 2.0),
    }
    scales = {weight: branch.scale for weight, branch in branches_of(insert(mixed(), spec)).items()}
    assert scales == {weight: alpha / rank for weight, (rank, alpha) in options.items()}
    shapes = {weight: branch.lora_A.shape[0] for weight, branch in branches_of(insert(mixed(), spec)).items()}
    assert shapes == {weight: rank for weight, (rank, _) in options.items()}


# fmt: off
UNKNOWN = [
    (CascadeSpec(targets=("blocks.*.attn.qvk",)),
        "targets: 'blocks.*.attn.qvk' matches no weight; nearest: 'blocks.1.attn.qkv', 'blocks.0.attn.qkv', "
        "'blocks.1.attn.proj'"),
    (CascadeSpec(targets=("linaer",)), "targets: 'linaer' matches no weight; nearest: 'linear'"),
    (CascadeSpec(targets=("zzz",)), "targets: 'zzz' matches no weight; known: 'pos', 'blocks.0.attn.qkv.weight', "
        "'blocks.0.attn.proj.weight', 'blocks.0.fc1.weight', " "'blocks.0.fc2.weight' and 6 more"),
    (CascadeSpec(targets=("linear", "head.wieght")),
        "targets: 'head.wieght' matches no weight; nearest: 'head.weight', 'spare.weight', 'head'"),
    (CascadeSpec(targets=("head.bias",)), "targets: 'head.bias' matches no weight; nearest: 'head', 'head.weight'"),
    (CascadeSpec(exclude=("head.bais",)),
        "exclude: 'head.bais' matches no parameter; nearest: 'head.bias', 'head', 'head.weight'"),
    (CascadeSpec(exclude=("linear",)),
        "exclude: 'linear' matches no parameter; known: 'pos', 'blocks.0.norm.weight', 'blocks.0.norm.bias', "
        "'blocks.0.attn.qkv.weight', 'blocks.0.attn.qkv.bias' and 20 more"),
    (CascadeSpec(train=("heads.*",)),
        "train: 'heads.*' matches no parameter; nearest: 'head', 'head.bias', 'head.weight'"),
    (CascadeSpec(rules=(Rule("*.fc3", rank=2),)),
        "rules: '*.fc3' matches no weight; known: 'pos', 'blocks.0.attn.qkv.weight', "
        "'blocks.0.attn.proj.weight', 'blocks.0.fc1.weight', " "'blocks.0.fc2.weight' and 6 more"),
]
# fmt: on


@pytest.mark.parametrize(("spec", "message"), UNKNOWN)
@pytest.mark.parametrize("mode", ["own", "live"])
def test_a_pattern_that_matches_nothing(spec: CascadeSpec, message: str, mode: str) -> None:
    graph_module = ENCODER.graph(mode)
    photograph = Photograph(graph_module, ENCODER)
    with pytest.raises(UnknownTarget) as raised:
        Pipeline([MatchSites(spec), InsertBranches()])(graph_module)
    assert str(raised.value) == message
    assert isinstance(raised.value, SpecError)
    photograph.assert_unchanged()


# fmt: off
WITHOUT_SITES = [
    ("module_mixed_uses", CascadeSpec(exclude=("back",)), "the spec leaves no site to adapt:\n"
        "  lin.weight: mixed-uses (module lin is called as one node, but node linear (call_function "
        "torch._C._nn.linear) uses its weight too)\n  back.weight: excluded (excluded by the spec)"),
    ("module_linear", CascadeSpec(targets=("conv",)), "the spec leaves no site to adapt:\n"
        "  no weight that the graph uses matches targets=('conv',)"),
    ("module_linear", CascadeSpec(exclude=("0",), train=("2.*",)), "the spec leaves no site to adapt:\n"
        "  0.weight: excluded (excluded by the spec)\n"
        "  2.weight: trained-in-full (the spec trains it in full)"),
    ("aten_bare_matrices", CascadeSpec(exclude=("w[0-2]",)), "the spec leaves no site to adapt:\n"
        "  w0: excluded (excluded by the spec)\n  w1: excluded (excluded by the spec)\n"
        "  w2: excluded (excluded by the spec)\n  w3: unreached (no node of this graph uses it)"),
]
# fmt: on


@pytest.mark.parametrize(("case", "spec", "message"), WITHOUT_SITES)
def test_no_site_at_all(case: str, spec: CascadeSpec, message: str) -> None:
    graph_module = BY_NAME[case].own()
    photograph = Photograph(graph_module, BY_NAME[case])
    with pytest.raises(NoSites) as raised:
        Pipeline([MatchSites(spec), InsertBranches()])(graph_module)
    assert str(raised.value) == message
    assert isinstance(raised.value, SpecError)
    photograph.assert_unchanged()


SPECS = {
    "all": CascadeSpec(),
    "linear": CascadeSpec(targets=("linear",)),
    "conv": CascadeSpec(targets=("conv",)),
    "others": CascadeSpec(targets=("embedding", "recurrent", "experts")),
    "none-of-them": CascadeSpec(exclude=("*",)),
    "trained": CascadeSpec(train=("*",)),
    "every-name": CascadeSpec(targets=("*",)),
}


@pytest.mark.parametrize("mode", ["own", "live"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_matrix_is_reported(case: Case, mode: str) -> None:
    graph_module = case.graph(mode)
    for spec in (case.spec, *SPECS.values()):
        record = record_of(MatchSites(spec)(graph_module).graph_module)
        assert record.plan is not None
        reported = [
            *(site.weight for site in record.plan.sites),
            *(refusal.weight for refusal in record.refusals),
            *record.unreached,
        ]
        assert sorted(reported) == sorted(name for name, value in case.model.named_parameters() if value.dim() > 1)
        assert all(refusal.sentence for refusal in record.refusals)


def test_the_cases_cover_every_reason() -> None:
    covered = {Reason.NOT_TARGETED, Reason.QUANTIZED}  # by the tests above and the tests of quantized weights
    elsewhere = {Reason.EMPTY, Reason.SHARED_MEMORY}  # tests/numerics, tests/graph/test_shared_memory.py
    assert {reason for case in CASES for reason in case.refusals.values()} | covered | elsewhere == set(Reason)
    assert any(case.unreached for case in CASES)
    assert isinstance(ENCODER.model, Encoder)
