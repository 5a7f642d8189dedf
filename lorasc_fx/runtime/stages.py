"""The loop over stages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lorasc_fx.errors import SpecError
from lorasc_fx.runtime import transition
from lorasc_fx.runtime.optim import check_holds

if TYPE_CHECKING:
    from lorasc_fx.runtime.core import Core

__all__ = ["Stage", "run_stages"]


@dataclass(frozen=True)
class Stage:
    """A stage of a loop: its `number` in the cascade (the address of its noise), and its place, `index` of `count`."""

    number: int
    index: int
    count: int


def run_stages(core: Core, count: int, optimizer: torch.optim.Optimizer, scheduler: Any = None) -> Iterator[Stage]:
    """Check now, then yield the stages; a loop that is left early leaves its stage running."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise SpecError(f"stages({count!r}): give the number of stages, an integer of 1 or more")
    core.check_ready("stages")
    check_holds(optimizer, core.trainable())
    core.looped = True
    return _stages(core, count, optimizer, scheduler)


def _stages(core: Core, count: int, optimizer: torch.optim.Optimizer, scheduler: Any) -> Iterator[Stage]:
    with core.exclusive("stages"):
        transition.unpark(core)
    for index in range(1, count + 1):
        yield Stage(core.stage, index, count)
        with core.exclusive("transition"):
            transition.run(core, optimizer, park=index == count, then=scheduler.step if scheduler is not None else None)
