"""Seconds that a branch adds to a training step, by its shapes: the operations of `lorasc_fx.branch`, one by one.

Forward and backward, with the gradient of the input; what the op costs without a branch is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorasc_fx.cost.rates import Rates

__all__ = ["ConvUse", "LinearUse", "Use", "beside", "merged", "shared_gain"]


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
        """Whether the branch computes it as a product, see `lorasc_fx.branch.grid`."""
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
    own = rates.seconds("call", 0) + sum(rates.seconds(op, made, rank) for op in ("up", "down", "gradient"))
    return own + common / sharing


def merged(rates: Rates, use: Use) -> float:
    """Return the seconds of a branch that is merged into its op."""
    if isinstance(use, ConvUse):
        return rates.seconds("call", 0) + _conv_merged(rates, use)
    read, made, rank = use.tokens * use.inner, use.tokens * use.outer, use.rank
    seconds = rates.seconds("call", 0)
    seconds += sum(rates.seconds(op, each, rank) for op in ("down", "gradient") for each in (read, made))
    merging = rates.seconds("merge", use.inner * use.outer, rank)
    return seconds + merging + (merging if use.tokens >= use.outer else rates.seconds("up", read, rank))


def shared_gain(rates: Rates, uses: Sequence[LinearUse]) -> float:
    """Return the seconds that branches beside ops of one input save when they share one product of it."""
    return sum(beside(rates, use) - beside(rates, use, len(uses)) for use in uses)


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
