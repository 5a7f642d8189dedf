"""Running statistics of batch norms, estimated anew for the weights that are in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lorasc_fx.errors import StateError
from lorasc_fx.util.undo import AllOrNothing, Block, isolated


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms of a model that keep running statistics.

    Raises:
        StateError: there is none.
    """
    modules = (module for module in model.modules() if isinstance(module, _BatchNorm))
    norms = [module for module in modules if module.running_mean is not None]
    if not norms:
        raise StateError(
            "recalibrate: the model has no batch norm with running statistics, so there is nothing to do",
            code="not-available",
        )
    return norms


def estimate(
    cascade: Any,
    norms: list[_BatchNorm],
    batches: Iterable[Any],
    call: Callable[[Any, Any], Any] | None,
    running: AbstractContextManager[Any],
) -> None:
    """Give batch norms the mean statistics over all batches; whatever raises, they are as they were.

    Args:
        cascade: is called on each batch, in train mode.
        norms: of its model.
        batches: of inputs.
        call: runs the cascade on a batch; by default as torch.optim.swa_utils.update_bn does.
        running: in which the cascade runs the model itself.
    """
    before = [(buffer, buffer.detach().clone()) for norm in norms for buffer in norm.buffers(recurse=False)]

    def restore() -> None:
        for buffer, value in before:
            buffer.copy_(value)

    count = 0
    with torch.no_grad(), running, _averaging(cascade, norms), AllOrNothing() as undo:
        undo(restore)
        for norm in norms:
            norm.reset_running_stats()
        for batch in batches:
            (call or _call_on_first)(cascade, batch)
            count += 1
        if not count:
            raise StateError(
                "recalibrate: there is no batch to estimate statistics from; give one or more", code="invalid-data"
            )


@isolated
def _averaging(undo: Block, cascade: Any, norms: list[_BatchNorm]) -> None:
    """Let the norms take the mean over all batches, in train mode."""
    undo(partial(setattr, cascade, "_eager", cascade._eager))
    cascade._eager = True  # on shards, too, the model itself runs
    for module in cascade.modules():
        undo(partial(setattr, module, "training", module.training))
    for norm in norms:
        undo(partial(setattr, norm, "momentum", norm.momentum))
        norm.momentum = None
    cascade.train()


def _call_on_first(cascade: Any, batch: Any) -> Any:
    """Run the cascade on a batch as torch's update_bn does: of a tuple or list on its first entry."""
    if isinstance(batch, Mapping):
        return cascade(**batch)
    return cascade(batch[0] if isinstance(batch, (list, tuple)) else batch)
