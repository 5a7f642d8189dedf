"""Counter-based random noise on frozen weights, drawn once per stage.

Formulas (docs/algorithm.md, row "noise"): `N = strength * std(W) * U(-1/2, 1/2)` as in NoisyTune (2202.12024), or a
normal distribution of the same variance.

Each random number is a function of (seed, stage, weight name, position), so each rank computes only the numbers of its
slice. A weight is divided into blocks, each with two keys. The number at position p of a block is a hash of the two
keys and of entry p of a fixed table. Uniform numbers are computed with integers, so all devices compute the same bits.

Sources: Philox (Salmon et al., 2011) for random numbers from counters instead of a generator state, and lowbias32
(Wellons, 2018) for the constants of the hash.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from functools import lru_cache

import torch

from lorasc_fx.branch.contract import generator
from lorasc_fx.shards import UNSHARDED, ShardSpec
from lorasc_fx.spec import Noise

BLOCK, MAX_AXIS = 32768, 1024
"""Maximum number of entries of a block, and maximum length of its axes. Other values would change all noise."""

PIECE, WORKSPACE = 1 << 21, 40
"""Number of entries that an accelerator draws at a time, and bytes of temporary memory per entry.

The CPU draws one block at a time, which fits in its cache.
"""

CPU = torch.device("cpu")

Region = tuple[slice, ...]
"""Index of a piece of noise in this rank's slice of a weight."""


def amplitude(noise: Noise, weight: torch.Tensor, shard: ShardSpec = UNSHARDED) -> float:
    """Return `strength * std(W)`, or 0 for a weight with fewer than two entries.

    All-reduces if the weight is sharded: every rank must call this at the same point.
    """
    if noise.strength == 0:
        return 0.0
    std = shard.std(weight)
    if not 0 < std < math.inf:  # all entries are equal, or their squares overflow or underflow
        maximum = shard.group.max(weight.abs().max().item() if weight.numel() else 0.0)
        std = maximum * shard.std(weight / maximum) if 0 < maximum < math.inf else maximum
    return noise.strength * std


def draw(
    noise: Noise,
    seed: int,
    stage: int,
    name: str,
    shape: torch.Size,
    shard: ShardSpec = UNSHARDED,
    device: torch.device = CPU,
) -> Iterator[tuple[Region, torch.Tensor]]:
    """Yield (region, fp32 numbers): the unscaled noise of a weight, or of this rank's slice, piece by piece.

    Pieces may share memory, so use each one before you request the next.

    Args:
        noise: options of the noise. Only the distribution is used.
        seed, stage, name: key of the random numbers: seed of the spec, number of the stage, name of the weight.
        shape: shape of this rank's slice of the weight.
        shard: which slice of the full weight this is. The numbers are the same as in a draw of the full weight.
        device: device that computes. Uniform numbers are the same on all devices. Normal numbers may differ in the last
            bits.
    """
    full = shard.full_shape(shape)
    offsets = [shard.start if axis == shard.axis else 0 for axis in range(len(full))]
    if not math.prod(shape):
        return
    numbers = _UniformNumbers(generator(seed, stage, "noise", name), full, device)
    regions = _large_regions(shape) if device.type != "cpu" else _block_regions(offsets, shape, numbers.block)
    for region in regions:
        bounds = [(offset + part.start, offset + part.stop) for offset, part in zip(offsets, region, strict=True)]
        uniform = numbers.within(bounds)
        yield region, uniform if noise.distribution == "uniform" else _normal(uniform)


def _normal(numbers: torch.Tensor) -> torch.Tensor:
    """Convert fp32 numbers that are uniform in [-1/2, 1/2] to normal numbers of variance 1/12, in place."""
    # Slightly less than 2, because erfinv is infinite at -1 and 1.
    return numbers.mul_(2 - 2**-23).erfinv_().mul_(2**0.5).mul_(12**-0.5)


def add_noise(out: torch.Tensor, pieces: Iterable[tuple[Region, torch.Tensor]], size: float) -> None:
    """Add the noise of `draw` to a weight in place, piece by piece: `out += size * noise`."""
    for region, numbers in pieces:
        out[region].add_(numbers.to(out).mul_(size))


class _UniformNumbers:
    """The uniform random numbers of all entries of a full weight, computed on request.

    `source` is a generator for this weight and stage, which draws the keys of the blocks.
    """

    def __init__(self, source: torch.Generator, shape: torch.Size, device: torch.device) -> None:
        self.device, self.block, self.table = device, block_of(shape), _table(device)
        self.grid = [-(-length // size) for length, size in zip(shape, self.block, strict=True)]
        keys = torch.randint(-(1 << 31), 1 << 31, (2, math.prod(self.grid)), generator=source)
        keys[1] |= 1  # a multiplier must be odd, otherwise the product loses bits
        self.keys = keys.to(torch.int32).to(device)
        if device.type == "cpu":
            self.key_pairs = keys.T.tolist()
            self.scratch = torch.empty((2, min(BLOCK, math.prod(shape))), dtype=torch.int32)

    def within(self, bounds: list[tuple[int, int]]) -> torch.Tensor:
        """Return the fp32 numbers of a box of entries, uniform in [-1/2, 1/2].

        Args:
            bounds: (start, end) along each axis of the full weight. On the CPU, the box must be inside one block.
        """
        hashed, scratch = self._hash_block(bounds) if self.device.type == "cpu" else self._hash_box(bounds)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32))):
            # The integers are signed, so mask the sign bits that the shift copies.
            torch.bitwise_right_shift(hashed, shift, out=scratch)
            hashed.bitwise_xor_(scratch.bitwise_and_((1 << (32 - shift)) - 1)).mul_(factor)
        return scratch.view(torch.float32).copy_(hashed).mul_(2**-32)

    def _hash_block(self, bounds: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `(table[position] ^ key) * factor` for a box inside one block, and scratch memory of its shape."""
        index, sizes = 0, [end - start for start, end in bounds]
        for (start, _), size, count in zip(bounds, self.block, self.grid, strict=True):
            index = index * count + start // size
        entries = self.table[: math.prod(self.block)]
        if (*sizes,) != self.block:
            parts = [
                slice(start % size, (end - 1) % size + 1) for (start, end), size in zip(bounds, self.block, strict=True)
            ]
            entries = entries.view(self.block)[tuple(parts)].flatten()
        hashed, scratch = self.scratch[:, : len(entries)]
        key, factor = self.key_pairs[index]
        torch.bitwise_xor(entries, key, out=hashed)
        return hashed.mul_(factor).view(sizes), scratch.view(sizes)

    def _hash_box(self, bounds: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the same as `_hash_block`, for a box in any number of blocks, with few large operations."""
        block_index, position = (torch.zeros((), dtype=torch.int64, device=self.device) for _ in range(2))
        for axis, ((start, end), size, count) in enumerate(zip(bounds, self.block, self.grid, strict=True)):
            index = torch.arange(start, end, device=self.device).view(-1, *(1 for _ in bounds[axis + 1 :]))
            block_index, position = block_index * count + index // size, position * size + index % size
        hashed = self.table[position].bitwise_xor_(self.keys[0][block_index]).mul_(self.keys[1][block_index])
        return hashed, torch.empty_like(hashed)


@lru_cache(maxsize=8)
def _table(device: torch.device) -> torch.Tensor:
    """Return the fixed table [BLOCK] of random 32-bit integers."""
    table = torch.randint(-(1 << 31), 1 << 31, (BLOCK,), generator=torch.Generator().manual_seed(0))
    return table.to(torch.int32).to(device)


def _block_regions(offsets: list[int], shape: torch.Size, block: tuple[int, ...]) -> Iterator[Region]:
    """Yield the intersections of all blocks with a slice that starts at `offsets` in the full weight."""
    axes = []
    for offset, length, size in zip(offsets, shape, block, strict=True):
        ends = [*range((offset // size + 1) * size, offset + length, size), offset + length]
        axes.append([slice(start - offset, end - offset) for start, end in itertools.pairwise([offset, *ends])])
    yield from itertools.product(*axes)


def _large_regions(shape: torch.Size) -> Iterator[Region]:
    """Yield regions of at most PIECE entries that together cover a tensor of this shape."""
    entries = math.prod(shape[1:])
    if len(shape) > 1 and entries > PIECE:
        for index in range(shape[0]):
            for inner in _large_regions(shape[1:]):
                yield (slice(index, index + 1), *inner)
        return
    rows = max(1, PIECE // max(1, entries))
    for start in range(0, shape[0], rows):
        yield (slice(start, min(start + rows, shape[0])), *(slice(0, length) for length in shape[1:]))


def block_of(shape: torch.Size) -> tuple[int, ...]:
    """Return the shape of the blocks of a weight: [32, 1024] for a large matrix.

    A block has at most `BLOCK` entries, and at most `MAX_AXIS` along each axis. The last axes are filled first, so a
    shard of a few rows, columns or matrices shares few blocks with other shards.
    """
    block, entries = list[int](), BLOCK
    for length in reversed(shape):
        block.append(max(1, min(length, MAX_AXIS, entries)))
        entries //= block[-1]
    return tuple(reversed(block))
