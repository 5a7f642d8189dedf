"""Limits on a transition: no replaced tensors or state, little memory, few functions, no capture and no compilation.

These tests count and do not measure time: `python -m benchmarks costs` does.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lorasc_fx as lx
from lorasc_fx.branch.deltas import accumulate
from lorasc_fx.branch.noise import BLOCK
from tests.kit.compare import tensors
from tests.kit.models import batches, branches, loss_of, mlp, optimizer_of, randomize, train
from tests.kit.seams import SEAMS, lower, seam
from tests.kit.state import variant_count

STAGES = 5


class Peak(TorchDispatchMode):
    """Counts bytes of live storages that operations have allocated. `most` is the largest sum so far."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {tensor.untyped_storage()._cdata for tensor in tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in tensors(result):
            storage = tensor.untyped_storage()
            if not tensor.is_meta and storage._cdata not in inputs and storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata)
        self.most = max(self.most, sum(self.alive.values()))
        return result


class Wide(nn.Module):
    """Ten weights of one size, [640, 800] as matrices: linears, convolutions, and a stack of four experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.down = nn.ModuleList(nn.Linear(800, 640, bias=False) for _ in range(4))
        self.up = nn.ModuleList(nn.Linear(640, 800, bias=False) for _ in range(4))
        self.conv = nn.Conv2d(200, 640, 2)
        self.experts = nn.Parameter(torch.randn(4, 160, 800) * 0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for down, up in zip(self.down, self.up, strict=True):
            x = x + up(torch.tanh(down(x)))
        y = self.conv(x.view(-1, 200, 2, 2)).flatten(1)
        return y + torch.bmm(x.expand(4, -1, -1), self.experts.transpose(1, 2)).transpose(0, 1).flatten(1)


LARGEST = 640 * 800
X = torch.randn(3, 800, generator=torch.Generator().manual_seed(1))
NARROW = {torch.bfloat16: 1, torch.float32: 0}


def wide(dtype: torch.dtype, **options: Any) -> tuple[lx.Cascade, torch.optim.Optimizer]:
    """Return a cascade whose branches and optimizer state are not zero."""
    spec = lx.CascadeSpec(rank=1, pace=0.5, **options)
    cascade = lx.adapt(Wide().to(dtype).eval(), (X.to(dtype),), spec=spec)
    assert len(cascade.sites) == 10
    return cascade, torch.optim.AdamW(cascade.param_groups(lr=1e-3))


def trained(cascade: lx.Cascade, optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("options", [{}, {"restart": "fast", "optimizer_state": 0.5}], ids=["slow", "fast"])
@pytest.mark.parametrize("strength", [0.0, 0.1])
def test_memory_beside_the_weights(dtype: torch.dtype, strength: float, options: dict[str, Any]) -> None:
    """A transition allocates copies of factors, some blocks of noise, and for narrow weights one weight in fp32.

    A copy of all ten weights, or a full product of factors, would exceed the limit. W0 is copied once, before the first
    write.
    """
    cascade, optimizer = wide(dtype, noise=lx.Noise(strength), **options)
    factors = sum(parameter.nbytes for branch in cascade.branches.values() for parameter in branch.parameters())
    unit = 4 * LARGEST
    assert factors < unit / 10
    for stage in range(4):
        trained(cascade, optimizer)
        with Peak() as peak:
            cascade.transition(optimizer)
        weights = sum(parameter.nbytes for parameter in cascade.model.parameters() if parameter.dim() > 1)
        copied = weights if stage == 0 and not strength else 0
        limit = copied + NARROW[dtype] * unit + (12 * BLOCK if strength else 0)
        assert peak.most <= limit + 6 * factors
        assert peak.most >= copied + NARROW[dtype] * unit * 0.5  # it is seen at all
    with Peak() as peak:
        cascade.release()
    assert peak.most <= NARROW[dtype] * unit + 6 * factors


def test_five_stages_replace_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameter objects and addresses stay the same. No graph is captured, and the optimizer gets no new entry."""
    capture = mock.Mock(wraps=seam("capture"))
    monkeypatch.setattr(*SEAMS["capture"], capture)
    spec = lx.CascadeSpec(rank=2, noise=lx.Noise(0.1), train=("conv.bias",))
    cascade = lx.adapt(Wide().eval(), (X,), spec=spec)
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=1e-3))
    assert capture.call_count == 1

    def places() -> list[tuple[str, int, int]]:
        return [(name, id(value), value.data_ptr()) for name, value in cascade.named_parameters()]

    before, variants = places(), variant_count(cascade)
    optimized = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    experts = []
    for _ in cascade.stages(STAGES, optimizer):
        loss_of(cascade(X)).backward()
        optimizer.step()
        optimizer.zero_grad()
        experts.append(cascade.model.experts.detach().clone())
        assert places() == before
    assert places() == before
    assert [id(parameter) for group in optimizer.param_groups for parameter in group["params"]] == optimized
    assert (capture.call_count, variant_count(cascade)) == (1, variants)
    assert not any(itertools.starmap(torch.equal, itertools.pairwise(experts)))


# ---- the one function that writes a weight


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda tensor: tensor.contiguous(),
    "channels last": lambda tensor: tensor.contiguous(memory_format=torch.channels_last),
    "transposed": lambda tensor: tensor.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0),
    "every second": lambda tensor: tensor.repeat_interleave(2, dim=0)[::2],
}


@pytest.mark.parametrize("block", [1, 200, 1 << 21])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    ("narrow", "dtype"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_accumulate_is_the_sum_rounded_once(
    narrow: torch.dtype, dtype: torch.dtype, stacked: bool, layout: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every bit is right for any block size, memory format and stack.

    The factors have rank 1, so there is no order of summation. They have few bits, so no kernel rounds their products,
    fused or not.
    """
    lower(monkeypatch, "block of a sum", block)
    source = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64).to(dtype)

    def few_bits(*shape: int) -> torch.Tensor:
        return torch.randint(-31, 32, shape, generator=source).to(dtype) / 16

    shape = (6, 5, 3, 4)
    base, delta = draw(*shape).to(narrow), draw(*shape)
    b, a = (few_bits(6, 5, 1), few_bits(6, 1, 12)) if stacked else (few_bits(6, 1), few_bits(1, 60))
    expected = ((base.to(dtype) + delta) + (b @ a).view(shape)).to(narrow)
    out = LAYOUTS[layout](torch.zeros(shape, dtype=narrow))
    strides, address = out.stride(), out.data_ptr()
    accumulate(out, base, dtype, delta, (b, a), stacked)
    assert torch.equal(out, expected)
    assert (out.stride(), out.data_ptr()) == (strides, address)
    accumulate(out, base, dtype)
    assert torch.equal(out, base)
    assert not torch.equal(expected, base)


def test_a_transition_inside_autocast_is_none_of_its_business() -> None:
    """A fold is computed in fp32 even inside autocast."""
    weights = []
    for enabled in (False, True):
        cascade = lx.adapt(Wide().eval(), (X,), spec=lx.CascadeSpec(rank=2, noise=lx.Noise(0.1), pace=0.5))
        randomize(cascade)
        before = {name: cascade.model.get_parameter(name).detach().clone() for name in branches(cascade)}
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            cascade.transition(None)
            weights.append({name: value.detach().clone() for name, value in cascade.model.named_parameters()})
        assert not any(torch.equal(before[name], weights[-1][name]) for name in before)
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


def pruned(state: dict[str, torch.Tensor], name: str, ratio: float) -> torch.Tensor:
    """Return zeros where either moment is among the share `ratio` of its smallest in magnitude, found by sorting."""
    value, zero = state[name], torch.zeros_like(state["exp_avg"], dtype=torch.bool)
    for moment in (state["exp_avg"].abs(), state["exp_avg_sq"].abs()):
        zero |= moment < moment.flatten().sort().values[round(ratio * moment.numel())]
    return torch.where(zero, 0.0, value)


@pytest.mark.parametrize("how", ["reset", "kept", 0.25, 0.9])
def test_optimizer_state_of_the_branches_and_of_nothing_else(how: Any) -> None:
    spec = lx.CascadeSpec(rank=2, targets=("0", "2"), train=("4",), optimizer_state=how)
    cascade = lx.adapt(mlp(), batches(1, 4, 5), spec=spec)
    optimizer = optimizer_of(cascade)
    train(cascade, optimizer, batches(4, 4, 5))
    objects, before = list(cascade.parameters()), copy.deepcopy(list(optimizer.state.values()))
    parameters = list(optimizer.state)
    groups = copy.deepcopy([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])
    assert all(state["exp_avg"].any() for state in before)
    cascade.transition(optimizer)
    assert all(new is old for new, old in zip(cascade.parameters(), objects, strict=True))
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == groups
    assert all(parameter.grad is None for parameter in cascade.parameters())
    factors = set(cascade.branches.parameters())
    for parameter, state in zip(parameters, before, strict=True):
        current, mine = optimizer.state.get(parameter, {}), parameter in factors
        assert set(current) == (set() if mine and how == "reset" else set(state))
        for name, value in current.items():
            shaped = mine and isinstance(how, float) and value.shape == parameter.shape
            assert torch.equal(value, pruned(state, name, how) if shaped else state[name]), name
