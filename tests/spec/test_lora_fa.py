"""A frozen lora_A (LoRA-FA, 2308.03303): the gradients of lora_B, and the memory that it saves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from tests.compile.test_compiled import TOKENS, Mixed
from tests.kit.compare import saved_storages
from tests.kit.errors import raises
from tests.kit.models import batches, branches, loss_of


@pytest.mark.parametrize("kind", ["conv", "dropout", "others"])
def test_gradients_of_lora_b_are_those_with_a_trained_lora_a(kind: str) -> None:
    torch.manual_seed(4)
    models: dict[str, tuple[nn.Module, Any]] = {
        "conv": (nn.Sequential(nn.Conv2d(3, 4, (3, 2), stride=2, padding=1), nn.SiLU(), nn.Conv2d(4, 6, 1)),
                 torch.randn(2, 3, 8, 7)),
        "dropout": (nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), torch.randn(4, 5)),
        "others": (Mixed(), TOKENS),
    }  # fmt: skip
    model, x = models[kind]
    x = x.double() if x.is_floating_point() else x
    options = {"rank": 2, "lora_alpha": 3.0, "dropout": 0.4 if kind == "dropout" else 0.0}
    results = []
    for fixed in (True, False):
        spec = lx.CascadeSpec(**options, train_A=not fixed)
        cascade = lx.adapt(copy.deepcopy(model).double().train(), (x,), spec=spec)
        for branch in branches(cascade).values():
            with torch.no_grad():
                branch.lora_B.copy_(torch.linspace(-1, 1, branch.lora_B.numel()).view_as(branch.lora_B))
        torch.manual_seed(9)
        leaf = x.clone().requires_grad_(x.is_floating_point())
        loss_of(cascade(leaf)).backward()
        results.append((leaf.grad, branches(cascade)))
    (dx, ours), (expected_dx, theirs) = results
    assert len(ours) >= 1
    torch.testing.assert_close(dx, expected_dx, rtol=0, atol=1e-12)
    for name, branch in ours.items():
        torch.testing.assert_close(branch.lora_B.grad, theirs[name].lora_B.grad, rtol=1e-9, atol=1e-11, msg=name)
        assert branch.lora_A.grad is None
        assert theirs[name].lora_A.grad is not None


@pytest.mark.parametrize("build", [lambda: nn.Linear(40, 50), lambda: nn.Conv2d(40, 50, 3, padding=1)])
def test_the_input_is_not_kept(build: Any) -> None:
    """Bytes that autograd saves between forward and backward, counted by torch: without lora_A's gradient x is not
    among them.
    """
    saved = {}
    for fixed in (False, True):
        torch.manual_seed(0)
        inner = build()
        x = torch.randn(64, 40) if isinstance(inner, nn.Linear) else torch.randn(4, 40, 6, 6)
        model = nn.Sequential(inner, nn.Tanh())
        spec = lx.CascadeSpec(rank=2, train_A=not fixed, placement="beside")
        cascade = lx.adapt(model, (x,), spec=spec)
        moving = x * 1.0  # an activation, and no input
        kept = saved_storages(lambda cascade=cascade, x=moving: loss_of(cascade(x)).backward())
        saved[fixed] = moving.untyped_storage().data_ptr() in kept
    assert saved == {False: True, True: False}


@pytest.mark.parametrize("build", [lambda: nn.Linear(5, 7), lambda: nn.Conv1d(5, 7, 1)])
def test_a_gradient_of_a_gradient(build: Any) -> None:
    model = nn.Sequential(build(), nn.Tanh()).double()
    x = (
        batches(1, 8192, 5)[0] if isinstance(model[0], nn.Linear) else batches(1, 4, 5, 3)[0]
    )  # small ones have torch's backward
    cascade = lx.adapt(model, (x,), spec=lx.CascadeSpec(rank=2, train_A=False, placement="beside"))
    leaf = x.clone().requires_grad_()
    with raises(lx.StateError, "backward-not-supported"):
        torch.autograd.grad(loss_of(cascade(leaf)), leaf, create_graph=True)
