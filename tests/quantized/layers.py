"""Test cases for quantized layers: a layer defined here, and layers of the installed libraries."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchao.quantization as torchao
from torch import nn

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
    """A layer like those of libraries: packed values, an autograd.Function, Python state, and another product in eval
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
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight = nn.Parameter(weight)
    new = Packed(made)
    new.bias = layer.bias
    return new.train(layer.training)


LIBRARIES[f"{Packed.__module__}.{Packed.__qualname__}"] = Library(
    lambda layer: True, lambda layer: layer.dense(), _packed_again
)


NEEDS = {
    "bitsandbytes": "bitsandbytes", "gptq": "gptqmodel.nn_modules.qlinear.torch", "hqq": "hqq.core.quantize",
    "quanto": "optimum.quanto", "packed": "torch", "awq": "gptqmodel.nn_modules.qlinear.torch_awq",
}  # fmt: skip
"""The module to import for cases whose name starts with the key."""


def _library(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(NEEDS[name])  # noqa: TID251 - a name of the table above


def _bitsandbytes(bits: int, **options: Any) -> Quantize:
    def quantize(linear: nn.Linear) -> nn.Module:
        library: Any = _library("bitsandbytes")
        sizes = (linear.in_features, linear.out_features)
        layer = library.nn.Linear4bit(*sizes, compute_dtype=torch.float32, **options) if bits == 4 else None
        layer = library.nn.Linear8bitLt(*sizes, has_fp16_weights=False, **options) if layer is None else layer
        layer.load_state_dict(linear.state_dict())
        made: nn.Module = layer.to("cpu")
        return made

    return quantize


def _hqq(bits: int) -> Quantize:
    def quantize(linear: nn.Linear) -> nn.Module:
        library: Any = _library("hqq")
        config = library.BaseQuantizeConfig(nbits=bits, group_size=16)
        linear.requires_grad_(False)
        made: nn.Module = library.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
        return made

    return quantize


def _quanto(kind: str) -> Quantize:
    def quantize(linear: nn.Linear) -> nn.Module:
        library: Any = _library("quanto")
        model = nn.Sequential(linear)
        library.quantize(model, weights=getattr(library, kind))
        library.freeze(model)
        return model[0]

    return quantize


def _gptq(bits: int, group: int = 32) -> Quantize:
    """Return a layer of GPTQ with rounded values. The GPTQ algorithm itself would find better ones."""

    def quantize(linear: nn.Linear) -> nn.Module:
        blocks = linear.weight.detach().unflatten(1, (-1, group))
        scales = blocks.abs().amax(2) / (2 ** (bits - 1) - 1)
        sizes = {"in_features": linear.in_features, "out_features": linear.out_features, "group_size": group}
        layer = _library("gptq").TorchLinear(bits=bits, sym=True, desc_act=False, bias=True, **sizes)
        groups = torch.arange(linear.in_features, dtype=torch.int32) // group
        layer.pack(linear, scales, torch.full_like(scales, 2 ** (bits - 1)), groups)
        for name, value in [*layer.named_buffers()]:
            layer.register_buffer(name, value.clone())  # it packs in inference mode
        layer.post_init()
        made: nn.Module = layer.float()
        return made

    return quantize


LAYERS: dict[str, Quantize] = {
    "packed": Packed,
    "bitsandbytes nf4, double": _bitsandbytes(4, quant_type="nf4", compress_statistics=True),
    "bitsandbytes nf4": _bitsandbytes(4, quant_type="nf4", compress_statistics=False),
    "bitsandbytes fp4": _bitsandbytes(4, quant_type="fp4"),
    "bitsandbytes int8": _bitsandbytes(8),
    "bitsandbytes int8, outliers": _bitsandbytes(8, threshold=6.0),
    "hqq 8": _hqq(8),
    "hqq 4": _hqq(4),
    "hqq 2": _hqq(2),
    "quanto int8": _quanto("qint8"),
    "quanto int4": _quanto("qint4"),
    "quanto fp8": _quanto("qfloat8"),
}


def _awq(linear: nn.Linear, group: int = 32) -> nn.Module:
    """Return a layer of AWQ with rounded values. It computes in half precision."""
    scales = linear.weight.detach().unflatten(1, (-1, group)).abs().amax(2) / 7
    sizes = {"in_features": linear.in_features, "out_features": linear.out_features, "group_size": group}
    layer: Any = _library("awq").AwqTorchLinear(bits=4, sym=True, desc_act=False, bias=True, **sizes)
    layer.pack(linear, scales.half(), torch.full_like(scales, 8).half())
    layer.post_init()
    made: nn.Module = layer
    return made


CONFIGS: dict[str, Callable[[], Any]] = {
    "int8": torchao.Int8WeightOnlyConfig,
    "int4": lambda: torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(16)),
    "fp8": torchao.Float8WeightOnlyConfig,
}


def _torchao(width: str) -> Quantize:
    def quantize(linear: nn.Linear) -> nn.Module:
        torchao.quantize_(linear, CONFIGS[width]())
        return linear

    return quantize


WEIGHTS: dict[str, Quantize] = {f"torchao {width}": _torchao(width) for width in CONFIGS}
"""Layers of torch whose weight is a tensor subclass of torchao."""
FIXED: dict[str, Quantize] = {"gptq 8": _gptq(8), "gptq 4": _gptq(4), "awq 4": _awq}
"""Layers that cannot be re-quantized."""


def is_missing(case: str) -> str:
    """Return the library that a case needs if it is not installed, otherwise an empty string."""
    name = case.partition(" ")[0]
    try:
        _library(name)
    except ImportError:
        return name
    return ""
