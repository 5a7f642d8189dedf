"""Names of the axes of an ONNX file."""

from pathlib import Path

import pytest
import torch
from torch import nn

import lorasc_fx as lx

onnx = pytest.importorskip("onnx")


class Two(nn.Module):
    """A model of images and vectors whose batch sizes are independent."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(5, 4)

    def forward(self, image: torch.Tensor, vector: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.relu(self.conv(image)), self.linear(vector)


def axes(path: Path) -> dict[str, list[str | int]]:
    graph = onnx.load(path).graph
    return {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


def test_dynamic_axes_have_names_and_constant_ones_numbers(tmp_path: Path) -> None:
    cascade = lx.adapt(Two(), (torch.randn(4, 3, 8, 8), torch.randn(4, 5)), spec=lx.CascadeSpec(rank=2))
    for batch, height in ((3, 10), (5, 12)):
        cascade(torch.randn(batch, 3, height, height + 2), torch.randn(batch + 1, 5))
    image, vector, *outputs = axes(lx.export.onnx(cascade, tmp_path / "model.onnx")).values()
    assert image == ["batch", 3, "height", "width"]
    assert vector == ["batch_2", 5]
    assert outputs == [["batch", 4, "height", "width"], ["batch_2", 4]]
