"""Test cases for quantized layers: a layer defined here, and layers of the installed libraries."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
import torchao.quantization as torchao
from torch import nn
from torchao.prototype import mx_formats
from torchao.prototype.mx_formats import mx_tensor
from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

from lorasc_fx.quantized import LIBRARIES, Library

Quantize = Callable[[nn.Linear], nn.Module]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Packed) -> torch.Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dense())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.layer.dense(), None


class Packed(nn.Module):
    """A layer as libraries define it: packed values, an autograd.Function, Python state, and another product in eval
    mode."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias, self.calls = linear.bias, 0
        self.scale = nn.Buffer(linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.numbers = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), False)

    def dense(self) -> torch.Tensor:
        return self.numbers.to(self.scale.dtype) * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if not self.training:
            x = x + ((x * 64).round() / 64 - x).detach()
        product: torch.Tensor = _Product.apply(x, self)
        return product if self.bias is None else product + self.bias


def _packed_again(layer: Packed, weight: torch.Tensor) -> nn.Module:
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    dense.weight = nn.Parameter(weight)
    new = Packed(dense)
    new.bias = layer.bias
    return new.train(layer.training)


LIBRARIES[f"{Packed.__module__}.{Packed.__qualname__}"] = Library(
    lambda layer: True, lambda layer: layer.dense(), _packed_again
)


def _bitsandbytes(bits: int, **options: Any) -> Quantize:
    def quantize(linear: nn.Linear) -> nn.Module:
        import bitsandbytes as library

        sizes = (linear.in_features, linear.out_features)
        layer = library.nn.Linear4bit(*sizes, compute_dtype=torch.float32, **options) if bits == 4 else None
        layer = library.nn.Linear8bitLt(*sizes, has_fp16_weights=False, **options) if layer is None else layer
        layer.load_state_dict(linear.state_dict())
        return layer.to("cpu")

    return quantize


LAYERS: dict[str, Quantize] = {
    "packed": Packed,
    "bitsandbytes nf4, double": _bitsandbytes(4, quant_type="nf4", compress_statistics=True),
    "bitsandbytes nf4": _bitsandbytes(4, quant_type="nf4", compress_statistics=False),
    "bitsandbytes fp4": _bitsandbytes(4, quant_type="fp4"),
    "bitsandbytes int8": _bitsandbytes(8),
    "bitsandbytes int8, outliers": _bitsandbytes(8, threshold=6.0),
}


CONFIGS: dict[str, Callable[[], Any]] = {
    "int8": torchao.Int8WeightOnlyConfig,
    "int4": lambda: torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(16)),
    "fp8": torchao.Float8WeightOnlyConfig,
    "nvfp4": mx_formats.NVFP4WeightOnlyConfig,
}


def _torchao(width: str) -> Quantize:
    def quantize(linear: nn.Linear) -> nn.Module:
        torchao.quantize_(linear, CONFIGS[width]())
        return linear

    return quantize


def mxfp4(linear: nn.Linear) -> nn.Module:
    """Return a layer with a weight in MXFP4. Its own product quantizes the input too, and has no backward on a CPU."""
    emulated, kind = KernelPreference.EMULATED, torch.float4_e2m1fn_x2
    inputs = mx_tensor.QuantizeTensorToMXKwargs(kind, 32, kernel_preference=emulated)
    weight = linear.weight.detach()
    weight = mx_tensor.MXTensor.to_mx(weight, kind, 32, kernel_preference=emulated, act_quant_kwargs=inputs)
    linear.weight = nn.Parameter(weight, False)
    return linear


WEIGHTS: dict[str, Quantize] = {f"torchao {width}": _torchao(width) for width in CONFIGS}
"""Layers of torch whose weight is a tensor subclass of torchao."""


def is_missing(case: str) -> str:
    """Return the library that a case needs if it is not installed, otherwise an empty string."""
    name = case.partition(" ")[0]
    return name if name == "bitsandbytes" and find_spec(name) is None else ""
