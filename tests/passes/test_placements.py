"""The placements `merged` and `weight`, and shared inputs, give the same outputs and gradients as `beside`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lorasc_fx import CascadeSpec
from lorasc_fx.graph import branch_nodes, call_template, text
from lorasc_fx.graph.branch_calls import shared_input
from lorasc_fx.passes import FoldBranches, InsertBranches, MatchSites, Pipeline, ShareInputs, SplitInputs
from tests.passes.cases import ADAPTABLE, Case
from tests.passes.kit import (
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
    run_with_gradients,
    same_bits,
)

MERGES = ("linear", "addmm", "mm", "matmul", "conv1d", "conv2d", "conv3d")
"""Ends of the names of the forms that a merged branch can replace."""


def placed(case: Case, placement: str) -> CascadeSpec:
    """The case's spec with another placement."""
    return replace(case.spec, placement=placement)


def mergeable(case: Case) -> list[str]:
    """The nodes of a case that a merged branch can replace: a known form that reads the stored weight directly."""
    graph = {node.name: node for node in case.own().graph.nodes}
    names = []
    for weight, uses in case.sites.items():
        if case.kind(weight) == "embedding":  # a head tied to its table has one branch for both
            continue
        ties = {weight, *case.aliases.get(weight, ())}
        for name, form in uses:
            node = graph[name]
            direct = node.op == "call_module" or any(
                source.op == "get_attr" and source.target in ties for source in node.all_input_nodes
            )
            if form.rpartition(".")[2].lower() in MERGES and node.users and direct:
                names.append(name)
    return names


@pytest.mark.parametrize("placement", ["merged", "weight"])
@pytest.mark.parametrize("case", ADAPTABLE, ids=str)
def test_outputs_and_inverse(case: Case, placement: str) -> None:
    matched = MatchSites(placed(case, placement))(case.own()).graph_module
    before, bits = text(matched), run_in_training(matched, case)
    inserted = InsertBranches()(matched).graph_module
    assert len(branches_of(inserted)) == len(case.sites)
    # B = 0 moves no bit. torch chooses kernels by which weights require a gradient, and no merged product needs one.
    reference = case.own()
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_({form for _, form in case.sites.get(name, ())} == {"on-weight"})
    trained = same_bits(run_in_training(inserted, case), bits)
    assert trained or same_bits(run_with_gradients(inserted, case), run_with_gradients(reference, case))

    fill(inserted)
    formula = run_eager(case, deltas(inserted))
    assert_close(run(inserted, case), formula)
    assert_close(run_in_training(inserted, case), formula)  # by the hand-written backward's forward
    assert_differ(formula, bits)

    assert not InsertBranches()(inserted).modified
    assert not MatchSites(placed(case, placement))(inserted).modified
    assert text(FoldBranches()(inserted).graph_module) == before


@pytest.mark.parametrize("placement", ["auto", "merged", "weight"])
@pytest.mark.parametrize("case", [case for case in ADAPTABLE if case.name != "module_in_place"], ids=str)
def test_gradients_are_those_of_the_formula(case: Case, placement: str) -> None:
    assert_gradients(fill(insert(case.own(), placed(case, placement))), case)


def test_a_merged_branch_replaces_its_op() -> None:
    names = {case.name: mergeable(case) for case in ADAPTABLE}
    assert sum(map(len, names.values())) > 20
    for case in ADAPTABLE:
        graph_module = insert(case.own(), placed(case, "merged"))
        spelled = {call_template(node).name for node in branch_nodes(graph_module) if call_template(node) is not None}
        remaining = {node.name for node in graph_module.graph.nodes}
        assert not spelled & remaining, case.name  # the op itself is gone
        missed = set(names[case.name]) - spelled
        assert not missed, case.name


# --- shared inputs ---------------------------------------------------------------------------------------------------


class Attention(torch.nn.Module):
    """Three projections of one node, with different widths, and one of another node."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = torch.nn.Linear(6, 4), torch.nn.Linear(6, 5)
        self.v, self.o = torch.nn.Linear(6, 3, bias=False), torch.nn.Linear(3, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(x)
        return self.q(h).sin().sum() + self.k(h).square().sum() + self.o(self.v(h)).sin().sum()


SHARED = CascadeSpec(rank=2, lora_alpha=3.0, placement="beside")


def attention(frontend: str) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    model = Attention().double()
    if frontend == "symbolic":
        return torch.fx.symbolic_trace(model)
    return torch.export.export(model, (torch.randn(3, 8, 6, dtype=torch.float64),)).module()


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_branches_that_read_one_node_share_it(frontend: str) -> None:
    graph_module = attention(frontend)
    apart = Pipeline([MatchSites(SHARED), InsertBranches()])(graph_module).graph_module
    result = ShareInputs()(apart)
    together = result.graph_module
    assert result.modified
    groups = {shared_input(node).group for node in branch_nodes(together) if shared_input(node) is not None}
    assert len(groups) == 1
    assert sorted(shared_input(node).factor for node in branch_nodes(together) if shared_input(node) is not None) == [
        "k/weight",
        "q/weight",
        "v/weight",
    ]
    fill_alike(apart, together)
    x = torch.randn(3, 8, 6, dtype=torch.float64)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    shared_loss, loss = together(mine), apart(theirs)
    assert_close(shared_loss, loss)
    shared_loss.backward()
    loss.backward()
    assert_close(mine.grad, theirs.grad)
    for ours, alone in zip(together.branches.parameters(), apart.branches.parameters(), strict=True):
        assert_close(ours.grad, alone.grad)
    with torch.no_grad():
        assert_close(together(x), apart(x))

    assert not ShareInputs()(together).modified
    assert not MatchSites(SHARED)(together).modified
    assert not InsertBranches()(together).modified
    assert text(SplitInputs()(together).graph_module) == text(apart)
    assert not SplitInputs()(SplitInputs()(together).graph_module).modified
    assert text(FoldBranches()(together).graph_module) == text(graph_module)


def fill_alike(*graph_modules: torch.fx.GraphModule) -> None:
    for graph_module in graph_modules:
        fill(graph_module)
        for parameter in graph_module.branches.parameters():
            parameter.grad = None


def test_zero_b_changes_no_bit_with_a_shared_input() -> None:
    graph_module = attention("export")
    shared = Pipeline([MatchSites(SHARED), InsertBranches(), ShareInputs()])(graph_module).graph_module
    x = torch.randn(3, 8, 6, dtype=torch.float64)
    assert same_bits(shared(x).detach(), graph_module(x).detach())


def test_small_inputs_are_not_shared() -> None:
    apart = Pipeline([MatchSites(SHARED), InsertBranches()])(attention("export")).graph_module
    assert ShareInputs(least=3 * 8 * 6)(apart).modified
    few = ShareInputs(least=3 * 8 * 6 + 1)(apart)
    assert not few.modified
    assert few.graph_module is apart
    unknown = Pipeline([MatchSites(SHARED), InsertBranches()])(attention("symbolic")).graph_module
    assert not ShareInputs(least=1)(unknown).modified


def test_branches_with_dropout_are_not_shared() -> None:
    spec = replace(SHARED, dropout=0.5)
    graph_module = Pipeline([MatchSites(spec), InsertBranches()])(attention("export")).graph_module
    assert not ShareInputs()(graph_module).modified


def merged_graph() -> torch.fx.GraphModule:
    return insert(attention("export"), replace(SHARED, placement="merged"))
