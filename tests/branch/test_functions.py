"""Autograd functions of branches, compared with finite differences and with autograd over the plain formula."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import lorasc_fx as lx
from lorasc_fx.branch.placements import ConvCall
from lorasc_fx.branch.products import Beside, BesideConv, ConvGeometry, MergedConv, MergedProduct
from tests.kit.compare import saved_storages
from tests.kit.models import loss_of, randomize

SCALE = 0.7
D = torch.float64


def numbers(*shape: int, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=D).requires_grad_(grad)


# --- products --------------------------------------------------------------------------------------------------------

# few rows, many, a number that no fold divides, and one
ROWS = [(3,), (2, 5), (4, 64), (131, 3), (1, 1)]


def factors() -> tuple[Tensor, Tensor]:
    return numbers(2, 6, grad=True), numbers(5, 2, grad=True)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """The number of chunks depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_beside_a_product(rows: tuple[int, ...]) -> None:
    x, w, (a, b) = numbers(*rows, 6, grad=True), numbers(5, 6), factors()

    def ours(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return Beside.apply(F.linear(x, w), x, a, b, SCALE, 0.0, None)

    def plain(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, w + SCALE * b @ a)

    same(ours, plain, x, a, b)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("op", ["linear", "addmm", "mm", "matmul"])
@pytest.mark.parametrize("rows", [(2,), (4, 64), (131,)], ids=str)
def test_merged_with_a_product(op: str, rows: tuple[int, ...]) -> None:
    rows = (rows[0] * (rows[1] if rows[1:] else 1),) if op in ("addmm", "mm") else rows
    x, bias, (a, b) = numbers(*rows, 6, grad=True), numbers(5, grad=True), factors()
    w = numbers(5, 6) if op == "linear" else numbers(6, 5)
    bias = bias if op in ("linear", "addmm") else None

    def ours(x: Tensor, a: Tensor, b: Tensor, *bias: Tensor) -> Tensor:
        return MergedProduct.apply(x, w, bias[0] if bias else None, a, b, SCALE, op)

    def plain(x: Tensor, a: Tensor, b: Tensor, *bias: Tensor) -> Tensor:
        y = x @ (w.t() if op == "linear" else w).add(SCALE * (b @ a).t())
        return y + bias[0] if bias else y

    inputs = (x, a, b) if bias is None else (x, a, b, bias)
    same(ours, plain, *inputs)


def test_a_merged_weight_that_requires_grad_gets_a_gradient() -> None:
    x, w, (a, b) = numbers(3, 6, grad=True), numbers(5, 6, grad=True), factors()
    same(
        lambda x, w, a, b: MergedProduct.apply(x, w, None, a, b, SCALE, "linear"),
        lambda x, w, a, b: F.linear(x, w + SCALE * b @ a),
        *(x, w, a, b),
    )


def same(ours: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Check values and gradients of every input beside the plain formula, and of small inputs by finite differences."""
    results = []
    for call in (ours, plain):
        value = call(*inputs)
        slope = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view(value.shape)
        results.append((value.detach(), torch.autograd.grad(value, inputs, slope)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(results[0][1], results[1][1], strict=True):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)
    if inputs[0].numel() < 300:
        check_gradients(ours, *inputs)


def check_gradients(call: Callable[..., Tensor], *inputs: Tensor) -> None:
    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs)


# --- convolutions ----------------------------------------------------------------------------------------------------

GRIDS: dict[str, tuple[tuple[int, ...], Any, Any, Any, int]] = {
    "1x1": ((1, 1), 1, 0, 1, 1),
    "1x1 strided": ((1, 1), 2, 0, 1, 1),
    "3x3": ((3, 3), 1, 1, 1, 1),
    "3x1 strided, dilated": ((3, 1), (2, 1), (2, 0), (2, 1), 1),
    "same": ((3, 3), 1, "same", 1, 1),
    "valid": ((2, 3), 1, "valid", 1, 1),
    "groups": ((3, 3), 1, 1, 1, 2),
    "depthwise": ((2, 2), 1, 0, 1, 4),
    "1d": ((3,), 2, 1, 1, 1),
    "1d pointwise": ((1,), 1, 0, 1, 1),
    "3d": ((2, 1, 2), 1, 0, 1, 1),
}


@pytest.mark.parametrize(
    "last", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["channels first", "channels last"]
)
@pytest.mark.parametrize("name", GRIDS)
def test_convolutions(name: str, last: bool) -> None:
    kernel, stride, padding, dilation, groups = GRIDS[name]
    space = {1: (9,), 2: (5, 4), 3: (3, 4, 3)}[len(kernel)]  # small: gradcheck moves each entry
    if last and len(kernel) != 2:
        pytest.skip("channels last is a format of images")
    x, w, bias = numbers(2, 4, *space), numbers(8, 4 // groups, *kernel), numbers(8)
    if last:
        x, w = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, w))
    x.requires_grad_()
    a, b = numbers(3, 4 // groups, *kernel, grad=True), numbers(8, 3, grad=True)
    grid = ConvCall(stride, padding, dilation, groups).geometry(x, kernel)
    assert grid is not None
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(kernel)]

    def plain(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return conv(x, w + SCALE * (b @ a.flatten(1)).view(w.shape), bias, stride, padding, dilation, groups)

    def merged(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return MergedConv.apply(x, w, bias, a, b, grid, SCALE)

    def beside(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        base = conv(x, w, bias, stride, padding, dilation, groups)
        return BesideConv.apply(base, x, a, b, grid, SCALE, 0.0, None)

    for ours in (merged, beside) if groups == 1 else (merged,):
        same(ours, plain, x, a, b)
        assert ours(x, a, b).stride() == plain(x, a, b).stride()  # the memory format is kept


# --- adapter dropout -------------------------------------------------------------------------------------------------


def test_dropout_masks_and_scales_forward_and_backward() -> None:
    """If A and B are the identity, the branch adds its input after dropout."""
    x, eye, p = numbers(64, 40, grad=True), torch.eye(40, dtype=D, requires_grad=True), 0.3
    added = Beside.apply(torch.zeros(64, 40, dtype=D), x, eye, eye, 1.0, p, 1234)
    zero = added.detach() == 0
    assert abs(zero.double().mean() - p) < 0.03
    torch.testing.assert_close(added.detach()[~zero], x.detach()[~zero] / (1 - p))
    added.sum().backward()
    torch.testing.assert_close(x.grad, (~zero).to(D) / (1 - p))  # the mask of the forward, drawn again
    dropped = x.detach() * (~zero) / (1 - p)
    torch.testing.assert_close(eye.grad, 2 * dropped.sum(0).expand(40, -1))  # of A and of B, both the identity
    another_seed = Beside.apply(torch.zeros(64, 40, dtype=D), x, eye, eye, 1.0, p, 1235)
    assert not torch.equal(another_seed == 0, zero)


def test_gradients_with_dropout() -> None:
    x, w, (a, b) = numbers(4, 6, grad=True), numbers(5, 6), factors()
    check_gradients(lambda x, a, b: Beside.apply(F.linear(x, w), x, a, b, SCALE, 0.4, 77), x, a, b)
    image, kernel = numbers(2, 4, 5, 4, grad=True), numbers(3, 4, 3, 3, grad=True)
    tall, base, grid = numbers(8, 3, grad=True), numbers(2, 8, 5, 4), ConvGeometry((1, 1), (1, 1), (1, 1))
    check_gradients(lambda x, a, b: BesideConv.apply(base, x, a, b, grid, SCALE, 0.4, 77), image, kernel, tall)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).double()


def filled(model: nn.Module, x: Tensor, **options: Any) -> lx.Cascade:
    cascade = lx.adapt(model, (x,), spec=lx.CascadeSpec(rank=2, **options))
    randomize(cascade, size=0.1)
    return cascade


def test_dropout_follows_torchs_seed_and_mode() -> None:
    x = numbers(4, 3, 6, 6)
    cascade = filled(net(), x, dropout=0.5).train()
    torch.manual_seed(5)
    before = cascade(x)
    undisturbed = cascade(x)
    torch.manual_seed(5)
    assert torch.equal(cascade(x), before)  # torch.manual_seed holds for it
    assert not torch.equal(undisturbed, before)
    quiet = cascade.eval()(x)
    with cascade.weights("fast"):
        torch.testing.assert_close(cascade(x), quiet)  # evaluation drops nothing
    assert {site.dropout for site in cascade.sites} == {0.5}


def test_checkpointing_draws_the_same_mask_again() -> None:
    x = numbers(4, 3, 6, 6)
    cascade = filled(net(), x, dropout=0.5).train()
    gradients = []
    for call in (lambda: cascade(x), lambda: checkpoint(cascade, x, use_reentrant=False)):
        cascade.zero_grad()
        torch.manual_seed(5)
        call().square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in cascade.branches.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        assert torch.equal(plain, again)


@pytest.mark.parametrize("placement", ["beside", "merged"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_tensors_saved_for_backward(placement: str, dropout: float) -> None:
    """For a linear layer: x, and A x if forward computes it, but no mask and no merged weight."""
    torch.manual_seed(0)
    model, x = nn.Linear(196, 180), torch.randn(64, 196)
    if dropout and placement == "merged":
        pytest.skip("a spec that asks for both is refused")
    cascade = lx.adapt(model, (x,), spec=lx.CascadeSpec(rank=4, placement=placement, dropout=dropout)).train()
    parameters = {parameter.data_ptr() for parameter in cascade.parameters()}
    sizes = [size for address, size in saved_storages(lambda: cascade(x)).items() if address not in parameters]
    assert sum(sizes) == 4 * (64 * 196 + (64 * 4 if placement == "beside" else 0))


# --- other people's machinery ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own, for forward gradients
@pytest.mark.parametrize("placement", ["auto", "beside", "merged", "weight"])
def test_transforms_and_compilers_get_plain_operations(placement: str) -> None:
    x = numbers(4, 3, 6, 6)
    cascade = filled(net(), x, placement=placement)
    parameters = {name: value.detach() for name, value in cascade.branches.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        named = {f"branches.{name}": value for name, value in values.items()}
        return torch.func.functional_call(cascade, named, (x,)).square().sum()

    gradients = torch.func.grad(loss)(parameters)
    loss_here = cascade(x).square().sum()
    loss_here.backward()
    for name, value in cascade.branches.named_parameters():
        torch.testing.assert_close(gradients[name], value.grad, rtol=1e-11, atol=1e-11)
    tangents = {name: torch.ones_like(value) for name, value in parameters.items()}
    _, slope = torch.func.jvp(loss, (parameters,), (tangents,))
    expected = sum(value.grad.sum() for _, value in cascade.branches.named_parameters())
    torch.testing.assert_close(slope, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("placement", ["beside", "merged", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_arithmetic(placement: str, dtype: torch.dtype) -> None:
    """Under autocast or with bf16 weights, the error to fp64 is that of bf16, and the output is bf16."""
    exact, x = net(), numbers(4, 3, 6, 6)
    reference = filled(copy.deepcopy(exact), x, placement="beside")
    expected = reference(x)
    expected.square().sum().backward()
    cascade = filled(exact.to(dtype), x.to(dtype), placement=placement)
    for mine, theirs in zip(cascade.branches.parameters(), reference.branches.parameters(), strict=True):
        mine.data = theirs.data.to(mine.dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        output = cascade(x.to(dtype))
    assert output.dtype == torch.bfloat16
    output.double().square().sum().backward()
    torch.testing.assert_close(output.double(), expected, rtol=0.03, atol=0.03 * float(expected.detach().abs().max()))
    for mine, theirs in zip(cascade.branches.parameters(), reference.branches.parameters(), strict=True):
        assert mine.grad.dtype == torch.float32
        assert (mine.grad.double() - theirs.grad).norm() < 0.05 * theirs.grad.norm()


class WritesInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 1), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).relu_()).mul_(2)


@pytest.mark.parametrize("placement", ["auto", "beside", "merged", "weight"])
def test_the_output_of_a_branch_can_be_written_in_place(placement: str) -> None:
    x = numbers(2, 3, 4, 5)
    results = []
    for chosen in (placement, "weight"):
        torch.manual_seed(0)
        cascade = filled(WritesInPlace().double(), x, placement=chosen)
        loss = cascade(x).square().sum()
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in cascade.branches.parameters())])
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)


class Lookup(nn.Module):
    """An embedding layer, and a head that is tied to it."""

    def __init__(self, layer: type[nn.Module], sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = layer(9, 5, sparse=sparse).double(), nn.Linear(5, 3).double()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids)).sin()


@pytest.mark.parametrize("frontend", ["export", "eager"])
@pytest.mark.parametrize(("layer", "placement"), [(nn.EmbeddingBag, "auto"), (nn.Embedding, "weight")])
def test_a_sparse_lookup_trains_as_a_dense_one(layer: type[nn.Module], placement: str, frontend: str) -> None:
    """A branch on the table gets the gradient of the table, which is dense."""
    ids, gradients = torch.tensor([[1, 4, 8], [0, 4, 2]]), []
    for sparse in (True, False):
        spec = lx.CascadeSpec(rank=2, placement=placement)
        cascade = lx.adapt(Lookup(layer, sparse), (ids,), spec=spec, frontend=frontend)
        assert [site.weight for site in cascade.sites] == ["table.weight", "head.weight"]
        randomize(cascade)
        loss_of(cascade(ids)).backward()
        gradients.append([factor.grad for factor in cascade.branches.parameters()])
    for sparse_gradient, dense in zip(*gradients, strict=True):
        assert dense.any()
        torch.testing.assert_close(sparse_gradient, dense, rtol=0, atol=1e-12)
