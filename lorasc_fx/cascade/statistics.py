"""Estimates the running statistics of batch norms for the weights in place."""

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
    """Return the batch norms of a model with running statistics.

    Raises:
        StateError: there is none.
    """
    modules = (module for module in model.modules() if isinstance(module, _BatchNorm))
    norms = [module for module in modules if module.running_mean is not None]
    if not norms:
        raise StateError(
            "recalibrate: the model has no batch norm with running statistics",
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
    """Set batch norms to the mean statistics over all batches. If anything raises, they stay as they were.

    Args:
        cascade: called on each batch, in train mode.
        norms: the batch norms of its model.
        batches: inputs.
        call: runs the cascade on a batch, by default like torch.optim.swa_utils.update_bn.
        running: a context manager in which the model itself can run.
    """
    before = [(buffer, buffer.detach().clone()) for norm in norms for buffer in norm.buffers(recurse=False)]

    def restore() -> None:
        for buffer, value in before:
            buffer.copy_(value)

    count = 0
    with torch.no_grad(), running, _averaging(cascade, norms), AllOrNothing() as undo:
        undo(restore)
        for norm in norms:  # without a momentum, statistics are the mean over all batches since the reset
            norm.reset_running_stats()
        for batch in batches:
            (call or _call_on_first)(cascade, batch)
            count += 1
        if not count:
            raise StateError("recalibrate: there is no batch. Give one or more", code="invalid-data")


@isolated
def _averaging(undo: Block, cascade: Any, norms: list[_BatchNorm]) -> None:
    """Let the norms compute the mean over all batches, in train mode."""
    undo(partial(setattr, cascade, "_eager", cascade._eager))
    cascade._eager = True  # run the model itself, also if the weights are sharded
    for module in cascade.modules():
        undo(partial(setattr, module, "training", module.training))
    for norm in norms:
        undo(partial(setattr, norm, "momentum", norm.momentum))
        norm.momentum = None
    cascade.train()


def _call_on_first(cascade: Any, batch: Any) -> Any:
    """Run the cascade on a batch like torch's update_bn: on the first entry of a tuple or list."""
    if isinstance(batch, Mapping):
        return cascade(**batch)
    return cascade(batch[0] if isinstance(batch, (list, tuple)) else batch)
