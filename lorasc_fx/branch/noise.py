"""The noise of a stage, or of a step: `N = strength * std(W) * U(-1/2, 1/2)`, or a normal of the same variance; or by
rows, `N_ij = strength * |W_i| / sqrt(n) * N(0, 1)`.

Each random number is a function of (seed, stage, step, weight, position). Uniform numbers are computed with integers,
so they are the same on every device, and a shard computes only its own. A weight is divided into blocks with two keys
each. The number at position p of a block is a hash of these keys and of entry p of a fixed table.

Source: NoisyTune (2202.12024) for the form; algorithm.md, row "noise". By rows: Flat-LoRA (2409.14396). Counters in
place of a state: Philox (Salmon et al., 2011); the constants of the hash: lowbias32 (Wellons, 2018).
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator
from functools import lru_cache

import torch

from lorasc_fx.options import DISTRIBUTIONS
from lorasc_fx.shards import UNSHARDED, ShardSpec
from lorasc_fx.spec import Noise

BLOCK, WIDE = 32768, 1024
"""Largest number of entries of a block of noise, and of its last axis. Other values here give other noise."""
PIECE, WORKSPACE = 1 << 21, 40
"""Number of entries that an accelerator computes at a time, and bytes of temporary memory for each. The CPU computes
one block at a time, which fits into its cache."""

CPU = torch.device("cpu")

Places = tuple[slice, ...]
"""Where a piece lies in a weight."""


def generator(seed: int, stage: int, purpose: str, weight: str) -> torch.Generator:
    """Return a new CPU generator whose stream depends only on the four arguments.

    So the noise of a site does not depend on other sites, on the number of processes, or on earlier draws
    (algorithm.md, "Facts that hold exactly"). No global generator is read or advanced.
    """
    digest = hashlib.sha256(f"{seed}\0{stage}\0{purpose}\0{weight}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def amplitude(noise: Noise, weight: torch.Tensor, shard: ShardSpec = UNSHARDED) -> float:
    """Return `strength * std(W)`, 0 for a weight with fewer than two entries.

    If the weight is a shard of W, this is an all-reduce, and every rank must call it at the same point.
    """
    if noise.strength and shard.axis is not None:
        return noise.strength * _std_of_all(weight, shard)
    if noise.strength == 0 or weight.numel() < 2:
        return 0.0
    size = weight.std().item()
    if not 0 < size < math.inf:  # all entries are equal, or their squares overflow or underflow
        top = weight.abs().max().item()
        size = top * (weight / top).std().item() if 0 < top < math.inf else top
    return noise.strength * size


def _std_of_all(weight: torch.Tensor, shard: ShardSpec) -> float:
    """Return the standard deviation of a full weight from this rank's shard."""
    size = shard.std(weight)
    if 0 < size < math.inf:
        return size
    top = shard.group.max(weight.abs().max().item() if weight.numel() else 0.0)
    return top * shard.std(weight / top) if 0 < top < math.inf else top


def noise_size(
    noise: Noise, weight: torch.Tensor, stacked: bool, transposed: bool, shard: ShardSpec
) -> torch.Tensor | float:
    """Return the factor of the unscaled noise.

    It is the `amplitude`, or for a distribution by rows `strength * |W_i| / sqrt(n)` of each row i of n entries, in a
    shape that broadcasts over the weight. If the weight is a shard, this is an all-reduce, and every rank must call it
    at the same point.

    Args:
        noise: of the spec.
        weight: [out, ...], or [in, out] if `transposed`; after an axis of experts if `stacked`.
        stacked, transposed: how the weight is stored.
        shard: the slice of W that the weight is.
    """
    if not DISTRIBUTIONS[noise.distribution].by_rows:
        return amplitude(noise, weight, shard)
    row_axis = (1 if stacked else 0) + (1 if transposed else 0)
    rest = [axis for axis in range(1 if stacked else 0, weight.dim()) if axis != row_axis]
    sizes: torch.Tensor = torch.linalg.vector_norm(weight, dim=rest, keepdim=True)
    shape = weight.shape
    if shard.axis in rest:
        sizes, shape = shard.group.sum_tensor(sizes.square()).sqrt(), shard.full_shape(shape)
    return sizes.mul_(noise.strength / math.sqrt(max(1, math.prod(shape[axis] for axis in rest))))


def draw(
    noise: Noise,
    seed: int,
    stage: int,
    name: str,
    shape: torch.Size,
    step: int = 0,
    shard: ShardSpec = UNSHARDED,
    device: torch.device = CPU,
) -> Iterator[tuple[Places, torch.Tensor]]:
    """Yield the unscaled noise of a weight in pieces: where each lies, and its numbers in fp32. The caller uses a piece
    before it asks for the next one, which may be in the same memory.

    Args:
        noise, seed, stage, name: the key.
        shape: of the weight, or of the shard of it that is here.
        step: 0 at the start of the stage.
        shard: which part of the weight this is; its numbers are those that it has in the whole weight.
        device: that computes. All devices compute the same uniform numbers; normal ones may differ in the last bits.
    """
    full = shard.full_shape(shape)
    firsts = [shard.start if axis == shard.axis else 0 for axis in range(len(full))]
    if not math.prod(shape):
        return
    purpose = f"noise of step {step}" if step else "noise"
    hashed = _Hash(generator(seed, stage, purpose, name), full, device)
    distribution = DISTRIBUTIONS[noise.distribution]
    pieces = _boxes(shape) if device.type != "cpu" else _block_boxes(firsts, shape, hashed.block)
    for places in pieces:
        inside = [(first + place.start, first + place.stop) for first, place in zip(firsts, places, strict=True)]
        yield places, distribution.from_uniform(hashed.uniform(inside))


def add_noise(out: torch.Tensor, pieces: Iterable[tuple[Places, torch.Tensor]], size: torch.Tensor | float) -> None:
    """Add what `draw` yields, times a size that broadcasts over the weight, as `out += noise * size` would.

    By pieces: no tensor of the weight's shape is made.
    """
    sizes = size.expand(out.shape) if isinstance(size, torch.Tensor) else None
    for places, drawn in pieces:
        out[places].add_(drawn.to(out).mul_(sizes[places] if sizes is not None else size))


class _Hash:
    """Uniform numbers of the entries of one weight.

    Args:
        source: of the keys of the blocks; its seed is the key of the weight.
        shape: of the whole weight.
        device: that computes.
    """

    def __init__(self, source: torch.Generator, shape: torch.Size, device: torch.device) -> None:
        self.device, self.block, self.table = device, block_of(shape), _table(device)
        self.grid = [-(-length // size) for length, size in zip(shape, self.block, strict=True)]
        keys = torch.randint(-(1 << 31), 1 << 31, (2, math.prod(self.grid)), generator=source)
        keys[1] |= 1  # it is multiplied by
        self.keys = keys.to(torch.int32).to(device)
        if device.type == "cpu":
            self.key_pairs = keys.T.tolist()
            self.scratch = torch.empty((2, min(BLOCK, math.prod(shape))), dtype=torch.int32)

    def uniform(self, inside: list[tuple[int, int]]) -> torch.Tensor:
        """Return fp32 numbers that are uniform in [-1/2, 1/2].

        Args:
            inside: first entry and end along each axis of the whole weight; on the CPU they are in one block.
        """
        hashed, other = self._in_block(inside) if self.device.type == "cpu" else self._anywhere(inside)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32))):
            torch.bitwise_right_shift(hashed, shift, out=other)
            hashed.bitwise_xor_(other.bitwise_and_((1 << (32 - shift)) - 1)).mul_(factor)  # a logical shift
        return other.view(torch.float32).copy_(hashed).mul_(2**-32)

    def _in_block(self, inside: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `(table[position] ^ key) * factor` of each entry, and a tensor of its shape to work in."""
        number, sizes = 0, [end - first for first, end in inside]
        for (first, _), size, count in zip(inside, self.block, self.grid, strict=True):
            number = number * count + first // size
        entries = self.table[: math.prod(self.block)]
        if (*sizes,) != self.block:
            parts = [
                slice(first % size, (end - 1) % size + 1) for (first, end), size in zip(inside, self.block, strict=True)
            ]
            entries = entries.view(self.block)[tuple(parts)].flatten()
        hashed, other = self.scratch[:, : len(entries)]
        key, factor = self.key_pairs[number]
        torch.bitwise_xor(entries, key, out=hashed)
        return hashed.mul_(factor).view(sizes), other.view(sizes)

    def _anywhere(self, inside: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `_in_block` does, of entries in any number of blocks, by few large operations."""
        number, position = (torch.zeros((), dtype=torch.int64, device=self.device) for _ in range(2))
        for axis, ((first, end), size, count) in enumerate(zip(inside, self.block, self.grid, strict=True)):
            index = torch.arange(first, end, device=self.device).view(-1, *(1 for _ in inside[axis + 1 :]))
            number, position = number * count + index // size, position * size + index % size
        hashed = self.table[position].bitwise_xor_(self.keys[0][number]).mul_(self.keys[1][number])
        return hashed, torch.empty_like(hashed)


@lru_cache(maxsize=8)
def _table(device: torch.device) -> torch.Tensor:
    """Return the hash's table [BLOCK]: fixed random integers of 32 bits."""
    table = torch.randint(-(1 << 31), 1 << 31, (BLOCK,), generator=torch.Generator().manual_seed(0))
    return table.to(torch.int32).to(device)


def _block_boxes(firsts: list[int], shape: torch.Size, block: tuple[int, ...]) -> Iterator[Places]:
    """Yield the parts of blocks that lie in a shard, which begins at `firsts` of the whole weight."""
    axes = []
    for first, here, size in zip(firsts, shape, block, strict=True):
        ends = [*range((first // size + 1) * size, first + here, size), first + here]
        axes.append([slice(low - first, high - first) for low, high in itertools.pairwise([first, *ends])])
    yield from itertools.product(*axes)


def _boxes(shape: torch.Size) -> Iterator[Places]:
    """Yield boxes of at most PIECE entries, or single rows of the last axis, that cover a shape."""
    entries = math.prod(shape[1:])
    if len(shape) > 1 and entries > PIECE:
        for index in range(shape[0]):
            for rest in _boxes(shape[1:]):
                yield (slice(index, index + 1), *rest)
        return
    rows = max(1, PIECE // max(1, entries))
    for first in range(0, shape[0], rows):
        yield (slice(first, min(first + rows, shape[0])), *(slice(0, length) for length in shape[1:]))


def block_of(shape: torch.Size) -> tuple[int, ...]:
    """Return the shape of the blocks that have separate random streams: [32, 1024] for a large matrix.

    A block has at most `BLOCK` entries, and at most `WIDE` along an axis. Blocks are long in the last axes, so a shard
    of a few rows, some columns or one expert overlaps few blocks of other shards.
    """
    block, entries = list[int](), BLOCK
    for length in reversed(shape):
        block.append(max(1, min(length, WIDE, entries)))
        entries //= block[-1]
    return tuple(reversed(block))
