"""StageTransition has the values of a fold and an insertion, and keeps all nodes and the Parameters of branches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lorasc_fx import Noise, PassError, SpecError
from lorasc_fx.graph import record_of, text
from lorasc_fx.graph.patterns import targeted
from lorasc_fx.passes import FoldBranches, InsertBranches, Pipeline, StageTransition
from tests.kit.errors import raises
from tests.passes.cases import ADAPTABLE, BY_NAME, Case
from tests.passes.kit import (
    NEAR,
    Photograph,
    assert_close,
    assert_differ,
    assert_frozen,
    branches_of,
    deltas,
    fill,
    golden_section,
    insert,
    run,
    run_eager,
    same_bits,
    weights_of,
)

NOISES = {
    "quiet": Noise(),
    "noisy": Noise(0.3),
    "kept": Noise(0.3, "normal", keep=True),
    "all": Noise(0.2, where="all"),
}


@pytest.mark.parametrize("case", ADAPTABLE, ids=str)
def test_transition(case: Case) -> None:
    original = case.own()
    inserted = fill(insert(original, case.spec))
    before, added, photograph = text(inserted), deltas(inserted), Photograph(inserted, case)
    parameters = dict(inserted.named_parameters())
    result = StageTransition()(inserted)
    after = result.graph_module
    assert result.modified  # 1 truthful
    photograph.assert_unchanged(
        but=("branches.",)
    )  # the one pass that writes into branches, which stay the same objects
    assert text(after) == before == golden_section(case.name, "inserted", before)  # 2 the graph is the one we meant

    slow = {name: case.spec.pace * value for name, value in added.items()}  # 3 numerics
    for name, value in weights_of(after).items():
        if name in slow:
            assert_close(value.detach(), weights_of(original)[name].detach() + slow[name], **NEAR)
        elif targeted(case.spec.train, "", (name,)) and not targeted(case.spec.exclude, "", (name,)):
            assert value.requires_grad
            assert value.data_ptr() == weights_of(original)[name].data_ptr()
        else:
            assert_frozen(value, weights_of(original)[name])
    assert_close(run(after, case), run_eager(case, slow))
    assert_differ(run(after, case), run(case.model, case))
    for branch in branches_of(after).values():
        assert branch.lora_A is parameters[_name(after, branch.lora_A)]
        assert branch.lora_B is parameters[_name(after, branch.lora_B)]
        assert not branch.lora_B.any()

    values = {name: value.detach().clone() for name, value in weights_of(after).items()}
    again = StageTransition()(after).graph_module  # 4 a second one, of branches that are zero, moves no weight
    assert all(same_bits(value, values[name]) for name, value in weights_of(again).items())
    assert text(again) == before
    assert record_of(again).plan.stage == 3  # type: ignore[union-attr]
    folded = FoldBranches()(again).graph_module  # 5 the inverse
    assert text(folded) == text(original)
    assert all(same_bits(value, values[name]) for name, value in weights_of(folded).items())


def _name(graph_module: torch.fx.GraphModule, wanted: torch.nn.Parameter) -> str:
    return next(name for name, value in graph_module.named_parameters() if value is wanted)


RULES = (("slow", "quiet"), ("slow", "noisy"), ("fast", "quiet"), ("fast", "kept"), ("slow", "all"))
ROWS = [(case, *RULES[(index + offset) % len(RULES)]) for index, case in enumerate(ADAPTABLE) for offset in (0, 3)]


@pytest.mark.parametrize(("case", "restart", "noise"), ROWS, ids=str)
def test_transition_is_fold_then_insert(case: Case, restart: str, noise: str) -> None:
    spec = replace(case.spec, pace=0.4, restart=restart, noise=NOISES[noise])
    transitioned, reinserted = insert(case.own(), spec), insert(case.own(), spec)
    for stage in range(3):
        fill(transitioned, seed=stage)
        fill(reinserted, seed=stage)
        transitioned = StageTransition()(transitioned).graph_module
        reinserted = Pipeline([FoldBranches(), InsertBranches()])(reinserted).graph_module
        assert text(transitioned) == text(reinserted)
        mine, theirs = dict(transitioned.named_parameters()), dict(reinserted.named_parameters())
        assert list(mine) == list(theirs)
        assert [name for name, value in mine.items() if not same_bits(value, theirs[name])] == []
        assert same_bits(run(transitioned, case), run(reinserted, case))
        assert record_of(transitioned).plan == record_of(reinserted).plan
    mine = weights_of(FoldBranches()(transitioned).graph_module)
    theirs = weights_of(FoldBranches()(reinserted).graph_module)
    assert [name for name, value in mine.items() if not same_bits(value, theirs[name])] == []


@pytest.mark.parametrize("start", ["fresh", "kept"])
def test_initial_lora_a(start: str) -> None:
    case = BY_NAME["module_conv2d"]
    inserted = insert(case.own(), replace(case.spec, restart_A=start))
    initial = {weight: branch.lora_A.detach().clone() for weight, branch in branches_of(inserted).items()}
    fill(inserted)
    trained = {weight: branch.lora_A.detach().clone() for weight, branch in branches_of(inserted).items()}
    after = branches_of(StageTransition()(inserted).graph_module)
    for weight, branch in after.items():
        assert not branch.lora_B.any()
        assert same_bits(branch.lora_A, trained[weight]) == (start == "kept")
        if start == "fresh":
            assert_differ(branch.lora_A.detach(), initial[weight])
            assert branch.lora_A.abs().max() <= branch.lora_A.shape[1] ** -0.5


@pytest.mark.parametrize("name", ["module_linear", "module_conv2d"])
def test_a_partial_restart_changes_no_output(name: str) -> None:
    """The pairs that train on are subtracted from the weights, and a fold adds them again."""
    case = BY_NAME[name]
    inserted = fill(insert(case.own(), replace(case.spec, rank=4, pace=1.0, restart_pairs=0.5)))
    before = run(inserted, case)
    after = StageTransition()(inserted).graph_module
    for branch in branches_of(after).values():
        assert branch.lora_B.any(0).sum() == 2
    assert_close(run(after, case), before)
    assert_close(run(FoldBranches()(after).graph_module, case), before)


def test_a_stage_is_weighted_by_its_loss() -> None:
    """The second of two stages has a third of the weight of the first, so a quarter of the mean."""
    case = BY_NAME["module_linear"]
    graph, slow = insert(case.own(), replace(case.spec, pace="loss")), dict[str, torch.Tensor]()
    with raises(SpecError, "invalid-value", "loss of stage 1 is missing"):
        StageTransition()(graph)
    for stage, (loss, share) in enumerate([(1.0, 1.0), (3.0, 0.25)]):
        added = deltas(fill(graph, seed=stage))
        graph = StageTransition(loss=loss)(graph).graph_module
        slow = {name: slow.get(name, 0.0) + share * value for name, value in added.items()}
    assert_close(run(graph, case), run_eager(case, slow))


def test_a_live_graph_is_an_error() -> None:
    case = BY_NAME["module_linear"]
    inserted = insert(case.live(), case.spec)
    photograph = Photograph(inserted, case)
    with raises(PassError, "requirement-not-met", "stage-transition", "cascade.transition(optimizer)"):
        StageTransition()(inserted)
    photograph.assert_unchanged()
