"""Noise of a stage or of a step.

`N = strength * std(W) * U(-1/2, 1/2)`, or normal with the same variance (NoisyTune, 2202.12024; algorithm.md, row
"noise"). By rows: `N_ij = strength * |W_i| / sqrt(n) * N(0, 1)` (Flat-LoRA, 2409.14396).
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator

import torch

from lorasc_fx.options import DISTRIBUTIONS
from lorasc_fx.shards import WHOLE, ShardSpec
from lorasc_fx.spec import Noise

BLOCK, WIDE = 32768, 1024
"""Largest number of entries of a block of noise, and of its last axis. Other values here give other noise."""


def generator(seed: int, stage: int, purpose: str, weight: str) -> torch.Generator:
    """Return a new CPU generator whose stream depends only on the four arguments.

    So the noise of a site does not depend on other sites, on the number of processes, or on earlier draws
    (algorithm.md, "Facts that hold exactly"). No global generator is read or advanced.
    """
    digest = hashlib.sha256(f"{seed}\0{stage}\0{purpose}\0{weight}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def amplitude(noise: Noise, weight: torch.Tensor, shard: ShardSpec = WHOLE) -> float:
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
        sizes, shape = shard.group.sum_of(sizes.square()).sqrt(), shard.full_shape(shape)
    return sizes.mul_(noise.strength / math.sqrt(max(1, math.prod(shape[axis] for axis in rest))))


def draw(
    noise: Noise, seed: int, stage: int, name: str, shape: torch.Size, step: int = 0, shard: ShardSpec = WHOLE
) -> Iterator[tuple[tuple[slice, ...], torch.Tensor]]:
    """Yield the unscaled noise of a key in blocks: the place of each block in the weight, and its values in fp32 on the
    CPU.

    Step 0 is the start of the stage. A shard gets the values that it has in the full weight. If only a part of a block
    is in the shard, the block is drawn in full and cut.
    """
    distribution, purpose = DISTRIBUTIONS[noise.distribution], f"noise of step {step}" if step else "noise"
    full = shard.full_shape(shape)
    firsts = [shard.first if axis == shard.axis else 0 for axis in range(len(full))]
    axes = [_pieces(*axis) for axis in zip(firsts, shape, full, block_of(full), strict=True)]
    for pieces in itertools.product(*axes) if math.prod(shape) else ():
        index, sizes, places, parts = zip(*pieces, strict=True)
        source = generator(seed, stage, f"block {index} of {purpose}", name)
        yield places, distribution.draw(torch.Size(sizes), source)[parts]


def add_noise(
    out: torch.Tensor, blocks: Iterable[tuple[tuple[slice, ...], torch.Tensor]], size: torch.Tensor | float
) -> None:
    """Add the blocks of `draw`, multiplied by a size that broadcasts over the weight: `out += noise * size`.

    Blocks fit into the cache, and no tensor of the weight's shape is allocated.
    """
    sizes = size.expand(out.shape) if isinstance(size, torch.Tensor) else None
    for places, drawn in blocks:
        out[places].add_(drawn.to(out).mul_(sizes[places] if sizes is not None else size))


def _pieces(first: int, count: int, full: int, size: int) -> list[tuple[int, int, slice, slice]]:
    """Return the blocks that overlap `first` to `first + count` of an axis.

    Each has its number, its length, and the overlap as a slice of the shard and as a slice of the block.
    """
    pieces = []
    for number in range(first // size, -(-(first + count) // size)):
        start, length = number * size, min(size, full - number * size)
        low, high = max(start, first), min(start + length, first + count)
        pieces.append((number, length, slice(low - first, high - first), slice(low - start, high - start)))
    return pieces


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
