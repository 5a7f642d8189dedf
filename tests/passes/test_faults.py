"""Fault injection at every operation and every n-th line of a pass. The input must be unchanged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch import fx

from lorasc_fx import Noise
from lorasc_fx.passes import FoldBranches, InsertBranches, MatchSites, Pipeline, StageTransition
from tests.errors.inject import EVERY, FailAt, LineAt, failing, python_answers, sigint
from tests.passes.cases import BY_NAME, Case
from tests.passes.kit import Photograph
from tests.passes.test_transactions import _at

FILES = ("passes", "lorasc_fx/graph", "lorasc_fx/branch")
RUNS: dict[str, tuple[str, Callable[[Case], Any]]] = {
    "match": ("captured", lambda case: MatchSites(replace(case.spec, noise=Noise(0.3)))),
    "insert": ("matched", lambda case: InsertBranches()),
    "fold": ("inserted", lambda case: FoldBranches()),
    "transition": ("inserted", lambda case: StageTransition()),
    "fold-live": ("live", lambda case: FoldBranches()),
    "again": ("inserted", lambda case: Pipeline([StageTransition(), FoldBranches(), InsertBranches()])),
    "all": (
        "captured",
        lambda case: Pipeline([MatchSites(case.spec), InsertBranches(), StageTransition(), FoldBranches()]),
    ),
}
ACTS: dict[str, Callable[[], None]] = {"memory": failing(MemoryError("no more")), "ctrl-c": sigint}
CASE = BY_NAME["module_two_names"]
CASE = replace(CASE, spec=replace(CASE.spec, ranks=(3, 2)))  # a transition also writes another scale


def fails_in_turn(
    injector: Callable[[int], Any],
    stage: str,
    make: Callable[[Case], Callable[[fx.GraphModule], Any]],
    case: Case,
    often: int,
) -> int:
    """Make the pass fail at every `often`-th point, one at a time, until it succeeds. Return the number of failures."""
    graph_module = _at(stage, case)
    photograph, failures = Photograph(graph_module, case), 0
    for at in range(1, EVERY, often):
        with python_answers(), injector(at) as mode:
            try:
                make(case)(graph_module)
            except (MemoryError, KeyboardInterrupt):
                failures += 1
            else:
                assert mode.count < at
                return failures
        photograph.assert_unchanged()
    raise AssertionError("it never went through")


@pytest.mark.parametrize("kind", ACTS)
@pytest.mark.parametrize(("name", "often"), [("fold", 2), ("transition", 3), ("again", 13), ("all", 11)])
def test_at_some_operations(name: str, often: int, kind: str) -> None:
    stage, make = RUNS[name]
    assert fails_in_turn(lambda at: FailAt(at, ACTS[kind]), stage, make, CASE, often) > 3


@pytest.mark.parametrize("kind", ACTS)
@pytest.mark.parametrize("name", ["transition", "again"])
def test_at_some_lines(name: str, kind: str) -> None:
    stage, make = RUNS[name]
    assert fails_in_turn(lambda at: LineAt(at, ACTS[kind], FILES), stage, make, CASE, 907) > 3


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ACTS)
@pytest.mark.parametrize("name", RUNS)
def test_at_many_operations_and_lines(name: str, kind: str) -> None:
    stage, make = RUNS[name]
    fails_in_turn(lambda at: FailAt(at, ACTS[kind]), stage, make, CASE, 3)
    assert fails_in_turn(lambda at: LineAt(at, ACTS[kind], FILES), stage, make, CASE, 211) > 3
