"""Train the net of `accelerate_loop` in your own loop with Lightning Fabric, and with `cascade.stages`.

Needs the extra `loops`: pip install 'lorasc-fx[loops]'. Takes a few seconds on two cores. Nothing is downloaded.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch.utils.data import DataLoader, TensorDataset

import lorasc_fx as lx
from examples.accelerate_loop import bars, net


def main(folder: str, stages: int = 3, rows: int = 960) -> float:
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    fabric.launch()
    fabric.seed_everything(1, verbose=False)
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(*bars(rows, seed=1)), batch_size=32, shuffle=True))

    spec = lx.CascadeSpec(targets=("conv",), train=("7.*",), rank=4, pace=0.8, noise=lx.Noise(0.05))
    cascade = lx.adapt(net(), args=(bars(2, 0)[0],), spec=spec)
    model, optimizer = fabric.setup(cascade, torch.optim.AdamW(cascade.param_groups(lr=5e-3)))
    for stage in cascade.stages(stages, optimizer):
        for _ in range(2):
            for images, labels in loader:
                loss = F.cross_entropy(model(images), labels)
                fabric.backward(loss)
                fabric.clip_gradients(model, optimizer, max_norm=1.0)
                optimizer.step()
                optimizer.zero_grad()
        print(f"stage {stage.index}: loss {loss.item():.3f}")
        lx.save(cascade, Path(folder, "checkpoint"), optimizer=optimizer, extra={"stages": stage.index})

    images, labels = bars(500, seed=7)
    with torch.no_grad():
        accuracy: float = (cascade.release()(images).argmax(-1) == labels).float().mean().item()
    print(f"accuracy of the released model: {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(sys.argv[1] if len(sys.argv) > 1 else temporary)
