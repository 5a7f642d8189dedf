"""The factors of a bank: one row of one tensor for each adapter, so that a batch of adapters is one gather."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from lorasc_fx.plan import Site

Key = tuple[str, str]
"""Weight name and tensor name (`branch.lora.DOWN`, `UP`)."""


class _Place(NamedTuple):
    """Where a factor is: the index of its storage, its first column there, and its shape."""

    storage: int
    start: int
    shape: tuple[int, ...]


class Slots:
    """Storage for the factors of adapters. Slot 0 holds zeros, which are no adapter.

    Args:
        sites: of the bank.
        weights: by name; a factor has the device and dtype of its weight, or fp32 if that is quantized.
        rank: of all factors, which zeros pad.
        count: number of adapters that it can hold.
    """

    def __init__(self, sites: Sequence[Site], weights: Mapping[str, torch.Tensor], rank: int, count: int) -> None:
        self._places: dict[Key, _Place] = {}
        sizes: dict[tuple[torch.device, torch.dtype], int] = {}
        for site in sites:
            weight = weights[site.weight]
            kind = weight.device, weight.dtype if weight.dtype.is_floating_point else torch.float32
            for name, shape in site.parameter_shapes.items():
                start = sizes.setdefault(kind, 0)
                self._places[site.weight, name] = _Place([*sizes].index(kind), start, shape)
                sizes[kind] = start + torch.Size(shape).numel()
        self._storages = [
            torch.zeros(count + 1, size, device=device, dtype=dtype) for (device, dtype), size in sizes.items()
        ]
        self.free = list(range(1, count + 1))

    def write(self, slot: int, values: Mapping[Key, torch.Tensor]) -> None:
        """Write the factors of an adapter."""
        with torch.no_grad():
            for key, view in self.of(slot).items():
                view.copy_(values[key])

    def of(self, slot: int) -> dict[Key, torch.Tensor]:
        """Return the factors in a slot, as views."""
        rows = [storage[slot] for storage in self._storages]
        return {
            key: rows[place.storage].narrow(0, place.start, torch.Size(place.shape).numel()).view(place.shape)
            for key, place in self._places.items()
        }

    def gather(self, slots: Sequence[int]) -> dict[Key, torch.Tensor]:
        """Return the factors of several slots, [slots, ...] each, as views of one tensor."""
        rows = [storage.index_select(0, torch.tensor(slots, device=storage.device)) for storage in self._storages]
        return {
            key: rows[place.storage]
            .narrow(1, place.start, torch.Size(place.shape).numel())
            .view(len(slots), *place.shape)
            for key, place in self._places.items()
        }
