"""Every public error is exported and is raised by some test, found in the sources of the tests."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import lorasc_fx as lx
from lorasc_fx import errors
from lorasc_fx.passes import FoldBranches, InsertBranches, MatchSites, Pipeline, StageTransition
from tests.errors.catalogue import ENTRIES
from tests.errors.models import exactly, inputs, mlp
from tests.errors.page import PAGE, page
from tests.errors.raises import Place, held, places, untested
from tests.errors.state import unchanged

PUBLIC = [name for name in errors.__all__ if isinstance(getattr(errors, name), type)]
CLASSES = [name for name in PUBLIC if not issubclass(getattr(errors, name), Warning)]


def raised_in(source: str) -> Iterator[str]:
    """Names inside the first argument of each `pytest.raises`, and of each `with raises` written in full."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("pytest.raises", "raises", "refuse") and node.args:
            for inside in ast.walk(node.args[0]):
                if isinstance(inside, ast.Name):
                    yield inside.id
                elif isinstance(inside, ast.Attribute):
                    yield inside.attr


def test_every_error_is_exported() -> None:
    assert set(errors.__all__) == {*PUBLIC, "listed", "named", "nearest", "path_of", "warn"}
    for name in PUBLIC:
        home = next((module for module in (lx, lx.passes, lx.export) if name in module.__all__), lx.errors)
        assert getattr(home, name) is getattr(errors, name)
    assert {name for name in lx.__all__ if name in PUBLIC} == {
        "LorascError", "SpecError", "UnknownTarget", "CaptureError", "PassError", "StateError", "NonFiniteBranch",
        "CheckpointError",
    }  # fmt: skip
    for name in CLASSES:
        assert issubclass(getattr(errors, name), lx.LorascError)
    defined = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert defined == set(PUBLIC)


def test_every_error_is_raised_by_some_test() -> None:
    tests = Path(__file__).parents[1]
    found = {name for path in tests.rglob("test_*.py") for name in raised_in(path.read_text(encoding="utf-8"))}
    assert set(CLASSES) - found == set()


def test_every_message_is_held_by_some_test() -> None:
    """Each `raise` of a public error, by words of its own; a new message needs a test that holds it."""
    assert len(places()) > 150
    assert untested(places(), held()) == []


def test_the_search_for_held_messages_finds_what_it_should() -> None:
    one = Place("StateError", "a.py:1", ("the weights are ", " and the call was early"))
    two = Place("StateError", "b.py:2", ("the weights are ", " and the call was late"))
    assert untested([one, two], ["^the weights are old and the call was early$"]) == [
        f"b.py:2: StateError({' ... '.join(two.parts)!r})"
    ]
    assert len(untested([one, two], ["the weights are old and the call was"])) == 2  # words that both have


def test_the_catalogue_has_every_error() -> None:
    assert sorted(entry.raised.__name__ for entry in ENTRIES) == sorted(CLASSES)


def test_the_page_is_what_the_calls_raise() -> None:
    """`python -m tests.errors.page` writes it anew."""
    assert PAGE.read_text(encoding="utf-8") == page()


def test_the_search_for_raised_errors_finds_what_it_should() -> None:
    source = "with pytest.raises(lx.A, match='B'):\n    C()\nwith pytest.raises((D, e.F)):\n    raise G"
    assert set(raised_in(source)) - {"lx", "e"} == {"A", "D", "F"}


@pytest.mark.parametrize("name", CLASSES)
def test_every_error_is_documented(name: str) -> None:
    assert getattr(errors, name).__doc__


def test_an_extra_that_is_missing() -> None:
    from lorasc_fx.extras import module_of

    sentence = "this needs the package 'absent_package', which is not installed: pip install 'lorasc-fx[vision]'"
    with pytest.raises(lx.errors.MissingExtra, match=exactly(sentence)) as caught:
        module_of("vision", "absent_package.part")
    assert isinstance(caught.value, ImportError)


def test_one_root_catches_them_all() -> None:
    with pytest.raises(lx.LorascError, match=r"^rank is 0; "):
        lx.CascadeSpec(rank=0)
    with pytest.raises(ValueError, match=r"^rank is 0; "):
        lx.CascadeSpec(rank=0)


# ---- passes: the errors that need no cascade

SPEC = lx.CascadeSpec(rank=2)


def graph_of(model: nn.Module) -> fx.GraphModule:
    return fx.symbolic_trace(model)


def test_a_pass_whose_requirement_is_not_met() -> None:
    graph_module = graph_of(mlp())
    for each, fact in ((InsertBranches(), "sites-matched"), (FoldBranches(), "branches-inserted")):
        sentence = f"{each.name} requires {fact}, which this graph does not carry; run a pass that provides it before"
        with unchanged(graph_module), pytest.raises(lx.PassError, match=exactly(sentence)):
            each(graph_module)


@pytest.mark.parametrize(
    ("passes", "sentence"),
    [
        (list, "the pipeline is empty; give at least one pass"),
        (
            lambda: [InsertBranches(), MatchSites(SPEC)],
            "the passes cannot run in this order:\n"
            "  insert-branches requires sites-matched, which match-sites provides only after it",
        ),
        (
            lambda: [MatchSites(SPEC), InsertBranches(), FoldBranches(), StageTransition()],
            "the passes cannot run in this order:\n"
            "  stage-transition requires branches-inserted, which fold-branches before it takes away",
        ),
    ],
)
def test_an_impossible_order(passes: object, sentence: str) -> None:
    assert callable(passes)
    with pytest.raises(lx.passes.PassOrderError, match=exactly(sentence)):
        Pipeline(passes(), order="given")


def test_a_graph_that_does_not_agree_with_its_plan() -> None:
    pipeline = Pipeline([MatchSites(SPEC), InsertBranches()])
    adapted = pipeline(graph_of(mlp())).graph_module
    node = next(node for node in adapted.graph.nodes if node.name.endswith("_lora"))
    node.replace_all_uses_with(node.args[0], delete_user_cb=lambda user: user is not node)
    adapted.recompile()
    with unchanged(adapted), pytest.raises(lx.passes.VerifyError) as caught:
        FoldBranches()(adapted)
    lines = str(caught.value).splitlines()
    assert lines[0] == "before fold-branches, the graph does not agree with its plan:"
    assert f"  branch node {node.name} is read by nobody" in lines


def test_a_plan_of_another_kind() -> None:
    graph_module = graph_of(mlp())
    matched = MatchSites(SPEC)(graph_module).graph_module
    plan = json.loads(matched.meta["lorasc_fx"].plan.to_json())
    plan["sites"][0]["kind"] = "conv"
    matched.meta["lorasc_fx"] = replace(matched.meta["lorasc_fx"], plan=lx.Plan.from_json(json.dumps(plan)))
    with (
        unchanged(matched),
        pytest.raises(lx.passes.VerifyError, match=r"\n  node _0 is a linear, but 0.weight is planned as a conv"),
    ):
        InsertBranches()(matched)


def test_a_transition_pass_on_a_live_model() -> None:
    cascade = lx.adapt(mlp(), args=(inputs(2, 5),), spec=SPEC, frontend="symbolic")
    module = cascade.variant((inputs(2, 5),), {}).module
    sentence = "stage-transition: this graph reads a live model; call cascade.transition(optimizer) instead"
    with unchanged(cascade), pytest.raises(lx.PassError, match=exactly(sentence)):
        StageTransition()(module)


def test_a_pass_on_a_branch_that_is_not_finite() -> None:
    adapted = Pipeline([MatchSites(SPEC), InsertBranches()])(graph_of(mlp())).graph_module
    with torch.no_grad():
        adapted.branches["2/weight"].lora_B[0, 0] = float("nan")
    for each in (FoldBranches(), StageTransition()):
        with (
            unchanged(adapted),
            pytest.raises(lx.NonFiniteBranch, match=r"^the branch of 2\.weight holds inf or nan at "),
        ):
            each(adapted)


@pytest.mark.parametrize("restart_A", ["fresh", "kept"])
def test_a_pass_that_skips_such_a_branch(restart_A: str) -> None:
    spec = lx.CascadeSpec.from_dict({"rank": 2, "on_nonfinite": "skip", "restart_A": restart_A})
    adapted = Pipeline([MatchSites(spec), InsertBranches()])(graph_of(mlp())).graph_module
    with torch.no_grad():
        adapted.branches["2/weight"].lora_A[0, 0] = float("nan")
        adapted.branches["2/weight"].lora_B.fill_(1.0)
    with pytest.warns(lx.errors.LorascWarning, match="^the branch of 2.weight holds inf or nan at the end of stage 1"):
        went_on = StageTransition()(adapted).graph_module
    assert torch.equal(went_on(inputs(4, 5)), mlp()(inputs(4, 5)))
