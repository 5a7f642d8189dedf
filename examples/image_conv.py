"""Adapt a conv net for images. The net is trained on MNIST and then adapted to digits by other writers.

Every convolution and the head get a branch. The batch norms are trained in full. Takes 20 seconds. Run it from a clone,
with the extra `demo`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorasc_fx as lx
from experiments.data import digits, mnist5k

SIZE = 28
Examples = tuple[Tensor, Tensor]
"""Images [examples, 3, SIZE, SIZE] from -1 to 1, and their classes."""


def prepared(pixels: Tensor, labels: Tensor) -> Examples:
    images = F.interpolate(pixels.float(), (SIZE, SIZE), mode="bilinear", align_corners=False)
    return images.expand(-1, 3, -1, -1) / 127.5 - 1, labels


class Block(nn.Module):
    """Two convolutions and a strided skip connection, as in a ResNet."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outer)
        self.skip = nn.Conv2d(inner, outer, 1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.skip(x))


class ConvNet(nn.Module):
    """Classifies images [batch, 3, height, width] into ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.Sequential(Block(16, 32), Block(32, 64))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


def step(model: nn.Module, examples: Examples, optimizer: torch.optim.Optimizer, seed: int, rows: int) -> float:
    """Take one training step on 32 of the first `rows` examples, and return the loss."""
    images, labels = examples
    index = torch.randint(rows, (32,), generator=torch.Generator().manual_seed(seed))
    loss = F.cross_entropy(model(images[index]), labels[index])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@torch.no_grad()
def accuracy(model: nn.Module, examples: Examples, start: int) -> float:
    images, labels = (tensor[start:] for tensor in examples)
    return (model(images).argmax(-1) == labels).float().mean().item()


def main(pretrain: int = 150, steps: int = 60, stages: int = 2) -> tuple[float, float]:
    torch.manual_seed(0)
    model = ConvNet()
    mnist, new = prepared(*mnist5k()), prepared(*digits())
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for index in range(pretrain):  # in practice, load a pretrained checkpoint instead
        step(model, mnist, optimizer, index, len(mnist[0]))
    model.eval()  # from here on, batch norm keeps its statistics
    before = accuracy(model, new, start=1300)

    spec = lx.CascadeSpec(targets=("conv", "head.weight"), train=("*.norm?.*",), rank=4, lora_alpha=8, pace=0.8)
    model = lx.adapt(model, args=(new[0][:32],), spec=spec)
    print(model)
    optimizer = torch.optim.AdamW(model.param_groups(lr=2e-3))
    for stage in model.stages(stages, optimizer):
        loss = 0.0
        for index in range(steps):
            loss = step(model, new, optimizer, stage.index * steps + index, 1300)
        print(f"stage {stage.index}: loss {loss:.3f}")
    after = accuracy(model.release(), new, start=1300)
    print(f"accuracy on other writers: {before:.3f} before, {after:.3f} after")
    return before, after


if __name__ == "__main__":
    main()
