"""Every public error is exported and is raised by some test, found in the sources of the tests."""

from __future__ import annotations

import ast
import json
import re
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
from tests.errors.models import inputs, mlp
from tests.errors.page import PAGE, page
from tests.errors.raises import BY_WORDS, expected_codes, given_codes, uncoded
from tests.errors.state import unchanged
from tests.kit.errors import raises, warns
from tests.kit.state import variant_for

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
    assert set(errors.__all__) == {*PUBLIC, "CODES", "listed", "named", "nearest", "path_of", "reason_of", "warn"}
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


def test_every_code_is_in_the_table_and_used() -> None:
    assert set(given_codes()) == set(errors.CODES)
    assert list(errors.CODES) == sorted(errors.CODES)
    for code in errors.CODES:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", code), code


def test_every_code_is_raised_by_some_test() -> None:
    """Found in the sources of the tests."""
    assert set(errors.CODES) - expected_codes() == BY_WORDS


def test_no_error_is_without_a_code() -> None:
    assert uncoded() == []


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
    from lorasc_fx.util.extras import module_of

    with raises(lx.errors.MissingExtra, "missing-extra", "absent_package", "lorasc-fx[vision]") as caught:
        module_of("vision", "absent_package.part")
    assert isinstance(caught.value, ImportError)


def test_one_root_catches_them_all() -> None:
    with raises(lx.LorascError, "invalid-value", "rank"):
        lx.CascadeSpec(rank=0)
    with pytest.raises(ValueError, match="rank"):
        lx.CascadeSpec(rank=0)


# ---- passes: the errors that need no cascade

SPEC = lx.CascadeSpec(rank=2)


def graph_of(model: nn.Module) -> fx.GraphModule:
    return fx.symbolic_trace(model)


def test_a_pass_whose_requirement_is_not_met() -> None:
    graph_module = graph_of(mlp())
    for each, fact in ((InsertBranches(), "sites-matched"), (FoldBranches(), "branches-inserted")):
        with unchanged(graph_module), raises(lx.PassError, "requirement-not-met", each.name, fact):
            each(graph_module)


@pytest.mark.parametrize(
    ("passes", "sentence"),
    [
        (list, ("invalid-value",)),
        (
            lambda: [InsertBranches(), MatchSites(SPEC)],
            ("pass-order", "insert-branches", "sites-matched"),
        ),
        (
            lambda: [MatchSites(SPEC), InsertBranches(), FoldBranches(), StageTransition()],
            ("pass-order", "stage-transition", "branches-inserted"),
        ),
    ],
)
def test_an_impossible_order(passes: object, sentence: tuple[str, ...]) -> None:
    assert callable(passes)
    with raises(lx.passes.PassOrderError, *sentence):
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
        raises(lx.passes.VerifyError, "graph-not-verified", "_0", "0.weight"),
    ):
        InsertBranches()(matched)


def test_a_transition_pass_on_a_live_model() -> None:
    cascade = lx.adapt(mlp(), args=(inputs(2, 5),), spec=SPEC, frontend="symbolic")
    module = variant_for(cascade, (inputs(2, 5),), {}).module
    with unchanged(cascade), raises(lx.PassError, "requirement-not-met"):
        StageTransition()(module)


def test_a_pass_on_a_branch_that_is_not_finite() -> None:
    adapted = Pipeline([MatchSites(SPEC), InsertBranches()])(graph_of(mlp())).graph_module
    with torch.no_grad():
        adapted.branches["2/weight"].lora_B[0, 0] = float("nan")
    for each in (FoldBranches(), StageTransition()):
        with (
            unchanged(adapted),
            raises(lx.NonFiniteBranch, "non-finite", "2.weight"),
        ):
            each(adapted)


@pytest.mark.parametrize("restart_A", ["fresh", "kept"])
def test_a_pass_that_skips_such_a_branch(restart_A: str) -> None:
    spec = lx.CascadeSpec.from_dict({"rank": 2, "on_nonfinite": "skip", "restart_A": restart_A})
    adapted = Pipeline([MatchSites(spec), InsertBranches()])(graph_of(mlp())).graph_module
    with torch.no_grad():
        adapted.branches["2/weight"].lora_A[0, 0] = float("nan")
        adapted.branches["2/weight"].lora_B.fill_(1.0)
    with warns("non-finite-left-out", "2.weight", "1"):
        went_on = StageTransition()(adapted).graph_module
    assert torch.equal(went_on(inputs(4, 5)), mlp()(inputs(4, 5)))
