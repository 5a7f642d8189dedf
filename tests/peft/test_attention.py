"""Attention in peft and here: the fast path of eval mode, and both projections of nn.MultiheadAttention."""

from __future__ import annotations

import copy

import pytest
import torch
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from tests.peft.kit import (
    EXACT,
    Case,
    assert_ours_is_right,
    eager,
    formula_of,
    gap,
    normal,
    peft_gaps,
    peft_of,
    seeded,
    without_gradient,
)


class Attends(nn.Module):
    """Self-attention and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.head = nn.MultiheadAttention(6, 2, dropout=0.1, batch_first=True), nn.Linear(6, 5)
        for bias in (self.attn.in_proj_bias, self.attn.out_proj.bias):
            nn.init.normal_(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.attn(x, x, x, need_weights=False)[0])


class Crosses(nn.Module):
    """Keys and values of other widths than the queries: three projections in place of one."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(6, 2, kdim=5, vdim=7, batch_first=True)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return self.head(self.attn(x, keys, values, need_weights=False)[0])


def inputs() -> tuple[torch.Tensor]:
    return (normal(3, 4, 6),)


def attends(*targets: str) -> Case:
    meant = {"attn.in_proj_weight": ("attn", "attn.in_proj_weight"), "attn.out_proj.weight": ("attn", "attn.out_proj")}
    meant["head.weight"] = ("head",)
    weights = tuple(name for name, by in meant.items() if set(by) & set(targets))
    return Case(Attends, inputs, targets, weights)


def layers(*targets: str, count: int = 2) -> Case:
    """TransformerEncoderLayers, with these modules of each."""
    weights = {"linear1": ["linear1.weight"], "linear2": ["linear2.weight"]}
    weights["self_attn"] = ["self_attn.in_proj_weight", "self_attn.out_proj.weight"]
    names = [f"{layer}.{name}" for layer in range(count) for target in targets for name in weights[target]]

    def build() -> nn.Module:
        return nn.Sequential(*(nn.TransformerEncoderLayer(6, 2, 10, batch_first=True) for _ in range(count)))

    modules = tuple(f"{layer}.{target}" for layer in range(count) for target in targets)
    return Case(build, inputs, modules, tuple(names))


@pytest.mark.parametrize("targets", [("linear1", "linear2"), ("self_attn",), ("self_attn", "linear1", "linear2")])
def test_the_fast_path_of_eval_mode(targets: tuple[str, ...]) -> None:
    """In eval mode the layer hands its weights to one fused op, as the frozen weights allow: peft is not asked."""
    case = layers(*targets)
    model, args = case.model().eval(), case.inputs()
    theirs = peft_of(model, case.targets)
    adapted = set(case.targets) | {f"{name}.out_proj" for name in case.targets if name.endswith("self_attn")}
    with torch.no_grad():
        assert torch.equal(theirs(*args), model(*args))
    assert not theirs(*args).requires_grad
    assert without_gradient(theirs, args) == adapted
    assert without_gradient(theirs.train(), args) == set()
    theirs.eval()
    merged = copy.deepcopy(theirs).merge_and_unload()
    with torch.no_grad():
        assert gap(merged(*args), theirs(*args)) > 0.1


def test_the_linears_in_train_mode() -> None:
    """The control: without the fast path, peft is right on what the layer calls."""
    assert max(peft_gaps(layers("linear1", "linear2"), training=True)) < EXACT


@pytest.mark.parametrize(
    ("frontend", "targets"),
    [
        ("auto", ("self_attn", "linear1", "linear2")),
        ("dynamo", ("linear1", "linear2")),
        ("graph-breaks", ("linear1", "linear2")),
    ],
)
def test_the_fast_path_is_off_here(frontend: str, targets: tuple[str, ...]) -> None:
    """Export takes no fast path; dynamo would, and so would a model with graph breaks."""
    assert_ours_is_right(layers(*targets, count=1), frontend)


@pytest.mark.parametrize("training", [True, False])
def test_in_proj_is_missed(training: bool) -> None:
    """It is a parameter and no module: an error where it is alone, nothing where another target is found."""
    case = attends("attn.in_proj_weight", "head")
    model, args = case.model().train(training), case.inputs()
    with pytest.raises(NoMatchingPeftModuleError, match=r"Target modules \{'attn.in_proj_weight'\} not found"):
        peft_of(model, case.targets[:1])
    theirs, head = peft_of(model, case.targets), peft_of(model, ["head"])
    assert set(formula_of(theirs, model)) == {"head.weight"}
    assert torch.equal(seeded(theirs, args), seeded(head, args))
    assert "attn.in_proj_weight" not in formula_of(peft_of(model, "all-linear"), model)


def test_in_proj_is_a_site() -> None:
    assert_ours_is_right(attends("attn.in_proj_weight", "head"))


@pytest.mark.parametrize("training", [True, False])
def test_in_proj_as_a_parameter(training: bool) -> None:
    """peft's target_parameters is right here, where its user knows of it."""
    case = Case(Attends, inputs, ("head",), ("head.weight",))
    assert max(peft_gaps(case, training, target_parameters=["attn.in_proj_weight"])) < EXACT


@pytest.mark.parametrize("targets", [("attn.out_proj", "head"), "all-linear"])
@pytest.mark.parametrize("training", [True, False])
def test_out_proj_is_dead(targets: tuple[str, ...] | str, training: bool) -> None:
    """nn.MultiheadAttention reads out_proj.weight and never calls out_proj; the merge then adds what never trained."""
    case = attends("attn.out_proj", "head")
    model, args = case.model().train(training), case.inputs()
    theirs = peft_of(model, targets)
    weights = formula_of(theirs, model)
    assert set(weights) == {"attn.out_proj.weight", "head.weight"}
    head_only = eager(model, {"head.weight": weights["head.weight"]}, args)
    right = eager(model, weights, args)
    assert gap(seeded(theirs, args), head_only) < EXACT
    assert gap(head_only, right) > 0.1
    assert without_gradient(theirs, args) == {"attn.out_proj"}
    assert gap(seeded(theirs.merge_and_unload(), args), right) < EXACT


def test_out_proj_is_a_site() -> None:
    assert_ours_is_right(attends("attn.out_proj", "head"))


@pytest.mark.parametrize("training", [True, False])
def test_the_whole_attention_counts_out_proj_twice(training: bool) -> None:
    """peft's own layer for it adds the delta of out_proj by hand, and then once more by that projection's merge."""
    case = attends("attn", "head")
    model, args = case.model().train(training), case.inputs()
    theirs = peft_of(model, case.targets)
    weights = formula_of(theirs, model)
    twice = dict(weights)
    twice["attn.out_proj.weight"] = 2 * weights["attn.out_proj.weight"] - model.attn.out_proj.weight.detach()
    assert gap(seeded(theirs, args), eager(model, twice, args)) < EXACT
    assert gap(seeded(theirs, args), eager(model, weights, args)) > 0.1
    merged = theirs.merge_and_unload()
    for name, value in twice.items():
        assert gap(merged.get_parameter(name).detach(), value) < EXACT
    assert gap(merged.attn.out_proj.weight.detach(), weights["attn.out_proj.weight"]) > 0.1


def test_the_whole_attention_is_two_sites() -> None:
    assert_ours_is_right(attends("attn", "head"))


def test_other_widths_of_keys_and_values() -> None:
    names = ("attn.q_proj_weight", "attn.k_proj_weight", "attn.v_proj_weight", "attn.out_proj.weight", "head.weight")
    case = Case(Crosses, lambda: (normal(3, 4, 6), normal(3, 2, 5), normal(3, 2, 7, seed=5)), ("attn", "head"), names)
    with pytest.raises(ValueError, match="Only same embed for query/key/value is supported"):
        peft_of(case.model(), case.targets)
    assert_ours_is_right(case)
