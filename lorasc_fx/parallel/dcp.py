"""State dicts of cascades for torch.distributed.checkpoint (DCP).

The state dict has the content of a checkpoint from `lorasc_fx.save`, as a flat dictionary of tensors. The manifest is
encoded as one of them. Sharded tensors are DTensors of the local shards, so that no rank gathers anything.

The number of tensors depends on the number of ended stages. So `load` reads their names and sizes from the metadata of
the checkpoint, and then validates the content like a checkpoint folder.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.tensor import DTensor, Replicate, Shard

from lorasc_fx.adapt import load as load_checkpoint
from lorasc_fx.cascade import run_of
from lorasc_fx.cascade.training import Optimizers, optimizers_of
from lorasc_fx.checkpoint import saved
from lorasc_fx.checkpoint.content import Content, Stateful, gathered_random_states, several
from lorasc_fx.checkpoint.files import KEY, digest_of, packed
from lorasc_fx.checkpoint.reader import from_state_dict
from lorasc_fx.errors import CheckpointError
from lorasc_fx.facade import Cascade

__all__ = ["load", "state_dict"]


def state_dict(
    cascade: Cascade,
    *,
    optimizer: Optimizers | None = None,
    scheduler: Stateful | Sequence[Stateful] | None = None,
    extra: Mapping[str, object] | None = None,
) -> dict[str, torch.Tensor]:
    """Return the state dict of a cascade, for `torch.distributed.checkpoint.save` or `async_save`.

    It has the content of a checkpoint from `lorasc_fx.save`. The tensors are copies, so training may continue while
    `async_save` writes them. Then pass a separate process group (`process_group=torch.distributed.new_group()`) to
    `async_save`. If the weights are sharded, every rank must call this, between two optimizer steps.

    Args:
        cascade: a cascade, sharded or not.
        optimizer, scheduler, extra: as in `lorasc_fx.save`.

    Returns:
        Tensors by name. Sharded tensors are DTensors. All other tensors are on rank 0 only.

    Raises:
        CheckpointError, StateError, NonFiniteBranch: as in `lorasc_fx.save`.
    """
    run, call = run_of(cascade), "state_dict"
    group = run.slow.group
    # Check everything before any rank copies or sends tensors.
    with group.agreed(call):
        run.check_ready(call, sharded=True, keeps=True)
        if not group.is_alone:
            saved.check_between_steps(run, call)
        saved.check_finite(run)
    rng = gathered_random_states(group, call)
    with group.agreed(call):
        content = Content.of(run, optimizers_of(call, optimizer), several(scheduler), extra, rng)
        tensors, manifest = saved.contents(content, run)
    axes: dict[str, int] = manifest["shards"]
    # Unsharded tensors are equal on all ranks, so rank 0 writes them.
    local_tensors = {name: value for name, value in tensors.items() if group.rank == 0 or name in axes}
    lengths = {name: local_tensors[name].shape[axis] for name, axis in axes.items()}
    ranks = [json.loads(text) for text in group.gather_text(json.dumps(lengths), call)]
    digests, order = group.gather_text(digest_of(local_tensors), call), group.first_replica
    mesh = next((value.device_mesh for value in cascade.parameters() if isinstance(value, DTensor)), None)
    replicated = [Replicate()] * (mesh.ndim - 1 if mesh is not None else 0)
    state: dict[str, torch.Tensor] = {}
    if group.rank == 0:
        state[KEY] = packed(manifest, [digests[rank] for rank in order])
    for name, value in local_tensors.items():
        if name not in axes:
            state[name] = value
            continue
        axis, shape = axes[name], list(value.shape)
        shape[axis] = sum(ranks[rank][name] for rank in order)
        stride = torch.empty(shape, device="meta").stride()
        state[name] = DTensor.from_local(
            value, mesh, [*replicated, Shard(axis)], run_check=False, shape=torch.Size(shape), stride=stride
        )
    return state


def load(
    reader: StorageReader,
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Cascade:
    """Restore a cascade from a checkpoint of torch.distributed.checkpoint, like `lorasc_fx.load`.

    The checkpoint may have been written by any number of ranks. Each rank that loads it gets the full, unsharded
    cascade. Then call `lorasc_fx.parallel.fsdp.shard`, and `cascade.resume` to restore the optimizer.

    Args:
        reader: a storage reader of torch.distributed.checkpoint. `FileSystemReader` unpickles the metadata, which can
            execute code, so use it only for your own checkpoints. `HuggingFaceStorageReader` reads safetensors, and
            cannot execute code.
        model, args, kwargs: as in `lorasc_fx.load`.
        options: `base`, as in `lorasc_fx.load`.

    Raises:
        CheckpointError: the checkpoint cannot be read, is not from a cascade, is damaged, or has another base model.
    """
    where = str(getattr(reader, "path", type(reader).__name__))
    try:
        entries = reader.read_metadata().state_dict_metadata
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)  # each rank reads all
            state_dict_loader.load(tensors, storage_reader=reader, no_dist=True)
    except Exception as fault:  # a reader of any storage may raise any error
        raise CheckpointError(
            f"{where}: torch.distributed.checkpoint cannot read it: {type(fault).__name__}: {fault}"[:400]
            + ". Give the storage reader that matches the writer, for the same folder",
            code="unreadable-file",
        ) from fault
    return load_checkpoint(from_state_dict(tensors, str(Path(where))), model, args, kwargs, **options)
