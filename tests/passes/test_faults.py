"""A pass or pipeline that raises, at any operation or line, leaves its input unchanged, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
from torch import fx

from lorasc_fx import CascadeSpec, Noise, UnknownTarget
from lorasc_fx.graph import GraphEditor, branch_nodes
from lorasc_fx.passes import (
    CascadePass,
    FoldBranches,
    InsertBranches,
    MatchSites,
    Pipeline,
    StageTransition,
    VerifyError,
)
from tests.errors.inject import EVERY, FailAt, LineAt, failing, python_answers, sigint
from tests.kit.errors import raises
from tests.passes.cases import BY_NAME
from tests.passes.kit import Snapshot, fill, insert, run, same_bits
from tests.passes.test_pipeline import nothing

CASE = BY_NAME["module_two_names"]
SPEC = replace(CASE.spec, noise=Noise(0.3))


def graph_at(stage: str) -> fx.GraphModule:
    """The graph before or after a pass."""
    match stage:
        case "captured":
            return CASE.own()
        case "matched":
            return MatchSites(SPEC)(CASE.own()).graph_module
        case "live":
            return fill(insert(CASE.live(), SPEC))
    return fill(insert(CASE.own(), SPEC))


def test_a_transition_before_a_foreign_pass_still_keeps_the_parameters() -> None:
    case = BY_NAME["module_convs"]
    inserted, twin = fill(insert(case.own(), case.spec)), fill(insert(case.own(), case.spec))
    parameters = {name: value for name, value in inserted.named_parameters() if name.startswith("branches.")}
    after = Pipeline([StageTransition(), nothing])(inserted).graph_module
    expected = StageTransition()(twin).graph_module
    current = dict(after.named_parameters())
    assert parameters
    assert all(current[name] is value for name, value in parameters.items())
    assert all(same_bits(current[name], value) for name, value in expected.named_parameters())
    assert same_bits(run(after, case), run(expected, case))


def test_a_late_error_rolls_back_the_early_passes() -> None:
    @dataclass(frozen=True)
    class Careless(CascadePass):
        name: ClassVar[str] = "careless"
        requires: ClassVar[frozenset[str]] = frozenset({"branches-inserted"})

        def rewrite(self, graph: GraphEditor) -> None:
            graph.remove_branch(next(iter(branch_nodes(graph.module))))

    case = BY_NAME["module_conv2d"]
    inserted = fill(insert(case.own(), case.spec))
    snapshot = Snapshot(inserted)
    for runner in (Careless(), Pipeline([StageTransition(), Careless()]), Pipeline([Careless(), FoldBranches()])):
        with raises(VerifyError, "graph-not-verified", "after careless", "0.weight is used at node _0 with 0 branches"):
            runner(inserted)
        snapshot.assert_unchanged()
    with pytest.raises(UnknownTarget):
        Pipeline([StageTransition(), FoldBranches(), MatchSites(CascadeSpec(targets=("nowhere.*",)))])(inserted)
    snapshot.assert_unchanged()


FILES = ("passes", "lorasc_fx/graph", "lorasc_fx/branch")
RUNS: dict[str, tuple[str, Callable[[fx.GraphModule], Any]]] = {
    "match": ("captured", MatchSites(SPEC)),
    "insert": ("matched", InsertBranches()),
    "fold": ("inserted", FoldBranches()),
    "transition": ("inserted", StageTransition()),
    "fold-live": ("live", FoldBranches()),
    "again": ("inserted", Pipeline([StageTransition(), FoldBranches(), InsertBranches()])),
    "all": ("captured", Pipeline([MatchSites(SPEC), InsertBranches(), StageTransition(), FoldBranches()])),
}
ACTS: dict[str, Callable[[], None]] = {"memory": failing(MemoryError("no more")), "ctrl-c": sigint}
OPERATIONS = {"fold": 2, "fold-live": 2, "transition": 3, "again": 13, "all": 11}
LINES = {"transition": 907, "again": 907}
TRIALS = [("operation", *row) for row in OPERATIONS.items()] + [("line", *row) for row in LINES.items()]
MANY = [(unit, name, often) for unit, often in (("operation", 3), ("line", 211)) for name in RUNS]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ACTS)
@pytest.mark.parametrize(
    ("unit", "name", "often"), [*TRIALS, *(pytest.param(*row, marks=pytest.mark.slow) for row in MANY)]
)
def test_a_fault_at_every_nth_place(unit: str, name: str, often: int, kind: str) -> None:
    """A pass fails at one place after the other, until it succeeds. Each failure leaves the input unchanged."""
    stage, pass_ = RUNS[name]
    graph_module = graph_at(stage)
    snapshot, failures = Snapshot(graph_module), 0
    for number in range(1, EVERY, often):
        injector = FailAt(number, ACTS[kind]) if unit == "operation" else LineAt(number, ACTS[kind], FILES)
        with python_answers(), injector:
            try:
                pass_(graph_module)
            except (MemoryError, KeyboardInterrupt):
                failures += 1
            else:
                assert injector.count < number
                break
        snapshot.assert_unchanged()
    assert failures >= 3 or (unit == "operation" and name in ("match", "insert"))  # which run few operations
