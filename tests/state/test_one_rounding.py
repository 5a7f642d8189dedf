"""Slow weights are computed from W0 and the experts in fp32 (fp64 for fp64), and rounded once after many stages."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from tests.kit.models import branches, loss_of, randomize

STAGES, PACE, SCALE = 20, 0.5, 1.5


def model_of(dtype: torch.dtype) -> nn.Module:
    """Return a model of two weights. Over 20 stages of rank 1, [60, 50] keeps experts, and [9, 60] becomes dense."""
    torch.manual_seed(21)
    return nn.Sequential(nn.Linear(50, 60), nn.Tanh(), nn.Linear(60, 9)).to(dtype)


def few_bits(cascade: lx.Cascade) -> None:
    """Give every branch factors with few bits, whose products no kernel rounds, fused with the sum or not."""
    randomize(cascade, size=1.0)
    with torch.no_grad():
        for branch in branches(cascade).values():
            for factor in (branch.lora_A, branch.lora_B):
                factor.copy_((factor * 32).round() / 32)
            assert branch.lora_A.any()


def differing(actual: torch.Tensor, expected: torch.Tensor) -> int:
    return int((actual != expected).sum())


@pytest.mark.parametrize("restart", ["slow", "fast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_twenty_stages_round_once(dtype: torch.dtype, restart: str) -> None:
    """The weights equal W0 + S bit for bit, with S from the recorded factors. A chain of folds does not."""
    model = model_of(dtype)
    base = {name: value.detach().clone() for name, value in model.named_parameters() if value.dim() > 1}
    x = torch.randn(6, 50, generator=torch.Generator().manual_seed(1)).to(dtype)
    spec = lx.CascadeSpec(rank=1, lora_alpha=SCALE, pace=PACE, restart=restart)
    cascade = lx.adapt(model, (x,), spec=spec)
    optimizer = torch.optim.SGD(cascade.param_groups(lr=2.0))
    slow = {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in base.items()}
    start, chain, size = dict(slow), dict(base), dict(slow)
    for _ in cascade.stages(STAGES, optimizer):
        for name, value in base.items():  # a stage starts from one rounding as well
            exact = value.double() + start[name]
            slack = STAGES * 2.0**-24 * (value.double().abs() + size[name])
            open_bits = (exact + slack).to(dtype) != (exact - slack).to(dtype)
            running = dict(model.named_parameters())[name].detach()
            assert differing(running[~open_bits], exact.to(dtype)[~open_bits]) == 0
        for _ in range(2):
            loss_of(cascade(x).float()).backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, branch in branches(cascade).items():
            assert branch.lora_A.dtype == branch.lora_B.dtype == torch.float32
            delta = SCALE * branch.lora_B.detach().double() @ branch.lora_A.detach().double()
            chain[name] = (chain[name].float() + PACE * delta.float()).to(dtype)
            fast, size[name] = start[name] + delta, size[name] + delta.abs()
            slow[name] = slow[name] + PACE * (fast - slow[name])
            start[name] = slow[name] if restart == "slow" else fast
    idle = {name: dict(model.named_parameters())[name].detach().clone() for name in base}
    released = cascade.release()
    for name, value in base.items():
        exact = value.double() + slow[name]
        assert (exact.to(dtype) != value).float().mean() > 0.5  # the stages say something
        # fp32 sums of 20 terms are this near to the exact ones; only where a tie lies between is the last bit open
        slack = STAGES * 2.0**-24 * (value.double().abs() + size[name])
        open_bits = (exact + slack).to(dtype) != (exact - slack).to(dtype)
        assert open_bits.float().mean() < 0.05
        actual = dict(released.named_parameters())[name].detach()
        assert differing(actual[~open_bits], exact.to(dtype)[~open_bits]) == 0
        assert differing(actual, exact.float().to(dtype)) <= value.numel() // 500
        assert torch.equal(idle[name], actual)
        if restart == "slow":
            assert differing(chain[name], exact.to(dtype)) > 0.1 * value.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_one_expert_is_rounded_once(dtype: torch.dtype) -> None:
    """An expert of rank 1 has no order of summation, and its products are exact: all entries are equal bit for bit."""
    model = model_of(dtype)
    base = {name: value.detach().clone() for name, value in model.named_parameters() if value.dim() > 1}
    x = torch.randn(6, 50).to(dtype)
    cascade = lx.adapt(model, (x,), spec=lx.CascadeSpec(rank=1, lora_alpha=2.0, pace=0.5))
    few_bits(cascade)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    for view, pace in (("fast", 1.0), ("slow", 0.5)):
        if view == "slow":
            cascade.transition(None)
        with cascade.weights(view):
            for name, branch in branches(cascade).items():
                if view == "fast":
                    delta = (2.0 * branch.lora_B.detach()) @ branch.lora_A.detach()
                    base[f"{name} delta"] = delta
                right = (base[name].to(exact) + base[f"{name} delta"] * pace).to(dtype)
                assert torch.equal(dict(model.named_parameters())[name], right)


def test_a_cast_rounds_from_the_base_too() -> None:
    """cascade.to(bf16) rounds the exact weights once. A cast back restores W0, because the cascade keeps it."""
    model = model_of(torch.float32)
    base = model[0].weight.detach().clone()
    x = torch.randn(6, 50)
    cascade = lx.adapt(model, (x,), spec=lx.CascadeSpec(rank=1, lora_alpha=2.0, pace=1.0))
    few_bits(cascade)
    branch = branches(cascade)["0.weight"]
    slow = base + (2.0 * branch.lora_B.detach()) @ branch.lora_A.detach()
    cascade.transition(None)
    cascade.to(torch.bfloat16)
    assert torch.equal(model[0].weight, slow.to(torch.bfloat16))
    assert cascade(x.bfloat16()).dtype == torch.bfloat16
    cascade.to(torch.float32)
    assert torch.equal(model[0].weight, slow)
    with cascade.weights("base"):
        assert torch.equal(model[0].weight, base)
