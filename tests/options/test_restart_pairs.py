"""Partial restarts (SRLoRA, 2505.12433): some pairs of a branch are merged, and the others continue to train."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from lorasc_fx.branch.lora import LoraBranch
from lorasc_fx.plan import SiteOptions
from tests.kit.errors import warns
from tests.kit.models import OPTIMIZERS, batches, branches, by_hand, loss_of, mlp, optimizer_of, randomize, train
from tests.kit.state import weight_states

SPEC = {"rank": 4, "lora_alpha": 6.0, "restart_pairs": 0.5, "targets": ("linear", "conv")}
EXACT = {"rtol": 0, "atol": 1e-11}


def conv() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(5, 6), nn.Unflatten(0, (2, -1)), nn.Conv1d(2, 3, 2), nn.Linear(5, 4)).double()


def kept_pairs(a: torch.Tensor, b: torch.Tensor, restarted: int) -> torch.Tensor:
    """Return the mask of all pairs except those with the smallest `|b_i a_i|`."""
    norms = torch.stack([(column.outer(row)).norm() for column, row in zip(b.t(), a, strict=True)])
    return norms > norms.sort().values[restarted - 1]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("more", [
    {}, {"pace": 0.4}, {"pace": 0.4, "restart": "fast"}, {"restart_pairs": 0.3}, {"restart_A": "kept"},
    {"placement": "merged"}, {"placement": "weight"}, {"momentum": 0.5, "pace": 0.5},
], ids=str)  # fmt: skip
def test_a_trajectory_is_that_of_the_formula(more: dict[str, Any], optimizer: str) -> None:
    """In fp64. A restart changes neither the outputs of the start weights nor the optimizer state of kept pairs."""
    calls = batches(3, 4, 5)
    model = conv()
    cascade = lx.adapt(copy.deepcopy(model), (calls[0],), spec=lx.CascadeSpec(**{"pace": 1.0, **SPEC, **more}))
    spec = cascade.plan.spec
    hand = by_hand(model, cascade, pace=spec.pace, restart=spec.restart)
    ours, theirs = optimizer_of(cascade, optimizer), OPTIMIZERS[optimizer](hand.parameters())
    velocity = {name: torch.zeros_like(value) for name, value in hand.slow.items()}
    for stage in range(3):
        found, expected = train(cascade, ours, calls), train(hand, theirs, calls)
        torch.testing.assert_close(found, expected, **EXACT)
        fast = {name: hand.fast(name).detach() for name in hand.base}
        velocity = {name: spec.momentum * velocity[name] + fast[name] - hand.slow[name] for name in fast}
        hand.end()
        hand.slow = {name: slow + spec.pace * spec.momentum * velocity[name] for name, slow in hand.slow.items()}
        hand.start = dict(hand.slow if spec.restart == "slow" else fast)
        wanted = torch.func.functional_call(
            model, {name: hand.base[name] + start for name, start in hand.start.items()}, (calls[0],)
        )
        cascade.transition(ours)
        torch.testing.assert_close(cascade(calls[0]), wanted, **EXACT)
        for name, branch in branches(cascade).items():
            pair = hand.branches[name]
            with torch.no_grad():
                kept = kept_pairs(pair.a, pair.b, 2 if spec.restart_pairs == 0.5 else 1)
                assert torch.equal(branch.lora_B[:, ~kept], torch.zeros_like(branch.lora_B[:, ~kept]))
                if spec.restart_A == "fresh":
                    assert not torch.isclose(branch.lora_A[~kept], pair.a[~kept]).any()
                pair.a[~kept], pair.b[:, ~kept] = branch.lora_A[~kept].detach(), 0.0
                hand.start[name] = hand.start[name] - hand.scale * (pair.b @ pair.a).view_as(hand.base[name])
            for parameter, dim in ((pair.a, 0), (pair.b, 1)):
                for value in theirs.state[parameter].values():
                    if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                        value.index_fill_(dim, (~kept).nonzero().flatten(), 0.0)
        with cascade.weights("slow"):
            for name, value in hand.weights("slow").items():
                torch.testing.assert_close(dict(cascade.model.named_parameters())[name].detach(), value, **EXACT)
        assert stage < 2 or loss_of(cascade(calls[0])) < found[0]


def test_a_weight_is_rounded_once() -> None:
    """It is computed from W0, its experts and the kept pairs, with a single rounding."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 40)).bfloat16()
    cascade = lx.adapt(model, (torch.randn(4, 48).bfloat16(),), spec=lx.CascadeSpec(pace=1.0, **SPEC))
    for stage in range(3):
        randomize(cascade, stage)
        cascade.transition(None)
    held = dict(cascade.model.named_parameters())
    for name, state in weight_states(cascade).items():
        branch = branches(cascade)[name]
        exact = state.base.double() + sum(expert.b.double() @ expert.a.double() for expert in state.experts)
        exact = exact - branch.scale * branch.lora_B.detach().double() @ branch.lora_A.detach().double()
        assert bool(branch.lora_B.any())
        assert bool(((held[name].double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all())


def test_a_loop_ends_without_branches() -> None:
    """After the loop, all pairs restart, and the optimizer state is reset."""
    calls = batches(2, 4, 5)
    cascade = lx.adapt(mlp(), (calls[0],), spec=lx.CascadeSpec(pace=0.5, **SPEC))
    optimizer = optimizer_of(cascade)
    for _ in cascade.stages(2, optimizer):
        train(cascade, optimizer, calls)
    assert not any(bool(branch.lora_B.any()) for branch in branches(cascade).values())
    assert not any(optimizer.state.get(parameter) for parameter in cascade.branches.parameters())
    with cascade.weights("slow"):
        slow = cascade(calls[0])
    assert torch.equal(cascade(calls[0]), slow)
    for _ in cascade.stages(1, optimizer):
        torch.testing.assert_close(cascade(calls[0]), slow, **EXACT)
        train(cascade, optimizer, calls)
    cascade.transition(optimizer)
    cascade.rewind(0, optimizer)
    assert not any(bool(branch.lora_B.any()) for branch in branches(cascade).values())


@pytest.mark.parametrize(("kind", "shape", "slices"), [
    ("linear", (6, 5), ()), ("linear", (9, 5), (2, 3, 4)), ("experts", (3, 6, 5), ()), ("conv", (6, 2, 3), ()),
])  # fmt: skip
def test_the_pairs_with_the_smallest_terms_restart(kind: str, shape: tuple[int, ...], slices: tuple[int, ...]) -> None:
    """A pair has a term in each slice and expert, and its norm is taken over all terms."""
    site = lx.Site("w", kind, shape, SiteOptions(5, 5.0), slices=slices)
    branch = LoraBranch(site, 0, 1, torch.empty(shape))
    with torch.no_grad():
        branch.lora_B.copy_(torch.randn(branch.lora_B.shape, generator=torch.Generator().manual_seed(1)))
        norms = []
        for pair in range(5):
            only = copy.deepcopy(branch)
            only.lora_B[..., torch.arange(5) != pair] = 0.0
            norms.append(only.dense_delta(torch.zeros(shape)).norm())
        wanted = [bool(norm > sorted(norms)[1]) for norm in norms]
        kept = branch.kept_entries(lx.CascadeSpec(rank=5, restart_pairs=0.4))
        only = copy.deepcopy(branch)
        only.lora_A.mul_(kept["lora_A"])
        branch.lora_B.mul_(torch.tensor(wanted))
        assert kept["lora_B"].tolist() == wanted
        assert torch.equal(only.dense_delta(torch.zeros(shape)), branch.dense_delta(torch.zeros(shape)))


def test_a_branch_that_is_left_out_restarts_whole() -> None:
    cascade = lx.adapt(mlp(), (batches(1, 4, 5)[0],), spec=lx.CascadeSpec(on_nonfinite="skip", **SPEC))
    optimizer = optimizer_of(cascade)
    randomize(cascade)
    with torch.no_grad():
        branches(cascade)["0.weight"].lora_B[1, 2] = torch.nan
    with warns("non-finite-left-out", "0.weight"):
        cascade.transition(optimizer)
    assert {name: bool(branch.lora_B.any()) for name, branch in branches(cascade).items()} == {
        "0.weight": False, "2.weight": True, "4.weight": True,
    }  # fmt: skip


def test_moments_that_are_not_kept_by_entry_are_reset() -> None:
    calls = batches(2, 4, 5)
    cascade = lx.adapt(mlp(), (calls[0],), spec=lx.CascadeSpec(**SPEC))
    optimizer = torch.optim.Adafactor(cascade.param_groups(lr=0.01))
    train(cascade, optimizer, calls)
    cascade.transition(optimizer)
    assert not any(optimizer.state.get(parameter) for parameter in cascade.branches.parameters())
    train(cascade, optimizer, calls)


def test_a_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    calls = batches(2, 4, 5)
    cascade = lx.adapt(mlp(), (calls[0],), spec=lx.CascadeSpec(pace=0.5, **SPEC))
    optimizer = optimizer_of(cascade)
    for _ in range(2):
        train(cascade, optimizer, calls)
        cascade.transition(optimizer)
    lx.save(cascade, tmp_path, optimizer=optimizer)
    again = lx.load(tmp_path, mlp(), (calls[0],))
    other = optimizer_of(again)
    again.resume(other)
    for _ in range(2):
        assert torch.equal(train(again, other, calls), train(cascade, optimizer, calls))
        for each, held in ((again, other), (cascade, optimizer)):
            each.transition(held)
    assert all(map(torch.equal, again.folded_state_dict().values(), cascade.folded_state_dict().values()))
