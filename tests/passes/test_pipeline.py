"""Pipeline: the order of passes, foreign passes, and errors."""

from __future__ import annotations

import itertools
import sys
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
from tests.passes.kit import Photograph, assert_close, deltas, fill, insert, run, same_bits, uses_of, weights_of

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


def test_insertion_transition_and_fold_restore_the_graph() -> None:
    original = CASE.own()
    result = Pipeline([MatchSites(SPEC), InsertBranches(), FoldBranches()])(original)
    assert result.modified
    assert text(result.graph_module) == text(original)
    assert record_of(result.graph_module).facts == {"sites-matched", "branches-folded"}
    assert same_bits(run(result.graph_module, CASE), run(CASE.model, CASE))
    staged = Pipeline([MatchSites(SPEC), InsertBranches(), StageTransition(), FoldBranches()])(CASE.own())
    assert record_of(staged.graph_module).plan.stage == 3


@pytest.mark.parametrize("order", [*itertools.permutations([MatchSites(SPEC), InsertBranches(), FoldBranches()])])
def test_any_permutation_is_solved(order: tuple[CascadePass, ...]) -> None:
    pipeline = Pipeline(order, order="solved")
    assert [pass_.name for pass_ in pipeline.passes] == ["match-sites", "insert-branches", "fold-branches"]
    original = CASE.own()
    assert text(pipeline(original).graph_module) == text(original)


def test_a_solved_order_is_near_the_given_one() -> None:
    passes = [contract("c"), contract("a"), contract("b", {"fact"}), contract("d"), contract("e", set(), {"fact"})]
    assert [pass_.name for pass_ in Pipeline(passes, order="solved").passes] == ["c", "a", "d", "e", "b"]
    staged = Pipeline([FoldBranches(), StageTransition(), InsertBranches(), MatchSites(SPEC)], order="solved")
    assert [pass_.name for pass_ in staged.passes][-2:] == ["stage-transition", "fold-branches"]


def nothing(graph_module: fx.GraphModule) -> None:
    """A pass without a contract."""


CYCLE = [
    contract("one", {"a"}, {"b"}),
    contract("two", {"b"}, {"c"}),
    contract("free"),
    contract("three", {"c"}, {"a"}),
]
UNSOLVABLE: dict[str, list[Any]] = {
    "one -> two -> three -> one": CYCLE,
    "nothing is not a CascadePass": [MatchSites(SPEC), nothing],
    "twice": [InsertBranches(), FoldBranches(), InsertBranches()],
}


@pytest.mark.parametrize("message", UNSOLVABLE)
def test_passes_without_an_order(message: str) -> None:
    with raises(PassOrderError, "pass-order", message):
        Pipeline(UNSOLVABLE[message], order="solved")
    with raises(PassOrderError, "invalid-value", "'any'"):
        Pipeline([MatchSites(SPEC)], order="any")  # type: ignore[arg-type]


def test_a_pass_that_occurs_twice_runs_as_given() -> None:
    pipeline = Pipeline([MatchSites(SPEC), InsertBranches(), StageTransition(), StageTransition(), FoldBranches()])
    assert record_of(pipeline(CASE.own()).graph_module).plan.stage == 4
    again = Pipeline([InsertBranches(), FoldBranches(), InsertBranches()])
    folded = again(MatchSites(SPEC)(CASE.own()).graph_module).graph_module
    assert record_of(folded).facts == {"sites-matched", "branches-inserted"}


def test_an_empty_pipeline_is_an_error() -> None:
    with raises(PassOrderError, "invalid-value"):
        Pipeline([])


@pytest.mark.parametrize(
    ("name", "fact", "call"),
    [
        ("insert-branches", "sites-matched", InsertBranches()),
        ("insert-branches", "sites-matched", Pipeline([InsertBranches(), FoldBranches()])),
        ("fold-branches", "branches-inserted", FoldBranches()),
        ("stage-transition", "branches-inserted", StageTransition()),
        ("fold-branches", "branches-inserted", Pipeline([MatchSites(SPEC), FoldBranches(), InsertBranches()])),
    ],
    ids=["alone", "in a pipeline", "fold", "transition", "too early"],
)
def test_a_missing_fact_is_named(name: str, fact: str, call: Callable[[fx.GraphModule], PassResult]) -> None:
    photograph = Photograph(CASE.own(), CASE)
    with raises(PassError, "requirement-not-met", f"{name} requires {fact}", "run a pass that provides it"):
        call(photograph.module)
    photograph.assert_unchanged()


# --- truthful -------------------------------------------------------------------------------------------------------


def test_modified_is_truthful() -> None:
    pipeline = Pipeline([MatchSites(SPEC), InsertBranches()])
    result = pipeline(CASE.own())
    assert result.modified
    again = pipeline(result.graph_module)
    assert not again.modified
    assert again.graph_module is result.graph_module
    folded = Pipeline([FoldBranches()])(result.graph_module)
    assert folded.modified
    again = Pipeline([FoldBranches()])(folded.graph_module)
    assert not again.modified
    assert again.graph_module is folded.graph_module


# --- other people's passes ------------------------------------------------------------------------------------------


def rename_nothing(graph_module: fx.GraphModule) -> None:
    """Edits in place and returns None."""
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


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
    photograph = Photograph(original, CASE)

    def as_module(graph_module: fx.GraphModule) -> fx.GraphModule:
        return GeluForTanh()(graph_module).graph_module

    results = []
    for foreign in (GeluForTanh(), as_module):
        result = Pipeline([foreign, MatchSites(SPEC), rename_nothing, InsertBranches(), rename_nothing])(original)
        photograph.assert_unchanged()
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
    class Odd:
        def __call__(self, graph_module: fx.GraphModule) -> Any:
            return graph_module.graph

    for odd in (Odd(), lambda graph_module: "done"):
        name, got = ("Odd", "Graph") if isinstance(odd, Odd) else ("<lambda>", "str")
        with raises(PassError, "wrong-function-result", name, got):
            Pipeline([odd, MatchSites(SPEC)])(CASE.own())


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
    outer = Pipeline([rename_nothing, inner, FoldBranches(), InsertBranches()])
    assert text(outer(CASE.own()).graph_module) == text(inner(CASE.own()).graph_module)


# --- torch.fx's own PassManager -------------------------------------------------------------------------------------


def test_the_pass_manager_of_torch_fx() -> None:
    original = CASE.own()
    photograph = Photograph(original, CASE)
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
    photograph.assert_unchanged()


# --- growth ---------------------------------------------------------------------------------------------------------


def _lines(layers: int) -> int:
    """Number of Python lines that an insertion and a fold run on a chain of layers."""
    chain = [nn.Linear(2, 3, bias=False) if index % 2 else nn.Linear(3, 2, bias=False) for index in range(layers)]
    graph_module = fx.symbolic_trace(nn.Sequential(*chain))
    pipeline = Pipeline([MatchSites(SPEC), InsertBranches(), StageTransition(), FoldBranches()])
    count = 0

    def note(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        count += 1
        return note

    before = sys.gettrace()
    sys.settrace(note)
    try:
        pipeline(graph_module)
    finally:
        sys.settrace(before)
    return count


def test_work_grows_linearly_with_the_graph() -> None:
    assert _lines(200) < 4.3 * _lines(50)
