"""A stage that ends early, where a metric gets no better."""

from __future__ import annotations

import math
from typing import Any, Literal

from lorasc_fx.errors import SpecError

__all__ = ["Plateau"]


class Plateau:
    """Tells when a stage is over: after more than `patience` reports in a row that were not better than the best.

    By the rule of torch's ReduceLROnPlateau. The stage that follows begins without a best::

        plateau = lx.Plateau(patience=2)
        for stage in cascade.stages(5, optimizer):
            for epoch in range(20):
                ...
                if plateau.over(validation_loss):
                    break

    Args:
        patience: reports without an improvement that a stage stands, 0 or more.
        threshold: how much better a report has to be: a share of the best (`rel`), or a difference (`abs`).
        mode: `min` for a metric that falls, `max` for one that rises.
        threshold_mode: `rel` or `abs`.

    Raises:
        SpecError: a value that cannot be meant.
    """

    def __init__(
        self,
        patience: int = 2,
        threshold: float = 1e-4,
        mode: Literal["min", "max"] = "min",
        threshold_mode: Literal["rel", "abs"] = "rel",
    ) -> None:
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 0:
            raise SpecError(f"Plateau: patience is {patience!r}; give a number of reports, an integer of 0 or more")
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold < math.inf:
            raise SpecError(f"Plateau: threshold is {threshold!r}; give a finite number of 0 or more")
        if mode not in ("min", "max"):
            raise SpecError(f"Plateau: mode is {mode!r}; give 'min' or 'max'")
        if threshold_mode not in ("rel", "abs"):
            raise SpecError(f"Plateau: threshold_mode is {threshold_mode!r}; give 'rel' or 'abs'")
        self.patience, self.threshold, self.mode, self.threshold_mode = patience, threshold, mode, threshold_mode
        self.best: float | None = None
        self.waited = 0

    def over(self, metric: Any) -> bool:
        """Report a metric, a number or a tensor of one; return whether the stage is over.

        An inf or nan is no improvement. After True everything is forgotten, for the next stage.
        """
        value = float(metric)
        if math.isfinite(value) and (self.best is None or self._better(value, self.best)):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        if self.waited <= self.patience:
            return False
        self.best, self.waited = None, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return best and count, for `lx.save(extra=...)`."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.best, self.waited = state["best"], state["waited"]

    def _better(self, value: float, best: float) -> bool:
        margin = self.threshold * (best if self.threshold_mode == "rel" else 1.0)
        return value < best - margin if self.mode == "min" else value > best + margin
