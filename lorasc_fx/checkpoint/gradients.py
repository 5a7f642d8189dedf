"""Gradients in a checkpoint: a run that is saved between backward and step, or accumulates, loses none."""

from __future__ import annotations

import torch

from lorasc_fx.cascade.commit import Gradients, Planned
from lorasc_fx.cascade.run import Run
from lorasc_fx.checkpoint.reader import Checkpoint
from lorasc_fx.errors import CheckpointError

_PREFIX = "gradient/"


def gradients_in(run: Run) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return copies of the gradients, by their names in a checkpoint, and which parameters' no step has used."""
    trainable = run.trainable()
    tensors = {
        f"{_PREFIX}{name}": parameter.grad.detach().clone()
        for name, parameter in trainable.items()
        if parameter.grad is not None
    }
    return tensors, run.pending.waiting(trainable)


def gradients_of(run: Run, checkpoint: Checkpoint) -> Planned:
    """Return the commit of the gradients that a checkpoint holds, to which a cascade was restored.

    Raises:
        CheckpointError: a gradient of no parameter that is trained here, or of another shape or dtype than its own.
    """
    where, parameters, values = checkpoint.path, run.trainable(), {}
    for key, tensor in checkpoint.tensors.items():
        if not key.startswith(_PREFIX):
            continue
        name = key.removeprefix(_PREFIX)
        parameter = parameters.get(name)
        if parameter is None:
            raise CheckpointError(f"{where}: {key!r} is of no parameter that is trained")
        if parameter.shape != tensor.shape or parameter.dtype != tensor.dtype:
            raise CheckpointError(
                f"{where}: {key!r} is {tuple(tensor.shape)} {tensor.dtype}, its parameter "
                f"{tuple(parameter.shape)} {parameter.dtype}; it is not of this run"
            )
        values[name] = tensor
    gradients = Gradients(values, checkpoint.manifest.get("unapplied_gradients", ()))
    return Planned(run.plan, run.slow, gradients=gradients)
