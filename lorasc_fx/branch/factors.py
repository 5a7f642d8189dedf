"""Values that branches and slow weights exchange: factors, deltas, and which axes of a weight their axes match."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from functools import cached_property
from typing import Any, Self

import torch


class Side(Enum):
    """Which axes of a weight [rows, columns] the axes of a tensor match. This decides how the tensor is sharded.

    Stacked experts have their axis first, in the weight and in the tensor, except `OUT`.
    """

    WEIGHT = "[rows, columns]"
    LEFT = "[rows, rank]"
    RIGHT = "[rank, columns]"
    OUT = "[out]"

    def axis(self, along: int, stacked: bool, transposed: bool) -> int | None:
        """Return the axis along which a tensor is sharded if its weight is sharded, or None if every rank has all of
        it.

        Args:
            along: axis along which the weight is sharded.
            stacked, transposed: layout of the weight.
        """
        lead = 1 if stacked else 0
        if self is Side.OUT:
            return 0 if along == lead + transposed else None
        if self is Side.WEIGHT or along < lead:
            return along
        return along if (along == lead) == (self is Side.LEFT) else None


class Tree:
    """Base class of frozen dataclasses with tensors, with one `map` over all of them.

    Fields with tensors, or with tuples or mappings of tensors, have a `Side` in their metadata. Other fields may be
    trees themselves.
    """

    def map(self, change: Callable[[torch.Tensor, Side], torch.Tensor]) -> Self:
        """Return a copy in which `change` replaces every tensor. A tensor that occurs twice stays shared."""
        done: dict[int, Any] = {}

        def walk(value: Any, side: Side | None) -> Any:
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
        return mapped


@dataclass(frozen=True)
class Factors(Tree):
    """A low-rank delta `b @ a` in the layout of the weight: `b` [rows, r] includes the scale, and `a` is [r, columns].

    For stacked experts, both have the axis of experts first.
    """

    b: torch.Tensor = field(metadata={Side: Side.LEFT})
    a: torch.Tensor = field(metadata={Side: Side.RIGHT})

    @property
    def rank(self) -> int:
        """Number of columns of `b`."""
        return self.b.shape[-1]

    @cached_property
    def bound(self) -> float:
        """An upper bound for the absolute entries of `b @ a`: the product of the norms (Cauchy-Schwarz)."""
        b, a = (torch.linalg.vector_norm(factor.cpu(), dtype=torch.float64).item() for factor in (self.b, self.a))
        return b * a if math.isfinite(b * a) else math.inf


@dataclass(frozen=True)
class Delta(Tree):
    """The change of a weight W by a branch: the weight becomes `diag(gain) (W + b @ a + dense)`.

    Args:
        factors: the low-rank term, or None.
        dense: the dense term in the shape of the weight, or None.
        gain: factor of each row [out] (DoRA), in fp64 in host memory. None means 1.
    """

    factors: Factors | None = None
    dense: torch.Tensor | None = field(default=None, metadata={Side: Side.WEIGHT})
    gain: torch.Tensor | None = field(default=None, metadata={Side: Side.OUT})


@dataclass(frozen=True)
class InitialFactors(Tree):
    """Initial values of a branch whose delta was not zero at the start of a stage, in fp64 in host memory.

    Args:
        factors: the delta that was subtracted from the weight (PiSSA, OLoRA, MiLoRA), or None.
        magnitude: the initial row norms [out] of DoRA, or None.
    """

    factors: Factors | None = None
    magnitude: torch.Tensor | None = field(default=None, metadata={Side: Side.OUT})
