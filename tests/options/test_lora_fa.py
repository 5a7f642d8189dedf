"""A frozen lora_A (LoRA-FA, 2308.03303), compared with peft's optimizer for it, and the memory that it saves."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from peft.optimizers import create_lorafa_optimizer
from torch import nn
from torch.nn.functional import linear

import lorasc_fx as lx
from tests.kit.compare import saved_storages
from tests.kit.errors import raises
from tests.kit.models import PLAIN, batches, branches, lora_of, loss_of, mlp, train
from tests.options.test_stage_schedule import LINEARS, LR, X


class Hf(torch.optim.Optimizer):
    """AdamW of transformers, as in peft's optimizer: eps is added after the bias correction."""

    def __init__(self, groups: Any, eps: float = 1e-6) -> None:
        super().__init__(groups, {"eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                count = state["step"] = state.get("step", 0) + 1
                mean = state.setdefault("mean", torch.zeros_like(parameter))
                square = state.setdefault("square", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 0.1)
                square.lerp_(parameter.grad**2, 0.001)
                size = group["lr"] * math.sqrt(1 - 0.999**count) / (1 - 0.9**count)
                parameter.addcdiv_(mean, square.sqrt() + group["eps"], value=-size)


@pytest.mark.parametrize("placement", ["beside", "merged", "weight"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_lora_fa_is_pefts(placement: str, use_rslora: bool) -> None:
    original = copy.deepcopy(mlp())
    spec = lx.CascadeSpec(
        **PLAIN, use_rslora=use_rslora, train_A=False, nearest_full_gradient=True, placement=placement
    )
    cascade = lx.adapt(mlp(), (X,), spec=spec)
    before = {name: branch.lora_A.detach().clone() for name, branch in branches(cascade).items()}
    theirs = lora_of(cascade, original, LINEARS, use_rslora=use_rslora)
    made = create_lorafa_optimizer(theirs, r=PLAIN["rank"], lora_alpha=PLAIN["lora_alpha"], lr=LR)
    calls = batches(20, 4, 5)
    ours, expected = train(cascade, Hf(cascade.param_groups(lr=LR)), calls), train(theirs, made, calls)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    for name, branch in branches(cascade).items():
        assert torch.equal(branch.lora_A, before[name])
        assert branch.lora_A.grad is None


def test_the_inverses_are_computed_once_in_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = lx.CascadeSpec(**PLAIN, train_A=False, nearest_full_gradient=True)
    cascade = lx.adapt(mlp(), (X,), spec=spec)
    sites = len(cascade.sites)
    counted, pinv = [], torch.linalg.pinv
    monkeypatch.setattr(torch.linalg, "pinv", lambda matrix: (counted.append(matrix), pinv(matrix))[1])
    optimizer = torch.optim.SGD(cascade.param_groups(lr=LR))
    for stage in (1, 2):
        for _ in range(3):
            optimizer.zero_grad()
            cascade(X).square().sum().backward()
            optimizer.step()
        assert len(counted) == stage * sites
        cascade.transition(optimizer)
    with torch.no_grad():
        branch = branches(cascade)[cascade.sites[0].weight]
        branch.lora_A.mul_(2)
    cascade(X)
    assert len(counted) == 3 * sites
    b, a, scale = branch.lora_B, branch.lora_A.detach(), branch.scale
    gradient = torch.autograd.grad((branch.up * torch.ones_like(b)).sum(), b)[0]
    exact = torch.ones_like(b) @ torch.linalg.inv(a @ a.T) / scale**2
    torch.testing.assert_close(gradient, exact, rtol=1e-6, atol=0)


def test_the_correction_under_autocast_is_that_of_full_precision() -> None:
    spec = lx.CascadeSpec(**PLAIN, train_A=False, nearest_full_gradient=True)
    x, gradients = X.float(), []
    cascade = lx.adapt(mlp().float(), (x,), spec=spec)
    factors = [branch.lora_B for branch in branches(cascade).values()]
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = cascade(x)
        gradients.append(torch.autograd.grad(output.square().sum(), factors))
    for full, half in zip(*gradients, strict=True):
        assert (half - full).norm() <= 0.03 * full.norm()


@pytest.mark.parametrize("nearest", [False, True])
@pytest.mark.parametrize("kind", ["conv", "shared", "dropout", "embedding", "experts", "slices"])
def test_gradients_of_lora_b_are_those_with_a_trained_lora_a(kind: str, nearest: bool) -> None:
    torch.manual_seed(4)
    models: dict[str, tuple[nn.Module, Any]] = {
        "conv": (nn.Sequential(nn.Conv2d(3, 4, (3, 2), stride=2, padding=1), nn.SiLU(), nn.Conv2d(4, 6, 1)),
                 torch.randn(2, 3, 8, 7)),
        "shared": (Shared(), torch.randn(2, 6, 5)),
        "dropout": (nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), torch.randn(4, 5)),
        "embedding": (nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 3)), torch.tensor([[1, 2, 2], [4, 8, 0]])),
        "experts": (Experts(), torch.randn(4, 5)),
        "slices": (Packed(), torch.randn(4, 5)),
    }  # fmt: skip
    model, x = models[kind]
    x = x.double() if x.is_floating_point() else x
    options = {"rank": 2, "lora_alpha": 3.0, "dropout": 0.4 if kind == "dropout" else 0.0}
    found = []
    for fixed in (True, False):
        spec = lx.CascadeSpec(**options, train_A=not fixed, nearest_full_gradient=nearest and fixed)
        cascade = lx.adapt(copy.deepcopy(model).double().train(), (x,), spec=spec)
        for branch in branches(cascade).values():
            with torch.no_grad():
                branch.lora_B.copy_(torch.linspace(-1, 1, branch.lora_B.numel()).view_as(branch.lora_B))
        torch.manual_seed(9)
        given = x.clone().requires_grad_(x.is_floating_point())
        loss_of(cascade(given)).backward()
        found.append((given.grad, branches(cascade)))
    (dx, ours), (expected_dx, theirs) = found
    assert len(ours) >= 1
    torch.testing.assert_close(dx, expected_dx, rtol=0, atol=1e-12)
    for name, branch in ours.items():
        a, slope = branch.lora_A.detach(), theirs[name].lora_B.grad
        if nearest:
            slopes = slope.split(branch.slices, -2) if branch.slices else [slope]
            each = a.chunk(len(slopes), -2)
            steady = [one @ one.transpose(-2, -1) + 1e-8 * torch.eye(2) for one in each]  # as peft does
            inverse = [torch.linalg.inv(one) / branch.scale**2 for one in steady]
            slope = torch.cat([one @ other for one, other in zip(slopes, inverse, strict=True)], -2)
        torch.testing.assert_close(branch.lora_B.grad, slope, rtol=1e-9, atol=1e-11, msg=name)
        assert branch.lora_A.grad is None
        assert theirs[name].lora_A.grad is not None


class Shared(nn.Module):
    """Two products of the same input, whose branches share a stacked product."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other, self.last = nn.Linear(5, 7), nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).tanh() * self.other(x))


class Packed(nn.Module):
    """A fused weight whose slices have separate pairs of factors."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Parameter(torch.randn(7, 5) * 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.packed[:3]).tanh() @ linear(x, self.packed[3:]).sum(0)[:3]


class Experts(nn.Module):
    """A weight of three stacked matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 6, 5) * 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x.expand(3, -1, -1), self.stack.transpose(1, 2)).tanh().sum(0)


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
        moving = x * 1.0  # an activation of its own
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
    given = x.clone().requires_grad_()
    with raises(lx.StateError, "backward-not-supported"):
        torch.autograd.grad(loss_of(cascade(given)), given, create_graph=True)
