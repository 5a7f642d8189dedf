"""Convolutions by functions, by classes of the user's own, and with kernels that forward computes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasc_fx.plan import Reason
from tests.kit.operators.case import Case, linear, of, rand, row, seq

SIGNAL, IMAGE = rand((2, 4, 11)), rand((2, 4, 9, 11))
ONE = {"w0": "conv"}


class SameAsTensorFlow(nn.Conv2d):
    """Pads as TensorFlow does, by the size of the image."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size, kernel, step in zip(x.shape[:-3:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((math.ceil(size / step) - 1) * step + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardized(nn.Conv2d):
    """Weight standardization."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / (self.weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return self._conv_forward(x, weight, self.bias)


class Modulated(nn.Module):
    """StyleGAN2's convolution: a weight per example, scaled by a style and normalized, run as groups."""

    def __init__(self) -> None:
        super().__init__()
        self.style, self.weight = nn.Linear(5, 4), nn.Parameter(torch.randn(1, 6, 4, 3, 3))

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        weight = self.weight * self.style(code).view(batch, 1, channels, 1, 1)
        weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4)) + 1e-8).view(batch, 6, 1, 1, 1)
        weight = weight.view(batch * 6, channels, 3, 3)
        output = F.conv2d(x.reshape(1, batch * channels, height, width), weight, padding=1, groups=batch)
        return output.view(batch, 6, height, width)


class Shuffled(nn.Module):
    """Sub-pixel upsampling, squeeze and excitation with 1x1 convolutions, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 16, 3, padding=1), nn.BatchNorm2d(4)
        self.squeeze, self.excite = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(F.pixel_shuffle(self.conv(x), 2))
        return x * torch.sigmoid(self.excite(F.relu_(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))


def _unfolded(x: Tensor, w: Tensor) -> Tensor:
    return w.view(6, -1) @ F.unfold(x, (3, 3), padding=1)


def _both(x: Tensor, w: Tensor) -> Tensor:
    return F.conv2d(x, w).mean((2, 3)) + F.linear(x.mean((2, 3)), w[:, :, 0, 0])


def _lazy() -> nn.Module:
    model = nn.Sequential(nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d(), nn.LazyConv2d(5, 2))
    model(torch.randn(2, 4, 9, 11))
    return model


# fmt: off
CODED = [
    Case("torch_convolution", of(lambda x, w: torch.convolution(x, w, None, [2], [1], [1], False, [0], 2), (6, 2, 3)),
        SIGNAL, ONE),
    Case("conv_tbc", of(lambda x, w, b: torch.conv_tbc(x, w, b, 1), (3, 4, 6), (6,)), rand((7, 2, 4)), ONE),
    Case("conv_of_a_matrix", of(lambda x, w: F.conv2d(x, w[:, :, None, None]), (6, 4)), IMAGE, ONE),
    Case("unfolded", of(_unfolded, (6, 4, 3, 3)), IMAGE, linear("w0")),
    Case("conv_and_linear", of(_both, (6, 4, 3, 3)), IMAGE, ONE),
    Case("conv_flipped", of(lambda x, w: F.conv2d(x, w.flip(2, 3).transpose(0, 1)), (4, 6, 3, 3)), IMAGE, ONE),
    Case("conv_shared_over_channels",
        of(lambda x, w: F.conv2d(x, w.repeat(x.shape[1], 1, 1, 1), groups=x.shape[1]), (1, 1, 3, 3)), IMAGE, ONE),
    row("conv_same_as_tensorflow",
        seq(lambda: SameAsTensorFlow(4, 6, 3, stride=2, groups=2), lambda: nn.Conv2d(6, 5, 1)), IMAGE,
        {"0.weight": "conv", "1.weight": "conv"}, leaves=("SameAsTensorFlow",),
        module="1.weight=nn.Conv2d"),
    row("conv_standardized", seq(lambda: Standardized(4, 6, 3, stride=2, padding=1), lambda: nn.Conv2d(6, 5, 2)), IMAGE,
        aten="1.weight=conv2d_1 0.weight:conv=*"),
    Case("conv_modulated", Modulated, rand((2, 4, 5, 6), (2, 5)), {"style.weight": "linear", "weight": "conv"}),
    Case("conv_residual", Shuffled, IMAGE, {f"{name}.weight": "conv" for name in ("conv", "squeeze", "excite")}),
    Case("conv_lazy", _lazy, IMAGE, {"0.weight": "conv", "2.weight": "conv"}),
    Case("conv_channels_last", lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), IMAGE,
        {"weight": "conv"}),
    Case("gains", of(lambda x, w, g, p: F.conv1d(x, w) * g + p, (6, 4, 3), (6, 1), (6, 9)), SIGNAL, ONE,
        {"w1": Reason.NO_FORM, "w2": Reason.NO_FORM}),
]
# fmt: on
