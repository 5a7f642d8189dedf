"""InsertBranches: no bit moves while B = 0, and the formula when it is not, in every placement; golden texts."""

from __future__ import annotations

import copy
import os
import re
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from lorasc_fx import CascadeSpec, Noise, PassError
from lorasc_fx.capture import capture
from lorasc_fx.errors import VerifyError
from lorasc_fx.graph import branch_nodes, text
from lorasc_fx.graph.branch_calls import made_by
from lorasc_fx.passes import FoldBranches, InsertBranches, MatchSites, StageTransition
from tests.kit.errors import raises
from tests.kit.models import train, trainable_parameters
from tests.kit.operators.case import Of
from tests.kit.state import noise_drawn, weight_state
from tests.passes.cases import ADAPTABLE, BY_NAME, CASES, SPEC, Case
from tests.passes.kit import (
    CLOSE,
    Snapshot,
    assert_close,
    assert_differ,
    assert_gradients,
    branches_of,
    deltas,
    fill,
    insert,
    run,
    run_eager,
    run_in_training,
    same_bits,
    sites_of,
    weights_of,
)

PLACEMENTS = ("merged", "weight")


def alternating(*choices: tuple[str, ...]) -> list[tuple[Case, str]]:
    """Return rows of each case with one of each tuple of choices, by turns."""
    return [(case, some[index % len(some)]) for index, case in enumerate(ADAPTABLE) for some in choices]


@pytest.mark.parametrize(("case", "variant"), alternating(("own", "live"), PLACEMENTS), ids=str)
def test_insert(case: Case, variant: str) -> None:
    """In a graph that owns its weights, in one that reads a live model, and in the other placements."""
    spec = placed(case, variant) if variant in PLACEMENTS else case.spec
    matched = MatchSites(spec)(case.graph("live" if variant == "live" else "own")).graph_module
    before, snapshot = text(matched), Snapshot(matched)
    result = InsertBranches()(matched)
    inserted = result.graph_module
    assert result.modified  # 1 truthful
    snapshot.assert_unchanged()

    assert len(branches_of(inserted)) == len(case.sites)  # 2 a weight that is used twice has one branch
    if variant not in PLACEMENTS:  # each use has one branch, except dead code
        uses = [(node, weight) for weight, uses in case.sites.items() for node, _ in uses if node != "aux"]
        bases = {str(node.args[0]): branch.weight_name for node, branch in branch_nodes(inserted).items()}
        assert bases == dict(uses)
    if variant == "live":  # all targets except branches and regions are in the child `model`
        text_of_owner = text(insert(case.own(), case.spec))
        assert text(inserted) == re.sub(r"(get_attr|call_module)\[(?!branches\.|submod_)", r"\1[model.", text_of_owner)

    bits = run_in_training(matched, case)  # 3 numerics: B = 0 moves no bit
    if variant not in PLACEMENTS:
        assert same_bits(run_in_training(inserted, case), bits)
    elif not same_bits(run_in_training(inserted, case), bits):  # no merged product needs a gradient of the weight
        on_weight = {name for name, uses in case.sites.items() if {form for _, form in uses} == {"on-weight"}}
        output = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, inserted(*case.args))
        assert same_bits(output, run_in_training(case.own(), case, on_weight.__contains__))
    fill(inserted)
    formula = run_eager(case, deltas(inserted))
    assert_close(run(inserted, case), formula)  # otherwise it is the formula
    assert_close(run_in_training(inserted, case), formula)  # also in forward of the hand-written backward
    assert_differ(formula, run(matched, case))

    again = InsertBranches()(inserted)
    assert not again.modified  # 4 a fixed point
    assert again.graph_module is inserted
    assert not MatchSites(spec)(inserted).modified
    assert text(FoldBranches()(inserted).graph_module) == before  # 5 the inverse


@pytest.mark.parametrize("case", ADAPTABLE, ids=str)
def test_nodes_and_branches(case: Case) -> None:
    inserted = insert(case.own(), case.spec)
    for node in branch_nodes(inserted):
        base = node.args[0]
        assert isinstance(base, fx.Node)
        assert node.name == f"{base.name}_lora"
        assert made_by(node) == "insert-branches"
        ours = {key: value for key, value in node.meta.items() if not key.startswith("lorasc_fx")}
        theirs = {key: value for key, value in base.meta.items() if not key.startswith("lorasc_fx")}
        assert ours == theirs
        assert made_by(base) == ""
    for weight, branch in branches_of(inserted).items():
        site, parameter = sites_of(inserted)[weight], weights_of(inserted)[weight]
        columns, rows = parameter[0].numel(), parameter.shape[0]
        if case.kind(weight) == "stacked":
            outputs, columns = parameter.shape[:0:-1] if weight in case.transposed else parameter.shape[1:]
            assert branch.lora_A.shape == (rows, site.rank, columns)
            assert branch.lora_B.shape == (rows, outputs, site.rank)
        else:
            columns, rows = (rows, columns) if weight in case.transposed else (columns, rows)
            assert branch.lora_A.shape == (site.rank, columns)
            assert branch.lora_B.shape == (rows, site.rank)
        assert branch.lora_A.dtype == branch.lora_B.dtype == torch.float64
        assert branch.lora_A.requires_grad
        assert branch.lora_B.requires_grad
        assert not branch.lora_B.any()
        assert 0 < branch.lora_A.detach().abs().max() <= columns**-0.5
        assert f"{branch.scale:.12f}" == f"{site.scale:.12f}"


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16, torch.float32])
def test_factors_of_a_narrow_weight_are_fp32_and_move_no_bit(narrow: torch.dtype) -> None:
    case = BY_NAME["module_linear"]
    graph_module = case.own().to(narrow)
    x = case.args[0].to(narrow)
    inserted = insert(graph_module, case.spec)
    assert {branch.lora_A.dtype for branch in branches_of(inserted).values()} == {torch.float32}
    with torch.no_grad():
        assert inserted(x).dtype == narrow
        assert torch.equal(inserted(x).view(torch.uint8), graph_module(x).view(torch.uint8))


# --- noise ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "distribution"), alternating(("uniform", "normal")), ids=str)
def test_noise_is_in_the_weights_of_a_graph_that_owns_them(case: Case, distribution: str) -> None:
    noise = Noise(0.4, distribution)  # type: ignore[arg-type]
    spec = CascadeSpec(rank=2, lora_alpha=3.0, noise=noise, seed=7)
    original = case.own()
    snapshot = Snapshot(original)
    inserted = insert(original, spec)
    snapshot.assert_unchanged()
    before, after = weights_of(original), weights_of(inserted)
    added = {}
    for name, value in after.items():
        if name not in sites_of(inserted):
            assert value.data_ptr() == before[name].data_ptr()  # not copied, not noisy
            assert not value.requires_grad
            continue
        u = noise_drawn(noise, 7, 1, name, value.shape).double()
        added[name] = 0.4 * before[name].detach().std() * u
        assert_close(value.detach(), (before[name] + added[name]).detach(), rtol=1e-14, atol=1e-15)
        assert not value.requires_grad
        assert same_bits(weight_state(inserted, name).base, before[name])
        if distribution == "uniform":
            assert u.abs().max() <= 0.5
    assert_close(run(inserted, case), run_eager(case, added))
    assert_differ(run(inserted, case), run(original, case))
    folded = FoldBranches()(inserted).graph_module  # B = 0: the fold takes the noise away, bit for bit
    for name, value in weights_of(folded).items():
        assert same_bits(value, before[name])


# --- what is there already --------------------------------------------------------------------------------------------


def test_a_taken_node_name_is_not_reused() -> None:
    model = nn.Sequential(OrderedDict(linear=nn.Linear(5, 7), linear_lora=nn.Linear(7, 6)))
    graph_module = fx.symbolic_trace(model.double())
    inserted = insert(graph_module, SPEC)
    assert [node.name for node in inserted.graph.nodes if node.op == "call_module"] == [
        "linear",
        "linear_lora_1",
        "linear_lora",
        "linear_lora_lora",
    ]
    folded = FoldBranches()(inserted).graph_module
    assert text(folded) == text(graph_module)
    assert text(insert(folded, SPEC)) == text(inserted)


def test_a_submodule_named_branches_is_an_error() -> None:
    model = nn.Sequential(OrderedDict(branches=nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 4))))
    graph_module = fx.symbolic_trace(model.double())
    with raises(PassError, "not-a-model", "'branches'"):
        insert(graph_module, SPEC)
    x = torch.randn(2, 5, dtype=torch.float64)
    live = capture(graph_module, (x,), {}).module  # may have such a child, because the branches are outside of it
    assert len(branch_nodes(insert(live, SPEC))) == 2


def test_a_computed_size_is_passed_to_the_branch() -> None:
    def padded(x: torch.Tensor, v: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        x = F.conv1d(x, v)
        return F.conv1d(x, w, padding=x.shape[-1] - 5)

    model = Of(padded, (4, 3, 2), (5, 4, 3)).double()
    inserted = fill(insert(fx.symbolic_trace(model), SPEC))
    added = deltas(inserted)
    weights = {name: value.detach() + added.get(name, 0) for name, value in model.named_parameters()}
    for length in (7, 9):
        x = torch.randn(2, 3, length, dtype=torch.float64)
        with torch.no_grad():
            assert_close(inserted(x), functional_call(model, weights, (x,)), **CLOSE)


class Recurrent(nn.Module):
    """Its recurrent layer is a leaf module, and also has its weights in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cell, self.last = nn.Linear(5, 4), nn.GRU(4, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.cell(self.first(x))[0])


@pytest.mark.parametrize("noise", [Noise(0.0), Noise(0.1)], ids=["quiet", "noisy"])
def test_only_branches_train(noise: Noise) -> None:
    """An optimizer of all that requires a gradient moves no weight of the user's model; a fold restores the flags."""
    torch.manual_seed(0)
    model, x = Recurrent(), torch.randn(3, 6, 5)
    model.first.bias.requires_grad_(False)
    flags, before = {n: p.requires_grad for n, p in model.named_parameters()}, copy.deepcopy(model.state_dict())
    spec = CascadeSpec(rank=2, noise=noise, train=("last.bias",), pace=1.0)
    traced = fx.symbolic_trace(model)
    graph = insert(traced, spec)
    for stage in range(2):
        trains = {name for name, value in graph.named_parameters() if value.requires_grad}
        branches = {f"branches.{name}" for name, _ in graph.get_submodule("branches").named_parameters()}
        assert trains == {"last.bias", *branches}
        optimizer = torch.optim.SGD(trainable_parameters(graph), lr=0.1)
        train(graph, optimizer, [x])
        if not stage:
            graph = StageTransition()(graph).graph_module
    assert flags == {name: value.requires_grad for name, value in model.named_parameters()}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name != "last.bias")
    assert all(value.grad is None for name, value in model.named_parameters() if name != "last.bias")
    folded = FoldBranches()(graph).graph_module
    assert flags == {name: value.requires_grad for name, value in folded.named_parameters()}
    kept = [name for name, value in folded.named_parameters() if value is model.get_parameter(name)]
    assert kept == [name for name in flags if not name.endswith(("first.weight", "last.weight"))]
    assert all(value is not None and value.requires_grad for value in folded.cell._flat_weights)  # type: ignore[union-attr]
    twin = copy.deepcopy(graph)  # its weights are others, which are not exchanged for the model's
    back = FoldBranches()(twin).graph_module
    assert flags == {name: value.requires_grad for name, value in back.named_parameters()}
    assert not {value.data_ptr() for value in back.parameters()} & {value.data_ptr() for value in model.parameters()}


def test_frozen_weights_that_were_changed_anyway() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh()).double()
    graph = insert(fx.symbolic_trace(model), CascadeSpec(rank=2, pace=1.0)).requires_grad_(True)
    x, optimizer = torch.randn(3, 5).double(), torch.optim.SGD(graph.parameters(), lr=0.1)
    for _ in range(2):
        graph(x).square().sum().backward()
        optimizer.step()
    assert_close(FoldBranches()(graph).graph_module(x), graph(x))
    noisy = insert(fx.symbolic_trace(model), CascadeSpec(rank=2, noise=Noise(0.1))).requires_grad_(True)
    with torch.no_grad():
        noisy.get_parameter("0.weight").add_(1.0)
    with raises(VerifyError, "graph-not-verified", "0.weight was changed after stage 1 started"):
        FoldBranches()(noisy)


GOLDEN = Path(__file__).parent / "golden"
BEFORE_2_13 = ("encoder", "encoder_layer", "gru", "lstm_deep", "mha_kdim", "mha_length_first")
"""Cases whose layer norm or attention torch.export writes with other arguments before torch 2.13."""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_golden(case: Case) -> None:
    """The texts of the graphs equal the golden file. With EXPECTTEST_ACCEPT=1, write it."""
    graph_module = case.own()
    texts = {"captured": text(graph_module)}
    if case.sites:
        inserted = insert(graph_module, case.spec)
        texts |= {"inserted": text(inserted), "folded": text(FoldBranches()(inserted).graph_module)}
        merged = text(insert(graph_module, placed(case, "merged")))
        texts |= {"merged": merged} if merged != texts["inserted"] else {}
        assert texts["folded"] == texts["captured"]
    if torch.__version__ < (2, 13) and case.name.removeprefix("aten_") in BEFORE_2_13:
        return
    path, content = GOLDEN / f"{case.name}.txt", "\n".join(f"=== {title} ===\n{body}" for title, body in texts.items())
    if os.environ.get("EXPECTTEST_ACCEPT"):
        path.write_text(content, encoding="utf-8")
    assert content == path.read_text(encoding="utf-8"), "run with EXPECTTEST_ACCEPT=1 and read what is written"


def placed(case: Case, placement: str) -> CascadeSpec:
    """The case's spec with another placement."""
    return replace(case.spec, placement=placement)


@pytest.mark.parametrize(("case", "placement"), alternating(("auto",), PLACEMENTS), ids=str)
def test_gradients_are_those_of_the_formula(case: Case, placement: str) -> None:
    if case.name != "module_in_place":  # which writes into its input
        assert_gradients(fill(insert(case.own(), placed(case, placement))), case)
