"""Learning rates by factor and by pattern, compared with peft's optimizer for LoRA+ and torch's parameter groups."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn

import lorasc_fx as lx
from tests.kit.errors import raises
from tests.kit.models import PLAIN, batches, lora_of, loss_of, mlp, train

X = batches(1, 4, 5)[0]
LR = 3e-3
LINEARS = ("0", "2", "4")


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_lora_plus_is_pefts(optimizer: Any) -> None:
    original = copy.deepcopy(mlp())
    cascade = lx.adapt(mlp(), (X,), spec=lx.CascadeSpec(**PLAIN, lr_ratio=16.0))
    theirs = lora_of(cascade, original, LINEARS)
    plain = lx.adapt(mlp(), (X,), spec=lx.CascadeSpec(**PLAIN))
    calls = batches(20, 4, 5)
    ours = train(cascade, optimizer(cascade.param_groups(lr=LR), weight_decay=0.0), calls)
    made = create_loraplus_optimizer(theirs, optimizer, lr=LR, loraplus_lr_ratio=16.0)
    expected = train(theirs, made, calls)
    without = train(plain, optimizer(plain.param_groups(lr=LR), weight_decay=0.0), calls)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    assert (ours - without).abs().max() > 1e-4  # the ratio is felt


def test_rates_of_groups() -> None:
    rules = (lx.TrainRule("4.bias", lr=0.5), lx.TrainRule("4.*", slow=False), lx.TrainRule("*", lr=0.25))
    spec = lx.CascadeSpec(targets=("0.weight",), train=("4.*", "0.bias"), lr_ratio=4.0, train_rules=rules)
    cascade = lx.adapt(mlp(), (X,), spec=spec, frontend="symbolic")
    groups = cascade.param_groups(lr=0.1, betas=(0.8, 0.9))
    assert [(group["name"], group["lr"]) for group in groups] == [
        ("lora_A", 0.1),
        ("lora_B", 0.4),
        ("train", 0.1),
        ("train:*", 0.25),
        ("train:4.bias", 0.5),
    ]
    held = {group["name"]: [id(parameter) for parameter in group["params"]] for group in groups}
    named = dict(cascade.model.named_parameters())
    assert held["train"] == [id(named["4.weight"])]
    assert held["train:*"] == [id(named["0.bias"])]
    assert held["train:4.bias"] == [id(named["4.bias"])]
    assert all(group["betas"] == (0.8, 0.9) for group in groups)
    assert [group["name"] for group in lx.adapt(mlp(), (X,)).param_groups(lr=0.1)] == ["lora_A", "lora_B"]


@pytest.mark.parametrize("slow_train", [True, False])
def test_a_rule_says_who_has_a_slow_copy(slow_train: bool) -> None:
    """By the recursion of algorithm.md: p + pace (fast - p) with a slow copy, otherwise the fast value."""
    rules = (lx.TrainRule("4.bias", slow=True), lx.TrainRule("4.weight", slow=False))
    spec = lx.CascadeSpec(
        targets=("0.weight",), train=("4.*", "0.bias"), pace=0.3, slow_train=slow_train, train_rules=rules
    )
    cascade = lx.adapt(mlp(), (X,), spec=spec, frontend="symbolic")
    optimizer = torch.optim.SGD(cascade.param_groups(lr=0.1))
    named = dict(cascade.model.named_parameters())
    slow = {name: named[name].detach().clone() for name in ("4.weight", "4.bias", "0.bias")}
    for _ in range(3):
        loss_of(cascade(X)).backward()
        optimizer.step()
        optimizer.zero_grad()
        fast = {name: named[name].detach().clone() for name in slow}
        for name, follows in (("4.weight", False), ("4.bias", True), ("0.bias", slow_train)):
            slow[name] = slow[name] + 0.3 * (fast[name] - slow[name]) if follows else fast[name]
            assert not torch.equal(fast[name], slow[name]) or not follows
        cascade.transition(optimizer)
        for name, value in slow.items():
            torch.testing.assert_close(named[name].detach(), value, rtol=0, atol=1e-12, msg=name)
    model = cascade.release()
    for name, value in slow.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].detach(), value, rtol=0, atol=1e-12)


def test_a_rule_for_nothing_that_is_trained() -> None:
    spec = lx.CascadeSpec(train=("4.*",), train_rules=(lx.TrainRule("2.weight", lr=0.1),))
    model = mlp()
    with raises(lx.UnknownTarget, "unknown-target", "train_rules", "2.weight", "4.weight"):
        lx.adapt(model, (X,), spec=spec)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_rates_of_a_tied_parameter_by_any_of_its_names() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)).double()
    model[2].bias = model[0].bias
    spec = lx.CascadeSpec(train=("0.bias",), train_rules=(lx.TrainRule("2.bias", lr=0.5, slow=False),))
    cascade = lx.adapt(model, (X,), spec=spec)
    assert [(group["name"], group["lr"]) for group in cascade.param_groups(lr=0.1)][2:] == [("train:2.bias", 0.5)]


@pytest.mark.parametrize("lr", [0.0, 0.5])
def test_rates_that_happen_to_be_equal_are_taken(lr: float) -> None:
    """An optimizer from `param_groups` is accepted, also if the rate is 0 or a rule has the same rate as the others."""
    rule = lx.TrainRule("0.*", lr=0.5)
    more = {"lr_ratio": 16.0} if lr == 0.0 else {"train": ("0.*",), "targets": ("1.*",), "train_rules": (rule,)}
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    cascade = lx.adapt(model, args=(torch.randn(2, 3),), spec=lx.CascadeSpec(rank=2, **more))
    optimizer = torch.optim.SGD(cascade.param_groups(lr=lr))
    assert {group["lr"] for group in optimizer.param_groups} == {lr}
    assert len(list(cascade.stages(1, optimizer))) == 1
