"""Seconds that a branch adds to a training step, by its shapes: one line per low-rank operation of `lorasc_fx.branch`.

Forward and backward, with the gradient of the input; what the op costs without a branch is left out. The shapes are
read off the sizes that a front end noted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lorasc_fx.graph.flow import shape_of

OPS = (
    *("down", "up", "raise", "gradient"),  # over rows [tokens, features], as in branch/low_rank.py
    *("image_down", "image_up", "image_raise", "image_gradient"),  # over images [batch, channels, *space]
    *("kernel_down", "kernel_raise", "kernel_gradient"),  # convolutions with `rank` channels, over unfolded images
    *("merge", "add"),  # a weight with its delta; a gradient to another, in place
    "call",  # what a branch's forward and backward take whatever its size
    "dense",  # by multiply-adds: a product, and
    "frozen",  # that of a frozen weight in training (branch/products.py)
    *("convolve", "depthwise"),  # by multiply-adds: a convolution and its input's gradient
)
"""Names of the operations: `down` reads rows, `up` adds to rows, `raise` makes rows, `gradient` reads rows."""


@dataclass(frozen=True)
class Line:
    """Seconds of an operation: `start + entries * (entry + rank * product)`."""

    start: float
    entry: float
    product: float = 0.0

    def seconds(self, entries: float, rank: float = 0.0) -> float:
        """Return the seconds for so many entries of the long operand, and this rank."""
        return self.start + entries * (self.entry + rank * self.product)


@dataclass(frozen=True)
class Rates:
    """The lines of one machine, number of threads and dtype, by the names in OPS; or `guessed`, not measured."""

    lines: Mapping[str, Line]
    guessed: bool = False

    def seconds(self, op: str, entries: float, rank: float = 0.0) -> float:
        """Return the seconds of an operation."""
        return self.lines[op].seconds(entries, rank)

    def to_json(self) -> dict[str, list[float]]:
        """Return plain numbers."""
        return {op: [line.start, line.entry, line.product] for op, line in self.lines.items()}

    @classmethod
    def from_json(cls, data: Any) -> Rates | None:
        """Return the rates of what `to_json` returned; None for anything else."""
        if not isinstance(data, dict) or set(data) != set(OPS):
            return None
        for line in data.values():
            if not isinstance(line, list) or len(line) != 3:
                return None
            if not all(isinstance(number, (int, float)) and math.isfinite(number) and number >= 0 for number in line):
                return None
        return cls({op: Line(*map(float, data[op])) for op in OPS})


_USUAL = {
    **dict.fromkeys(("down", "gradient", "image_down", "image_gradient"), (3e-6, 0.18e-9, 0.020e-9)),
    **dict.fromkeys(("up", "raise", "image_up", "image_raise"), (3e-6, 0.25e-9, 0.019e-9)),
    **dict.fromkeys(("kernel_down", "kernel_raise", "kernel_gradient"), (2e-5, 0.05e-9, 0.020e-9)),
    "merge": (3e-6, 0.15e-9, 0.016e-9),
    "add": (2e-6, 0.08e-9, 0.0),
    "call": (1.5e-4, 0.0, 0.0),
    **dict.fromkeys(("dense", "frozen"), (5e-6, 0.015e-9, 0.0)),
    "convolve": (2e-5, 0.035e-9, 0.0),
    "depthwise": (2e-5, 0.5e-9, 0.0),
}
"""Lines of one core of a server of 2023, AVX2, fp32."""


def usual(threads: int) -> Rates:
    """Return the rates of a usual machine, for one that is too busy to be measured."""
    lines = {op: Line(start, entry / threads, product / threads) for op, (start, entry, product) in _USUAL.items()}
    return Rates(lines, guessed=True)


@dataclass(frozen=True)
class LinearUse:
    """A product of x [tokens, inner] with a weight of inner * outer entries."""

    tokens: int
    inner: int
    outer: int
    rank: int

    @property
    def work(self) -> int:
        """Multiply-adds of the op."""
        return self.tokens * self.inner * self.outer


@dataclass(frozen=True)
class ConvUse:
    """A convolution of x [batch, inner, *space] to [batch, outer, *places].

    Args:
        pixels, places: numbers of places of x and of the result, the batch counted in.
        inner, outer: channels.
        kernel: entries of the kernel for a pair of channels.
        rank: of the branch.
        groups: of the convolution.
        in_rows: channels are the innermost axis in memory.
    """

    pixels: int
    places: int
    inner: int
    outer: int
    kernel: int
    rank: int
    groups: int = 1
    in_rows: bool = False

    @property
    def weight(self) -> int:
        """Entries of the weight."""
        return self.outer * self.inner // self.groups * self.kernel

    @property
    def work(self) -> int:
        """Multiply-adds of the op."""
        return self.places * self.weight

    @property
    def is_product(self) -> bool:
        """Whether the branch computes it as a product, see `lorasc_fx.branch.low_rank`."""
        return self.kernel == 1 and self.groups == 1 and self.pixels == self.places


Use = LinearUse | ConvUse


def beside(rates: Rates, use: Use, sharing: int = 1) -> float:
    """Return the seconds of a branch beside its op.

    Args:
        rates: of the machine.
        use: what the op computes.
        sharing: number of branches that share one product of the input; this one's part of it is counted.
    """
    if isinstance(use, ConvUse):
        return rates.seconds("call", 0) + _conv_beside(rates, use)
    read, made, rank = use.tokens * use.inner, use.tokens * use.outer, use.rank
    common = rates.seconds("add", read)
    common += sum(rates.seconds(op, read, rank * sharing) for op in ("down", "raise", "gradient"))
    alone = rates.seconds("call", 0) + sum(rates.seconds(op, made, rank) for op in ("up", "down", "gradient"))
    return alone + common / sharing


def merged(rates: Rates, use: Use) -> float:
    """Return the seconds of a branch that is merged into its op."""
    if isinstance(use, ConvUse):
        return rates.seconds("call", 0) + _conv_merged(rates, use)
    read, made, rank = use.tokens * use.inner, use.tokens * use.outer, use.rank
    seconds = rates.seconds("call", 0)
    seconds += sum(rates.seconds(op, entries, rank) for op in ("down", "gradient") for entries in (read, made))
    merging = rates.seconds("merge", use.inner * use.outer, rank)
    return seconds + merging + (merging if use.tokens >= use.outer else rates.seconds("up", read, rank))


def _conv_beside(rates: Rates, use: ConvUse) -> float:
    read, made = use.pixels * use.inner, use.places * use.outer
    if use.groups > 1:
        passes = rates.seconds("depthwise", use.work)
        return passes + rates.seconds("add", read) + rates.seconds("add", made) + _grouped(rates, use)
    up = rates.seconds("up" if use.in_rows else "image_up", made, use.rank)
    return up + _over_x(rates, use, "raise") + rates.seconds("add", read) + _factors(rates, use)


def _conv_merged(rates: Rates, use: ConvUse) -> float:
    merging = rates.seconds("merge", use.weight, use.rank)
    if use.in_rows:  # the delta is made apart, in the weight's memory format
        merging += rates.seconds("add", use.weight)
    return 2 * merging + (_grouped(rates, use) if use.groups > 1 else _factors(rates, use))


def _grouped(rates: Rates, use: ConvUse) -> float:
    """Return the seconds of the factors' gradients from that of the whole kernel."""
    return rates.seconds("depthwise", use.work / 2) + 2 * rates.seconds("gradient", use.weight, use.rank)


def _factors(rates: Rates, use: ConvUse) -> float:
    """Return the seconds of `A x`, `B^T slope` and the factors' gradients."""
    over_y = sum(
        rates.seconds(op if use.in_rows else f"image_{op}", use.places * use.outer, use.rank)
        for op in ("down", "gradient")
    )
    return over_y + _over_x(rates, use, "down") + _over_x(rates, use, "gradient")


def _over_x(rates: Rates, use: ConvUse, op: str) -> float:
    """Return the seconds of an operation between the input's channels and `rank` channels."""
    if not use.is_product:
        return rates.seconds(f"kernel_{op}", use.places * use.inner * use.kernel, use.rank)
    return rates.seconds(op if use.in_rows else f"image_{op}", use.pixels * use.inner, use.rank)


_INPUT = {"addmm": 1, "baddbmm": 1, "addbmm": 1}
"""Where the first factor of a product stands, if not first."""
PRODUCTS = ("linear", "mm", "matmul", "bmm", "grouped_mm", "_grouped_mm", "grouped_mm_fallback", *_INPUT)
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
TRANSPOSED_CONVOLUTIONS = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
ATTENTION = "scaled_dot_product_attention"


def use_at(x: Any, result: fx.Node, weight: tuple[int, ...], rank: int) -> Use | None:
    """Return what an op with a weight of this shape computes of the node x; None where sizes are not known.

    Args:
        x: the op's input.
        result: node with the sizes of what the op computes.
        weight: shape; [out, in/groups, *kernel] for a convolution, a matrix for a product.
        rank: of the branch.
    """
    read = shape_of(x) if isinstance(x, fx.Node) else None
    made = shape_of(result)
    if not read or not made or 0 in read or 0 in made:
        return None
    if len(weight) == 2:
        return LinearUse(math.prod(read[:-1]), read[-1], made[-1], rank)
    if len(read) != len(weight) or len(made) != len(weight):
        return None
    return ConvUse(
        pixels=read[0] * math.prod(read[2:]),
        places=made[0] * math.prod(made[2:]),
        inner=read[1],
        outer=weight[0],
        kernel=math.prod(weight[2:]),
        rank=rank,
        groups=max(1, read[1] // weight[1]),
        in_rows=_in_rows(x, read),
    )


def work_of(node: fx.Node, name: str) -> int:
    """Return the multiply-adds of a node's forward, of an op of this name; 0 where it multiplies no matrices."""
    made = shape_of(node)
    shapes = [shape_of(arg) if isinstance(arg, fx.Node) else None for arg in node.args]
    first, second = _INPUT.get(name, 0), _INPUT.get(name, 0) + 1
    if made is None or len(shapes) <= second or shapes[first] is None or shapes[second] is None:
        return 0
    left, right = shapes[first], shapes[second]
    if not left or not right:
        return 0
    if name in PRODUCTS:
        return math.prod(made) * left[-1]
    if name in CONVOLUTIONS:
        return math.prod(made) * math.prod(right[1:])
    if name in TRANSPOSED_CONVOLUTIONS:
        return math.prod(left) * math.prod(right[1:])
    if name == ATTENTION:
        return math.prod(left[:-1]) * right[-2] * (left[-1] + made[-1])
    return 0


def dtype_of(node: Any) -> torch.dtype | None:
    """Return the dtype of a node's tensor, if it is known."""
    dtype = _noted(node, "dtype")
    return dtype if isinstance(dtype, torch.dtype) else None


def device_of(node: Any) -> torch.device | None:
    """Return the device of a node's tensor, if it is known."""
    device = _noted(node, "device")
    return device if isinstance(device, torch.device) else None


def _noted(node: Any, what: str) -> Any:
    values = (node.meta.get(name) for name in ("val", "example_value")) if isinstance(node, fx.Node) else ()
    return next((getattr(value, what, None) for value in values if isinstance(value, torch.Tensor)), None)


def _in_rows(x: fx.Node, shape: tuple[int, ...]) -> bool:
    """Whether the node's tensor [batch, channels, h, w] is in channels-last memory."""
    strides = _noted(x, "stride")
    if strides is None or len(shape) != 4 or shape[1] == 1 or shape[2] * shape[3] == 1:
        return False
    return bool(strides()[1] == 1)
