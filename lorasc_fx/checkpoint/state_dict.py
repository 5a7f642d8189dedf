"""The state dict of a cascade: what `lorasc_fx.save` writes, as one flat table of tensors.

The manifest is one of the tensors: its JSON as bytes. It is checked as one from a folder is, and a cascade that lives
takes the state over as a whole. torch's own entries, of model and branches, hold W_t with its noise: no cascade can be
made of them again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lorasc_fx.cascade.commit import Gradients, Planned
from lorasc_fx.cascade.run import Run
from lorasc_fx.checkpoint import reader, writer
from lorasc_fx.checkpoint.gradients import gradients_of
from lorasc_fx.checkpoint.layout import MANIFEST, canonical, file_names, sanitized
from lorasc_fx.errors import CheckpointError
from lorasc_fx.plan import Plan
from lorasc_fx.shards import chunk_of
from lorasc_fx.util.fingerprint import data_of, fingerprint, text_digest
from lorasc_fx.util.undo import Undo

KEY = "lorasc_fx.manifest"
"""Name of the tensor that holds the manifest."""


def to_state_dict(run: Run) -> dict[str, torch.Tensor]:
    """Return copies of all that a resume needs, but for optimizer and scheduler, as tensors by name.

    Raises:
        NonFiniteBranch: a branch holds inf or nan.
    """
    writer.check_finite(run)
    tensors, manifest = writer.contents(run, None, None, {}, {})
    return {**tensors, KEY: packed(manifest, [digest_of(tensors)])}


def packed(manifest: dict[str, Any], digests: Sequence[str]) -> torch.Tensor:
    """Return a manifest as a tensor of bytes, completed by the digests of the tensors of each rank (`digest_of`)."""
    manifest["files"] = dict(zip(file_names(len(digests)), digests, strict=True))
    manifest["digest"] = text_digest(canonical(manifest))
    text = json.dumps(manifest, allow_nan=False).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def from_state_dict(table: Mapping[str, torch.Tensor], where: str) -> reader.Checkpoint:
    """Return the checkpoint that a table holds.

    Raises:
        CheckpointError: it is none, or is damaged; says why.
    """
    packed = table.get(KEY)
    if packed is None or packed.dtype != torch.uint8 or packed.dim() != 1:
        first = ", ".join(sanitized(name) for name in list(table)[:2]) or "nothing"
        raise CheckpointError(
            f"{where}: is no state of a cascade, as it has no {KEY}; it holds {first}. Weights of the model itself are "
            "loaded before it is adapted"
        )
    foreign = next((name for name in table if name != KEY and "/" not in name), None)
    if foreign is not None:  # such as a weight of the model
        raise CheckpointError(
            f"{where}: holds {sanitized(repr(foreign))}, which is no tensor of a cascade; take it out"
        )
    way = "take another checkpoint"
    table = {name: tensor.cpu() for name, tensor in table.items()}  # experts stay on the host
    data = bytes(data_of(table[KEY].contiguous()))
    manifest, plan = reader.manifest_of(data, Path(where, MANIFEST), way)
    shards, count = manifest.get("shards", {}), len(manifest["files"])
    tensors = {name: tensor for name, tensor in table.items() if name != KEY}
    for sentence in reader.plan_faults(plan, tensors):
        raise CheckpointError(f"{where}: {sentence}; {way}")
    axes = {name: shards[name] for name in tensors if name in shards}
    if list(map(digest_of, _cut(tensors, axes, count))) != list(manifest["files"].values()):
        raise CheckpointError(f"{where}: its tensors differ from the digest in {KEY}; it is damaged; {way}")
    return reader.Checkpoint(Path(where), manifest, tensors, plan)


def take_over(run: Run, checkpoint: reader.Checkpoint, undo: Undo) -> None:
    """Go on from a checkpoint in a cascade that lives, of the same base and spec, as a part of a block.

    Gradients that wait for a step are those of the checkpoint.

    Raises:
        CheckpointError: another base, another spec, other sites, or values that do not fit.
    """
    reader.check_base(
        checkpoint,
        run.parameters_by_name(),
        run.fingerprints(),
        run.moved_parameters(),
        "adapt the weights that were adapted",
    )
    _check_alike(run.plan, checkpoint)
    run.commit(Planned(run.plan, run.slow, gradients=Gradients()), undo)
    reader.restore(run, checkpoint, undo)
    run.commit(gradients_of(run, checkpoint), undo)


def _check_alike(now: Plan, checkpoint: reader.Checkpoint) -> None:
    """Refuse a state of a cascade that was made otherwise."""
    then = checkpoint.plan
    ours, theirs = now.spec.to_dict(), then.spec.to_dict()
    for name in ours | theirs:
        if ours.get(name) != theirs.get(name):
            raise CheckpointError(
                f"{checkpoint.path}: was made with {name} = {sanitized(theirs.get(name))}, this cascade has "
                f"{sanitized(ours.get(name))}; adapt by the same spec",
                code="spec-differs",
            )
    odd = sorted(now.by_weight.keys() ^ then.by_weight.keys())
    if odd:
        here = "is a site there, and none here" if odd[0] in then.by_weight else "is a site here, and none there"
        raise CheckpointError(
            f"{checkpoint.path}: {sanitized(odd[0])} {here}; adapt in the same mode and with the same example inputs, "
            "or make the cascade by lorasc_fx.load",
            code="sites-differ",
        )


def _cut(tensors: Mapping[str, torch.Tensor], axes: Mapping[str, int], count: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the tensors that each of `count` ranks wrote: its shards, and on the first rank all that is not sharded."""
    for rank in range(count):
        written = {name: tensor for name, tensor in tensors.items() if rank == 0 and name not in axes}
        for name, axis in axes.items():
            if axis < tensors[name].dim():
                written[name] = tensors[name].narrow(axis, *chunk_of(tensors[name].shape[axis], count, rank))
        yield written


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of the fingerprints of tensors by name."""
    return text_digest(json.dumps({name: fingerprint(tensors[name]) for name in sorted(tensors)}))
