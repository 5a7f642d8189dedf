"""Pipeline: the order of passes, foreign passes, and errors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager

from lorasc_fx import PassError
from lorasc_fx.graph import GraphEditor, branch_nodes, record_of, text
from lorasc_fx.passes import (
    CascadePass,
    FoldBranches,
    InsertBranches,
    MatchSites,
    PassOrderError,
    Pipeline,
    StageTransition,
    VerifyError,
)
from tests.kit.errors import raises
from tests.passes.cases import BY_NAME, SPEC
from tests.passes.kit import Snapshot, assert_close, deltas, fill, insert, run, same_bits, uses_of, weights_of

CASE = BY_NAME["module_convs"]


@dataclass(frozen=True)
class Note(CascadePass):
    """A pass without an effect, to test the order of contracts."""

    name: ClassVar[str] = "note"

    def rewrite(self, graph: GraphEditor) -> None:
        return None


def contract(called: str, requires: set[str] = frozenset(), provides: set[str] = frozenset()) -> CascadePass:  # type: ignore[assignment]
    """Return a pass with this name and contract and no effect."""
    members = {"name": called, "requires": frozenset(requires), "provides": frozenset(provides)}
    return type("Contract", (Note,), {"__annotations__": {}, **members})()


# --- order ----------------------------------------------------------------------------------------------------------


def test_insertion_and_fold_restore_the_graph() -> None:
    """A pipeline that has run changes nothing if it runs again."""
    original, insertion = CASE.own(), Pipeline([MatchSites(SPEC), InsertBranches()])
    inserted = insertion(original)
    assert inserted.modified
    folded = Pipeline([FoldBranches()])(inserted.graph_module)
    assert folded.modified
    for pipeline, result in ((insertion, inserted), (Pipeline([FoldBranches()]), folded)):
        repeated = pipeline(result.graph_module)
        assert not repeated.modified
        assert repeated.graph_module is result.graph_module
    assert text(folded.graph_module) == text(original)
    assert record_of(folded.graph_module).facts == {"sites-matched", "branches-folded"}
    assert same_bits(run(folded.graph_module, CASE), run(CASE.model, CASE))


def test_a_solved_order_fulfils_the_contracts_and_is_near_the_given_one() -> None:
    for order in itertools.permutations([MatchSites(SPEC), InsertBranches(), FoldBranches()]):
        solved = Pipeline(order, order="solved").passes
        assert [pass_.name for pass_ in solved] == ["match-sites", "insert-branches", "fold-branches"]
    passes = [contract("c"), contract("a"), contract("b", {"fact"}), contract("d"), contract("e", set(), {"fact"})]
    assert [pass_.name for pass_ in Pipeline(passes, order="solved").passes] == ["c", "a", "d", "e", "b"]
    staged = Pipeline([FoldBranches(), StageTransition(), InsertBranches(), MatchSites(SPEC)], order="solved")
    assert [pass_.name for pass_ in staged.passes][-2:] == ["stage-transition", "fold-branches"]


def nothing(graph_module: fx.GraphModule) -> None:
    """A pass without a contract, which edits in place and returns None."""
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


CYCLE = [
    contract("one", {"a"}, {"b"}),
    contract("two", {"b"}, {"c"}),
    contract("free"),
    contract("three", {"c"}, {"a"}),
]
WITHOUT_ORDER: list[tuple[list[Any], Any, str, str]] = [
    (CYCLE, "solved", "pass-order", "one -> two -> three -> one"),
    ([MatchSites(SPEC), nothing], "solved", "pass-order", "nothing"),
    ([InsertBranches(), FoldBranches(), InsertBranches()], "solved", "pass-order", "insert-branches"),
    ([MatchSites(SPEC)], "any", "invalid-value", "'any'"),
    ([], "given", "invalid-value", "empty"),
]


@pytest.mark.parametrize(("passes", "order", "code", "name"), WITHOUT_ORDER)
def test_passes_without_an_order(passes: list[Any], order: Any, code: str, name: str) -> None:
    with raises(PassOrderError, code, name):
        Pipeline(passes, order=order)


def test_a_pass_that_occurs_twice_runs_as_given() -> None:
    pipeline = Pipeline([MatchSites(SPEC), InsertBranches(), StageTransition(), StageTransition(), FoldBranches()])
    assert record_of(pipeline(CASE.own()).graph_module).plan.stage == 4
    again = Pipeline([InsertBranches(), FoldBranches(), InsertBranches()])
    folded = again(MatchSites(SPEC)(CASE.own()).graph_module).graph_module
    assert record_of(folded).facts == {"sites-matched", "branches-inserted"}


MISSING_FACTS = [
    ("insert-branches requires sites-matched", InsertBranches()),
    ("fold-branches requires branches-inserted", FoldBranches()),
    ("stage-transition requires branches-inserted", StageTransition()),
    ("fold-branches requires branches-inserted", Pipeline([MatchSites(SPEC), FoldBranches(), InsertBranches()])),
]


@pytest.mark.parametrize(("fact", "call"), MISSING_FACTS)
def test_a_missing_fact_is_named(fact: str, call: Callable[[fx.GraphModule], PassResult]) -> None:
    snapshot = Snapshot(CASE.own())
    with raises(PassError, "requirement-not-met", fact):
        call(snapshot.module)
    snapshot.assert_unchanged()


# --- other people's passes ------------------------------------------------------------------------------------------


class GeluForTanh(PassBase):
    """A `PassBase` of torch.fx, which returns a PassResult."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        modified = False
        for node in graph_module.graph.nodes:
            if node.op == "call_module" and isinstance(graph_module.get_submodule(node.target), nn.Tanh):
                with graph_module.graph.inserting_after(node):
                    new = graph_module.graph.call_function(torch.nn.functional.gelu, node.args)
                node.replace_all_uses_with(new)
                graph_module.graph.erase_node(node)
                modified = True
        graph_module.recompile()
        return PassResult(graph_module, modified)


def test_foreign_passes_of_every_kind() -> None:
    original = CASE.own()
    snapshot = Snapshot(original)

    def as_module(graph_module: fx.GraphModule) -> fx.GraphModule:
        return GeluForTanh()(graph_module).graph_module

    results = []
    for foreign in (GeluForTanh(), as_module):
        result = Pipeline([foreign, MatchSites(SPEC), nothing, InsertBranches(), nothing])(original)
        snapshot.assert_unchanged()
        assert result.modified
        assert [node.name for node in result.graph_module.graph.nodes if "gelu" in node.name] == ["gelu"]
        assert len(branch_nodes(result.graph_module)) == len(CASE.sites)
        results.append(result.graph_module)
    assert text(results[0]) == text(results[1])
    folded = FoldBranches()(results[0]).graph_module
    assert same_bits(run(folded, CASE), run(GeluForTanh()(CASE.own()).graph_module, CASE))


def test_a_foreign_pass_that_reports_no_change() -> None:
    graph_module = CASE.own()
    inserted = insert(graph_module, SPEC)

    def honest(graph_module: fx.GraphModule) -> PassResult:
        return PassResult(graph_module, False)

    result = Pipeline([honest, FoldBranches(), honest])(inserted)
    assert result.modified
    result = Pipeline([honest, InsertBranches()])(inserted)
    assert not result.modified
    assert result.graph_module is inserted


def test_a_foreign_pass_that_returns_something_else() -> None:
    with raises(PassError, "wrong-function-result", "<lambda>", "Graph"):
        Pipeline([lambda graph_module: graph_module.graph, MatchSites(SPEC)])(CASE.own())


def test_an_exception_has_a_note_with_the_name_of_the_pass() -> None:
    def halve(graph_module: fx.GraphModule) -> None:
        raise ZeroDivisionError("of the user")

    with pytest.raises(ZeroDivisionError, match="of the user") as caught:
        Pipeline([MatchSites(SPEC), Note(), halve])(CASE.own())
    assert caught.value.__notes__ == ["in the pass halve, number 3 of 3 of a Pipeline"]


def test_a_use_that_a_foreign_pass_adds_is_an_error() -> None:
    case = BY_NAME["functional_keywords"]

    def penalty(graph_module: fx.GraphModule) -> None:
        graph = graph_module.graph
        output = next(iter(reversed(graph.nodes)))
        with graph.inserting_before(output):
            weight = graph.get_attr("w2")
            norm = graph.call_method("norm", (weight,))
            total = graph.call_function(torch.add, (output.args[0], norm))
        output.args = (total,)
        graph_module.recompile()

    with raises(VerifyError, "graph-not-verified", "after penalty", "w2 is used at node w2_1 with 0 branches"):
        Pipeline([MatchSites(SPEC), InsertBranches(), penalty])(case.own())
    after = Pipeline([penalty, MatchSites(SPEC), InsertBranches()])(case.own()).graph_module
    assert record_of(after).refusals == ()  # before the match, the penalty is a use like another
    assert uses_of(after)["w2"] == (("w2", "on-weight"), ("w2_1", "on-weight"))


def test_a_pipeline_is_a_pass() -> None:
    inner = Pipeline([MatchSites(SPEC), InsertBranches()])
    outer = Pipeline([nothing, inner, FoldBranches(), InsertBranches()])
    assert text(outer(CASE.own()).graph_module) == text(inner(CASE.own()).graph_module)


# --- torch.fx's own PassManager -------------------------------------------------------------------------------------


def test_the_pass_manager_of_torch_fx() -> None:
    original = CASE.own()
    snapshot = Snapshot(original)
    manager = PassManager(passes=[MatchSites(SPEC), InsertBranches()])
    result = manager(original)
    assert result.modified
    assert text(result.graph_module) == text(insert(original, SPEC))
    fill(result.graph_module)
    added = deltas(result.graph_module)
    folded = PassManager(passes=[GeluForTanh(), FoldBranches()])(result.graph_module)
    assert folded.modified
    for name, value in added.items():
        expected = weights_of(original)[name].detach() + value
        assert_close(weights_of(folded.graph_module)[name].detach(), expected, rtol=1e-14, atol=1e-15)
    snapshot.assert_unchanged()
