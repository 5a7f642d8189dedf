"""Reading a checkpoint, which anybody may have written: it is taken over completely, or refused with one error.

Sizes are compared with the file before anything of that size is allocated: a tensor cannot be larger than its file, and
a branch of the plan not larger than its tensors. No name in a file becomes a path, and nothing in it is executed.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from lorasc_fx.cascade.run import Run
from lorasc_fx.checkpoint.codec import RunState, TensorTable, decode, install
from lorasc_fx.checkpoint.layout import MANIFEST, list_versions, plain_bytes, refusing, sanitized, way_back
from lorasc_fx.checkpoint.manifest import MAX_MANIFEST_BYTES, parsed, plan_of
from lorasc_fx.errors import CheckpointError, named, path_of
from lorasc_fx.plan import Plan
from lorasc_fx.state import Learner
from lorasc_fx.util.accelerator import RNG
from lorasc_fx.util.fingerprint import fingerprints
from lorasc_fx.util.undo import Undo

_GENERATOR = re.compile(rf"{RNG}|rng/[a-z0-9_]{{1,32}}/\d{{1,4}}")
_ROOM = 1 << 18
"""Entries that a branch may have however small its weight is."""


@dataclass(frozen=True)
class Checkpoint:
    """A version as read.

    Args:
        path: of the version; for a state dict, its name in messages.
        manifest, tensors, plan: its content.
        advice: what to do if it cannot be used, for messages.
    """

    path: Path
    manifest: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor] = field(repr=False)
    plan: Plan
    advice: str

    @property
    def frontend(self) -> str:
        """The front end that the user asked for."""
        return str(self.manifest["frontend"])

    @property
    def moved(self) -> set[str]:
        """Names of the model's buffers, and of the parameters that forward writes."""
        return {name.removeprefix("buffer/") for name in self.tensors if name.startswith("buffer/")}

    @property
    def bases(self) -> dict[str, torch.Tensor]:
        """W0 of the parameters trained in full, by name."""
        values = {name: self.tensors.get(f"base/{name}") for name in self.manifest["trained"]}
        return {name: value for name, value in values.items() if value is not None}

    def refusing(self) -> AbstractContextManager[None]:
        """Raise errors inside the block as errors of this checkpoint."""
        return refusing(self.path, self.advice)

    def decoded(self, taker: RunState | None = None) -> RunState:
        """Return the state in this checkpoint, for the cascade that takes it over if there is one (`codec.decode`).

        Raises:
            CheckpointError: the tensors do not fit the plan.
        """
        with self.refusing():
            return decode(self.manifest, self.tensors, self.plan, taker)

    def with_learners(self) -> tuple[RunState, dict[str, Learner]]:
        """Return the state in this checkpoint, and what trains in its running stage by weight; no model is built.

        Raises:
            CheckpointError: the tensors do not fit the plan.
        """
        state = self.decoded()
        with self.refusing():
            return state, state.learners()


def read(folder: str | PathLike[str]) -> Checkpoint:
    """Read the newest version in a checkpoint folder, or in the folder of a run of the command line.

    Raises:
        CheckpointError: there is none, or it is damaged; names the file and the reason.
    """
    root, advice = path_of(folder), "give the folder that save was given"
    with refusing(root, advice):
        versions = list_versions(root) or list_versions(root / "checkpoint")
    if not versions:
        raise CheckpointError(f"{root}: no checkpoint in this folder; {advice}", code="no-checkpoint")
    path = versions[-1]
    advice = way_back(path)
    with refusing(path / MANIFEST, advice, code="unreadable-file"):
        data = plain_bytes(path / MANIFEST, MAX_MANIFEST_BYTES)
    manifest, plan = read_manifest(data, path, advice)
    files = []
    for name, digest in manifest["files"].items():
        # RuntimeError and AssertionError: a dtype or a size that torch does not have.
        with refusing(path / name, advice, also=(RuntimeError, AssertionError, MemoryError)):
            data = plain_bytes(path / name)
            if hashlib.sha256(data).hexdigest() != digest:
                raise ValueError(f"differs from its digest in {MANIFEST}: the file is damaged")
            files.append(dict(sorted(load(data).items())))  # the order of safetensors differs between processes
    with refusing(path, advice):
        with os.scandir(path) as entries:
            odd = next((entry.name for entry in entries if entry.name not in (MANIFEST, *manifest["files"])), None)
        if odd is not None:
            raise ValueError(f"holds {sanitized(odd)}, which is not part of a checkpoint: move it away")
        tensors = _joined(files, manifest.get("shards", {}))
    return checked(Checkpoint(path, manifest, tensors, plan, advice))


def read_manifest(data: bytes, path: Path, advice: str) -> tuple[dict[str, Any], Plan]:
    """Return the manifest of a version from its bytes, checked, and its plan.

    Raises:
        CheckpointError: it is damaged.
    """
    with refusing(path / MANIFEST, advice, code="unreadable-file"):
        manifest = parsed(data)
    with refusing(path / MANIFEST, advice):
        return manifest, plan_of(manifest)


def checked(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint if its tensors are safe to build a cascade from.

    Its branches then have the sizes in the plan, so that the plan cannot ask for more memory than the file has bytes.

    Raises:
        CheckpointError: a tensor is missing or unexpected, or has another shape.
    """
    plan, tensors, bases = checkpoint.plan, checkpoint.tensors, checkpoint.manifest["base"]
    with checkpoint.refusing():
        state = tensors.get(RNG)
        if state is None:
            raise ValueError(f"has no tensor {RNG!r}")
        try:
            if state.dtype != torch.uint8 or state.shape != torch.get_rng_state().shape:
                raise RuntimeError("another dtype or shape")
            torch.Generator().set_state(state)
        except RuntimeError as fault:
            raise ValueError(f"{RNG!r} is not a state of torch's random generator") from fault
        shapes = {
            f"branch/{site.weight}/{name}": shape
            for site in plan.sites
            for name, shape in site.parameter_shapes.items()
        }
        for name in tensors:
            if name.startswith("rng/") and not _GENERATOR.fullmatch(name):
                raise ValueError(f"holds {sanitized(repr(name))}, which is not a random generator")
            if name.startswith("branch/") and name not in shapes:
                raise ValueError(f"holds {sanitized(repr(name))}, and the plan has no such site")
        table = TensorTable(tensors)
        for name, shape in shapes.items():
            table.take(name, shape)
        base_values = {name: value for name, value in tensors.items() if name.startswith("base/")}
        for key, digest in fingerprints(base_values).items():
            name = key.removeprefix("base/")
            if name not in checkpoint.manifest["trained"]:
                raise ValueError(f"holds {sanitized(repr(key))}, and this parameter was not trained in full")
            if bases.get(name, digest) != digest:
                raise ValueError(f"{sanitized(repr(key))} differs from its fingerprint in {MANIFEST}")
    return checkpoint


def _joined(files: Sequence[Mapping[str, torch.Tensor]], shards: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Return the full tensors of the files of several ranks, given the axis along which each sharded one is cut.

    Raises:
        ValueError: the first file lacks a shard, or another one holds anything else, or shards do not fit together.
    """
    tensors = dict(files[0])
    for file in files if shards else files[1:]:
        odd = sorted(shards.keys() - file.keys() if file is files[0] else shards.keys() ^ file.keys())
        if odd:
            raise ValueError(f"its files disagree about the shards of {sanitized(repr(odd[0]))}")
    for name, axis in shards.items():
        pieces = [file[name] for file in files]
        kinds = {(piece.dtype, piece.dim(), piece.shape[:axis], piece.shape[axis + 1 :]) for piece in pieces}
        if len(kinds) != 1 or axis >= pieces[0].dim():
            raise ValueError(f"the shards of {sanitized(repr(name))} do not fit together along axis {axis}")
        tensors[name] = torch.cat(pieces, axis)
    return tensors


def check_base(
    checkpoint: Checkpoint,
    parameters: Mapping[str, torch.Tensor],
    digests: Mapping[str, str] | None = None,
    moved: Collection[str] = (),
    advice: str = "load onto the weights that were adapted",
) -> None:
    """Refuse a model that is not the base of a checkpoint.

    Values that the checkpoint holds itself do not matter: W0 of parameters trained in full, which it replaces. Of
    tensors on the meta device only the names are compared.

    Args:
        checkpoint: as read.
        parameters: of the model, by name.
        digests: fingerprints of their W0, if they are known.
        moved: names of further parameters that forward writes.
        advice: what to do about another base, for messages.

    Raises:
        CheckpointError: names the parameters that are missing, unexpected, or different.
    """
    base: Mapping[str, str] = checkpoint.manifest["base"]
    replaced = {}
    for name, value in checkpoint.bases.items():
        parameter = parameters.get(name)
        if parameter is not None and (parameter.shape, parameter.dtype) == (value.shape, value.dtype):
            replaced[name] = value
    if digests is None:
        to_compare = {name: value for name, value in parameters.items() if name in base and name not in replaced}
        digests = {name: base[name] for name, value in to_compare.items() if value.is_meta}
        digests |= fingerprints({name: value for name, value in to_compare.items() if not value.is_meta})
    digests = {**digests, **fingerprints(replaced)}
    check_digests(f"{checkpoint.path}: this is", base, digests, parameters, {*checkpoint.moved, *moved}, advice)


def check_digests(
    subject: str,
    base: Mapping[str, str],
    digests: Mapping[str, str],
    names: Iterable[str],
    moved: Collection[str],
    advice: str,
) -> None:
    """Refuse a model whose fingerprints differ from the base's.

    Args:
        subject: the start of the message, before "another base".
        base: fingerprints of the base, by parameter.
        digests: those of the model, for the parameters that the base has.
        names: of all parameters of the model.
        moved: parameters that are not part of a base, because forward writes them.
        advice: what to do, for the message.

    Raises:
        CheckpointError: names the parameters that are missing, unexpected, or different.
    """
    missing = [name for name in base if name not in digests and name not in moved]
    foreign = [name for name in names if name not in base and name not in moved]
    changed = [name for name, digest in digests.items() if base.get(name, digest) != digest and name not in moved]
    for how, parameters in (("lacks", missing), ("has besides", foreign), ("differs in", changed)):
        if parameters:
            raise CheckpointError(
                f"{subject} another base: the model {how} {named(map(sanitized, parameters))}; {advice}",
                code="base-differs",
            )


def check_plan(
    checkpoint: Checkpoint, matrices: Mapping[str, tuple[str, ...]], parameters: Mapping[str, torch.Tensor]
) -> None:
    """Refuse a plan for other weights than the model has, before a cascade is built from it.

    Args:
        checkpoint: as read.
        matrices: all names of each weight matrix, by its first one.
        parameters: of the model, by first name.

    Raises:
        CheckpointError: names the weight.
    """
    plan, spec, as_it_was = checkpoint.plan, checkpoint.plan.spec, "build the same model that was adapted"

    def fault(problem: str, advice: str) -> CheckpointError:
        return CheckpointError(f"{checkpoint.path / MANIFEST}: {problem}; {advice}", code="sites-differ")

    for site in plan.sites:
        names = matrices.get(site.weight)
        if names is None:
            raise fault(f"its plan has a site {sanitized(site.weight)}, which the model does not have", as_it_was)
        if (site.weight, *site.aliases) != names:
            theirs, ours = sanitized(", ".join(site.aliases) or "nothing"), ", ".join(names[1:]) or "nothing"
            raise fault(f"its plan has {sanitized(site.weight)} tied to {theirs}, the model to {ours}", as_it_was)
        shape = tuple(parameters[site.weight].shape)
        if site.shape != shape:
            raise fault(f"its plan has {site.weight} of shape {site.shape}, the model {shape}", checkpoint.advice)
    rank = max(spec.rank, *spec.ranks, *(rule.rank or 0 for rule in spec.rules), 0)
    for name in matrices.keys() - plan.by_weight.keys():  # a later call may be the first one to use such a weight
        size = parameters[name].shape
        if rank * (size[0] + math.prod(size[1:])) > max(_ROOM, 64 * parameters[name].numel()):
            raise fault(f"its spec asks for rank {rank}, a branch far larger than the weight {name}", checkpoint.advice)


def restore(run: Run, checkpoint: Checkpoint, undo: Undo | None = None) -> None:
    """Put the values of a checkpoint into a cascade that has its sites. The cascade then has the checkpoint's plan.

    With `undo` this is part of a larger transaction. On sharded weights every rank takes its shards.

    Raises:
        CheckpointError: they do not fit; the cascade is unchanged.
    """
    state = checkpoint.decoded(RunState.of(run))
    with checkpoint.refusing():
        install(run, state, undo)
    if run.digests:
        base = checkpoint.manifest["base"]
        run.digests = {**run.digests, **{name: base[name] for name in checkpoint.bases}}  # a new table, for a rollback
