"""A cascade's state for torch.distributed.checkpoint (DCP): torch's own `save` and `async_save` write it, `load` reads
it.

The state is that of `lorasc_fx.save` as one flat table: the manifest is one of its tensors, and what lies in shards is
a DTensor of the shard that is here, so that no rank gathers anything. A state has as many experts as stages have
ended: what a checkpoint holds is asked of its metadata, and the codec checks it as it checks a folder.
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
from lorasc_fx.checkpoint import training_state, writer
from lorasc_fx.checkpoint.state_dict import KEY, digest_of, from_state_dict, packed
from lorasc_fx.errors import CheckpointError
from lorasc_fx.facade import Cascade

__all__ = ["load", "state_dict"]


def state_dict(
    cascade: Cascade,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, torch.Tensor]:
    """Return what `torch.distributed.checkpoint.save` or `async_save` is to write: all that `lorasc_fx.save` does.

    The tensors are copies: training may go on while `async_save` writes them, in a process group of its own
    (`process_group=torch.distributed.new_group()`). Of sharded weights every rank must call this, between two steps.

    Args:
        cascade: on one process, or on shards.
        optimizer, scheduler, extra: as of `lorasc_fx.save`.

    Returns:
        Tensors by name. Sharded tensors are DTensors. All other tensors are on the first rank only.

    Raises:
        CheckpointError, StateError, NonFiniteBranch: as of `lorasc_fx.save`.
    """
    run, call = cascade._run, "state_dict"
    group = run.slow.group
    kept = dict(extra or {})
    with group.agreed(call):
        run.check_ready(call, sharded=True)
        if not group.is_alone:
            writer.check_between_steps(run, call)
        writer.check_finite(run)
    if not group.is_alone:
        kept[training_state.RANKS] = group.gather(training_state.random_bytes(), call)
    with group.agreed(call):
        tensors, manifest = writer.contents(run, optimizer, scheduler, kept)
    axes: dict[str, int] = manifest.get("shards", {})
    own = {name: value for name, value in tensors.items() if group.rank == 0 or name in axes}
    lengths = {name: own[name].shape[axis] for name, axis in axes.items()}
    ranks = [json.loads(text) for text in group.gather_text(json.dumps(lengths), call)]
    digests, order = group.gather_text(digest_of(own), call), group.first_replica
    mesh = next((value.device_mesh for value in cascade.parameters() if isinstance(value, DTensor)), None)
    replicated = [Replicate()] * (mesh.ndim - 1 if mesh is not None else 0)
    state: dict[str, torch.Tensor] = {}
    if group.rank == 0:
        state[KEY] = packed(manifest, [digests[rank] for rank in order])
    for name, value in own.items():
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
    """Adapt a base model as a checkpoint of DCP has it, and go on with the same numbers, as `lorasc_fx.load` does.

    It does not matter how many ranks wrote it, or how it was cut: each rank that loads it has the whole cascade but for
    W0 of a model on the meta device, to be sharded as one from `adapt`; then `cascade.resume` gives the optimizer its
    state.

    Args:
        reader: of torch.distributed.checkpoint. `FileSystemReader` unpickles the metadata, which can run code: give it
            your own checkpoints only. `HuggingFaceStorageReader` reads safetensors, and runs none.
        model, args, kwargs: as of `lorasc_fx.load`.
        options: `base`, as of `lorasc_fx.load`.

    Raises:
        CheckpointError: it cannot be read, is none of a cascade, is damaged, or of another base.
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
            warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)  # it is meant: each rank reads all
            state_dict_loader.load(tensors, storage_reader=reader, no_dist=True)
    except Exception as fault:  # storage of any kind may raise anything
        raise CheckpointError(
            f"{where}: torch.distributed.checkpoint cannot read it: {type(fault).__name__}: {fault}"[:400]
            + "; give a reader of the kind of the writer, on its folder",
            code="unreadable-file",
        ) from fault
    return load_checkpoint(from_state_dict(tensors, str(Path(where))), model, args, kwargs, **options)
