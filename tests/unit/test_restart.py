"""What a transition does besides the slow update: optimizer state, the next lora_A, parameters trained in full."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from tests.unit import oracle
from tests.unit.cases import OPTIMIZERS, batches, branches, factors, loss_of, mlp, optimizer_of, randomize, train

CALLS = 4


def headed() -> nn.Module:
    """A body of two sites, a norm and a head that are trained in full."""
    torch.manual_seed(61)
    body = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6))
    return nn.Sequential(OrderedDict(body=body, norm=nn.LayerNorm(6), head=nn.Linear(6, 2))).double()


def headed_cascade(model: nn.Module | None = None, **options: Any) -> lx.Cascade:
    spec = lx.CascadeSpec(**{"rank": 2, "targets": ("body",), "train": ("head", "norm"), **options})
    return lx.adapt(headed() if model is None else model, batches(1, 4, 5), spec=spec)


TRAINED = ("norm.weight", "norm.bias", "head.weight", "head.bias")


def snapshot(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, dict[str, torch.Tensor]]:
    return {parameter: {k: v.clone() for k, v in state.items()} for parameter, state in optimizer.state.items()}


def owned(cascade: lx.Cascade) -> list[nn.Parameter]:
    return list(cascade.branches.parameters())


def pruned(state: dict[str, torch.Tensor], name: str, ratio: float) -> torch.Tensor:
    """Zero where either moment is among the share `ratio` of its smallest in magnitude, by sorting."""
    value, zero = state[name], torch.zeros_like(state["exp_avg"], dtype=torch.bool)
    for moment in (state["exp_avg"].abs(), state["exp_avg_sq"].abs()):
        zero |= moment < moment.flatten().sort().values[round(ratio * moment.numel())]
    return torch.where(zero, 0.0, value)


@pytest.mark.parametrize("how", ["reset", "kept", 0.25, 0.9])
def test_optimizer_state_of_the_branches_and_of_nothing_else(how: Any) -> None:
    cascade = headed_cascade(optimizer_state=how)
    optimizer = optimizer_of(cascade)
    train(cascade, optimizer, batches(CALLS, 4, 5))
    objects, before = list(cascade.parameters()), snapshot(optimizer)
    groups = copy.deepcopy([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])
    own = owned(cascade)
    assert all(before[parameter]["exp_avg"].any() for parameter in own)
    cascade.transition(optimizer)

    assert all(new is old for new, old in zip(cascade.parameters(), objects, strict=True))
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == groups
    assert all(parameter.grad is None for parameter in cascade.parameters())
    for parameter, state in before.items():
        found = optimizer.state.get(parameter, {})
        mine = any(parameter is each for each in own)
        assert set(found) == (set() if mine and how == "reset" else set(state))
        for name, value in found.items():
            shaped = mine and isinstance(how, float) and value.shape == parameter.shape
            assert torch.equal(value, pruned(state, name, how) if shaped else state[name]), name


def test_no_factor_leaps_on_a_pruned_state() -> None:
    """lora_A has no gradient in a stage's first step; where its second moment was pruned and its first was not, Adam
    stepped by exp_avg / eps."""
    calls = batches(2 * CALLS, 4, 5)
    cascade = lx.adapt(mlp(), (calls[0],), spec=lx.CascadeSpec(rank=4, optimizer_state=0.9))
    optimizer = optimizer_of(cascade)
    train(cascade, optimizer, calls[:CALLS])
    cascade.transition(optimizer)
    before = {name: value.detach().clone() for name, value in cascade.branches.named_parameters()}
    train(cascade, optimizer, calls[CALLS : CALLS + 1])
    rate = max(group["lr"] for group in optimizer.param_groups)
    for name, value in cascade.branches.named_parameters():
        assert (value - before[name]).abs().max() <= 10 * rate, name


def test_a_reset_is_a_new_optimizer() -> None:
    """The next stage's steps are those of an optimizer that has never stepped; kept state makes others."""
    calls, losses = batches(2 * CALLS, 4, 5), {}
    for how in ("reset", "kept", "new"):
        cascade = lx.adapt(
            mlp(), (calls[0],), spec=lx.CascadeSpec(rank=2, optimizer_state="kept" if how == "kept" else "reset")
        )
        optimizer = optimizer_of(cascade)
        train(cascade, optimizer, calls[:CALLS])
        cascade.transition(optimizer)
        losses[how] = train(cascade, optimizer if how != "new" else optimizer_of(cascade), calls[CALLS:])
    assert torch.equal(losses["reset"], losses["new"])
    assert not torch.allclose(losses["kept"], losses["new"], rtol=1e-6)


def test_sgd_momentum_is_state_too() -> None:
    cascade = headed_cascade()
    optimizer = optimizer_of(cascade, "sgd")
    train(cascade, optimizer, batches(CALLS, 4, 5))
    trained = {
        name: optimizer.state[dict(cascade.model.named_parameters())[name]]["momentum_buffer"].clone()
        for name in TRAINED
    }
    cascade.transition(optimizer)
    assert not any(optimizer.state.get(parameter) for parameter in owned(cascade))
    for name, value in trained.items():
        assert torch.equal(optimizer.state[dict(cascade.model.named_parameters())[name]]["momentum_buffer"], value)


@pytest.mark.parametrize("restart", ["slow", "fast"])
@pytest.mark.parametrize("slow_train", [True, False])
def test_parameters_trained_in_full_follow_the_slow_rule(restart: str, slow_train: bool) -> None:
    """S_t = S_{t-1} + pace (F_t - S_{t-1}) of the parameter itself; slow_train = False leaves it fast."""
    cascade = headed_cascade(pace=0.4, restart=restart, slow_train=slow_train)
    held = dict(cascade.model.named_parameters())
    base = {name: held[name].detach().clone() for name in TRAINED}
    slow = {name: value.clone() for name, value in base.items()}
    optimizer = optimizer_of(cascade)
    for stage in range(3):
        train(cascade, optimizer, batches(CALLS, 4, 5, seed=stage))
        fast = {name: held[name].detach().clone() for name in TRAINED}
        for which, expected in (("fast", fast), ("slow", slow if slow_train else fast), ("base", base)):
            with cascade.weights(which):
                for name, value in expected.items():
                    torch.testing.assert_close(held[name].detach(), value, rtol=0, atol=1e-14)
            assert all(torch.equal(held[name], value) for name, value in fast.items())
        slow = {name: value + 0.4 * (fast[name] - value) for name, value in slow.items()} if slow_train else fast
        if stage < 2:
            cascade.transition(optimizer)
            start = slow if restart == "slow" else fast
            for name, value in start.items():
                torch.testing.assert_close(held[name].detach(), value, rtol=0, atol=1e-14)
                assert held[name].requires_grad
    assert all((slow[name] - base[name]).abs().max() > 1e-3 for name in TRAINED)
    state = cascade.folded_state_dict()
    released = dict(cascade.release().named_parameters())
    for name, value in slow.items():
        torch.testing.assert_close(released[name].detach(), value, rtol=0, atol=1e-14)
        assert torch.equal(state[name], released[name])


def test_a_stage_that_trained_the_head_only_is_folded() -> None:
    cascade = headed_cascade(pace=0.5)
    head = cascade.model.head.weight
    base = head.detach().clone()
    with torch.no_grad():
        head.add_(1.0)
    torch.testing.assert_close(cascade.release().head.weight.detach(), base + 0.5, rtol=0, atol=1e-15)


def test_idle_heads_are_slow() -> None:
    """After `stages` the head is the slow one; the next loop goes on from where the restart rule says."""
    for restart in ("slow", "fast"):
        cascade = headed_cascade(pace=0.4, restart=restart)
        head, optimizer = cascade.model.head.weight, optimizer_of(cascade)
        base = head.detach().clone()
        for _ in cascade.stages(1, optimizer):
            train(cascade, optimizer, batches(CALLS, 4, 5))
            fast = head.detach().clone()
        slow = base + 0.4 * (fast - base)
        torch.testing.assert_close(head.detach(), slow, rtol=0, atol=1e-14)
        for _ in cascade.stages(1, optimizer):
            torch.testing.assert_close(head.detach(), slow if restart == "slow" else fast, rtol=0, atol=1e-14)


@pytest.mark.parametrize("how", ["fresh", "kept"])
def test_where_lora_a_starts(how: str) -> None:
    cascade = lx.adapt(mlp(), batches(1, 4, 5), spec=lx.CascadeSpec(rank=2, restart_A=how))
    first, optimizer = factors(cascade), optimizer_of(cascade)
    train(cascade, optimizer, batches(CALLS, 4, 5))
    trained = factors(cascade)
    cascade.transition(optimizer)
    second = factors(cascade)
    for name, branch in branches(cascade).items():
        assert not branch.lora_B.any()
        assert not torch.equal(trained[name], first[name])
        assert torch.equal(second[name], trained[name]) == (how == "kept")
        assert not torch.equal(second[name], first[name])


def gradients_of(model: nn.Module, calls: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Eager autograd's gradients of the weights, summed over the batches."""
    twin = copy.deepcopy(model).requires_grad_(True)
    twin.zero_grad()
    for call in calls:
        loss_of(twin(call)).backward()
    return {name: value.grad for name, value in twin.named_parameters() if value.dim() > 1}


@pytest.mark.parametrize("clip", [None, 1e-3, 1e9])
@pytest.mark.parametrize("discarded", [False, True])
def test_lora_a_from_the_gradient(clip: float | None, discarded: bool) -> None:
    """A spans the leading right singular vectors of G; in that step dA = 0 and dB = c s G A^T, c by clipping.

    With SGD at rate 1 the step itself shows dB: B goes from 0 to -dB.
    """
    spec = lx.CascadeSpec(rank=2, lora_alpha=3.0, restart_A="gradient", noise=lx.Noise(0.1))
    cascade = lx.adapt(mlp(), batches(1, 4, 5), spec=spec)
    optimizer = torch.optim.SGD(cascade.param_groups(lr=1.0))
    randomize(cascade)
    cascade.transition(optimizer)
    fresh = factors(cascade)
    if discarded:  # a batch that the user takes back, as after an overflow
        loss_of(cascade(batches(1, 4, 5, seed=77)[0])).backward()
        optimizer.zero_grad()
    calls = batches(2, 6, 5, seed=9)  # one step over two batches
    truth = gradients_of(cascade.model, calls)
    for call in calls:
        loss_of(cascade(call)).backward()
    share = 1.0
    if clip is not None:
        norm = torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)
        share = min(1.0, clip / (norm.item() + 1e-6))
        assert (share < 0.1) == (clip < 1)
    optimizer.step()
    optimizer.zero_grad()

    for name, branch in branches(cascade).items():
        gradient, a = truth[name], branch.lora_A.detach()
        _, sizes, right = torch.linalg.svd(gradient)
        assert sizes[1] > 1e-3 * sizes[0]
        top = right[:2]
        assert not torch.equal(a, fresh[name])
        torch.testing.assert_close(a @ top.T @ top, a, rtol=0, atol=1e-12)
        assert torch.linalg.matrix_rank(a) == 2
        expected = -share * 1.5 * gradient @ a.T
        torch.testing.assert_close(branch.lora_B.detach(), expected, rtol=1e-6, atol=1e-12)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in cascade.model.parameters())
    after = factors(cascade)
    train(cascade, optimizer, batches(1, 4, 5, seed=10))  # the next step is an ordinary one
    for name, branch in branches(cascade).items():
        assert (branch.lora_A.detach() - after[name]).abs().max() < 0.5
        assert not torch.equal(branch.lora_A, after[name])


class Packed(nn.Module):
    """A layer that is used whole, and slices of 2, 4 and 3 rows of a packed weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(62)
        self.body, self.packed = nn.Linear(5, 7), nn.Parameter(torch.randn(9, 7) / 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.body(x))
        one, two, three = self.packed.split([2, 4, 3])
        one, two, three = nn.functional.linear(x, one), nn.functional.linear(x, two), nn.functional.linear(x, three)
        return torch.cat([one.sin(), two.tanh() * one.sum(-1, keepdim=True), three.square()], -1)


@pytest.mark.parametrize("frontend", ["export", "symbolic", "graph-breaks"])
@pytest.mark.parametrize("clip", [None, 1e-3])
def test_lora_a_from_the_gradient_of_each_slice(clip: float | None, frontend: str) -> None:
    """The same for each slice by itself: its rows of G, its rows of lora_A and of lora_B."""
    spec = lx.CascadeSpec(rank=2, lora_alpha=3.0, restart_A="gradient", noise=lx.Noise(0.1))
    cascade = lx.adapt(Packed().double(), batches(1, 4, 5), spec=spec, frontend=frontend)
    assert {site.weight: site.slices for site in cascade.sites} == {"body.weight": (), "packed": (2, 4, 3)}
    optimizer = torch.optim.SGD(cascade.param_groups(lr=1.0))
    randomize(cascade)
    cascade.transition(optimizer)
    fresh, calls = factors(cascade), batches(2, 6, 5, seed=9)
    truth = gradients_of(cascade.model, calls)
    for call in calls:
        loss_of(cascade(call)).backward()
    share = 1.0
    if clip is not None:
        norm = torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)
        share = clip / (norm.item() + 1e-6)
        assert share < 0.1
    optimizer.step()
    optimizer.zero_grad()

    branch = branches(cascade)["packed"]
    assert branch.lora_A.shape == (6, 7)
    assert branch.lora_B.shape == (9, 2)
    for index, rows in enumerate((slice(0, 2), slice(2, 6), slice(6, 9))):
        gradient, a = truth["packed"][rows], branch.lora_A.detach()[2 * index : 2 * index + 2]
        _, sizes, right = torch.linalg.svd(gradient, full_matrices=False)
        assert sizes[1] > 1e-3 * sizes[0]
        assert not torch.allclose(a, fresh["packed"][2 * index : 2 * index + 2], atol=1e-3)
        torch.testing.assert_close(a @ right[:2].T @ right[:2], a, rtol=0, atol=1e-12)
        assert torch.linalg.matrix_rank(a) == 2
        torch.testing.assert_close(branch.lora_B.detach()[rows], -share * 1.5 * gradient @ a.T, rtol=1e-6, atol=1e-12)


def test_the_gradient_start_is_the_cascades_own_trajectory() -> None:
    """From the step on, the stage is LoRA from that A: steps by hand with autograd's own gradients agree."""
    spec = lx.CascadeSpec(rank=2, restart_A="gradient", pace=1.0)
    calls = batches(5, 4, 5)
    cascade = lx.adapt(mlp(), (calls[0],), spec=spec)
    optimizer = optimizer_of(cascade, "sgd")
    cascade.transition(optimizer)
    model = mlp()
    losses = train(cascade, optimizer, calls[:1])
    loss = loss_of(model(calls[0]))
    torch.testing.assert_close(losses[0], loss.detach(), rtol=0, atol=1e-13)
    reference = oracle.Cascade(model, factors(cascade), cascade.sites[0].scale)
    theirs = OPTIMIZERS["sgd"](reference.parameters())
    expected = train(reference, theirs, calls)
    torch.testing.assert_close(train(cascade, optimizer, calls[1:]), expected[1:], rtol=0, atol=1e-10)


def test_a_copy_waits_for_the_first_gradient_too() -> None:
    calls = batches(2, 4, 5)
    cascade = lx.adapt(mlp(), (calls[0],), spec=lx.CascadeSpec(rank=2, restart_A="gradient"))
    optimizer = optimizer_of(cascade, "sgd")
    cascade.transition(optimizer)
    loss_of(cascade(calls[0])).backward()
    optimizer.zero_grad()
    copied = copy.deepcopy(cascade)
    for each in (cascade, copied):
        train(each, optimizer_of(each, "sgd"), calls)
        assert all(weight.grad is None and not weight.requires_grad for weight in each.model.parameters())
    for ours, theirs in zip(cascade.branches.parameters(), copied.branches.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_scheduler_steps_once_a_stage() -> None:
    cascade = lx.adapt(mlp(), batches(1, 4, 5), spec=lx.CascadeSpec(rank=2))
    optimizer = torch.optim.SGD(cascade.param_groups(lr=1.0))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    rates = []
    for _ in cascade.stages(3, optimizer, scheduler):
        rates.append(optimizer.param_groups[0]["lr"])
        train(cascade, optimizer, batches(1, 4, 5))
    assert rates == [1.0, 0.5, 0.25]
