"""Adapt a model without its source: read a .pt2 file that somebody else has exported, and write another .pt2 file.

The written file runs without the model's class and without lorasc_fx. Takes a few seconds.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorasc_fx as lx


def somebody_exports(path: Path) -> None:
    """Export a net, as somebody else would. The rest of this example does not use its source."""
    net = nn.Sequential(nn.Linear(12, 48), nn.GELU(), nn.LayerNorm(48), nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 3))
    rows = torch.export.Dim("rows", min=2)
    torch.export.save(torch.export.export(net, (torch.randn(4, 12),), dynamic_shapes=({0: rows},)), path)


def our_task(rows: int) -> tuple[Tensor, Tensor]:
    """Return points [rows, 12] and their classes: the one of three directions with the largest dot product."""
    points = torch.randn(rows, 12)
    return points, (points @ torch.randn(12, 3, generator=torch.Generator().manual_seed(7))).argmax(-1)


@torch.no_grad()
def accuracy(graph: nn.Module, points: Tensor, labels: Tensor) -> float:
    return (graph(points).argmax(-1) == labels).float().mean().item()


def main(steps: int = 150, stages: int = 3, folder: Path | None = None) -> tuple[float, float]:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(folder or temporary)
        source, adapted = folder / "given.pt2", folder / "adapted.pt2"
        somebody_exports(source)
        points, labels = our_task(2000)
        test = our_task(500)
        before = accuracy(torch.export.load(source).module(), *test)

        program = torch.export.load(source)  # this unpickles parts of the file: use it only for files that you trust
        cascade = lx.adapt(program, args=(points[:16],), spec=lx.CascadeSpec(rank=3, lora_alpha=6, pace=0.8))
        print(cascade)
        optimizer = torch.optim.AdamW(cascade.param_groups(lr=1e-2))
        for stage in cascade.stages(stages, optimizer):
            for _ in range(steps):
                chosen = torch.randint(len(points), (64,))
                loss = F.cross_entropy(cascade(points[chosen]), labels[chosen])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            print(f"stage {stage.index}: loss {loss.item():.3f}")

        lx.export.pt2(cascade, adapted)
        after = accuracy(torch.export.load(adapted).module(), *test)
    print(f"accuracy: {before:.3f} of the given graph, {after:.3f} of the adapted one")
    return before, after


if __name__ == "__main__":
    main()
