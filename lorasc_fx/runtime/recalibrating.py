"""Running statistics of batch norms for other weights: those that a stage gathered belong to the fast weights of then.

Source: torch.optim.swa_utils.update_bn (SWA, 1803.05407, section 3.2). It runs the model itself, not a captured graph,
in which the momentum of a batch norm is a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lorasc_fx.errors import StateError
from lorasc_fx.undo import AllOrNothing, Block, isolated, no_grad

if TYPE_CHECKING:
    from lorasc_fx.runtime.cascade import Cascade

__all__ = ["recalibrate"]


def recalibrate(cascade: Cascade, batches: Iterable[Any], call: Callable[[Cascade, Any], Any] | None) -> None:
    """Estimate the statistics for the weights in place; see `Cascade.recalibrate`."""
    core = cascade.core
    core.check_alive("recalibrate")
    norms = [each for each in cascade.model.modules() if isinstance(each, _BatchNorm) and each.running_mean is not None]
    if not norms:
        raise StateError("recalibrate: the model has no batch norm with running statistics, so there is nothing to do")
    if core.placed is None:
        with cascade.weights("fast"):
            _estimate(cascade, norms, batches, call or _first)
        return
    core.statistics = core.statistics or [(buffer, buffer.detach().clone()) for buffer in _buffers(norms)]
    _estimate(cascade, norms, batches, call or _first)


def _estimate(
    cascade: Cascade, norms: list[_BatchNorm], batches: Iterable[Any], call: Callable[[Cascade, Any], Any]
) -> None:
    held = [(buffer, buffer.detach().clone()) for buffer in _buffers(norms)]

    def put_back() -> None:
        for buffer, value in held:
            buffer.copy_(value)

    count = 0
    with no_grad(), _averaging(cascade, norms), AllOrNothing() as undo:
        undo(put_back)
        for norm in norms:
            norm.reset_running_stats()
        for batch in batches:
            call(cascade, batch)
            count += 1
        if not count:
            raise StateError("recalibrate: there is no batch to estimate statistics from; give one or more")


@isolated
def _averaging(undo: Block[Any], cascade: Cascade, norms: list[_BatchNorm]) -> None:
    """Let the norms take the mean over all batches, in train mode."""
    for module in cascade.modules():
        undo(partial(setattr, module, "training", module.training))
    for norm in norms:
        undo(partial(setattr, norm, "momentum", norm.momentum))
        norm.momentum = None
    cascade.train()


def _buffers(norms: Iterable[nn.Module]) -> list[torch.Tensor]:
    return [buffer for norm in norms for buffer in norm.buffers(recurse=False)]


def _first(cascade: Cascade, batch: Any) -> Any:
    """Run the cascade on a batch as update_bn does: of a tuple or list on its first entry."""
    if isinstance(batch, Mapping):
        return cascade(**batch)
    return cascade(batch[0] if isinstance(batch, (list, tuple)) else batch)
