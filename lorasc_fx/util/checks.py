"""Type checks of values from users and files. A bool counts neither as an integer nor as a number."""

from __future__ import annotations

import math
from typing import TypeGuard


def is_integer(value: object, minimum: int) -> TypeGuard[int]:
    """Whether a value is an integer of at least `minimum`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a finite number that can be converted to a float without rounding."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value) and float(value) == value
    except OverflowError:
        return False
