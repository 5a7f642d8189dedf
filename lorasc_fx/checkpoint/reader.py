"""Reads and checks a checkpoint. It is not trusted: it is either restored completely, or rejected with one error.

Sizes are checked before anything is allocated: a tensor cannot be larger than its file, and a branch cannot be larger
than its tensors. Names in a file are not used as paths, and nothing in a file is executed.
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
from lorasc_fx.checkpoint.layout import MANIFEST, list_versions, plain_bytes, recovery_advice, refusing, sanitized
from lorasc_fx.checkpoint.manifest import MAX_MANIFEST_BYTES, parsed, plan_of
from lorasc_fx.errors import CheckpointError, named, path_of
from lorasc_fx.plan import Plan
from lorasc_fx.state import Learner
from lorasc_fx.util.accelerator import RNG
from lorasc_fx.util.fingerprint import fingerprints
from lorasc_fx.util.undo import Undo

_GENERATOR = re.compile(rf"{RNG}|rng/[a-z0-9_]{{1,32}}/\d{{1,4}}")
_MIN_BRANCH_LIMIT = 1 << 18
"""Number of elements that a branch may always have, even if its weight is small."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a version that was read.

    Args:
        path: path of the version. For a state dict, its name in messages.
        manifest, tensors, plan: its content.
        advice: what the user can do if it cannot be used, for messages.
    """

    path: Path
    manifest: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor] = field(repr=False)
    plan: Plan
    advice: str

    @property
    def frontend(self) -> str:
        """The front end that the user has chosen."""
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
        """Convert errors inside the block to CheckpointErrors that name this checkpoint."""
        return refusing(self.path, self.advice)

    def decoded(self, taker: RunState | None = None) -> RunState:
        """Return the state in this checkpoint. See `codec.decode` for `taker`.

        Raises:
            CheckpointError: the tensors do not fit the plan.
        """
        with self.refusing():
            return decode(self.manifest, self.tensors, self.plan, taker)

    def with_learners(self) -> tuple[RunState, dict[str, Learner]]:
        """Return the state in this checkpoint, and the learners of its running stage by weight, without a model.

        Raises:
            CheckpointError: the tensors do not fit the plan.
        """
        state = self.decoded()
        with self.refusing():
            return state, state.learners()


def read(folder: str | PathLike[str]) -> Checkpoint:
    """Read the newest version in a checkpoint folder, or in a run folder of `lorasc-fx train`.

    Raises:
        CheckpointError: there is none, or it is damaged. The message names the file and the reason.
    """
    root, advice = path_of(folder), "give a folder that lorasc_fx.save has written"
    with refusing(root, advice):
        versions = list_versions(root) or list_versions(root / "checkpoint")
    if not versions:
        raise CheckpointError(f"{root}: no checkpoint in this folder; {advice}", code="no-checkpoint")
    path = versions[-1]
    advice = recovery_advice(path)
    with refusing(path / MANIFEST, advice, code="unreadable-file"):
        data = plain_bytes(path / MANIFEST, MAX_MANIFEST_BYTES)
    manifest, plan = read_manifest(data, path, advice)
    files = []
    for name, digest in manifest["files"].items():
        # torch raises RuntimeError or AssertionError for a dtype or a size that it does not support.
        with refusing(path / name, advice, also=(RuntimeError, AssertionError, MemoryError)):
            data = plain_bytes(path / name)
            if hashlib.sha256(data).hexdigest() != digest:
                raise ValueError(f"differs from its digest in {MANIFEST}: the file is damaged")
            files.append(dict(sorted(load(data).items())))  # the order of safetensors differs between processes
    with refusing(path, advice):
        with os.scandir(path) as entries:
            odd = next((entry.name for entry in entries if entry.name not in (MANIFEST, *manifest["files"])), None)
        if odd is not None:
            raise ValueError(f"contains {sanitized(odd)}, which is not part of a checkpoint: move it away")
        tensors = _joined(files, manifest.get("shards", {}))
    return checked(Checkpoint(path, manifest, tensors, plan, advice))


def read_manifest(data: bytes, path: Path, advice: str) -> tuple[dict[str, Any], Plan]:
    """Parse and check the manifest of a version, and return it with its plan.

    Raises:
        CheckpointError: the manifest is damaged.
    """
    with refusing(path / MANIFEST, advice, code="unreadable-file"):
        manifest = parsed(data)
    with refusing(path / MANIFEST, advice):
        return manifest, plan_of(manifest)


def checked(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint if a cascade can safely be built from its tensors.

    Its branches have the sizes in the plan. So the plan cannot request more memory than the file has bytes.

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
        # Compare the names and shapes of the branches with the plan.
        shapes = {
            f"branch/{site.weight}/{name}": shape
            for site in plan.sites
            for name, shape in site.parameter_shapes.items()
        }
        for name in tensors:
            if name.startswith("rng/") and not _GENERATOR.fullmatch(name):
                raise ValueError(f"has the unexpected tensor {sanitized(repr(name))}: it is not a random generator")
            if name.startswith("branch/") and name not in shapes:
                raise ValueError(f"has the unexpected tensor {sanitized(repr(name))}: the plan has no such branch")
        table = TensorTable(tensors)
        for name, shape in shapes.items():
            table.take(name, shape)
        # Compare the saved W0 of parameters trained in full with their fingerprints.
        base_values = {name: value for name, value in tensors.items() if name.startswith("base/")}
        for key, digest in fingerprints(base_values).items():
            name = key.removeprefix("base/")
            if name not in checkpoint.manifest["trained"]:
                raise ValueError(
                    f"has the unexpected tensor {sanitized(repr(key))}: this parameter was not trained in full"
                )
            if bases.get(name, digest) != digest:
                raise ValueError(f"{sanitized(repr(key))} differs from its fingerprint in {MANIFEST}")
    return checkpoint


def _joined(files: Sequence[Mapping[str, torch.Tensor]], shards: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Concatenate the shards in the files of several ranks, and return all tensors.

    `shards` has the axis of each sharded tensor. Only the first file also has the unsharded tensors.
    """
    tensors = dict(files[0])
    for file in files if shards else files[1:]:
        odd = sorted(shards.keys() - file.keys() if file is files[0] else shards.keys() ^ file.keys())
        if odd:
            raise ValueError(f"its files disagree about the shards of {sanitized(repr(odd[0]))}")
    for name, axis in shards.items():
        parts = [file[name] for file in files]
        kinds = {(part.dtype, part.dim(), part.shape[:axis], part.shape[axis + 1 :]) for part in parts}
        if len(kinds) != 1 or axis >= parts[0].dim():
            raise ValueError(f"the shards of {sanitized(repr(name))} do not fit together along axis {axis}")
        tensors[name] = torch.cat(parts, axis)
    return tensors


def check_base(
    checkpoint: Checkpoint,
    parameters: Mapping[str, torch.Tensor],
    digests: Mapping[str, str] | None = None,
    moved: Collection[str] = (),
    advice: str = "load onto the weights that were adapted",
) -> None:
    """Check that a model has the parameters of a checkpoint's base.

    Parameters trained in full may have other values, because the checkpoint contains their W0. For tensors on the meta
    device only the names are compared.

    Args:
        checkpoint: the checkpoint.
        parameters: parameters of the model, by name.
        digests: fingerprints of their W0, if they are known.
        moved: names of further parameters that forward writes.
        advice: what the user can do about another base, for messages.

    Raises:
        CheckpointError: parameters are missing, unexpected or different. The message names them.
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
    """Check that the fingerprints of a model equal the fingerprints of a base.

    Args:
        subject: the start of the message, before "another base".
        base: fingerprints of the base, by parameter name.
        digests: fingerprints of the model, for parameters that the base has.
        names: names of all parameters of the model.
        moved: names of parameters that are not compared, because forward writes them.
        advice: what the user can do, for the message.

    Raises:
        CheckpointError: parameters are missing, unexpected or different. The message names them.
    """
    missing = [name for name in base if name not in digests and name not in moved]
    unexpected = [name for name in names if name not in base and name not in moved]
    changed = [name for name, digest in digests.items() if base.get(name, digest) != digest and name not in moved]
    for fault, parameters in (("lacks", missing), ("also has", unexpected), ("differs in", changed)):
        if parameters:
            raise CheckpointError(
                f"{subject} another base: the model {fault} {named(map(sanitized, parameters))}; {advice}",
                code="base-differs",
            )


def check_plan(
    checkpoint: Checkpoint, matrices: Mapping[str, tuple[str, ...]], parameters: Mapping[str, torch.Tensor]
) -> None:
    """Check that the sites of a checkpoint's plan are weights of the model, before a cascade is built from it.

    Args:
        checkpoint: the checkpoint.
        matrices: all names of each weight matrix, by its first name.
        parameters: parameters of the model, by first name.

    Raises:
        CheckpointError: a site does not fit. The message names the weight.
    """
    plan, spec, same_model = checkpoint.plan, checkpoint.plan.spec, "build the same model that was adapted"

    def fault(problem: str, advice: str) -> CheckpointError:
        return CheckpointError(f"{checkpoint.path / MANIFEST}: {problem}; {advice}", code="sites-differ")

    for site in plan.sites:
        names = matrices.get(site.weight)
        if names is None:
            raise fault(f"the plan adapts {sanitized(site.weight)}, which the model does not have", same_model)
        if (site.weight, *site.aliases) != names:
            saved, current = sanitized(", ".join(site.aliases) or "nothing"), ", ".join(names[1:]) or "nothing"
            raise fault(
                f"{sanitized(site.weight)} is tied to {saved} in the plan, but to {current} in the model", same_model
            )
        shape = tuple(parameters[site.weight].shape)
        if site.shape != shape:
            raise fault(f"{site.weight} is {site.shape} in the plan, but {shape} in the model", checkpoint.advice)
    # A later call may add a site for any other weight. A forged rank must not make its branch very large.
    rank = max(spec.rank, *spec.ranks, *(rule.rank or 0 for rule in spec.rules), 0)
    for name in matrices.keys() - plan.by_weight.keys():
        size = parameters[name].shape
        if rank * (size[0] + math.prod(size[1:])) > max(_MIN_BRANCH_LIMIT, 64 * parameters[name].numel()):
            raise fault(
                f"with rank {rank} of the spec, a branch would be more than 64 times as large as the weight {name}",
                checkpoint.advice,
            )


def restore(run: Run, checkpoint: Checkpoint, undo: Undo) -> None:
    """Restore the state of a checkpoint in a cascade with the same sites, as part of a transaction.

    The cascade also gets the checkpoint's plan. If the weights are sharded, every rank restores its shards.

    Raises:
        CheckpointError: the values do not fit. The cascade is unchanged.
    """
    state = checkpoint.decoded(RunState.of(run))
    with checkpoint.refusing():
        install(run, state, undo)
    if run.digests:
        base = checkpoint.manifest["base"]
        # Assign a new dict, because a rollback restores the old one.
        run.digests = {**run.digests, **{name: base[name] for name in checkpoint.bases}}
