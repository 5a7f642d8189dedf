"""The values that branches and slow states exchange: factors, deltas, and how each tensor lies beside its weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from functools import cached_property
from typing import Any, Self

import torch


class Side(Enum):
    """How a tensor of the state lies beside its weight, which is stored as [rows, columns], or as a stack of these."""

    WEIGHT = "as the weight is"
    LEFT = "[rows, rank]"
    RIGHT = "[rank, columns]"
    OUT = "[out]"

    def axis(self, along: int, stacked: bool, transposed: bool) -> int | None:
        """Return the axis along which such a tensor is sharded if the weight is; None if it is not sharded.

        Args:
            along: axis of the weight.
            stacked, transposed: how the weight is stored.
        """
        lead = 1 if stacked else 0
        if self is Side.OUT:
            return 0 if along == lead + transposed else None
        if self is Side.WEIGHT or along < lead:
            return along
        return along if (along == lead) == (self is Side.LEFT) else None


class Tree:
    """A frozen dataclass with tensors, or tuples or tables of them, in fields whose metadata has a `Side`, and in
    fields that are trees.
    """

    def map(self, change: Callable[[torch.Tensor, Side], torch.Tensor]) -> Self:
        """Return a copy with every tensor changed. A tensor that occurs twice is changed once and stays shared."""
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
            return made(value) if isinstance(value, Tree) else value

        def made(tree: Any) -> Any:
            return replace(
                tree, **{item.name: walk(getattr(tree, item.name), item.metadata.get(Side)) for item in fields(tree)}
            )

        mapped: Self = made(self)
        return mapped


@dataclass(frozen=True)
class Factors(Tree):
    """`b` [rows, r] with the branch's scale folded in, and `a` [r, columns]: `b @ a` is added to the weight as stored.

    For stacked experts both have the axis of experts before.
    """

    b: torch.Tensor = field(metadata={Side: Side.LEFT})
    a: torch.Tensor = field(metadata={Side: Side.RIGHT})

    @property
    def rank(self) -> int:
        """Number of columns of `b`."""
        return self.b.shape[-1]

    @cached_property
    def bound(self) -> float:
        """A number that no entry of `b @ a` exceeds: the product of their norms (Cauchy and Schwarz)."""
        b, a = (torch.linalg.vector_norm(factor.cpu(), dtype=torch.float64).item() for factor in (self.b, self.a))
        return b * a if math.isfinite(b * a) else math.inf


@dataclass(frozen=True)
class Delta(Tree):
    """The change of a weight W in a stage: the weight becomes `diag(gain) (W + b @ a + dense)`.

    Args:
        factors: the low-rank term, with the branch's scale folded in; None if there is none.
        dense: the dense term, in the shape of the weight; None if there is none.
        gain: factor of each row [out], in fp64 on the host (DoRA); None for 1.
    """

    factors: Factors | None = None
    dense: torch.Tensor | None = field(default=None, metadata={Side: Side.WEIGHT})
    gain: torch.Tensor | None = field(default=None, metadata={Side: Side.OUT})


@dataclass(frozen=True)
class InitialFactors(Tree):
    """Where a stage started if its branch is not zero there, in fp64 on the host.

    Args:
        factors: the low-rank term that was subtracted from the weight (PiSSA, OLoRA, MiLoRA).
        magnitude: the row norms [out] of DoRA.
    """

    factors: Factors | None = None
    magnitude: torch.Tensor | None = field(default=None, metadata={Side: Side.OUT})
