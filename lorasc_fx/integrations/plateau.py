"""When a loss has stopped falling."""

from __future__ import annotations

import math
from typing import Any

from lorasc_fx.errors import CheckpointError

__all__ = ["Plateau"]


class Plateau:
    """Counts evaluations in a row that have found no lower loss than the lowest of the stage.

    Args:
        patience: so many of them are a plateau.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self._lowest, self._count = math.inf, 0

    @property
    def reached(self) -> bool:
        """Whether the loss stands still."""
        return self._count >= self.patience

    def look(self, loss: float) -> None:
        """Take note of an evaluation; a loss that is nan is no lower one."""
        if loss < self._lowest:
            self._lowest, self._count = loss, 0
        else:
            self._count += 1

    def reset(self) -> None:
        """Begin anew, with a stage."""
        self._lowest, self._count = math.inf, 0

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"lowest": self._lowest if math.isfinite(self._lowest) else None, "count": self._count}

    def take(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned.

        Raises:
            CheckpointError: it is no such state.
        """
        lowest, count = state.get("lowest"), state.get("count")
        if type(count) is not int or count < 0 or not (lowest is None or isinstance(lowest, (int, float))):
            raise CheckpointError(f"the state of a plateau is {state!r:.100}; it needs a lowest loss and a count")
        self._lowest, self._count = math.inf if lowest is None else float(lowest), count
