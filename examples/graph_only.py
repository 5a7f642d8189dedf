"""A graph without source: a .pt2 file that somebody exported comes in, another .pt2 goes out; a few seconds.

Neither the model's class nor lorasc_fx is needed to run what comes out.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorasc_fx as lx


def somebody_exports(path: Path) -> None:
    """Write a trained net as somebody else would, whose source we never see."""
    net = nn.Sequential(nn.Linear(12, 48), nn.GELU(), nn.LayerNorm(48), nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 3))
    rows = torch.export.Dim("rows", min=2)
    torch.export.save(torch.export.export(net, (torch.randn(4, 12),), dynamic_shapes=({0: rows},)), path)


def our_task(rows: int) -> tuple[Tensor, Tensor]:
    """Return points [rows, 12], and which of three directions each is nearest to."""
    points = torch.randn(rows, 12)
    return points, (points @ torch.randn(12, 3, generator=torch.Generator().manual_seed(7))).argmax(-1)


@torch.no_grad()
def accuracy(graph: nn.Module, points: Tensor, labels: Tensor) -> float:
    return (graph(points).argmax(-1) == labels).float().mean().item()


def main(steps: int = 150, stages: int = 3, folder: Path | None = None) -> tuple[float, float]:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as room:
        given, made = Path(folder or room) / "given.pt2", Path(folder or room) / "adapted.pt2"
        somebody_exports(given)
        points, labels = our_task(2000)
        test = our_task(500)
        before = accuracy(torch.export.load(given).module(), *test)

        program = torch.export.load(given)  # unpickles parts of the file: only for files that you trust
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

        lx.export.pt2(cascade, made)
        after = accuracy(torch.export.load(made).module(), *test)
    print(f"accuracy: {before:.3f} of the given graph, {after:.3f} of the adapted one")
    return before, after


if __name__ == "__main__":
    main()
