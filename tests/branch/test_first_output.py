"""Before training, a branch changes no bit of any output: each method and placement with each kind of op."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorasc_fx as lx
from lorasc_fx.branch import METHODS, products

CHANNELS_LAST: Any = torch.channels_last
STRIDED: dict[str, Any] = {"kernel_size": 1, "stride": 2}


class Products(nn.Module):
    """Matrix products in the dialects of torch, with contiguous and other inputs and weights."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.no_bias, self.turned = nn.Linear(10, 6), nn.Linear(10, 6, bias=False), nn.Linear(10, 6)
        self.turned.weight = nn.Parameter(self.turned.weight.detach().t().contiguous().t())
        self.addmm, self.mm, self.matmul = (nn.Parameter(torch.randn(10, 6) / 3) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> list[Tensor]:
        rows = x.flatten(0, -2)
        outputs = [torch.addmm(self.bias, rows, self.addmm), torch.mm(rows, self.mm), x @ self.matmul]
        for layer in (self.linear, self.no_bias, self.turned):
            outputs += [layer(x), layer(x[0]), layer(x.transpose(0, 1)), layer(x[:, ::2])]
        return outputs


class Convolutions(nn.Module):
    """Convolutions with every argument, and images and kernels in both memory formats."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv2d(4, 6, **{"kernel_size": 3, **options})
            for options in (
                {},
                {"stride": 2, "padding": 1, "bias": False},
                {"groups": 2, "dilation": 2},
                {"padding": 1, "padding_mode": "reflect"},
                {"kernel_size": 2, "padding": "same"},
                {"kernel_size": 1},
                STRIDED,
                {**STRIDED, "bias": False},
                {**STRIDED, "groups": 2},
                {**STRIDED, "padding": 1},
            )
        )
        self.lasts = nn.ModuleList(nn.Conv2d(4, 6, **options) for options in ({"kernel_size": 3}, STRIDED))
        self.lasts.to(memory_format=CHANNELS_LAST)
        self.line, self.pixels = nn.Conv1d(4, 6, 3, stride=2), nn.Conv1d(4, 6, **STRIDED)
        self.volume = nn.Conv3d(2, 4, 1, stride=(1, 2, 2))

    def forward(self, x: Tensor) -> list[Tensor]:
        convolutions = [*self.layers, *self.lasts]
        outputs = [layer(image) for layer in convolutions for image in (x, x.to(memory_format=CHANNELS_LAST))]
        lines = [self.line(x.flatten(2)), self.pixels(x.flatten(2))]
        return [*outputs, *lines, self.volume(x.unflatten(1, (2, 2))), self.layers[1](x[0])]


class Others(nn.Module):
    """Ops to whose output no product can be added, except the lookup."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up = nn.Embedding(9, 6, padding_idx=2), nn.ConvTranspose2d(4, 3, 3, stride=2)
        self.cell, self.weight = nn.LSTM(6, 4), nn.Parameter(torch.randn(10, 6) / 3)

    def forward(self, x: Tensor, image: Tensor, indices: Tensor) -> list[Tensor]:
        rows = self.table(indices)
        return [rows, self.up(image), self.cell(rows)[0], F.linear(x, self.weight.t())]


class Layers(nn.Module):
    """All ops in one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.products, self.convolutions, self.others = Products(), Convolutions(), Others()
        self.to(dtype)

    def forward(self, x: Tensor, image: Tensor, indices: Tensor) -> list[Tensor]:
        x, image = x.to(self.dtype), image.to(self.dtype)
        return [*self.products(x), *self.convolutions(image), *self.others(x, image, indices)]


class All(nn.Module):
    """All ops in single precision and in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.single, self.narrow = Layers(torch.float32), Layers(torch.bfloat16)

    def forward(self, x: Tensor, image: Tensor, indices: Tensor) -> list[Tensor]:
        return [*self.single(x, image, indices), *self.narrow(x, image, indices)]


ROWS = [
    (name, placement)
    for name, method in METHODS.items()
    for placement in ("auto", "beside", "merged", "weight")
    if placement in {"auto", *method.placements}
]
REPLACES_THE_OP, NO_LOOKUP = ("*.others.*",), ("*.table.*", "*.cell.*")
EXCLUDED = {"dora": REPLACES_THE_OP, "lokr": NO_LOOKUP}


@pytest.mark.parametrize(("name", "placement"), ROWS)
def test_no_output_changes_before_training(name: str, placement: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of large products in training, oneDNN and MKL round the last bit in different ways (docs/algorithm.md).
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    torch.manual_seed(5)
    model, indices = All(), torch.randint(0, 9, (3, 7))
    x, image = torch.randn(4, 8, 10, requires_grad=True), torch.randn(2, 4, 9, 9, requires_grad=True)
    # torch computes some products with another algorithm if the weight requires a gradient, as W + s B A does.
    twins = copy.deepcopy(model).requires_grad_(False), copy.deepcopy(model)
    spec = lx.CascadeSpec(adapter=name, rank=2, placement=placement, targets=("*",), exclude=EXCLUDED.get(name, ()))
    cascade = lx.adapt(model, (x, image, indices), spec=spec)
    assert len(cascade.sites) >= 2 * 21
    for training in (True, False):
        for module in (cascade, *twins):
            module.train(training)
        with torch.set_grad_enabled(training):
            ours, frozen, trainable = (module(x, image, indices) for module in (cascade, *twins))
        for index, (output, *expected) in enumerate(zip(ours, frozen, trainable, strict=True)):
            case = f"output {index}, training={training}"
            assert any(torch.equal(output, value) for value in expected), case
            assert output.stride() in [value.stride() for value in expected], case
