"""Ranks and paces by stage, compared with dense recursions in fp64 and with a chain of peft adapters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from tests.kit.models import batches, branches, factors, lora_of, mlp, train, trainable_parameters

X = batches(1, 4, 5)[0]
RANKS = (4, 2, 3, 1)


def adapted(frontend: str = "auto", **options: Any) -> tuple[lx.Cascade, torch.optim.Optimizer]:
    spec = lx.CascadeSpec(**{"rank": RANKS, "lora_alpha": 4.5, "pace": 1.0} | options)
    cascade = lx.adapt(mlp(), (X,), spec=spec, frontend=frontend)
    return cascade, torch.optim.AdamW(cascade.param_groups(lr=1e-2))


@pytest.mark.parametrize("frontend", ["export", "eager"])
def test_stages_are_a_chain_of_pefts_adapters_of_these_ranks(frontend: str) -> None:
    theirs: nn.Module = copy.deepcopy(mlp())
    cascade, optimizer = adapted(frontend)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    calls = batches(25, 4, 5)
    for stage, rank in zip(cascade.stages(5, optimizer), (4, 2, 3, 1, 1), strict=True):
        assert {branch.rank for branch in branches(cascade).values()} == {rank}
        assert {site.rank for site in cascade.sites} == {rank}
        assert cascade.sites[0].scale == 4.5 / rank
        adapter = lora_of(cascade, theirs, ["0", "2", "4"], r=rank)
        part = calls[stage.number * 5 - 5 : stage.number * 5]
        ours = train(cascade, optimizer, part)
        expected = train(adapter, torch.optim.AdamW(trainable_parameters(adapter), lr=1e-2), part)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
        theirs = adapter.merge_and_unload()
    assert {id(parameter) for group in optimizer.param_groups for parameter in group["params"]} == held
    for name, value in cascade.release().state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("state", ["reset", "kept", 0.5])
@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda groups: torch.optim.SGD(groups, momentum=0.9)])
def test_state_of_the_optimizer_is_dropped_where_the_rank_changes(make: Any, state: Any) -> None:
    cascade, _ = adapted(rank=(3, 3, 2), optimizer_state=state)
    optimizer = make(cascade.param_groups(lr=1e-2))
    for number, _ in enumerate(cascade.stages(3, optimizer), start=1):
        own = [parameter for branch in branches(cascade).values() for parameter in branch.parameters()]
        assert all(bool(optimizer.state.get(each)) == (number == 2 and state != "reset") for each in own)
        train(cascade, optimizer, batches(2, 4, 5))


def test_kept_factors_are_fresh_where_the_rank_changes() -> None:
    cascade, optimizer = adapted(rank=(3, 3, 2), restart_factors="B")
    plain, _ = adapted(rank=(3, 3, 2))
    train(cascade, optimizer, batches(2, 4, 5))
    before = factors(cascade)
    cascade.transition(optimizer)
    assert all(torch.equal(value, before[name]) for name, value in factors(cascade).items())
    cascade.transition(optimizer)
    for _ in range(2):
        plain.transition(None)
    assert all(torch.equal(value, factors(plain)[name]) for name, value in factors(cascade).items())


def test_a_rule_with_a_rank_of_its_own_stays() -> None:
    cascade, _ = adapted(rules=(lx.Rule("2.weight", rank=5), lx.Rule("4.weight", lora_alpha=9.0)))
    seen = []
    for _ in range(5):
        seen.append([site.rank for site in cascade.sites])
        assert [branches(cascade)[site.weight].rank for site in cascade.sites] == seen[-1]
        cascade.transition(None)
    assert seen == [[4, 5, 4], [2, 5, 2], [3, 5, 3], [1, 5, 1], [1, 5, 1]]


class Late(nn.Module):
    """A head that is used only in eval mode or, if `python`, for inputs with a negative sum (a graph break)."""

    def __init__(self, python: bool) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.body, self.head, self.python = nn.Linear(5, 7), nn.Linear(7, 6), python

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.body(x).tanh()
        if self.python:
            return hidden if x.sum() > 0 else self.head(hidden)
        return hidden if self.training else self.head(hidden)


@pytest.mark.parametrize("python", [False, True])
def test_a_site_that_comes_in_a_later_stage_has_the_rank_of_that(python: bool) -> None:
    spec = lx.CascadeSpec(rank=RANKS, lora_alpha=4.5, pace=1.0)
    x = torch.ones(4, 5).double()
    cascade = lx.adapt(Late(python).double().train(), (x,), spec=spec)
    assert cascade.frontend == ("eager" if python else "export")
    for _ in range(2):
        cascade(x)
        cascade.transition(None)
    assert len(cascade.sites) == 1
    cascade.train(python)
    expected = Late(python).double().train(python)
    torch.testing.assert_close(cascade(-x), expected(-x), rtol=0, atol=1e-12)
    assert {name: branch.rank for name, branch in branches(cascade).items()} == {"body.weight": 3, "head.weight": 3}
    assert cascade.stage == 3
    cascade.transition(None)
    torch.testing.assert_close(cascade(-x), expected(-x), rtol=0, atol=1e-12)
    assert {branch.rank for branch in branches(cascade).values()} == {1}
