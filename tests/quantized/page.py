"""`python -m tests.quantized.page` measures each case of `quantized_layers` that is installed, and writes its row
in docs/quantized.md; rows of libraries that are missing stay as they are.
"""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lorasc_fx as lx
from tests.kit.models import train
from tests.quantized.layers import LAYERS, WEIGHTS, Quantize, is_missing, mxfp4

PAGE = Path(__file__).parents[2] / "docs" / "quantized.md"


def make() -> Any:
    """Two layers to quantize, and a dense head."""
    up, down, head = nn.Linear(256, 512), nn.Linear(512, 256), nn.Linear(256, 10)
    return nn.Sequential(OrderedDict(up=up, a=nn.Tanh(), down=down, b=nn.Tanh(), head=head))


def trained(layer: Quantize, grid: str | None = None) -> tuple[lx.Cascade, torch.Tensor]:
    """Return a cascade of two stages on the quantized model, and the inputs."""
    torch.manual_seed(0)
    model, x = make(), torch.randn(64, 256)
    model.up, model.down = layer(model.up), layer(model.down)
    cascade = lx.adapt(model, (x,), spec=lx.CascadeSpec(rank=4, pace=1.0, grid=grid))
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=1e-3))
    for _ in cascade.stages(2, optimizer):
        train(cascade, optimizer, [x] * 10)
    return cascade, x


def on_grid(layer: Quantize) -> float:
    """Return the distance between a cascade that has trained on its own grid and its released model."""
    cascade, x = trained(layer, "own")
    with torch.no_grad():
        running = cascade(x)
        return float((cascade.release()(x) - running).norm() / running.norm())


@torch.no_grad()
def row(case: str, layer: Quantize, grid: str | None = None) -> str:
    """Return the row of a case. Distances are between outputs, relative to the norm of the outputs after training.

    Args:
        grid: of the training; "own" if the product of the library has no backward.
    """
    torch.manual_seed(0)
    plain = make()
    with torch.enable_grad():
        cascade, x = trained(layer, grid)
    size = cascade(x).norm()
    with cascade.weights("base"):
        base = cascade.model(x)
    rounding = (base - plain(x)).norm() / plain(x).norm()
    moved = (cascade(x) - base).norm() / size
    wanted = cascade(x)
    dense = make()
    dense.load_state_dict(cascade.folded_state_dict(quantized="dequantize"))
    folded = (dense(x) - wanted).norm() / size
    cascade.release(quantized="requantize")
    requantized = (cascade.model(x) - wanted).norm() / size
    with torch.enable_grad():
        trained_on_grid = on_grid(layer)
    distances = f"{rounding:.2g}|{moved:.2g}|{folded:.0e}|{requantized:.2g}|{trained_on_grid:.0e}"
    return f"|{case}|{version(case.partition(' ')[0])}|{distances}|"


def main() -> None:
    """Rewrite the rows of the page."""
    warnings.simplefilter("ignore")
    layers = {**LAYERS, **WEIGHTS, "torchao mxfp4": mxfp4}
    cases = {case: layer for case, layer in layers.items() if case != "packed" and not is_missing(case)}
    text = PAGE.read_text()
    for case, layer in cases.items():
        measured = row(case, layer, "own" if case == "torchao mxfp4" else None)
        text, count = re.subn(rf"^\|{re.escape(case)}\|.*$", lambda _, line=measured: line, text, flags=re.MULTILINE)
        if not count:
            print("no row yet:")
        print(measured)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
