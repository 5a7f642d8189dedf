"""All of a pass or pipeline, or nothing: what raises in the middle leaves the input as it was, bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import fx, nn

from lorasc_fx import CascadeSpec, Noise, UnknownTarget
from lorasc_fx.branch import Branch
from lorasc_fx.graph import GraphEditor, branch_nodes, named_weights, use_of
from lorasc_fx.passes import (
    CascadePass,
    FoldBranches,
    InsertBranches,
    MatchSites,
    Pipeline,
    StageTransition,
    VerifyError,
)
from tests.kit.errors import raises
from tests.passes.cases import BY_NAME, Case
from tests.passes.kit import Photograph, fill, insert, run, same_bits

SOME = [
    BY_NAME[name] for name in ("aten_conv2d", "aten_tied", "functional_keywords", "module_two_names", "module_convs")
]


class Stop(Exception):
    """Raised in the middle."""


@dataclass(frozen=True)
class Wreck(CascadePass):
    """Does everything that an editor can do, then stops."""

    name: ClassVar[str] = "wreck"

    def rewrite(self, graph: GraphEditor) -> None:
        named = named_weights(graph.owner)
        for weight, parameter in named.parameters.items():
            graph.set_tensor(named.names[weight], torch.full_like(parameter, 7.0))
        graph.renew_branches({key: _zero(branch) for key, branch in graph.branches.items()})
        for node in branch_nodes(graph.module):
            graph.remove_branch(node)
        for node in graph.nodes:
            if use_of(node) is not None:
                graph.insert_after(node, "nowhere", (node, node), {})
        graph.set_branches({})
        graph.mark({})
        graph.record = replace(graph.record, plan=None, facts=frozenset(), slow={})
        raise Stop


def _zero(branch: Branch) -> Branch:
    twin = object.__new__(type(branch))
    nn.Module.__init__(twin)
    twin.lora_A, twin.lora_B = nn.Parameter(branch.lora_A * 0), nn.Parameter(branch.lora_B * 0)
    twin.weight_name, twin.weight_shape, twin.scale = branch.weight_name, branch.weight_shape, branch.scale
    return twin


def _at(stage: str, case: Case) -> fx.GraphModule:
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
    graph_module = _at(stage, case)
    photograph = Photograph(graph_module, case)
    with pytest.raises(Stop):
        (Wreck() if through == "alone" else Pipeline([Wreck()]))(graph_module)
    photograph.assert_unchanged()


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
METHODS = (
    "mark",
    "set_branches",
    "renew_branches",
    "insert_after",
    "remove_branch",
    "set_tensor",
    "finish",
    "compiled",
)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", [BY_NAME["aten_conv2d"], BY_NAME["module_two_names"]], ids=str)
def test_an_editor_that_raises_at_any_moment(case: Case, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call of each method of the editor, one after the other, is the one that raises."""
    real, struck = getattr(GraphEditor, method), 0
    for stage, make in RUNS.values():
        for when, after in itertools.product(range(30), (False, True)):
            graph_module = _at(stage, case)
            photograph, calls = Photograph(graph_module, case), itertools.count()

            def raising(
                self: GraphEditor, *args: Any, when: int = when, after: bool = after, calls: Any = calls
            ) -> Any:
                if next(calls) != when:
                    return real(self, *args)
                if after and method != "finish":  # what finish has written is committed
                    real(self, *args)
                raise Stop

            with monkeypatch.context() as patch:
                patch.setattr(GraphEditor, method, raising)
                try:
                    make(case)(graph_module)
                except Stop:
                    struck += 1
                else:
                    break  # the method is not called that often
            photograph.assert_unchanged()
    assert struck


def test_a_write_that_fails_half_way_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME["aten_conv2d"]
    for when in range(8):
        inserted = fill(insert(case.own(), case.spec))
        photograph, real, calls = Photograph(inserted, case), torch.Tensor.copy_, itertools.count()
        held = {id(p) for name, p in inserted.named_parameters() if name.startswith("branches.")}

        def failing(
            self: torch.Tensor,
            *args: Any,
            when: int = when,
            held: set[int] = held,
            calls: Any = calls,
            real: Any = real,
        ) -> torch.Tensor:
            if id(self) in held and next(calls) == when:
                raise Stop
            return real(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "copy_", failing)
            with pytest.raises(Stop):
                StageTransition()(inserted)
        photograph.assert_unchanged()


def test_a_foreign_pass_that_raises_after_a_transition() -> None:
    case = BY_NAME["module_convs"]
    inserted = fill(insert(case.own(), case.spec))
    photograph = Photograph(inserted, case)

    def stop(graph_module: fx.GraphModule) -> None:
        raise Stop

    with pytest.raises(Stop):
        Pipeline([StageTransition(), stop])(inserted)
    photograph.assert_unchanged()


def test_a_transition_before_a_foreign_pass_still_keeps_the_parameters() -> None:
    case = BY_NAME["module_convs"]
    here, there = fill(insert(case.own(), case.spec)), fill(insert(case.own(), case.spec))
    held = {name: value for name, value in here.named_parameters() if name.startswith("branches.")}

    def nothing(graph_module: fx.GraphModule) -> None:
        graph_module.graph.eliminate_dead_code()
        graph_module.recompile()

    after = Pipeline([StageTransition(), nothing])(here).graph_module
    expected = StageTransition()(there).graph_module
    now = dict(after.named_parameters())
    assert held
    assert all(now[name] is value for name, value in held.items())
    assert all(same_bits(now[name], value) for name, value in expected.named_parameters())
    assert same_bits(run(after, case), run(expected, case))


def test_damage_by_a_pass_is_found_and_nothing_is_committed() -> None:
    @dataclass(frozen=True)
    class Careless(CascadePass):
        name: ClassVar[str] = "careless"
        requires: ClassVar[frozenset[str]] = frozenset({"branches-inserted"})

        def rewrite(self, graph: GraphEditor) -> None:
            graph.remove_branch(next(iter(branch_nodes(graph.module))))

    case = BY_NAME["module_conv2d"]
    inserted = fill(insert(case.own(), case.spec))
    photograph = Photograph(inserted, case)
    for runner in (Careless(), Pipeline([StageTransition(), Careless()], order="given")):
        with raises(VerifyError, "graph-not-verified", "after careless", "0.weight is used at node _0 with 0 branches"):
            runner(inserted)
        photograph.assert_unchanged()


def test_a_late_error_undoes_the_early_passes() -> None:
    case = BY_NAME["module_conv2d"]
    inserted = fill(insert(case.own(), case.spec))
    photograph = Photograph(inserted, case)
    late = MatchSites(CascadeSpec(targets=("nowhere.*",)))
    with pytest.raises(UnknownTarget):
        Pipeline([StageTransition(), FoldBranches(), late])(inserted)
    photograph.assert_unchanged()
