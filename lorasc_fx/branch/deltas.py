"""Deltas of weights, and their arithmetic: folds, sums of low-rank factors, and rounding to a grid.

A fold computes `out = base + delta + b @ a`, rounded once. It works on blocks of rows. On the CPU a block stays in the
cache between the copy, the product and the rounding. On an accelerator a block is large enough to use the bandwidth of
the bus, and W0 is copied there in its own dtype. A weight narrower than the arithmetic needs a temporary buffer of one
block. Every step is in place, because autocast does not change the dtype of in-place ops.

Training on a grid (`CascadeSpec.grid`) computes with the weights that a fold will store. In each forward, a branch adds
its delta to the weight. It rounds the sum to the dtype of the weight (`step`), and then to the grid (`rounded`). The
gradient passes through both roundings unchanged (straight-through estimator, 1308.3432). A fold applies the deltas of
all stages to W0 one after another, with the same function `step`, and rounds the result to the grid. So the weights of
the running and of the folded model have the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from functools import cached_property, lru_cache, partial
from typing import Any, Self

import torch

from lorasc_fx.errors import SpecError
from lorasc_fx.quantized import is_quantized, requantized
from lorasc_fx.spec import GRIDS, OWN_GRID
from lorasc_fx.util.undo import Block, isolated


class Side(Enum):
    """The kind of a tensor that belongs to a weight [rows, columns]: which axes of the weight the tensor also has.

    Stacked matrices have the axis of the stack first, in the weight and in all tensors except `OUT`.
    """

    WEIGHT = "[rows, columns]"
    LEFT = "[rows, rank]"
    RIGHT = "[rank, columns]"
    OUT = "[out]"

    def axis(self, along: int, stacked: bool, transposed: bool) -> int | None:
        """Return the axis of the tensor that is sharded if the weight is sharded along axis `along`, or None."""
        lead = 1 if stacked else 0
        if self is Side.OUT:
            return 0 if along == lead + transposed else None
        if self is Side.WEIGHT or along < lead:
            return along
        return along if (along == lead) == (self is Side.LEFT) else None


class Tree:
    """Base class of frozen dataclasses with tensors, with a `map` over all tensors.

    Fields with tensors, or with tuples or mappings of tensors, have a `Side` in their metadata. Other fields may be
    trees themselves.
    """

    def map(self, change: Callable[[torch.Tensor, Side], torch.Tensor]) -> Self:
        """Return a copy in which `change` replaces every tensor. A tensor that occurs twice stays shared."""
        done: dict[int, Any] = {}

        def walk(value: object, side: Side | None) -> Any:
            if isinstance(value, torch.Tensor):
                assert side is not None, "a field with tensors has a Side in its metadata"
                if id(value) not in done:
                    done[id(value)] = change(value, side)
                return done[id(value)]
            if isinstance(value, tuple):
                return tuple(walk(inner, side) for inner in value)
            if isinstance(value, Mapping):
                return {key: walk(inner, side) for key, inner in value.items()}
            return rebuild(value) if isinstance(value, Tree) else value

        def rebuild(tree: Any) -> Any:
            return replace(
                tree, **{item.name: walk(getattr(tree, item.name), item.metadata.get(Side)) for item in fields(tree)}
            )

        mapped: Self = rebuild(self)
        done.clear()  # free the tensors now: the two functions are a reference cycle
        return mapped


@dataclass(frozen=True)
class Factors(Tree):
    """A low-rank delta `b @ a` in the layout of the weight, with `b` [rows, r] and `a` [r, columns].

    The scale of the delta is part of `b`. For stacked matrices, both have the axis of the stack first.
    """

    b: torch.Tensor = field(metadata={Side: Side.LEFT})
    a: torch.Tensor = field(metadata={Side: Side.RIGHT})

    @property
    def rank(self) -> int:
        """Number of columns of `b`."""
        return self.b.shape[-1]

    def with_rows(self, scale: torch.Tensor, transposed: bool) -> Factors:
        """Return the factors of the delta whose output rows are multiplied by `scale` [out]."""
        if transposed:
            return Factors(self.b, scale_rows(scale, self.a, True))
        return Factors(scale_rows(scale, self.b, False), self.a)

    @cached_property
    def bound(self) -> float:
        """An upper bound for the absolute entries of `b @ a`: the product of the norms (Cauchy-Schwarz)."""
        b = torch.linalg.vector_norm(self.b.cpu(), dtype=torch.float64)
        a = torch.linalg.vector_norm(self.a.cpu(), dtype=torch.float64)
        bound = (b * a).item()
        return bound if math.isfinite(bound) else math.inf


@dataclass(frozen=True)
class Delta(Tree):
    """The change of a weight W by a branch: the weight becomes `diag(gain) (W + b @ a + dense)`.

    Args:
        factors: the low-rank term, or None.
        dense: the dense term in the shape of the weight, or None.
        gain: factor of each output row [out] (DoRA), in fp64 in host memory. None means 1.
    """

    factors: Factors | None = None
    dense: torch.Tensor | None = field(default=None, metadata={Side: Side.WEIGHT})
    gain: torch.Tensor | None = field(default=None, metadata={Side: Side.OUT})


@dataclass(frozen=True)
class InitialFactors(Tree):
    """Initial factors and magnitudes of a branch in a stage, in fp64 in host memory.

    Args:
        factors: the delta at the start of the stage, which was subtracted from the weight (PiSSA), or None for zero.
        magnitude: the initial row norms [out] of DoRA, or None.
    """

    factors: Factors | None = None
    magnitude: torch.Tensor | None = field(default=None, metadata={Side: Side.OUT})


# ---- arithmetic


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for computing weights of a dtype: fp64 and complex dtypes are unchanged, others become fp32."""
    return dtype if dtype == torch.float64 or dtype.is_complex else torch.float32


def exact_products(like: torch.Tensor) -> AbstractContextManager[None]:
    """Return a context manager that computes fp32 products on CUDA in fp32, even if the process has enabled TF32."""
    return _ieee() if like.is_cuda else nullcontext()


@isolated
def _ieee(undo: Block) -> None:
    matmul = torch.backends.cuda.matmul
    undo(partial(setattr, matmul, "fp32_precision", matmul.fp32_precision))
    matmul.fp32_precision = "ieee"


def scale_rows(scale: torch.Tensor, weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Return a weight [out, ...], or [in, out] if `transposed`, with output row i multiplied by `scale[i]`.

    The result has the dtype of the weight. Under DoRA the scale is [out] in fp64.
    """
    shape = (1, -1) if transposed else (-1, *(1 for _ in weight.shape[1:]))
    return weight * scale.to(device=weight.device, dtype=weight.dtype).view(shape)


@lru_cache(maxsize=8)
def has_fp64(device: torch.device) -> bool:
    """Whether a device supports fp64. MPS does not."""
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except TypeError:
        return False
    return True


# ---- folds

BLOCK = 1 << 21
"""Bytes of a block per thread on the CPU. Sizes from 1 to 4 MiB are equally fast. Smaller blocks need more calls, and a
whole weight does not fit in the cache."""
DEVICE_BLOCK = 1 << 26
"""Bytes of a block on an accelerator, in the dtype of the arithmetic. Of a bf16 weight, 32 MiB are copied at a time."""


class Scratch:
    """A scratch buffer that is reused from weight to weight.

    Page faults of a new buffer would take longer than the computation.
    """

    _buffer: torch.Tensor | None = None

    def like(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return `torch.empty_like(weight, dtype=dtype)`. It may share memory with tensors from earlier calls."""
        buffer, entries = self._buffer, weight.numel()
        if buffer is None or buffer.numel() < entries or (buffer.dtype, buffer.device) != (dtype, weight.device):
            self._buffer = buffer = None  # free the old buffer before the new one is allocated
            self._buffer = buffer = torch.empty(entries, dtype=dtype, device=weight.device)
        return buffer.as_strided(weight.shape, torch.empty_like(weight, device="meta").stride())


def accumulate(
    out: torch.Tensor,
    base: torch.Tensor,
    dtype: torch.dtype,
    delta: torch.Tensor | None = None,
    pair: tuple[torch.Tensor, torch.Tensor] | None = None,
    stacked: bool = False,
) -> None:
    """Write `base + delta + b @ a` into `out`, computed in `dtype` and rounded once to the dtype of `out`.

    Args:
        out: a weight [out, ...], or stacked [matrices, out, ...], on any device, in any memory format.
        base, delta: tensors in the shape of `out`, on any device and in any dtype.
        dtype: dtype of the arithmetic.
        pair: `b` [out, r] and `a` [r, columns] in `dtype` on the device of `out`. If the weight is stacked, both have
            the axis of the stack first.
        stacked: whether the first axis counts matrices.
    """
    # Step 1: find an order of axes in which the weight is contiguous, to view it as a matrix.
    lead = 2 if stacked else 1
    order = [*range(lead), *sorted(range(lead, out.dim()), key=out.stride, reverse=True)]
    if not out.permute(order).is_contiguous():
        contiguous = torch.empty(out.shape, dtype=dtype, device=out.device)
        accumulate(contiguous, base, dtype, delta, pair, stacked)
        out.copy_(contiguous)
        return
    if order != sorted(order):  # channels last: permute base, delta and the columns of `a` like the weight
        base, delta = base.permute(order), None if delta is None else delta.permute(order)
        if pair is not None:
            columns = pair[1].view(*pair[1].shape[:lead], *out.shape[lead:])
            pair = pair[0], columns.permute(order).reshape(pair[1].shape)
        out = out.permute(order)
    # Step 2: choose the number of rows of a block. If one matrix of a stack exceeds a block, fold each matrix alone.
    size = (BLOCK * torch.get_num_threads() if out.device.type == "cpu" else DEVICE_BLOCK) // dtype.itemsize
    entries = math.prod(out.shape[1:])
    if stacked and entries > size:
        for index, (matrix, base_matrix) in enumerate(zip(out, base, strict=True)):
            factors = None if pair is None else (pair[0][index], pair[1][index])
            accumulate(matrix, base_matrix, dtype, None if delta is None else delta[index], factors)
        return
    rows = max(1, size // max(1, entries))
    buffer = None if out.dtype == dtype else torch.empty_like(out[:rows], dtype=dtype)
    # Step 3: compute block by block.
    with exact_products(out):
        for start in range(0, out.shape[0], rows):
            block = slice(start, start + rows)
            target, source, dense = out[block], base[block], None if delta is None else delta[block]
            total = target if buffer is None else buffer[: len(target)]
            if dense is not None and dense.dtype == torch.float64 and not has_fp64(target.device):  # add on the host
                source, dense = source.cpu().to(total.dtype, copy=True).add_(dense.cpu()), None
            # `copy_` casts before it transfers. A narrow weight is transferred first, because it has fewer bytes.
            total.copy_(source.to(target.device) if source.dtype.itemsize < total.dtype.itemsize else source)
            if dense is not None:
                total.add_(dense.to(total.device))  # in its own dtype, so that only the sum is rounded
            if pair is not None and stacked:
                total.view(*total.shape[:2], math.prod(total.shape[2:])).baddbmm_(pair[0][block], pair[1][block])
            elif pair is not None:
                total.view(len(total), math.prod(total.shape[1:])).addmm_(pair[0][block], pair[1])
            if buffer is not None:
                target.copy_(total)


def cast(tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the tensor in a dtype on a device. For a transfer from or to the host, cast on the host.

    Some accelerators (MPS) have no fp64.
    """
    return tensor.to(dtype).to(device) if tensor.device.type == "cpu" else tensor.to(device).to(dtype)


def summing(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the dense delta of a weight: fp32 if the weight is narrower than fp32, otherwise fp64.

    Every stage adds to the dense delta. The delta is wider than the weight, so that only the sum is rounded.
    """
    return torch.float64 if dtype.itemsize >= 4 else torch.float32


# ---- pairs of factors


def sum_of(pairs: Sequence[tuple[float, Factors]], dtype: torch.dtype, device: torch.device) -> Factors:
    """Return the sum of `c * b @ a` over (c, factors) pairs as one pair of the summed rank.

    Its `b` [rows, sum of r] has the columns of all `c b`. Its `a` [sum of r, columns] has the rows of all `a`. A single
    pair is not copied if possible. Both factors are contiguous: BLAS rounds the product of a transposed factor
    differently, and a checkpoint does not store strides.
    """
    if len(pairs) == 1:
        b, a = pairs[0][1].b, pairs[0][1].a
    else:
        # Experts are on the host, and the factors of a running branch may not be. Concatenate where the experts are.
        home = pairs[0][1].b.device
        b = torch.cat([factors.b.to(home) for _, factors in pairs], dim=-1)
        a = torch.cat([factors.a.to(home) for _, factors in pairs], dim=-2)
    b, a = cast(b, dtype, device), cast(a, dtype, device)
    if len(pairs) > 1 and any(c != pairs[0][0] for c, _ in pairs):
        columns = [c for c, factors in pairs for _ in range(factors.b.shape[-1])]
        b = b * torch.tensor(columns, dtype=dtype, device=device)
    elif pairs[0][0] != 1:
        b = b * pairs[0][0]
    factors = list[torch.Tensor]()
    for factor in (b, a):  # `contiguous` is not enough, because it keeps any strides of axes of length 1
        strides = torch.empty(factor.shape, device="meta").stride()
        fits = factor.stride() == strides
        factors.append(factor if fits else factor.clone(memory_format=torch.contiguous_format))
    return Factors(*factors)


def shortest_pair(pair: Factors, floor: float = 0.0) -> Factors:
    """Return a pair with the same product `b @ a`, up to rounding, and the smallest rank.

    Singular values that are at most `floor`, or zero up to rounding, are dropped.
    """
    u, values, vh = svd_of(pair)
    smallest = max(floor, float(values.norm()) * torch.finfo(values.dtype).eps * max(len(u), vh.shape[-1]))
    return truncated(u, values, vh, int((values > smallest).sum()))


def svd_of(pair: Factors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the SVD of `b @ a`, or of a stack of products: U [rows, k], singular values [k] and V^H [k, columns].

    k is min(r, rows, columns). `b @ a` is never computed. With `b = Q_b R_b` and `a^T = Q_a R_a`, only the small core
    `R_b R_a^T` is decomposed.
    """
    q_b, r_b = torch.linalg.qr(pair.b)
    q_a, r_a = torch.linalg.qr(pair.a.mT)
    u, values, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    return q_b @ u, values, vh @ q_a.mT


def truncated(u: torch.Tensor, values: torch.Tensor, vh: torch.Tensor, rank: int, scale: float = 1.0) -> Factors:
    """Return factors b and a such that `scale * b @ a` is the sum of the `rank` largest terms of an SVD.

    Each factor is multiplied by the square root of values / scale.
    """
    root = (values[..., :rank] / scale).sqrt()
    return Factors(u[..., :rank] * root.unsqueeze(-2), root.unsqueeze(-1) * vh[..., :rank, :])


def scaled(pair: Factors, scale: torch.Tensor, transposed: bool) -> Factors:
    """Return the factors of a delta whose output rows are multiplied by `scale` [out], in fp64 on the host."""
    if transposed:
        return Factors(pair.b, scale_rows(scale, pair.a.cpu().double(), True))
    return Factors(scale_rows(scale, pair.b.cpu().double(), False), pair.a)


# ---- grids


def step(
    weight: torch.Tensor,
    pair: tuple[torch.Tensor, torch.Tensor] | None,
    dense: torch.Tensor | None = None,
    gain: torch.Tensor | None = None,
    transposed: bool = False,
) -> torch.Tensor:
    """Return `diag(gain) (W + dense) + b @ a`, computed in at least fp32 and rounded to the dtype of W.

    Args:
        weight: W [out, ...], or stacked [matrices, out, ...].
        pair: `b` [rows, rank] and `a` [rank, columns]. For a stacked weight, both have the axis of the stack first.
        dense: dense delta, with as many entries as the weight.
        gain: factor of each output row [out].
        transposed: whether the weight is stored as [in, out].
    """
    total = weight.to(arithmetic(weight.dtype), copy=True, memory_format=torch.contiguous_format)
    if dense is not None:
        total.add_(dense.to(total.device).reshape(total.shape))
    if gain is not None:
        total = scale_rows(gain, total, transposed)
    if pair is not None:
        # Make both contiguous: BLAS rounds the product of a transposed factor differently.
        b, a = (factor.to(total, copy=True, memory_format=torch.contiguous_format) for factor in pair)
        with exact_products(total):
            # Multiply stacked matrices one by one: a matrix that is computed alone must have the same bits.
            parts = zip(total, b, a, strict=True) if b.dim() == 3 else [(total, b, a)]
            for part, up, down in parts:
                part.view(len(up), -1).addmm_(up, down)
    return _laid_out(total.to(weight.dtype), weight)


def rounded(grid: str, value: torch.Tensor, weight: torch.Tensor, stacked: bool = False) -> torch.Tensor:
    """Return a value rounded to a grid, in the same shape and dtype.

    Args:
        grid: a name in `GRIDS`, "own" for the grid of a quantized weight, or "" for no grid.
        value: tensor [out, ...]. If `stacked`, tensor [matrices, out, ...], and each matrix is rounded alone.
        weight: the quantized weight that defines the grid "own".

    Raises:
        SpecError: the function of the grid returns another shape or dtype.
    """
    if not grid or (grid == OWN_GRID and not is_quantized(weight)):
        return value
    if grid == OWN_GRID:
        return requantized(weight, value)
    if stacked:
        return torch.stack([rounded(grid, part, weight) for part in value])
    result = GRIDS[grid](value)
    if (result.shape, result.dtype) != (value.shape, value.dtype):
        raise SpecError(
            f"grid={grid!r} returns {list(result.shape)} {result.dtype} for a weight of {list(value.shape)} "
            f"{value.dtype}. Give a function that returns the rounded weight in the same shape and dtype"
        )
    return _laid_out(result, value)


def step_on_grid(
    value: torch.Tensor,
    pair: tuple[torch.Tensor, torch.Tensor] | None,
    dense: torch.Tensor | None,
    gain: torch.Tensor | None,
    transposed: bool,
    grid: str,
    weight: torch.Tensor,
    stacked: bool,
) -> torch.Tensor:
    """Return `rounded(step(...))` with the arguments of both functions, as one custom op.

    Quantized weights and exported programs use plain operations: the op takes plain tensors, and other tools lack it.
    """
    if is_quantized(weight) or torch.compiler.is_exporting():
        return rounded(grid, step(value, pair, dense, gain, transposed), weight, stacked)
    b, a = pair or (None, None)
    on_grid: torch.Tensor = _opaque_step(value, b, a, dense, gain, transposed, grid, stacked)
    return on_grid


@torch.library.custom_op("lorasc_fx::step_on_grid", mutates_args=())
def _opaque_step(
    value: torch.Tensor,
    b: torch.Tensor | None,
    a: torch.Tensor | None,
    dense: torch.Tensor | None,
    gain: torch.Tensor | None,
    transposed: bool,
    grid: str,
    stacked: bool,
) -> torch.Tensor:
    """Compute `step_on_grid` as an opaque op, because Inductor would remove casts to a narrow dtype and back."""
    pair = None if b is None or a is None else (b, a)
    return rounded(grid, step(value, pair, dense, gain, transposed), value, stacked)


@_opaque_step.register_fake
def _(value: torch.Tensor, *others: object) -> torch.Tensor:
    return torch.empty_like(value)


def _laid_out(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return `value` with the strides of `like`, because torch chooses kernels by strides."""
    return value if value.stride() == like.stride() else torch.empty_like(like, dtype=value.dtype).copy_(value)


class Through(torch.autograd.Function):
    """Returns `value`, and passes the gradient of `value` to `delta`, from which `value` was rounded."""

    @staticmethod
    def forward(delta: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return the value."""
        return value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """Save nothing."""

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Pass the gradient through."""
        return gradient, None
