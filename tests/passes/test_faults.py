"""A pass or pipeline that raises, at any operation or line, leaves its input unchanged, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import fx, nn

from lorasc_fx import CascadeSpec, Noise, UnknownTarget
from lorasc_fx.branch import Branch
from lorasc_fx.graph import GraphEditor, Record, branch_nodes, named_weights
from lorasc_fx.graph.matching import uses_in
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
from tests.passes.cases import BY_NAME, Case
from tests.passes.kit import Photograph, fill, insert, run, same_bits

SOME = [
    BY_NAME[name] for name in ("aten_conv2d", "aten_tied", "functional_keywords", "module_two_names", "module_convs")
]


class Stop(Exception):
    """Raised by a pass in the middle of its work."""


@dataclass(frozen=True)
class Wreck(CascadePass):
    """Uses every method of the editor, then raises."""

    name: ClassVar[str] = "wreck"

    def rewrite(self, graph: GraphEditor) -> None:
        named = named_weights(graph.owner)
        for weight, parameter in named.parameters.items():
            graph.set_tensor(named.names[weight], torch.full_like(parameter, 7.0))
        graph.renew_branches({key: _zero(branch) for key, branch in graph.branches.items()})
        for node in branch_nodes(graph.module):
            graph.remove_branch(node)
        for node in uses_in(graph.module, graph.record):
            graph.insert_after(node, "nowhere", (node, node), {})
        graph.set_branches({})
        graph.record = Record()
        raise Stop


def _zero(branch: Branch) -> Branch:
    twin = object.__new__(type(branch))
    nn.Module.__init__(twin)
    twin.lora_A, twin.lora_B = nn.Parameter(branch.lora_A * 0), nn.Parameter(branch.lora_B * 0)
    twin.weight_name, twin.weight_shape, twin.scale = branch.weight_name, branch.weight_shape, branch.scale
    return twin


def _graph_at(stage: str, case: Case) -> fx.GraphModule:
    """The case's graph before or after a pass."""
    spec = replace(case.spec, noise=Noise(0.3))
    match stage:
        case "captured":
            return case.own()
        case "matched":
            return MatchSites(spec)(case.own()).graph_module
        case "live":
            return fill(insert(case.live(), spec))
    inserted = fill(insert(case.own(), spec))
    return FoldBranches()(inserted).graph_module if stage == "folded" else inserted


@pytest.mark.parametrize("through", ["alone", "pipeline"])
@pytest.mark.parametrize("stage", ["captured", "matched", "inserted", "folded", "live"])
@pytest.mark.parametrize("case", SOME, ids=str)
def test_a_pass_that_raises_leaves_its_input(case: Case, stage: str, through: str) -> None:
    graph_module = _graph_at(stage, case)
    photograph = Photograph(graph_module, case)
    with pytest.raises(Stop):
        (Wreck() if through == "alone" else Pipeline([Wreck()]))(graph_module)
    photograph.assert_unchanged()


def test_a_transition_before_a_foreign_pass_still_keeps_the_parameters() -> None:
    case = BY_NAME["module_convs"]
    inserted, twin = fill(insert(case.own(), case.spec)), fill(insert(case.own(), case.spec))
    parameters = {name: value for name, value in inserted.named_parameters() if name.startswith("branches.")}

    def nothing(graph_module: fx.GraphModule) -> None:
        graph_module.graph.eliminate_dead_code()
        graph_module.recompile()

    after = Pipeline([StageTransition(), nothing])(inserted).graph_module
    expected = StageTransition()(twin).graph_module
    current = dict(after.named_parameters())
    assert parameters
    assert all(current[name] is value for name, value in parameters.items())
    assert all(same_bits(current[name], value) for name, value in expected.named_parameters())
    assert same_bits(run(after, case), run(expected, case))


def test_damage_by_a_pass_is_an_error_and_nothing_is_committed() -> None:
    @dataclass(frozen=True)
    class Careless(CascadePass):
        name: ClassVar[str] = "careless"
        requires: ClassVar[frozenset[str]] = frozenset({"branches-inserted"})

        def rewrite(self, graph: GraphEditor) -> None:
            graph.remove_branch(next(iter(branch_nodes(graph.module))))

    case = BY_NAME["module_conv2d"]
    inserted = fill(insert(case.own(), case.spec))
    photograph = Photograph(inserted, case)
    for runner in (Careless(), Pipeline([StageTransition(), Careless()]), Pipeline([Careless(), FoldBranches()])):
        with raises(VerifyError, "graph-not-verified", "after careless", "0.weight is used at node _0 with 0 branches"):
            runner(inserted)
        photograph.assert_unchanged()


def test_a_late_error_rolls_back_the_early_passes() -> None:
    case = BY_NAME["module_conv2d"]
    inserted = fill(insert(case.own(), case.spec))
    photograph = Photograph(inserted, case)
    late = MatchSites(CascadeSpec(targets=("nowhere.*",)))
    with pytest.raises(UnknownTarget):
        Pipeline([StageTransition(), FoldBranches(), late])(inserted)
    photograph.assert_unchanged()


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


def fails_in_turn(
    injector: Callable[[int], Any],
    stage: str,
    make: Callable[[Case], Callable[[fx.GraphModule], Any]],
    case: Case,
    often: int,
) -> int:
    """Make the pass fail at every `often`-th point, one at a time, until it succeeds. Return the number of failures."""
    graph_module = _graph_at(stage, case)
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
