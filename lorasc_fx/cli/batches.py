"""Examples, and the order in which a run sees them: a function of (seed, step) alone, so that a resumed run agrees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Batch", "Examples", "Order", "in_turn", "split_sizes"]


@dataclass(frozen=True)
class Batch:
    """What one call of the model gets, and the classes [batch] that it should say."""

    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]
    labels: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on this device."""
        moved = {name: tensor.to(device) for name, tensor in self.kwargs.items()}
        return Batch(tuple(tensor.to(device) for tensor in self.args), moved, self.labels.to(device))


class Examples(Protocol):
    """Labelled examples that are kept small, and become model inputs a batch at a time."""

    @property
    def labels(self) -> Tensor:
        """Classes [examples]."""

    def __len__(self) -> int: ...

    def batch(self, index: Tensor) -> Batch:
        """Return the examples at these positions as one batch."""

    def take(self, index: Tensor) -> Any:
        """Return the examples at these positions, as Examples."""


@dataclass(frozen=True)
class Order:
    """Which examples each step sees: every epoch is its own shuffle, a last short batch is left out."""

    examples: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one pass."""
        return max(1, self.examples // self.batch_size)

    def index(self, step: int) -> Tensor:
        """Return the positions [batch] of a step (0 is the first)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        shuffled = torch.randperm(self.examples, generator=generator)
        return shuffled[place * self.batch_size : (place + 1) * self.batch_size]


def in_turn(examples: Examples, batch_size: int) -> Iterator[Batch]:
    """Yield all the examples in order, the last batch as short as it is."""
    for start in range(0, len(examples), batch_size):
        yield examples.batch(torch.arange(start, min(start + batch_size, len(examples))))


def split_sizes(total: int, sizes: tuple[int, ...], seed: int) -> list[Tensor]:
    """Return disjoint positions for parts of these sizes, drawn without order from `total` examples by the seed."""
    shuffled = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return list(torch.split(shuffled[: sum(sizes)], list(sizes)))
