"""What stands around the cascade's class: the signature that it shows, and the call that saves it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorasc_fx.errors import path_of
from lorasc_fx.runtime import checkpoint_write
from lorasc_fx.runtime.cascade import Cascade

__all__ = ["cascade_class", "save"]


def cascade_class(model: nn.Module, signature: inspect.Signature) -> type[Cascade]:
    """Return Cascade with a forward that shows the model's signature, which trainers and tracers read."""

    def forward(self: Cascade, *args: Any, **kwargs: Any) -> Any:
        return Cascade.forward(self, *args, **kwargs)

    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    shown = signature.replace(parameters=[first, *signature.parameters.values()])
    vars(forward)["__signature__"] = shown
    vars(forward)["__wrapped__"] = inspect.unwrap(type(model).forward)  # whose names of arguments torch.fx reads
    forward.__doc__ = Cascade.forward.__doc__
    return type("Cascade", (Cascade,), {"forward": forward, "__module__": __name__, "__doc__": Cascade.__doc__})


def save(
    cascade: Cascade,
    folder: str | PathLike[str],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    extra: Mapping[str, Any] | None = None,
    keep: int = 1,
) -> Path:
    """Write what a resume needs as a new version in `folder`, and drop versions older than the last `keep`.

    A process that is killed at any moment leaves versions that are whole: the new one counts from the moment at which
    it is on disk, and the old one goes after that. Gradients that wait for a step, and the states of the random
    generators of torch, python, numpy and CUDA, are written too; `Cascade.resume` gives them back.

    Args:
        cascade: whose branches, experts, coefficients, trained parameters and buffers are written.
        optimizer, scheduler: whose state is written.
        extra: anything of yours that JSON holds, and tensors in it: the number of steps done (the position in the
            stage, and in the data of `shuffled_batches`), the state of a loader or a GradScaler, an average of weights.
        keep: number of versions that stay.

    Returns:
        The folder of the new version.

    Raises:
        CheckpointError: the folder cannot be written, another save writes into it, or extra or scheduler hold what
            neither JSON nor safetensors can. What was there stays.
        SpecError: keep is less than 1.
        StateError: after `release`, inside `weights`, or inside a backward.
    """
    with cascade.core.exclusive("save"):
        return checkpoint_write.write_version(
            cascade.core, path_of(folder), optimizer, scheduler, dict(extra or {}), keep
        )
