"""Storage for the factors of a bank: each adapter is a row of one tensor, so that one gather reads several adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch

from lorasc_fx.plan import Site

Key = tuple[str, str]
"""Names of a weight and of a factor (`branch.lora.DOWN`, `UP`)."""


class _Location(NamedTuple):
    """Location of a factor: the index of its storage tensor, its first column in it, and its shape."""

    storage: int
    start: int
    shape: tuple[int, ...]


class Slot:
    """A slot in use. It is free again when nothing refers to this object: no adapter, and no running call.

    Args:
        index: the row of the storage tensors.
    """

    def __init__(self, index: int) -> None:
        self.index = index


class Slots:
    """Storage for the factors of several adapters. Slot 0 contains zeros, for the base.

    There is one tensor [slots, columns] for each device and dtype.

    Args:
        sites: the sites of the bank, whose rank is the rank of all factors.
        weights: weights by name. A factor has the device and dtype of its weight, or fp32 if the weight is quantized.
        count: number of adapters to allocate memory for.
    """

    def __init__(self, sites: Sequence[Site], weights: Mapping[str, torch.Tensor], count: int) -> None:
        self._locations: dict[Key, _Location] = {}
        sizes: dict[tuple[torch.device, torch.dtype], int] = {}
        for site in sites:
            weight = weights[site.weight]
            kind = weight.device, weight.dtype if weight.dtype.is_floating_point else torch.float32
            for name, shape in site.parameter_shapes.items():
                start = sizes.setdefault(kind, 0)
                self._locations[site.weight, name] = _Location([*sizes].index(kind), start, shape)
                sizes[kind] = start + torch.Size(shape).numel()
        with torch.inference_mode(False):  # inference tensors could not be used in training
            self._storages = [
                torch.zeros(count + 1, size, device=device, dtype=dtype) for (device, dtype), size in sizes.items()
            ]
            # `data` gives each slot its own version counter, so that a write into one slot does not invalidate the
            # autograd graphs of calls that have saved another.
            self._slots = [[row.data for row in storage] for storage in self._storages]
        self.base, self._count = Slot(0), count
        self._used: WeakValueDictionary[int, Slot] = WeakValueDictionary()

    def take(self) -> Slot | None:
        """Return a free slot, or None if all are in use."""
        index = next((index for index in range(1, self._count + 1) if index not in self._used), None)
        if index is None:
            return None
        slot = self._used[index] = Slot(index)
        return slot

    def write(self, slot: int, values: Mapping[Key, torch.Tensor]) -> None:
        """Write the factors of an adapter into a slot."""
        with torch.no_grad():
            for key, view in self.of(slot).items():
                view.copy_(values[key])

    def of(self, slot: int) -> dict[Key, torch.Tensor]:
        """Return the factors in a slot, as views of the storage."""
        rows = [slots[slot] for slots in self._slots]
        return {
            key: rows[location.storage]
            .narrow(0, location.start, torch.Size(location.shape).numel())
            .view(location.shape)
            for key, location in self._locations.items()
        }

    def gather(self, slots: Sequence[int]) -> dict[Key, torch.Tensor]:
        """Return the factors of several slots, stacked to [len(slots), ...], as views of one gathered tensor."""
        rows = [storage.index_select(0, torch.tensor(slots, device=storage.device)) for storage in self._storages]
        return {
            key: rows[location.storage]
            .narrow(1, location.start, torch.Size(location.shape).numel())
            .view(len(slots), *location.shape)
            for key, location in self._locations.items()
        }
