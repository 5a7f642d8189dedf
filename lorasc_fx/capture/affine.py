"""Whole numbers that are affine in an index, and conditions on them: what a mask made of sizes holds at every size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

__all__ = ["ALWAYS", "NEVER", "Form", "Truth", "Value"]


@dataclass(frozen=True)
class Form:
    """A whole number for each index: `start + sum(slope * index)`.

    Args:
        slopes: pairs of an axis, counted from the last one (-1), and its slope; none is zero.
        start: the number where all indices are zero.
    """

    slopes: tuple[tuple[int, int], ...] = ()
    start: int = 0

    @staticmethod
    def of(slopes: Mapping[int, int], start: int) -> Form:
        """Return the form of these slopes by axis."""
        return Form(tuple(sorted((axis, slope) for axis, slope in slopes.items() if slope)), start)

    def plus(self, other: Form, factor: int = 1) -> Form:
        """Return the sum with a multiple of another one."""
        slopes = dict(self.slopes)
        for axis, slope in other.slopes:
            slopes[axis] = slopes.get(axis, 0) + factor * slope
        return Form.of(slopes, self.start + factor * other.start)

    def moved(self, place: Callable[[int], int]) -> Form:
        """Return the form with its axes in other places."""
        return Form.of({place(axis): slope for axis, slope in self.slopes}, self.start)

    def first(self, axis: int) -> Form:
        """Return the form at the first index of an axis."""
        return Form(tuple((each, slope) for each, slope in self.slopes if each != axis), self.start)

    @property
    def reduced(self) -> Form:
        """The form with the smallest slopes that is negative at the same indices."""
        common = math.gcd(*(slope for _, slope in self.slopes)) or 1
        return Form(tuple((axis, slope // common) for axis, slope in self.slopes), self.start // common)

    @property
    def never_negative(self) -> bool:
        """Whether it is zero or more at every index."""
        return self.start >= 0 and all(slope > 0 for _, slope in self.slopes)

    @property
    def always_negative(self) -> bool:
        """Whether it is below zero at every index."""
        return self.start < 0 and all(slope < 0 for _, slope in self.slopes)


@dataclass(frozen=True)
class Truth:
    """True where none of the forms is negative: everywhere, if there is none."""

    conditions: frozenset[Form] = frozenset()

    @staticmethod
    def of(conditions: Iterable[Form]) -> Truth:
        """Return the truth of these conditions, without those that always hold."""
        left = frozenset(each.reduced for each in conditions if not each.never_negative)
        return NEVER if any(each.always_negative for each in left) else Truth(left)

    def over(self, change: Callable[[Form], Form]) -> Truth:
        """Return the truth with each condition changed."""
        return Truth.of(map(change, self.conditions))


NEVER = Truth(frozenset({Form((), -1)}))
ALWAYS = Truth()
Value = Form | Truth
