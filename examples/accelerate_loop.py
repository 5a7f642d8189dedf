"""Train a conv net with accelerate: prepare, accumulate gradients, clip, interrupt the run and resume it.

Needs the extra `loops`: pip install 'lorasc-fx[loops]'. Takes a few seconds on two cores. Nothing is downloaded.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

import lorasc_fx as lx


def bars(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return noisy images [count, 1, 12, 12] of a bar, and its direction: vertical, horizontal, or diagonal."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    shift = torch.randint(-3, 4, (count, 1, 1), generator=generator)
    row, column = torch.meshgrid(torch.arange(12) - 6, torch.arange(12) - 6, indexing="ij")
    sides = torch.stack([column, row, row - column, row + column])[labels]
    images = ((sides - shift).abs() < 2).float()
    return (images + 0.8 * torch.randn(count, 12, 12, generator=generator))[:, None], labels


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 4),
    )  # fmt: skip


def train(folder: Path, batches: range, stage: int = 40) -> dict[str, Tensor]:
    """Train on these batches of the run in `folder`, and save. A step takes 4 batches, and a stage `stage` batches."""
    set_seed(1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    spec = lx.CascadeSpec(targets=("conv",), train=("7.*",), rank=4, pace=0.8, noise=lx.Noise(0.05))
    cascade = lx.adapt(net(), args=(bars(2, 0)[0],), spec=spec)
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=5e-3))
    model, optimizer = accelerator.prepare(cascade, optimizer)
    if batches.start:
        accelerator.load_state(str(folder))
    for number in batches:
        images, labels = bars(16, seed=100 + number)
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if number % stage == stage - 1:
            cascade.transition(optimizer)
            print(f"batch {number + 1}: loss {loss.item():.3f}, stage {cascade.stage} starts")
    accelerator.save_state(str(folder))
    return cascade.folded_state_dict()


def main(folder: str, batches: int = 320) -> float:
    uninterrupted = train(Path(folder, "whole"), range(batches))
    train(Path(folder, "halves"), range(batches // 2 + 2))  # interrupt it between two batches of one step
    resumed = train(Path(folder, "halves"), range(batches // 2 + 2, batches))
    same = all(torch.equal(value, resumed[name]) for name, value in uninterrupted.items())
    print(f"the interrupted run ends with {'the same bits' if same else 'OTHER WEIGHTS'}")
    model = net()
    model.load_state_dict(uninterrupted)
    images, labels = bars(500, seed=7)
    with torch.no_grad():
        accuracy: float = (model(images).argmax(-1) == labels).float().mean().item()
    print(f"accuracy: {accuracy:.3f}")
    return accuracy if same else 0.0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(sys.argv[1] if len(sys.argv) > 1 else temporary)
