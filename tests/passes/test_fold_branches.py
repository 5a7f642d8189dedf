"""FoldBranches restores the captured graph with the slow weights, and StageTransition is a fold and an insertion."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import fx

from lorasc_fx import Noise, NonFiniteBranch, PassError, SpecError
from lorasc_fx.graph import branch_nodes, record_of, text
from lorasc_fx.passes import CascadePass, FoldBranches, InsertBranches, Pipeline, StageTransition
from tests.kit.errors import raises
from tests.kit.state import noise_drawn
from tests.passes.cases import ADAPTABLE, BY_NAME, Case
from tests.passes.kit import (
    NEAR,
    Snapshot,
    assert_close,
    assert_differ,
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


@pytest.mark.parametrize("case", ADAPTABLE, ids=str)
def test_fold(case: Case) -> None:
    original = case.own()
    before = text(original)
    inserted = fill(insert(original, case.spec))
    inserted_text, added, snapshot = text(inserted), deltas(inserted), Snapshot(inserted)
    result = FoldBranches(view="slow")(inserted)
    folded = result.graph_module
    assert result.modified  # 1 truthful
    snapshot.assert_unchanged()

    assert text(folded) == before  # 2 the graph is the captured one
    assert branch_nodes(folded) == {}
    assert "branches" not in folded._modules
    assert not [name for name, _ in folded.named_parameters() if "lora" in name]

    slow = {name: case.spec.pace * value for name, value in added.items()}  # 3 numerics: W0 + pace * s B A
    old, new = weights_of(original), weights_of(folded)
    assert new.keys() == old.keys()
    for name, value in new.items():
        if name in slow:
            assert_close(value.detach(), old[name].detach() + slow[name], **NEAR)
            assert_differ(value.detach(), old[name].detach() + added[name])  # pace counts
            assert value.requires_grad == old[name].requires_grad
        else:
            assert value is old[name]
    assert_close(run(folded, case), run_eager(case, slow))
    assert_differ(run(folded, case), run(inserted, case))
    fast = FoldBranches()(inserted).graph_module  # this view adds the whole branch, and its graph computes the same
    assert text(fast) == before
    for name, value in added.items():
        assert_close(weights_of(fast)[name].detach(), old[name].detach() + value, **NEAR)
    assert_close(run(fast, case), run(inserted, case))

    again = FoldBranches(view="slow")(folded)
    assert not again.modified  # 4 a fixed point
    assert again.graph_module is folded
    reinserted = InsertBranches()(folded)  # 5 the inverse
    assert reinserted.modified
    assert text(reinserted.graph_module) == inserted_text
    assert same_bits(run_in_training(reinserted.graph_module, case), run_in_training(folded, case))


@pytest.mark.parametrize("case", ADAPTABLE, ids=str)
def test_fold_of_a_live_graph_only_erases_nodes(case: Case) -> None:
    graph_module = case.live()
    before, output = text(graph_module), run(graph_module, case)
    inserted = fill(insert(graph_module, case.spec))
    snapshot = Snapshot(inserted)
    result = FoldBranches(view="slow")(inserted)
    assert result.modified
    snapshot.assert_unchanged()
    assert text(result.graph_module) == before
    assert same_bits(run(result.graph_module, case), output)
    assert all(value is weights_of(graph_module)[name] for name, value in weights_of(result.graph_module).items())
    assert not FoldBranches(view="slow")(result.graph_module).modified
    assert text(InsertBranches()(result.graph_module).graph_module) == text(inserted)


@pytest.mark.parametrize("restart", ["slow", "fast"])
def test_a_fold_in_a_later_stage_does_not_depend_on_the_rule(restart: str) -> None:
    case = BY_NAME["aten_conv2d"]
    graph = fill(insert(case.own(), replace(case.spec, pace=(0.5, 0.2), restart=restart)))
    later = fill(StageTransition()(graph).graph_module, seed=2)
    assert_close(run(FoldBranches()(later).graph_module, case), run(later, case))
    assert_differ(run(FoldBranches(view="slow")(later).graph_module, case), run(later, case))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("case", [BY_NAME["aten_conv2d"], BY_NAME["module_linear"], BY_NAME["aten_tied"]], ids=str)
def test_noise_at_a_fold(case: Case, keep: bool) -> None:
    spec = replace(case.spec, noise=Noise(0.5, keep=keep))
    original = case.own()
    inserted = fill(insert(original, spec))
    quiet = fill(insert(original, replace(case.spec, noise=Noise(0.0))))
    folded = weights_of(FoldBranches(view="slow")(inserted).graph_module)
    clean = weights_of(FoldBranches(view="slow")(quiet).graph_module)
    for name in sites_of(inserted):
        if not keep:
            assert same_bits(folded[name], clean[name])  # no noise remains
            continue
        before = weights_of(original)[name].detach()
        noise = 0.5 * before.std() * noise_drawn(spec.noise, spec.seed, 1, name, before.shape).double()
        assert_close(folded[name].detach(), clean[name].detach() + noise, **NEAR)
        assert noise.abs().max() > 1e-2


# --- non-finite branches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("end", [FoldBranches(view="slow"), StageTransition()])
def test_a_nonfinite_branch_is_an_error(value: float, end: CascadePass) -> None:
    case = BY_NAME["module_convs"]
    inserted = fill(insert(case.own(), case.spec))
    with torch.no_grad():
        branches_of(inserted)["0.2.weight"].lora_B[1, 2] = value
    snapshot = Snapshot(inserted)
    with raises(NonFiniteBranch, "non-finite", "0.2.weight", "stage 1"):
        end(inserted)
    snapshot.assert_unchanged()


NOISES = {
    "quiet": Noise(),
    "noisy": Noise(0.3),
    "kept": Noise(0.3, "normal", keep=True),
    "all": Noise(0.2, where="all"),
}


RULES = (("slow", "quiet"), ("slow", "noisy"), ("fast", "quiet"), ("fast", "kept"), ("slow", "all"))
ROWS = [(case, *RULES[(index + offset) % len(RULES)]) for index, case in enumerate(ADAPTABLE) for offset in (0, 3)]


@pytest.mark.parametrize(("case", "restart", "noise"), ROWS, ids=str)
def test_transition_is_fold_then_insert(case: Case, restart: str, noise: str) -> None:
    """With equal bits in three stages. The nodes stay, and the parameters of the branches are the same objects."""
    spec = replace(case.spec, pace=0.4, restart=restart, noise=NOISES[noise])
    transitioned, reinserted = insert(case.own(), spec), insert(case.own(), spec)
    factors = {name: value for name, value in transitioned.named_parameters() if name.startswith("branches.")}
    for stage in range(3):
        fill(transitioned, seed=stage)
        fill(reinserted, seed=stage)
        before, snapshot = text(transitioned), Snapshot(transitioned)
        result = StageTransition()(transitioned)
        assert result.modified
        snapshot.assert_unchanged(but="branches.")  # the one pass that writes into branches
        transitioned = result.graph_module
        reinserted = Pipeline([FoldBranches(view="slow"), InsertBranches()])(reinserted).graph_module
        assert text(transitioned) == text(reinserted) == before
        assert_same_parameters(transitioned, reinserted)
        parameters = dict(transitioned.named_parameters())
        assert all(parameters[name] is value for name, value in factors.items())
        assert same_bits(run(transitioned, case), run(reinserted, case))
        assert record_of(transitioned).plan == record_of(reinserted).plan
        assert record_of(transitioned).plan.stage == stage + 2
    fold = FoldBranches(view="slow")
    assert_same_parameters(fold(transitioned).graph_module, fold(reinserted).graph_module)


def assert_same_parameters(actual: fx.GraphModule, expected: fx.GraphModule) -> None:
    """Names, bits and flags are equal."""
    mine, theirs = dict(actual.named_parameters()), dict(expected.named_parameters())
    assert list(mine) == list(theirs)
    assert [name for name, value in mine.items() if not same_bits(value, theirs[name])] == []
    assert all(value.requires_grad == theirs[name].requires_grad for name, value in mine.items())


@pytest.mark.parametrize("name", ["module_linear", "module_conv2d"])
def test_a_stage_without_a_restart_changes_no_output(name: str) -> None:
    """The factors are subtracted from the weights, and a fold adds them again."""
    case = BY_NAME[name]
    inserted = fill(insert(case.own(), replace(case.spec, rank=4, pace=1.0, restart_factors="none")))
    before = run(inserted, case)
    after = StageTransition()(inserted).graph_module
    for branch in branches_of(after).values():
        assert branch.lora_B.any(0).all()
    assert_close(run(after, case), before)
    assert_close(run(FoldBranches(view="slow")(after).graph_module, case), before)


def test_arguments_that_are_errors() -> None:
    with raises(SpecError, "invalid-value", "fold-branches", "'base'"):
        FoldBranches(view="base")  # type: ignore[arg-type]
    case = BY_NAME["module_linear"]
    inserted = insert(case.live(), case.spec)
    snapshot = Snapshot(inserted)
    with raises(PassError, "requirement-not-met", "stage-transition", "cascade.transition(optimizer)"):
        StageTransition()(inserted)
    snapshot.assert_unchanged()
