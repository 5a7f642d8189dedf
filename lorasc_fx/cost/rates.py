"""How fast a machine does the operations that branches are made of: a line for each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["OPS", "Line", "Rates", "usual"]

OPS = (
    *("down", "up", "raise", "gradient"),  # over rows [tokens, features], as in branch/skinny.py
    *("image_down", "image_up", "image_raise", "image_gradient"),  # over images [batch, channels, *space]
    *("kernel_down", "kernel_raise", "kernel_gradient"),  # convolutions with `rank` channels, over unfolded images
    *("merge", "add"),  # a weight with its delta; a gradient to another, in place
    "call",  # what a branch's forward and backward take whatever its size
    *("dense", "convolve", "depthwise"),  # by multiply-adds: a product; a convolution and its input's gradient
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
    def from_json(cls, found: Any) -> Rates | None:
        """Return the rates of what `to_json` returned; None for anything else."""
        if not isinstance(found, dict) or set(found) != set(OPS):
            return None
        for numbers in found.values():
            if not isinstance(numbers, list) or len(numbers) != 3:
                return None
            if not all(isinstance(each, (int, float)) and math.isfinite(each) and each >= 0 for each in numbers):
                return None
        return cls({op: Line(*map(float, found[op])) for op in OPS})


_USUAL = {
    **dict.fromkeys(("down", "gradient", "image_down", "image_gradient"), (3e-6, 0.18e-9, 0.020e-9)),
    **dict.fromkeys(("up", "raise", "image_up", "image_raise"), (3e-6, 0.25e-9, 0.019e-9)),
    **dict.fromkeys(("kernel_down", "kernel_raise", "kernel_gradient"), (2e-5, 0.05e-9, 0.020e-9)),
    "merge": (3e-6, 0.15e-9, 0.016e-9),
    "add": (2e-6, 0.08e-9, 0.0),
    "call": (1.5e-4, 0.0, 0.0),
    "dense": (5e-6, 0.015e-9, 0.0),
    "convolve": (2e-5, 0.035e-9, 0.0),
    "depthwise": (2e-5, 0.5e-9, 0.0),
}
"""Lines of one core of a server of 2023, AVX2, fp32."""


def usual(threads: int) -> Rates:
    """Return the rates of a usual machine, for one that is too busy to be measured."""
    lines = {op: Line(start, entry / threads, product / threads) for op, (start, entry, product) in _USUAL.items()}
    return Rates(lines, guessed=True)
