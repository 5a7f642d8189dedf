"""The noise of a stage, or of a step: `N = strength * std(W) * U(-1/2, 1/2)`, or a normal of the same variance; or by
rows, `N_ij = strength * |W_i| / sqrt(n) * N(0, 1)`.

Source: NoisyTune (2202.12024) for the form; algorithm.md, row "noise". By rows: Flat-LoRA (2409.14396).
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
"""Entries of a block of noise, and of its last axis, at most. Part of the key: other numbers here are other noise."""


def generator(seed: int, stage: int, purpose: str, weight: str) -> torch.Generator:
    """Return a new CPU generator whose stream is a function of the four arguments alone.

    Algorithm.md, "Facts that hold exactly": the noise of a site does not depend on the order or number of sites, on the
    number of processes, or on how often it is asked for. No global generator is read or advanced.
    """
    digest = hashlib.sha256(f"{seed}\0{stage}\0{purpose}\0{weight}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def amplitude(noise: Noise, weight: torch.Tensor, shard: ShardSpec = WHOLE) -> float:
    """Return `strength * std(W)`; the standard deviation of one value, or of none, is 0.

    With a shard the weight is that of W. All-reduced then: every rank must call this at the same point.
    """
    if noise.strength and shard.axis is not None:
        return noise.strength * _std_of_all(weight, shard)
    if noise.strength == 0 or weight.numel() < 2:
        return 0.0
    size = weight.std().item()
    if not 0 < size < math.inf:  # of numbers whose squares leave the dtype, or of equal ones
        top = weight.abs().max().item()
        size = top * (weight / top).std().item() if 0 < top < math.inf else top
    return noise.strength * size


def _std_of_all(weight: torch.Tensor, shard: ShardSpec) -> float:
    """Return the standard deviation of a weight whose shard is here."""
    size = shard.std(weight)
    if 0 < size < math.inf:
        return size
    top = shard.group.max(weight.abs().max().item() if weight.numel() else 0.0)
    return top * shard.std(weight / top) if 0 < top < math.inf else top


def noise_size(
    noise: Noise, weight: torch.Tensor, stacked: bool, transposed: bool, shard: ShardSpec
) -> torch.Tensor | float:
    """Return what a draw is multiplied by: the `amplitude`, or of a distribution by rows `strength * |W_i| / sqrt(n)`
    of each row i of n entries, of a shape that broadcasts over the weight.

    With a shard the weight is that of W. All-reduced then: every rank must call this at the same point.

    Args:
        noise: of the spec.
        weight: [out, ...], [in, out] if `transposed`; with an axis of experts before if `stacked`.
        stacked, transposed: how it is stored.
        shard: of W, which the weight is.
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
    """Yield the unscaled noise of this address by blocks: where each lies in the weight, and its numbers, in fp32 on
    the CPU.

    Step 0 is the start of the stage. With a shard the shape is that of the shard, whose numbers are those that it has
    in the whole weight: of blocks that lie in it in part, the rest is drawn and dropped.
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
    """Add what `draw` yields, times a size that broadcasts over the weight, as `out += noise * size` would.

    By blocks, which stay in the cache: no tensor of the weight's shape is made.
    """
    sizes = size.expand(out.shape) if isinstance(size, torch.Tensor) else None
    for places, drawn in blocks:
        out[places].add_(drawn.to(out).mul_(sizes[places] if sizes is not None else size))


def _pieces(first: int, here: int, full: int, size: int) -> list[tuple[int, int, slice, slice]]:
    """Return the blocks in which `first` to `first + here` of an axis lie: the number and the length of each, where it
    lies here, and the part of it that does.
    """
    found = []
    for number in range(first // size, -(-(first + here) // size)):
        start, length = number * size, min(size, full - number * size)
        low, high = max(start, first), min(start + length, first + here)
        found.append((number, length, slice(low - first, high - first), slice(low - start, high - start)))
    return found


def block_of(shape: torch.Size) -> tuple[int, ...]:
    """Return the shape of the blocks whose noise has streams of their own: [32, 1024] of a large matrix.

    Of `BLOCK` entries at most, long in the last axes, of which `WIDE` entries at most: a shard of few rows, of some
    columns or of one expert is made of few blocks that are not its own.
    """
    block, room = list[int](), BLOCK
    for length in reversed(shape):
        block.append(max(1, min(length, WIDE, room)))
        room //= block[-1]
    return tuple(reversed(block))
