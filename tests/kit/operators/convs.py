"""Convolutions: every option of torch's layers, in banks on one input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tests.kit.operators.case import Case, rand

SIGNAL, IMAGE, VIDEO = rand((2, 4, 11)), rand((2, 4, 9, 11)), rand((2, 4, 6, 7, 5))
Options = dict[str, Any]


class Bank(nn.Module):
    """Layers side by side on one input."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


def bank(name: str, layer: type[nn.Module], inputs: Callable[[], Any], *options: Options) -> Case:
    """Return a case of layers from 4 channels to 6, kernel 3 unless an option says else."""

    def build() -> nn.Module:
        settings = ({"in_channels": 4, "out_channels": 6, "kernel_size": 3, **option} for option in options)
        return Bank(*(layer(**setting) for setting in settings))

    return Case(name, build, inputs, {f"layers.{index}.weight": "conv" for index in range(len(options))})


def modes(**options: Any) -> tuple[Options, ...]:
    return tuple({"padding_mode": mode, **options} for mode in ("zeros", "reflect", "replicate", "circular"))


def banks(
    layer: type[nn.Module], inputs: Callable[[], Any], kernel: Any, stride: Any, dilation: Any, padding: Any
) -> tuple[Case, Case]:
    """Return the options of a layer one by one and together, and the padding modes under the options that pad."""
    step, gaps, pad = {"stride": stride}, {"dilation": dilation}, {"padding": padding}
    same, uneven = {"padding": "same"}, {"kernel_size": kernel}
    plain = ({}, {"bias": False}, {"kernel_size": 1}, uneven, step, pad, gaps, gaps | pad, {"padding": "valid"} | step)
    together = (step | pad, step | gaps | pad | {"bias": False}, step | gaps | pad | {"groups": 2})
    padded = (same, same | uneven, same | gaps, same | {"groups": 2})
    grouped = ({"groups": 2}, {"groups": 4, "out_channels": 4} | gaps, {"groups": 4, "out_channels": 12} | step)
    number = layer.__name__.lower()
    return (
        bank(f"{number}_options", layer, inputs, *plain, *together, *padded, *grouped),
        bank(
            f"{number}_padding_modes",
            layer,
            inputs,
            *(
                mode
                for options in (pad | step, same | uneven, same | gaps, pad | gaps | {"groups": 2})
                for mode in modes(**options)
            ),
        ),
    )


CONVS = [
    *banks(nn.Conv1d, SIGNAL, 4, 2, 3, 2),
    *banks(nn.Conv2d, IMAGE, (2, 5), (2, 3), (1, 2), (1, 2)),
    *banks(nn.Conv3d, VIDEO, (1, 3, 2), (1, 2, 3), (2, 1, 1), (1, 2, 1)),
    bank("conv1d_unbatched", nn.Conv1d, rand((4, 11)), {}, {"groups": 2, "padding": "same"}),
    bank("conv2d_unbatched", nn.Conv2d, rand((4, 9, 11)), {"stride": 2}, {"padding": 1, "padding_mode": "circular"}),
    bank("conv2d_patches", nn.Conv2d, IMAGE, {"stride": 3}, {"kernel_size": (9, 11)}),
    bank(
        "conv_transpose1d",
        nn.ConvTranspose1d,
        SIGNAL,
        {},
        {"stride": 3, "output_padding": 2, "padding": 1},
        {"groups": 2, "dilation": 2, "bias": False},
    ),
    bank(
        "conv_transpose2d",
        nn.ConvTranspose2d,
        IMAGE,
        {"stride": 2},
        {"stride": (2, 1), "output_padding": (1, 0)},
        {"groups": 4, "out_channels": 8, "padding": 1},
    ),
    bank("conv_transpose3d", nn.ConvTranspose3d, VIDEO, {"stride": 2}, {"groups": 2}),
]
