"""What a value that a user or a file gave may be: an integer, or a finite number. A bool is neither."""

from __future__ import annotations

import math
from typing import TypeGuard


def is_integer(value: object, least: int) -> TypeGuard[int]:
    """Whether a value is an integer of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a finite number that a float holds exactly."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value) and float(value) == value
    except OverflowError:
        return False
