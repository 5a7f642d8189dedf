"""The state dict of a cascade: what `lorasc_fx.save` writes, as one flat table of tensors.

One of the tensors is the manifest: its JSON as bytes. It is checked like one from a folder, and a cascade takes the
whole state over or nothing. The entries that torch would write for model and branches hold W_t with its noise, from
which no cascade can be restored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lorasc_fx.cascade.commit import Gradients, Planned
from lorasc_fx.cascade.run import Run
from lorasc_fx.checkpoint import reader, writer
from lorasc_fx.checkpoint.codec import gradients_of
from lorasc_fx.checkpoint.layout import canonical, file_names, sanitized
from lorasc_fx.errors import CheckpointError
from lorasc_fx.shards import chunk_of
from lorasc_fx.util.fingerprint import data_of, fingerprint, text_digest
from lorasc_fx.util.undo import Undo

KEY = "lorasc_fx.manifest"
"""Name of the tensor that holds the manifest."""


def to_state_dict(run: Run) -> dict[str, torch.Tensor]:
    """Return copies of all that a resume needs, except optimizer and scheduler, as tensors by name.

    Raises:
        NonFiniteBranch: a branch holds inf or nan.
    """
    writer.check_finite(run)
    tensors, manifest = writer.contents(run, None, None, {})
    return {**tensors, KEY: packed(manifest, [digest_of(tensors)])}


def packed(manifest: dict[str, Any], digests: Sequence[str]) -> torch.Tensor:
    """Return a manifest as a tensor of bytes, with the digests of the tensors of each rank (`digest_of`) added."""
    manifest["files"] = dict(zip(file_names(len(digests)), digests, strict=True))
    manifest["digest"] = text_digest(canonical(manifest))
    text = json.dumps(manifest, allow_nan=False).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def from_state_dict(table: Mapping[str, torch.Tensor], where: str) -> reader.Checkpoint:
    """Return the checkpoint in a table of tensors.

    Raises:
        CheckpointError: it holds none, or a damaged one; says why.
    """
    packed, advice = table.get(KEY), "use another checkpoint"
    if packed is None or packed.dtype != torch.uint8 or packed.dim() != 1:
        names = ", ".join(sanitized(name) for name in list(table)[:2]) or "nothing"
        raise CheckpointError(
            f"{where}: is not the state of a cascade: it has no {KEY}, and holds {names}. Load weights of the model "
            "itself before you adapt it"
        )
    foreign = next((name for name in table if name != KEY and "/" not in name), None)
    if foreign is not None:  # such as a weight of the model
        raise CheckpointError(f"{where}: {sanitized(repr(foreign))} is not a tensor of a cascade; remove it")
    tensors = {name: tensor.cpu() for name, tensor in table.items()}  # experts stay on the host
    data = bytes(data_of(tensors.pop(KEY).contiguous()))
    manifest, plan = reader.read_manifest(data, Path(where), advice)
    checkpoint = reader.checked(reader.Checkpoint(Path(where), manifest, tensors, plan, advice))
    with checkpoint.refusing():
        axes = {name: axis for name, axis in manifest.get("shards", {}).items() if name in tensors}
        for rank, digest in enumerate(manifest["files"].values()):
            # Each rank wrote its shards, and the first rank all other tensors.
            written = {name: tensor for name, tensor in tensors.items() if rank == 0 and name not in axes}
            for name, axis in axes.items():
                if axis < tensors[name].dim():
                    part = chunk_of(tensors[name].shape[axis], len(manifest["files"]), rank)
                    written[name] = tensors[name].narrow(axis, *part)
            if digest_of(written) != digest:
                raise ValueError(f"its tensors differ from the digest in {KEY}: it is damaged")
    return checkpoint


def take_over(run: Run, checkpoint: reader.Checkpoint, undo: Undo) -> None:
    """Replace the state of a cascade by a checkpoint of the same base and spec, as part of a transaction.

    Gradients that wait for a step are replaced too.

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
    ours, theirs = run.plan.spec.to_dict(), checkpoint.plan.spec.to_dict()
    for name in ours | theirs:
        if ours.get(name) != theirs.get(name):
            raise CheckpointError(
                f"{checkpoint.path}: was made with {name} = {sanitized(theirs.get(name))}, and this cascade has "
                f"{sanitized(ours.get(name))}; adapt with the same spec",
                code="spec-differs",
            )
    sites, saved_sites = run.plan.by_weight, checkpoint.plan.by_weight
    if odd := sorted(sites.keys() ^ saved_sites.keys()):
        where = "there, but not here" if odd[0] in saved_sites else "here, but not there"
        raise CheckpointError(
            f"{checkpoint.path}: {sanitized(odd[0])} is a site {where}; adapt in the same mode and with the same "
            "example inputs, or make the cascade with lorasc_fx.load",
            code="sites-differ",
        )
    run.commit(Planned(run.plan, run.slow, gradients=Gradients()), undo)
    reader.restore(run, checkpoint, undo)
    with checkpoint.refusing():
        gradients = gradients_of(run, checkpoint.manifest, checkpoint.tensors)
    run.commit(gradients, undo)


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of the fingerprints of tensors by name."""
    return text_digest(json.dumps({name: fingerprint(tensors[name]) for name in sorted(tensors)}))
