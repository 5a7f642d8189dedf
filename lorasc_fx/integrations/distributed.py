"""Checkpoints of a cascade that several processes train together, under torch's DistributedDataParallel.

The wrapper needs nothing of ours: `DistributedDataParallel(cascade)`. Noise and fresh factors are functions of (seed,
stage, weight name), so that every process computes the same transition by itself. Here is what a run needs that one of
its processes may leave: one of them writes, all of them read, and an error of one is an error of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lorasc_fx.adapt import load as load_alone
from lorasc_fx.errors import CheckpointError, StateError
from lorasc_fx.integrations.processes import RANKS, agreed, gathered, reseed, streams, text_of_rank_0, texts
from lorasc_fx.runtime import Cascade
from lorasc_fx.runtime import save as save_alone

__all__ = ["load", "resume", "save"]


def save(
    cascade: nn.Module,
    folder: str | PathLike[str],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    extra: Mapping[str, Any] | None = None,
    keep: int = 1,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write a checkpoint of what all processes hold alike: rank 0 writes as `lorasc_fx.save` does, the others wait.

    Every process calls it, between two steps. The random generators of each process are written too.

    Args:
        cascade: or the DistributedDataParallel around it.
        folder, optimizer, scheduler, extra, keep: as for `lorasc_fx.save`; those of rank 0 are written.
        group: of the processes that train together; all of them by default.

    Returns:
        The folder of the new version, on every process.

    Raises:
        StateError: a process group is wanted and there is none; gradients wait for a step, as each process may hold
            others; or another process has failed or is gone.
        CheckpointError, SpecError, NonFiniteBranch: as `lorasc_fx.save`, on rank 0. What was there stays.
    """
    own, rank = _cascade_of(cascade, "save"), _rank("save", group)
    waiting = own._run.pending.waiting(own._run.trainable())
    if waiting:
        raise StateError(
            f"save: gradients wait for a step on {waiting[0]}, and each process may hold others; call it between "
            "optimizer.step() and the next backward",
            code="gradients-pending",
        )
    whole = {**(extra or {}), RANKS: gathered(streams(), group, "save")}
    path = ""
    with agreed("save", group):
        if rank == 0:
            path = str(save_alone(own, folder, optimizer=optimizer, scheduler=scheduler, extra=whole, keep=keep))
    return Path(text_of_rank_0(path, group, "save"))


def load(
    folder: str | PathLike[str],
    model: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    base: str | PathLike[str] = "memory",
    group: dist.ProcessGroup | None = None,
) -> Cascade:
    """Adapt a base model as the newest checkpoint in a folder has it, on every process; see `lorasc_fx.load`.

    The number of processes may be another one than that of the run which saved. Wrap the cascade then, and call
    `resume` with the wrapper.

    Args:
        folder: that every process sees.
        model, args, kwargs, base: as for `lorasc_fx.load`.
        group: of the processes that train together; all of them by default.

    Raises:
        StateError: there is no process group, another process has failed or is gone, or the processes have read
            different versions. Where it was another that failed, the model stays adapted here.
        CheckpointError, SpecError: as `lorasc_fx.load`.
    """
    _rank("load", group)
    with agreed("load", group):
        cascade = load_alone(folder, model, args, kwargs, base=base)
    found = cascade._loaded.path.name if cascade._loaded is not None else ""
    names = texts(found, group, "load")
    if len(set(names)) > 1:
        raise StateError(
            f"load: the processes have read different versions of {folder}: {', '.join(names)}, by rank; give a folder "
            "that all of them see, and let nobody write into it meanwhile",
            code="versions-differ",
        )
    return cascade


def resume(
    wrapper: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    *,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """After `load`: give optimizer, scheduler and random generators their saved state; return `extra`.

    On as many processes as saved, each gets its own generators back. On another number each gets a stream of its own,
    which is a function of what rank 0 had saved, of the rank and of the number.

    Args:
        wrapper: the DistributedDataParallel around the loaded cascade, so that it was made before any weight gathers
            a gradient for restart_A="gradient".
        optimizer, scheduler: built as those that were saved.
        group: of the processes that train together; all of them by default.

    Raises:
        StateError: the cascade is not wrapped, or was not loaded, or another process has failed or is gone.
        CheckpointError: as `Cascade.resume`, or the checkpoint was written by `lorasc_fx.save`, from one process.
    """
    rank = _rank("resume", group)
    if not isinstance(wrapper, DistributedDataParallel):
        raise StateError(
            f"resume: this is {type(wrapper).__name__}; wrap what load returned in DistributedDataParallel first, and "
            "give the wrapper",
            code="wrong-wrapper",
        )
    own = _cascade_of(wrapper, "resume")
    with agreed("resume", group):
        extra = own.resume(optimizer, scheduler)
        held = extra.pop(RANKS, None)
        if not isinstance(held, list):
            raise CheckpointError(
                "resume: this checkpoint was not written by lorasc_fx.integrations.distributed.save; call "
                "cascade.resume(optimizer), and seed each process yourself",
                code="saved-otherwise",
            )
        reseed(held, rank, dist.get_world_size(group), own._run.stage)
    return extra


def _cascade_of(model: nn.Module, call: str) -> Cascade:
    """Return the cascade, out of its wrapper if there is one."""
    inside = model.module if isinstance(model, DistributedDataParallel) else model
    if not isinstance(inside, Cascade):
        raise StateError(
            f"{call}: this is {type(inside).__name__}; give a cascade, or DistributedDataParallel(cascade)",
            code="wrong-wrapper",
        )
    return inside


def _rank(call: str, group: dist.ProcessGroup | None) -> int:
    if not dist.is_available() or not dist.is_initialized():
        raise StateError(
            f"{call}: no process group is there; start the processes by torchrun and call "
            f"torch.distributed.init_process_group, or use lorasc_fx.{call} in a single one",
            code="no-process-group",
        )
    return dist.get_rank(group)
