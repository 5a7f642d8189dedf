"""Products of large frozen weights with oneDNN, compared with eager models in fp64, and when plain ops are used."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import pytorch_utils

import lorasc_fx as lx
from lorasc_fx.branch import products
from lorasc_fx.branch.products import FrozenGrouped, for_frozen, grouped
from tests.kit.models import randomize
from tests.kit.state import branches_of

ROWS, WIDE = 160, 384
"""Sizes of a product with more multiply-adds than `products.MIN_WORK`."""

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Use oneDNN on any processor, and count its products. A product of `forward` has a bias."""
    counted: Counter[str] = Counter()
    onednn = products._onednn

    def count(x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
        counted["backward" if bias is None else "forward"] += 1
        return onednn(x, rows, bias)

    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "_onednn", count)
    return counted


@contextmanager
def without_onednn() -> Iterator[None]:
    """Like `torch.backends.mkldnn.flags(enabled=False)`, which warns on a CPU (torch 2.13)."""
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(True)


def net() -> Any:
    """One product of each kind: a linear layer, GPT-2's addmm, and a head without a branch."""
    first, second, head = nn.Linear(WIDE, WIDE), pytorch_utils.Conv1D(WIDE, WIDE), nn.Linear(WIDE, WIDE)
    return nn.Sequential(OrderedDict(first=first, a=nn.GELU(), second=second, b=nn.GELU(), head=head))


def adapted(model: nn.Module, x: Tensor, **options: object) -> lx.Cascade:
    cascade = lx.adapt(model, (x,), spec=lx.CascadeSpec(targets=("first", "second"), rank=4, **options))
    randomize(cascade, size=0.05)
    return cascade


def inputs() -> Tensor:
    return torch.randn(2, ROWS // 2, WIDE, generator=torch.Generator().manual_seed(3))


def gradients(model: Callable[[Tensor], Tensor], x: Tensor, *others: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    output = model(x)
    return [output, *torch.autograd.grad((output.double() ** 2).sum(), [x, *others])]


@pytest.mark.parametrize("placement", ["beside", "merged"])
def test_a_step_has_the_numbers_of_the_model_in_fp64(placement: str, calls: Counter[str]) -> None:
    torch.manual_seed(0)
    model, x = net(), inputs()
    cascade = adapted(copy.deepcopy(model), x, placement=placement)
    computed = gradients(cascade, x, *cascade.branches.parameters())
    assert calls == {"forward": 3, "backward": 3}

    exact, (up, down) = model.double(), branches_of(cascade).values()
    factors = [factor.detach().double().requires_grad_() for factor in cascade.branches.parameters()]
    by_name = dict(zip([name for name, _ in cascade.branches.named_parameters()], factors, strict=True))
    of = {id(p): by_name[name] for name, p in cascade.branches.named_parameters()}

    def plain(x: Tensor) -> Tensor:
        w = exact.first.weight + up.scale * of[id(up.lora_B)] @ of[id(up.lora_A)]
        v = exact.second.weight.t() + down.scale * of[id(down.lora_B)] @ of[id(down.lora_A)]
        hidden = F.gelu(F.linear(F.gelu(F.linear(x, w, exact.first.bias)), v, exact.second.bias))
        head: Tensor = exact.head(hidden)
        return head

    for ours, theirs in zip(computed, gradients(plain, x.double(), *factors), strict=True):
        assert (ours - theirs).norm() <= 2e-6 * theirs.norm()


def test_without_gradients_a_call_has_the_bits_of_the_model(calls: Counter[str]) -> None:
    torch.manual_seed(0)
    model, x = net(), inputs()
    cascade = lx.adapt(copy.deepcopy(model), (x,), spec=lx.CascadeSpec(targets=("first",), rank=4))
    with torch.no_grad():
        assert torch.equal(cascade(x), model(x))
    assert not calls


def test_weights_that_are_trained_have_their_gradients(calls: Counter[str]) -> None:
    torch.manual_seed(0)
    model, x = net(), inputs()
    cascade = adapted(copy.deepcopy(model), x, train=("head.weight", "second.bias"), placement="beside")
    computed = gradients(cascade, x, cascade.model.head.weight, cascade.model.second.bias)
    assert calls == {"forward": 1, "backward": 1}  # the first layer alone is frozen whole
    with without_onednn():
        expected = gradients(cascade, x, cascade.model.head.weight, cascade.model.second.bias)
    assert sum(calls.values()) == 2
    torch.testing.assert_close(computed, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, at its first dual number
def test_plain_ops_under_tracing_modes_autocast_and_double_backward(calls: Counter[str]) -> None:
    torch.manual_seed(0)
    model, x = net(), inputs()
    cascade = adapted(model, x, placement="merged")
    leaf = x.clone().requires_grad_()
    with FlopCounterMode(display=False) as flops:
        (cascade(leaf) ** 2).sum().backward()
    assert flops.get_total_flops() >= 6 * 2 * ROWS * WIDE**2
    beside = adapted(net(), x, placement="beside")  # whose first product reads the input, in fp32
    with torch.autocast("cpu", torch.bfloat16):
        gradients(cascade, x)
        gradients(beside, x)
    torch.func.grad(lambda x: cascade(x).sum())(x)
    with torch.autograd.forward_ad.dual_level():
        cascade(torch.autograd.forward_ad.make_dual(x, x))
    assert not calls

    (once,) = torch.autograd.grad((cascade(leaf) ** 2).sum(), leaf, create_graph=True)
    assert calls == {"forward": 3}
    (twice,) = torch.autograd.grad((once**2).sum(), leaf)
    with without_onednn():
        (once,) = torch.autograd.grad((cascade(leaf) ** 2).sum(), leaf, create_graph=True)
        (expected,) = torch.autograd.grad((once**2).sum(), leaf)
    assert (twice - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("ends", [[100, 100, 360], [0, 200, 300]], ids=["an expert without rows", "rows of no expert"])
def test_a_grouped_product(ends: list[int], calls: Counter[str]) -> None:
    pytest.importorskip("transformers.integrations.moe")
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((360, WIDE), (3, WIDE, WIDE)))
    offs, op = torch.tensor(ends, dtype=torch.int32), torch.ops.transformers.grouped_mm_fallback
    fast = for_frozen(op.default)
    assert fast is not None
    computed = gradients(lambda x: fast(x, weight, offs), x)
    assert calls["backward"] >= 2  # no product of experts has a bias
    exact = gradients(lambda x: op(x, weight.double(), offs), x.double())
    for ours, theirs in zip(computed, exact, strict=True):
        assert (ours - theirs).norm() <= 2e-6 * theirs.norm()
    assert torch.equal(computed[0][ends[-1] :], torch.zeros(360 - ends[-1], WIDE))

    calls.clear()
    base = op(x, weight, offs)
    small = grouped(op, x[:8], weight[:1, :, :8], torch.tensor([8]))
    assert torch.equal(FrozenGrouped.apply(base, x, weight, offs, op), base)
    torch.testing.assert_close(small, x[:8] @ weight[0, :, :8])
    assert not calls


def test_a_small_product_is_left_to_torch(calls: Counter[str]) -> None:
    model, x = nn.Sequential(nn.Linear(WIDE, WIDE), nn.Linear(WIDE, 8)), torch.randn(16, WIDE)
    gradients(lx.adapt(model, (x,), spec=lx.CascadeSpec(targets=("0",), rank=2)), x)
    assert not calls
