"""Convolutions: every option of torch's layers, in banks on one input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tests.kit.operators.case import Case, rand

SIGNAL, IMAGE, VIDEO = rand((2, 4, 11)), rand((2, 4, 9, 11)), rand((2, 4, 6, 7, 5))


class Bank(nn.Module):
    """Layers side by side on one input."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


def bank(layer: type[nn.Module], *options: dict[str, Any]) -> Callable[[], nn.Module]:
    """Return a maker of layers from 4 channels to 6, kernel 3 unless an option says else."""
    return lambda: Bank(
        *(layer(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3, **option}) for option in options)
    )


def layers(count: int) -> dict[str, str]:
    return {f"layers.{index}.weight": "conv" for index in range(count)}


def modes(**options: Any) -> tuple[dict[str, Any], ...]:
    return tuple({"padding_mode": mode, **options} for mode in ("zeros", "reflect", "replicate", "circular"))


# fmt: off
CONVS = [
    Case("conv1d_options",
        bank(nn.Conv1d, {}, {"stride": 2, "padding": 3}, {"dilation": 2, "bias": False}, {"kernel_size": 1}), SIGNAL,
        layers(4)),
    Case("conv1d_same", bank(nn.Conv1d, {"padding": "same"}, {"padding": "same", "kernel_size": 4}, {"padding": "same",
        "dilation": 3}, {"padding": "valid", "stride": 2}), SIGNAL, layers(4)),
    Case("conv1d_padding_modes", bank(nn.Conv1d, *modes(padding=2), *modes(padding="same", kernel_size=4)), SIGNAL,
        layers(8)),
    Case("conv1d_groups", bank(nn.Conv1d, {"groups": 2}, {"groups": 4, "out_channels": 8, "stride": 3}), SIGNAL,
        layers(2)),
    Case("conv1d_unbatched", bank(nn.Conv1d, {}, {"groups": 2, "padding": "same"}), rand((4, 11)), layers(2)),
    Case("conv2d_options", bank(nn.Conv2d, {}, {"stride": (2, 3)}, {"padding": (0, 2)}, {"dilation": (2, 1)},
        {"kernel_size": (1, 5), "bias": False}), IMAGE, layers(5)),
    Case("conv2d_same", bank(nn.Conv2d, {"padding": "same"}, {"padding": "same", "kernel_size": (2, 5)},
        {"padding": "same", "dilation": (1, 2), "kernel_size": (4, 3)}), IMAGE, layers(3)),
    Case("conv2d_padding_modes", bank(nn.Conv2d, *modes(padding=(1, 2), stride=2), *modes(padding="same")), IMAGE,
        layers(8)),
    Case("conv2d_groups", bank(nn.Conv2d, {"groups": 2, "stride": 2, "padding": 1}, {"groups": 2, "padding": "same"},
        {"groups": 2, "padding": 1, "padding_mode": "reflect"}), IMAGE, layers(3)),
    Case("conv2d_depthwise", bank(nn.Conv2d, {"groups": 4, "out_channels": 4, "dilation": 2}, {"groups": 4,
        "out_channels": 12, "stride": 2, "padding": "valid"}), IMAGE, layers(2)),
    Case("conv2d_unbatched", bank(nn.Conv2d, {"stride": 2}, {"padding": 1, "padding_mode": "circular"}),
        rand((4, 9, 11)), layers(2)),
    Case("conv2d_patches", bank(nn.Conv2d, {"kernel_size": 3, "stride": 3}, {"kernel_size": (9, 11)}), IMAGE,
        layers(2)),
    Case("conv3d_options", bank(nn.Conv3d, {"stride": (1, 2, 3)}, {"padding": "same", "kernel_size": (1, 3, 2)},
        {"groups": 2, "padding": (2, 0, 1), "bias": False}), VIDEO, layers(3)),
    Case("conv3d_padding_modes", bank(nn.Conv3d, *modes(padding=(1, 2, 1))), VIDEO, layers(4)),
    Case("conv_transpose1d", bank(nn.ConvTranspose1d, {}, {"stride": 3, "output_padding": 2, "padding": 1},
        {"groups": 2, "dilation": 2, "bias": False}), SIGNAL, layers(3), opaque=tuple(layers(3))),
    Case("conv_transpose2d", bank(nn.ConvTranspose2d, {"stride": 2}, {"stride": (2, 1), "output_padding": (1, 0)},
        {"groups": 4, "out_channels": 8, "padding": 1}), IMAGE, layers(3), opaque=tuple(layers(3))),
    Case("conv_transpose3d", bank(nn.ConvTranspose3d, {"stride": 2}, {"groups": 2}), VIDEO, layers(2),
        opaque=tuple(layers(2))),
]
# fmt: on
