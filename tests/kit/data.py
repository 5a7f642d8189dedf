"""Batches that depend only on the number of the step, with torch's own sampler."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler


def batches_from(done: int, data: Dataset[Any], size: int, rank: int = 0, count: int = 1) -> Iterator[Any]:
    """Yield this rank's share of every batch of `size` examples after the first `done` ones."""
    sampler = DistributedSampler(data, count, rank)
    loader = DataLoader(data, size // count, sampler=sampler, drop_last=True, generator=torch.Generator())
    epoch, skipped = divmod(done, len(loader))
    while True:
        sampler.set_epoch(epoch)
        yield from islice(loader, skipped, None)
        epoch, skipped = epoch + 1, 0
