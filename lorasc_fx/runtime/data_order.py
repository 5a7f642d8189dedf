"""The order of the data with an address: what a step sees is a function of (seed, step); a number is the position."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from lorasc_fx.branch.address import generator
from lorasc_fx.errors import SpecError

__all__ = ["shuffled_batches"]


def shuffled_batches(
    data: Any, batch_size: int, *, seed: int = 0, start: int = 0, share: tuple[int, int] = (0, 1), **options: Any
) -> DataLoader[Any]:
    """Return a DataLoader over a shuffled data set, epoch after epoch without end, from any step on.

    A run that was killed goes on in the middle of an epoch with the batches that come next: save the number of steps
    that are done, as `extra`, and give it as `start`. Workers that read ahead change nothing, and no global generator
    is read. Each epoch has its own order; a last short batch is left out.

    Args:
        data: a data set with a length whose items are asked for by position.
        batch_size: number of examples of each batch.
        seed: of the orders.
        start: number of steps that are done; the first batch is that of the next one.
        share: (rank, count) of processes that divide each batch between them, `count` of them: this one gets every
            count-th example from its rank on. A run goes on with the same batches on another number of processes.
        options: anything else that DataLoader takes (num_workers, collate_fn, ...) but for what decides on the order.

    Raises:
        SpecError: a batch size, seed, start or share that cannot be meant, or an option that decides on the order.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0), ("start", start, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise SpecError(f"shuffled_batches: {name} is {value!r}; give an integer of {least} or more")
    taken = [name for name in ("batch_sampler", "sampler", "shuffle", "drop_last", "generator") if name in options]
    if taken:
        raise SpecError(f"shuffled_batches: {taken[0]} is not yours to give here; the order comes from seed and start")
    rank, count = share
    if not 0 <= rank < count or batch_size % count:
        raise SpecError(
            f"shuffled_batches: share is {share!r} of a batch of {batch_size}; give (rank, count of processes), where "
            "the count divides the batch"
        )
    if len(data) < batch_size:
        raise SpecError(f"shuffled_batches: {len(data)} examples are less than a batch of {batch_size}")
    own = generator(seed, start, "workers", "")  # or the loader would draw from torch's, once an iteration
    return DataLoader(data, batch_sampler=_Batches(len(data), batch_size, seed, start, share), generator=own, **options)


class _Batches:
    """The positions of each batch, or of a share of it, without end; each iteration begins at `start`."""

    def __init__(self, size: int, batch_size: int, seed: int, start: int, share: tuple[int, int]) -> None:
        self.size, self.batch_size, self.seed, self.start = size, batch_size, seed, start
        self.rank, self.count = share

    def __iter__(self) -> Iterator[list[int]]:
        epoch, place = divmod(self.start, self.size // self.batch_size)
        while True:
            order = torch.randperm(self.size, generator=generator(self.seed, epoch, "order", "")).tolist()
            for first in range(place * self.batch_size, self.size - self.batch_size + 1, self.batch_size):
                yield order[first + self.rank : first + self.batch_size : self.count]
            epoch, place = epoch + 1, 0
