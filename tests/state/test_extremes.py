"""Numbers at the edges: 1e-30 and 1e30, no spread, no entries, one channel, ranks too high, and the ends of a dtype.

The oracle is the formula in fp64 (algorithm.md), written here, on the user's eager model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

import lorasc_fx as lx
from tests.compile.test_compiled import TOKENS, Mixed
from tests.errors.models import inputs
from tests.errors.state import unchanged
from tests.errors.test_warnings import net
from tests.kit.errors import raises
from tests.kit.models import by_hand, factors, loss_of, train
from tests.kit.state import branches_of, trainable

RANK, ALPHA, PACE = 2, 3.0, 0.5
PLACEMENTS = ("beside", "merged", "weight")


def spec(**options: Any) -> lx.CascadeSpec:
    return lx.CascadeSpec(**{"rank": RANK, "lora_alpha": ALPHA, "pace": PACE, **options})


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def put_factors(cascade: lx.Cascade, size: Mapping[str, float] | float = 1.0) -> dict[str, torch.Tensor]:
    """Give the branches factors whose deltas are of this size; return the deltas in fp64, by weight name."""
    deltas = {}
    for seed, (name, branch) in enumerate(sorted(branches_of(cascade).items())):
        root = math.sqrt(size if isinstance(size, float) else size[name])
        with torch.no_grad():
            branch.lora_A.copy_(randn(*branch.lora_A.shape, seed=seed, dtype=torch.float64) * root)
            branch.lora_B.copy_(randn(*branch.lora_B.shape, seed=seed + 50, dtype=torch.float64) * root)
        product = branch.lora_B.detach().double() @ branch.lora_A.detach().double()
        deltas[name] = (ALPHA / branch.rank * product).reshape(branch.weight_shape)
    return deltas


def eager(model: nn.Module, x: torch.Tensor, added: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The user's model in fp64 with `W + added`."""
    values = {name: value.detach().double() for name, value in model.state_dict().items()}
    values |= {name: values[name] + delta for name, delta in added.items()}
    return functional_call(model.double(), values, (x.double(),))


# ---- weights of 1e-30 and 1e30


def scaled(size: float, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Linear, conv and linear whose weights are of this size, and whose outputs would be of its cube."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 12), nn.Unflatten(1, (3, 4)), nn.Conv1d(3, 6, 1), nn.Flatten(), nn.Linear(24, 4))
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(size)
    return model.to(dtype)


SIZES = [
    (1e-30, torch.float32),
    (1e30, torch.float32),
    (1e-30, torch.bfloat16),
    (1e30, torch.bfloat16),
    (1e-200, torch.float64),
    (1e200, torch.float64),
]


@pytest.mark.parametrize(("size", "dtype"), SIZES)
def test_folds_of_tiny_and_huge_weights_are_the_formula(size: float, dtype: torch.dtype) -> None:
    """And the noise has their size: squares of such weights leave their dtype."""
    model = scaled(size, dtype)
    base = {name: value.detach().clone().double() for name, value in model.named_parameters()}
    cascade = lx.adapt(model, (randn(2, 5, dtype=dtype),), spec=spec(noise=lx.Noise(0.2)))
    eps = torch.finfo(dtype).eps
    for name in ("0.weight", "2.weight", "4.weight"):
        noise = model.get_parameter(name).detach().double() - base[name]
        allowed = 0.1 * float((base[name] / size).std()) * size
        assert 0 < float(noise.abs().max()) <= allowed * (1 + 8 * eps) + float(base[name].abs().max()) * eps
        assert float(noise.abs().max()) > 0.5 * allowed
    deltas = put_factors(cascade, size)
    cascade.transition(None)
    slow = cascade.release().state_dict()
    for name, delta in deltas.items():
        expected = base[name] + PACE * delta
        close = 4 * eps * float(expected.abs().max())
        torch.testing.assert_close(slow[name].double(), expected, rtol=eps, atol=close)
        assert float((slow[name].double() - base[name]).abs().max()) > 100 * close or dtype == torch.bfloat16


# ---- no spread, no entries, one channel


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_batch_of_none(placement: Any) -> None:
    """Its gradients are zero, and a stage that saw nothing else moves no weight."""
    model = Mixed().double()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    cascade = lx.adapt(model, (TOKENS,), spec=spec(placement=placement))
    optimizer = torch.optim.SGD(cascade.param_groups(lr=0.1))
    for empty in (TOKENS[:0], TOKENS[:0, :3]):
        output = cascade(empty)
        assert output.shape == (0, 5)
        output.sum().backward()
        gradients = [parameter.grad for parameter in trainable(cascade).values() if parameter.grad is not None]
        assert not any(bool(gradient.any()) for gradient in gradients)
        optimizer.step()
        optimizer.zero_grad()
    cascade.transition(optimizer)
    assert all(torch.equal(value, before[name]) for name, value in cascade.release().named_parameters())


class Hollow(nn.Module):
    """Two weights without entries, [3, 0] and [0, 5], beside one that has some."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.none_in, self.none_out = (nn.Parameter(torch.empty(*shape)) for shape in ((3, 0), (0, 5)))
        self.some = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(x, self.none_out)
        return self.some(x) + nn.functional.linear(y, self.none_in)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_weights_without_entries_are_refused_by_name(placement: Any) -> None:
    model, x = Hollow(), randn(4, 5)
    expected = model(x)
    cascade = lx.adapt(model, (x,), spec=spec(placement=placement, noise=lx.Noise(0.1, where="all")))
    assert [site.weight for site in cascade.sites] == ["some.weight"]
    refused = [(refusal.weight, refusal.reason.value) for refusal in cascade.refusals]
    assert refused == [("none_in", "empty"), ("none_out", "empty")]
    loss_of(cascade(x)).backward()
    for parameter in trainable(cascade).values():
        parameter.grad = None
    cascade.transition(None)
    assert torch.equal(cascade.release()(x), expected)


# ---- the ends of a dtype


def near_the_end(dtype: torch.dtype, share: float = 1.0) -> tuple[nn.Sequential, torch.Tensor]:
    """A linear whose first entry is a share of the largest number, followed by one that is nothing special."""
    torch.manual_seed(9)
    model = nn.Sequential(nn.Linear(5, 7, bias=False), nn.Linear(7, 3, bias=False)).to(dtype)
    with torch.no_grad():
        model[0].weight[0, 0] = torch.finfo(dtype).max * share
    return model, torch.zeros(2, 5, dtype=dtype)


def push(cascade: lx.Cascade, by: float) -> None:
    """Let the branch of the first weight add this to its first entry, and to no other, at pace 1."""
    branch = branches_of(cascade)["0.weight"]
    with torch.no_grad():
        branch.lora_A.zero_()
        branch.lora_A[0, 0] = math.sqrt(by / branch.scale)
        branch.lora_B[0, 0] = math.sqrt(by / branch.scale)


NARROW = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", NARROW)
def test_a_fold_that_leaves_the_dtype_is_refused(dtype: torch.dtype) -> None:
    model, x = near_the_end(dtype)
    cascade = lx.adapt(model, (x,), spec=spec(pace=1.0))
    optimizer = torch.optim.SGD(cascade.param_groups(lr=0.1))
    push(cascade, float(torch.finfo(dtype).max) * 0.01)
    for call in (lambda: cascade.transition(optimizer), cascade.release, cascade.folded_state_dict):
        with unchanged(cascade, optimizer), raises(lx.NonFiniteBranch, "non-finite", "0.weight", dtype, "1"):
            call()
    with cascade.weights("slow"):
        assert bool(model[0].weight.isfinite().all())


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.filterwarnings("ignore:.*the rounding of 0.weight keeps")  # by less than the last bit
def test_what_stays_inside_the_dtype_is_folded(dtype: torch.dtype) -> None:
    """Up to the largest number, and by less than its last bit: no fold is refused that rounds to a finite number."""
    limits = torch.finfo(dtype)
    for share, by in ((0.5, limits.max * 0.25), (1.0, limits.max * limits.eps / 8), (1.0, limits.max * limits.eps / 5)):
        model, x = near_the_end(dtype, share)
        expected = (model[0].weight[0, 0].double() + by).to(dtype)
        cascade = lx.adapt(model, (x,), spec=spec(pace=1.0))
        push(cascade, by)
        cascade.transition(None)
        assert bool(model[0].weight.isfinite().all())
        torch.testing.assert_close(
            cascade.release()[0].weight[0, 0].double(), expected.double(), rtol=limits.eps, atol=0
        )


def test_a_product_that_overflows_is_refused_though_its_factors_are_finite() -> None:
    model, x = near_the_end(torch.float32, 1e-38)
    cascade = lx.adapt(model, (x,), spec=spec())
    branch = branches_of(cascade)["0.weight"]
    with torch.no_grad():
        branch.lora_A.fill_(1e30)
        branch.lora_B.fill_(1e30)
    assert branch.finite()
    with unchanged(cascade), raises(lx.NonFiniteBranch, "non-finite", "torch.float32"):
        cascade.transition(None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_noise_that_leaves_the_dtype_is_refused(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 3)).to(dtype)
    with torch.no_grad():
        model[0].weight.copy_((torch.rand(30, 40) - 0.5).sign().double() * torch.finfo(dtype).max * 0.9)
    x = torch.zeros(2, 40, dtype=dtype)
    with unchanged(model), raises(lx.SpecError, "invalid-value", "noise.strength", "1.0", "1"):
        lx.adapt(model, (x,), spec=spec(noise=lx.Noise(1.0)))


def test_a_weight_that_is_not_finite_has_no_noise_but_can_be_adapted() -> None:
    model, x = near_the_end(torch.float32, math.inf)
    with unchanged(model), raises(lx.SpecError, "invalid-value", "noise.strength", "0.1", "0.weight"):
        lx.adapt(model, (x,), spec=spec(noise=lx.Noise(0.1)))
    cascade = lx.adapt(model, (x,), spec=spec())
    put_factors(cascade, 1e35)
    cascade.transition(None)
    weight = cascade.release()[0].weight
    assert weight[0, 0] == math.inf
    assert bool(weight.flatten()[1:].isfinite().all())


# ---- branches and heads that went non-finite


@pytest.mark.parametrize("slow_train", [True, False])
def test_a_head_that_is_not_finite(slow_train: bool) -> None:
    """A parameter trained in full is refused like a branch."""
    model, x = near_the_end(torch.float32, 1e-38)
    cascade = lx.adapt(model, (x,), spec=spec(targets=("0",), train=("1.*",), slow_train=slow_train))
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.1))
    train(cascade, optimizer, [x.add(1.0)])
    cascade.transition(optimizer)
    with torch.no_grad():
        model[1].weight[0, 0] = float("inf")
    with unchanged(cascade, optimizer), raises(lx.NonFiniteBranch, "non-finite", "1.weight", "stage 2"):
        cascade.transition(optimizer)
    with unchanged(cascade, optimizer), pytest.raises(lx.NonFiniteBranch):
        cascade.release()


BAD = ({0, 3}, {1}, {0, 1, 2, 3}, {2})
"""By stage, the steps whose loss overflows; in the third stage none is made."""
STEPS = 4
SPEC = lx.CascadeSpec(rank=2, lora_alpha=3.0, pace=1.0)


def train_stage(model: Any, optimizer: torch.optim.Optimizer, scaler: Any, stage: int, how: dict[str, Any]) -> int:
    """A stage; returns how many steps the scaler skipped."""
    skipped = 0
    for step in range(STEPS):
        loss = loss_of(model(inputs(6, 5, seed=10 * stage + step)))
        loss = loss * float("inf") if step in BAD[stage] else loss
        scaler.scale(loss).backward()
        if how["clip"]:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.05)
        scaler.step(optimizer)
        before = scaler.get_scale()
        scaler.update()
        skipped += scaler.get_scale() < before
        optimizer.zero_grad(set_to_none=how["to_none"])
    return skipped


@pytest.mark.parametrize(
    ("placement", "how"),
    [(p, {"clip": p == "merged", "to_none": to_none}) for p in PLACEMENTS for to_none in (False, True)],
)
def test_skipped_steps_are_those_of_a_loop_by_hand(placement: Any, how: dict[str, Any]) -> None:
    spec = replace(SPEC, placement=placement)
    cascade = lx.adapt(net(), (inputs(6, 5),), spec=spec)
    hand = by_hand(net(), cascade)
    ours, theirs = (torch.optim.AdamW(groups, lr=0.05) for groups in (cascade.param_groups(lr=0.05), hand.parameters()))
    scaler, scaler_by_hand = (torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2) for _ in range(2))
    for stage, bad in enumerate(BAD):
        assert train_stage(cascade, ours, scaler, stage, how) == len(bad)
        assert train_stage(hand, theirs, scaler_by_hand, stage, how) == len(bad)
        assert scaler.get_scale() == scaler_by_hand.get_scale()
        moved = all(bool(branch.lora_B.any()) for branch in branches_of(cascade).values())
        assert moved == (len(bad) < STEPS)
        cascade.transition(ours)
        hand.end()
        hand.begin(factors(cascade))
        theirs = torch.optim.AdamW(hand.parameters(), lr=0.05)
        for name, value in hand.weights("slow").items():
            torch.testing.assert_close(cascade.model.get_parameter(name).detach(), value, rtol=1e-4, atol=1e-5)
    x = inputs(8, 5, seed=99)
    expected = hand(x).detach()
    assert not torch.allclose(expected, net()(x), atol=0.05)
    torch.testing.assert_close(cascade.release()(x), expected, rtol=1e-4, atol=1e-4)
