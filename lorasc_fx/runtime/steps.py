"""noise.redraw = "step": after each step of the optimizer that trains the branches the weights get the next noise.

The tick is torch's own hook after an optimizer's step, so that any loop will do, compiled or not; a step that a loss
scaler skips is none. W_t is written anew from W0, S and the noise of (seed, stage, step, weight), rounded once: nothing
accumulates, and nothing is kept on the training device.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from lorasc_fx.runtime.slow import fill
from lorasc_fx.undo import Commit

if TYPE_CHECKING:
    from lorasc_fx.runtime.core import Core

__all__ = ["StepWatch"]


class StepWatch:
    """Waits for the steps of whichever optimizer holds the first branch; a copy (deepcopy, pickle) waits for none until
    it is armed.
    """

    def __init__(self) -> None:
        self._handle: Any = None

    def arm(self, core: Core) -> None:
        """Redraw the noise of this core after each step, as long as it lives."""
        if self._handle is not None:
            return
        seen = weakref.ref(core)

        def after_step(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
            own = seen()
            if own is not None and _trains(optimizer, own):
                _redraw(own)

        self._handle = register_optimizer_step_post_hook(after_step)
        weakref.finalize(core, self._handle.remove)

    def disarm(self) -> None:
        """Wait no longer."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def __reduce__(self) -> tuple[type[StepWatch], tuple[()]]:
        return (StepWatch, ())


def _trains(optimizer: torch.optim.Optimizer, core: Core) -> bool:
    first = next((branch.lora_B for branch in core.by_key.values()), None)
    return any(each is first for group in optimizer.param_groups for each in group["params"])


def _redraw(core: Core) -> None:
    if core.slow.parked:
        return
    before, slow = core.plan, core.slow
    after = replace(before, step=before.step + 1)
    if core.placed is not None:  # inside weights(): the new noise comes with the way back
        core.plan = after
        return
    with Commit(core.lock) as undo:
        core.check_weights("noise.redraw")
        undo(core.restorer())
        fill(
            core.weights_by_name(),
            slow.states,
            lambda name, out: slow.write_resting(name, after, out),
            lambda name, out: slow.write_resting(name, before, out),
            undo,
        )
        core.note_weights()
        core.plan = after
