"""Converts the state of a cascade to a state dict, and restores it. The content is the same as in a checkpoint folder.

A state dict is a flat dict of tensors. One tensor has the bytes of the manifest. The state is checked like a folder,
and restored completely or not at all. The usual entries of torch's state dict would have W_t with its noise, from which
a cascade cannot be restored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lorasc_fx.cascade.commit import Planned
from lorasc_fx.cascade.run import Run
from lorasc_fx.checkpoint import reader, writer
from lorasc_fx.checkpoint.codec import gradients_of
from lorasc_fx.checkpoint.layout import canonical, file_names, sanitized
from lorasc_fx.errors import CheckpointError
from lorasc_fx.shards import chunk_of
from lorasc_fx.util.fingerprint import data_of, fingerprint, text_digest
from lorasc_fx.util.undo import Undo

KEY = "lorasc_fx.manifest"
"""Name of the tensor with the manifest."""


def to_state_dict(run: Run) -> dict[str, torch.Tensor]:
    """Return copies of the state of a cascade, without optimizer and scheduler, as tensors by name.

    Raises:
        NonFiniteBranch: a branch holds inf or nan.
    """
    writer.check_finite(run)
    tensors, manifest = writer.contents(run, None, None, {})
    return {**tensors, KEY: packed(manifest, [digest_of(tensors)])}


def packed(manifest: dict[str, Any], digests: Sequence[str]) -> torch.Tensor:
    """Add the digest of each rank's tensors (`digest_of`) to a manifest, and return its bytes as a tensor."""
    manifest["files"] = dict(zip(file_names(len(digests)), digests, strict=True))
    manifest["digest"] = text_digest(canonical(manifest))
    text = json.dumps(manifest, allow_nan=False).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def from_state_dict(table: Mapping[str, torch.Tensor], where: str) -> reader.Checkpoint:
    """Return the checkpoint in a state dict.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    packed, advice = table.get(KEY), "use another checkpoint"
    if packed is None or packed.dtype != torch.uint8 or packed.dim() != 1:
        names = ", ".join(sanitized(name) for name in list(table)[:2]) or "nothing"
        raise CheckpointError(
            f"{where}: this is not the state of a cascade: it has no {KEY}, but {names}. Load weights of the model "
            "itself before you adapt it"
        )
    foreign = next((name for name in table if name != KEY and "/" not in name), None)
    if foreign is not None:  # for example, a weight of the model
        raise CheckpointError(f"{where}: {sanitized(repr(foreign))} is not a tensor of a cascade; remove it")
    tensors = {name: tensor.cpu() for name, tensor in table.items()}  # experts are kept in host memory
    data = bytes(data_of(tensors.pop(KEY).contiguous()))
    manifest, plan = reader.read_manifest(data, Path(where), advice)
    checkpoint = reader.checked(reader.Checkpoint(Path(where), manifest, tensors, plan, advice))
    with checkpoint.refusing():
        axes = {name: axis for name, axis in manifest.get("shards", {}).items() if name in tensors}
        for rank, digest in enumerate(manifest["files"].values()):
            # Each rank has written its shards. The first rank has also written all other tensors.
            written = {name: tensor for name, tensor in tensors.items() if rank == 0 and name not in axes}
            for name, axis in axes.items():
                if axis < tensors[name].dim():
                    part = chunk_of(tensors[name].shape[axis], len(manifest["files"]), rank)
                    written[name] = tensors[name].narrow(axis, *part)
            if digest_of(written) != digest:
                raise ValueError(f"its tensors differ from the digest in {KEY}: the state is damaged")
    return checkpoint


def take_over(run: Run, checkpoint: reader.Checkpoint, undo: Undo) -> None:
    """Replace the state of a cascade by a checkpoint of the same base and spec, as part of a transaction.

    Gradients that no optimizer step has used are replaced too.

    Raises:
        CheckpointError: the checkpoint has another base, another spec, other sites, or values that do not fit.
    """
    reader.check_base(
        checkpoint,
        run.parameters_by_name(),
        run.fingerprints(),
        run.moved_parameters(),
        "adapt a model with the same weights as the saved run",
    )
    ours, theirs = run.plan.spec.to_dict(), checkpoint.plan.spec.to_dict()
    for name in ours | theirs:
        if ours.get(name) != theirs.get(name):
            raise CheckpointError(
                f"{checkpoint.path}: was saved with {name} = {sanitized(theirs.get(name))}, but this cascade has "
                f"{sanitized(ours.get(name))}; adapt with the same spec",
                code="spec-differs",
            )
    sites, saved_sites = run.plan.by_weight, checkpoint.plan.by_weight
    if odd := sorted(sites.keys() ^ saved_sites.keys()):
        where = "only in the checkpoint" if odd[0] in saved_sites else "only in this cascade"
        raise CheckpointError(
            f"{checkpoint.path}: {sanitized(odd[0])} is adapted {where}; adapt in the same mode and with the same "
            "example inputs, or create the cascade with lorasc_fx.load",
            code="sites-differ",
        )
    run.commit(Planned(run.plan, run.slow, gradients={}), undo)
    reader.restore(run, checkpoint, undo)
    with checkpoint.refusing():
        gradients = gradients_of(run, checkpoint.manifest, checkpoint.tensors)
    run.commit(gradients, undo)


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of the names and fingerprints of tensors."""
    return text_digest(json.dumps({name: fingerprint(tensors[name]) for name in sorted(tensors)}))
