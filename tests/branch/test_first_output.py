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


OPTIONS: tuple[dict[str, Any], ...] = (
    {}, {"stride": 2, "padding": 1, "bias": False}, {"groups": 2, "dilation": 2},
    {"padding": 1, "padding_mode": "reflect"}, {"kernel_size": 2, "padding": "same"}, {"kernel_size": 1},
    STRIDED, {**STRIDED, "bias": False}, {**STRIDED, "groups": 2}, {**STRIDED, "padding": 1},
)  # fmt: skip
"""Options of convolutions."""


class Ops(nn.Module):
    """All ops in one dtype, with contiguous and other inputs and weights, and both memory formats of images."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.linear, self.no_bias, self.turned = nn.Linear(10, 6), nn.Linear(10, 6, bias=False), nn.Linear(10, 6)
        self.turned.weight = nn.Parameter(self.turned.weight.detach().t().contiguous().t())
        self.addmm, self.mm, self.matmul, self.stored = (nn.Parameter(torch.randn(10, 6) / 3) for _ in range(4))
        self.bias = nn.Parameter(torch.randn(6))
        self.convs = nn.ModuleList(nn.Conv2d(4, 6, **{"kernel_size": 3, **options}) for options in OPTIONS)
        self.lasts = nn.ModuleList(nn.Conv2d(4, 6, **options) for options in ({"kernel_size": 3}, STRIDED))
        self.lasts.to(memory_format=CHANNELS_LAST)
        self.line, self.pixels = nn.Conv1d(4, 6, 3, stride=2), nn.Conv1d(4, 6, **STRIDED)
        self.volume, self.up = nn.Conv3d(2, 4, 1, stride=(1, 2, 2)), nn.ConvTranspose2d(4, 3, 3, stride=2)
        self.table, self.cell = nn.Embedding(9, 6, padding_idx=2), nn.LSTM(6, 4)
        self.to(dtype)

    def forward(self, x: Tensor, image: Tensor, indices: Tensor) -> list[Tensor]:
        x, image, words = x.to(self.dtype), image.to(self.dtype), self.table(indices)
        rows, pixels = x.flatten(0, -2), image.flatten(2)
        outputs = [torch.addmm(self.bias, rows, self.addmm), torch.mm(rows, self.mm), x @ self.matmul]
        for layer in (self.linear, self.no_bias, self.turned):
            outputs += [layer(part) for part in (x, x[0], x.transpose(0, 1), x[:, ::2])]
        images = image, image.to(memory_format=CHANNELS_LAST)
        outputs += [layer(part) for layer in (*self.convs, *self.lasts) for part in images]
        outputs += [self.line(pixels), self.pixels(pixels), self.volume(image.unflatten(1, (2, 2)))]
        outputs += [self.convs[1](image[0]), self.up(image), F.linear(x, self.stored.t())]
        return [*outputs, words, self.cell(words)[0]]


class Both(nn.Module):
    """All ops in single precision and in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.single, self.narrow = Ops(torch.float32), Ops(torch.bfloat16)

    def forward(self, x: Tensor, image: Tensor, indices: Tensor) -> list[Tensor]:
        return [*self.single(x, image, indices), *self.narrow(x, image, indices)]


ROWS = [(name, placement) for name, method in METHODS.items() for placement in sorted(method.placements)]
NO_PRODUCT = ("*.table.*", "*.cell.*")
EXCLUDED = {"dora": (*NO_PRODUCT, "*.up.*", "*.stored"), "lokr": NO_PRODUCT}


@pytest.mark.parametrize(("name", "placement"), ROWS)
def test_no_output_changes_before_training(name: str, placement: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of large products in training, oneDNN and MKL round the last bit in different ways (docs/algorithm.md).
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    torch.manual_seed(5)
    model, indices = Both(), torch.randint(0, 9, (3, 7))
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
