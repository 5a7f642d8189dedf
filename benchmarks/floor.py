"""The floor by operations: what the low-rank products add to a step, if flops were all that costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lorasc_fx import Site

from .sites import Recorder

__all__ = ["floor_ratio", "low_rank_flops", "step_flops"]


def step_flops(step: Callable[[], None]) -> int:
    """Return the flops of a step."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def low_rank_flops(forward: Callable[[], torch.Tensor], model: nn.Module, sites: Sequence[Site]) -> int:
    """Return the flops of the branches of a step: `x A` and its product with B forward, twice as many backward.

    Of a product with F flops and n output entries of `out` features, A takes F * r / out and B takes 2 * n * r.

    Args:
        forward, model: of the frozen model.
        sites: those of a cascade over it.

    Raises:
        RuntimeError: a site met no product.
    """
    recorder = Recorder(model, sites)
    with recorder:
        forward()
    recorder.check_all_met()
    return 3 * sum(
        meeting.flops * meeting.site.rank // meeting.features + 2 * meeting.size * meeting.site.rank
        for meeting in recorder.meetings
    )


def floor_ratio(
    step: Callable[[], None], forward: Callable[[], torch.Tensor], model: nn.Module, sites: Sequence[Site]
) -> float:
    """Return (flops of a frozen step + those of the branches) / flops of a frozen step."""
    frozen = step_flops(step)
    return (frozen + low_rank_flops(forward, model, sites)) / frozen
