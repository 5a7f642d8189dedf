"""Reading a checkpoint: a folder that anybody may have written, taken over as a whole or refused in one sentence.

Each file is opened once and read into memory, and digest and content come from those bytes (`opening`). Sizes are held
against the file before anything of that size is made: a tensor cannot be larger than its file, a branch of the plan
not larger than its tensors. No name in a file becomes a path, and nothing in it is run.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from lorasc_fx.cascade.run import Run
from lorasc_fx.checkpoint.codec import RunState, decode, install
from lorasc_fx.checkpoint.layout import (
    FORMAT,
    MANIFEST,
    canonical,
    list_versions,
    plain_bytes,
    sanitized,
    way_back,
)
from lorasc_fx.checkpoint.manifest import LONGEST, parsed, plan_of
from lorasc_fx.errors import CheckpointError, named, path_of, reason_of
from lorasc_fx.plan import Plan
from lorasc_fx.state import Learner
from lorasc_fx.util.accelerator import RNG
from lorasc_fx.util.fingerprint import fingerprints, text_digest
from lorasc_fx.util.undo import Undo

_GENERATOR = re.compile(rf"{RNG}|rng/[a-z0-9_]{{1,32}}/\d{{1,4}}")
_AS_IT_WAS = "build the model as it was when it was adapted"
_ROOM = 1 << 18
"""Entries that a branch may have however small its weight is."""


@dataclass(frozen=True)
class Checkpoint:
    """A version as read: its manifest, its tensors, its plan."""

    path: Path
    manifest: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    plan: Plan

    @property
    def frontend(self) -> str:
        """The front end that was asked for."""
        return str(self.manifest["frontend"])

    @property
    def moved(self) -> set[str]:
        """Names of the model's buffers, and of the parameters that forward writes."""
        return {name.removeprefix("buffer/") for name in self.tensors if name.startswith("buffer/")}

    @property
    def bases(self) -> dict[str, torch.Tensor]:
        """W0 of the parameters trained in full, by name."""
        held = {name: self.tensors.get(f"base/{name}") for name in self.manifest["trained"]}
        return {name: value for name, value in held.items() if value is not None}


def read(folder: str | PathLike[str]) -> Checkpoint:
    """Read the newest version of a checkpoint folder, or of the one in the folder of a run of the command line.

    Raises:
        CheckpointError: there is none, or it is damaged; names the file and the reason.
    """
    root = path_of(folder)
    try:
        versions = list_versions(root) or list_versions(root / "checkpoint")
    except OSError as fault:
        raise CheckpointError(f"{root}: cannot be read: {_why(fault)}", code="unreadable-file") from fault
    if not versions:
        raise CheckpointError(
            f"{root}: no checkpoint in this folder; give the one that save was given", code="no-checkpoint"
        )
    path = versions[-1]
    manifest, plan = _read_manifest(path / MANIFEST)
    files = [_read_tensors(path / name, digest) for name, digest in manifest["files"].items()]
    _check_files(path, manifest["files"])
    try:
        tensors = _joined(files, manifest.get("shards", {}))
    except ValueError as fault:
        raise CheckpointError(f"{path}: {fault}; {way_back(path)}") from fault
    checkpoint = Checkpoint(path, manifest, tensors, plan)
    for sentence in (*plan_faults(plan, tensors), *_base_faults(checkpoint)):
        raise CheckpointError(f"{path}: {sentence}; {way_back(path)}")
    return checkpoint


def _read_manifest(path: Path) -> tuple[dict[str, Any], Plan]:
    try:
        data = plain_bytes(path, LONGEST)
    except (OSError, ValueError) as fault:
        raise CheckpointError(
            f"{path}: cannot be read: {_why(fault)}; {way_back(path.parent)}",
            code="unreadable-file",
        ) from fault
    return manifest_of(data, path, way_back(path.parent))


def manifest_of(data: bytes, path: Path, way: str) -> tuple[dict[str, Any], Plan]:
    """Return the manifest that these bytes are, checked, and its plan.

    Args:
        data: JSON.
        path: where they come from, for messages.
        way: what to do about one that no load takes.

    Raises:
        CheckpointError: they are none, or damaged.
    """
    try:
        manifest = parsed(data)
    except ValueError as fault:
        raise CheckpointError(f"{path}: cannot be read: {_why(fault)}; {way}", code="unreadable-file") from fault
    written = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
    if not isinstance(manifest, dict) or written != FORMAT or type(written) is not int:
        raise CheckpointError(
            f"{path}: format {sanitized(repr(written))}; this version reads format {FORMAT}; "
            "load it by the lorasc-fx that wrote it",
            code="format-not-supported",
        )
    try:
        if manifest.get("digest") != text_digest(canonical(manifest)):
            raise ValueError("differs from its own digest; the file is damaged, or was edited")
        plan = plan_of(manifest)
    except CheckpointError as fault:
        raise CheckpointError(f"{path}: {fault}", code=fault.code) from fault
    except ValueError as fault:
        raise CheckpointError(f"{path}: {fault}; {way}") from fault
    except RecursionError as fault:
        raise CheckpointError(
            f"{path}: cannot be read: it is nested too deeply; {way}", code="unreadable-file"
        ) from fault
    return manifest, plan


def _read_tensors(path: Path, digest: str) -> dict[str, torch.Tensor]:
    try:
        data = plain_bytes(path)
        if hashlib.sha256(data).hexdigest() != digest:
            raise CheckpointError(
                f"{path}: differs from its digest in {MANIFEST}; the file is damaged; {way_back(path.parent)}"
            )
        return dict(sorted(load(data).items()))  # safetensors gives them in another order in each process
    except (OSError, SafetensorError) as fault:
        raise CheckpointError(
            f"{path}: cannot be read: {_why(fault)}; {way_back(path.parent)}",
            code="unreadable-file",
        ) from fault
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as fault:  # a dtype or size torch has not
        why = f"{type(fault).__name__}: {sanitized(str(fault))}"
        raise CheckpointError(
            f"{path}: cannot be read: {why}; {way_back(path.parent)}", code="unreadable-file"
        ) from fault
    except MemoryError as fault:
        raise CheckpointError(
            f"{path}: cannot be read: there is no memory for its tensors; free some, or take a larger machine",
            code="out-of-memory",
        ) from fault


def _joined(files: Sequence[Mapping[str, torch.Tensor]], shards: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Return the whole tensors that files of several ranks hold, given the axis along which each shard is cut.

    Raises:
        ValueError: the first file lacks a shard, or another one holds anything else, or shards do not fit.
    """
    tensors = dict(files[0])
    for file in files if shards else files[1:]:
        odd = sorted(shards.keys() - file.keys() if file is files[0] else shards.keys() ^ file.keys())
        if odd:
            raise ValueError(f"its files disagree about the shards of {sanitized(repr(odd[0]))}")
    for name, axis in shards.items():
        tensors[name] = whole_of(name, [file[name] for file in files], axis)
    return tensors


def whole_of(name: str, shards: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    """Return the whole of a tensor, of its shards in order.

    Raises:
        ValueError: they do not fit along this axis.
    """
    alike = {(shard.dtype, shard.dim(), shard.shape[:axis], shard.shape[axis + 1 :]) for shard in shards}
    if len(alike) != 1 or axis >= shards[0].dim():
        raise ValueError(f"the shards of {sanitized(repr(name))} do not fit along axis {axis}")
    return torch.cat(list(shards), axis)


def _check_files(path: Path, files: Mapping[str, str]) -> None:
    """Refuse a version that holds more than its manifest and the files that it names."""
    with os.scandir(path) as entries:
        odd = next((entry.name for entry in entries if entry.name not in (MANIFEST, *files)), None)
    if odd is not None:
        raise CheckpointError(f"{path}: holds {sanitized(odd)}, which is no part of a checkpoint; take it away")


def plan_faults(plan: Plan, tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Yield what is wrong with tensors that must be right before a cascade is made by the plan: its branches are as
    large as the plan says, so the plan says no more than the file holds.
    """
    state = tensors.get(RNG)
    if state is None:
        yield f"has no tensor {RNG!r}"
    elif state.dtype != torch.uint8 or state.shape != torch.get_rng_state().shape or not _is_random(state):
        yield f"{RNG!r} is no state of torch's random generator"
    odd = next((name for name in tensors if name.startswith("rng/") and not _GENERATOR.fullmatch(name)), None)
    if odd is not None:
        yield f"holds {sanitized(repr(odd))}, which is no random generator"
    yield from branch_faults(plan, tensors)


def branch_faults(plan: Plan, tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Yield what is wrong with the names and shapes of a plan's branches; of the tensors no number is read."""
    planned = {f"branch/{site.weight}/{name}" for site in plan.sites for name in site.parameter_shapes}
    odd = next((name for name in tensors if name.startswith("branch/") and name not in planned), None)
    if odd is not None:
        yield f"holds {sanitized(repr(odd))}, of which the plan has no site"
    for site in plan.sites:
        for name, shape in site.parameter_shapes.items():
            factor = tensors.get(f"branch/{site.weight}/{name}")
            if factor is None:
                yield f"has no tensor {sanitized(repr(f'branch/{site.weight}/{name}'))}"
            elif tuple(factor.shape) != shape:
                what = sanitized(repr(f"branch/{site.weight}/{name}"))
                yield f"{what} is {tuple(factor.shape)}, the plan says {shape}"


def _base_faults(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield what is wrong with the W0 that the file holds: it has to have the fingerprint in the manifest."""
    prefix, base = "base/", checkpoint.manifest["base"]
    held = {name.removeprefix(prefix): value for name, value in checkpoint.tensors.items() if name.startswith(prefix)}
    for name, digest in fingerprints(held).items():
        if name not in base and name not in checkpoint.manifest["trained"]:
            yield f"holds {sanitized(repr(prefix + name))}, a parameter that the base does not have"
        elif base.get(name, digest) != digest:
            yield f"{sanitized(repr(prefix + name))} differs from its fingerprint in {MANIFEST}"


def _is_random(state: torch.Tensor) -> bool:
    try:
        torch.Generator().set_state(state)
    except RuntimeError:
        return False
    return True


def _why(fault: Exception) -> str:
    return sanitized(reason_of(fault), 300)


def check_base(
    checkpoint: Checkpoint,
    parameters: Mapping[str, torch.Tensor],
    digests: Mapping[str, str] | None = None,
    moved: Collection[str] = (),
    advice: str = "load onto the weights that were adapted",
) -> None:
    """Refuse a model that is not the checkpoint's base.

    The values of what the checkpoint holds itself do not matter: W0 of what was trained in full, which it puts in.
    Of what is on the meta device only names are known.

    Args:
        checkpoint: as read.
        parameters: of the model, by name.
        digests: fingerprints of their W0, if they are known.
        moved: more names of parameters that forward writes.
        advice: what to do about another base, for messages.

    Raises:
        CheckpointError: names the parameters that are missing, foreign, or differ.
    """
    base: Mapping[str, str] = checkpoint.manifest["base"]
    own = {}
    for name, value in checkpoint.bases.items():
        parameter = parameters.get(name)
        if parameter is not None and (parameter.shape, parameter.dtype) == (value.shape, value.dtype):
            own[name] = value
    if digests is None:
        here = {name: value for name, value in parameters.items() if name in base and name not in own}
        digests = {name: base[name] for name, value in here.items() if value.is_meta}
        digests |= fingerprints({name: value for name, value in here.items() if not value.is_meta})
    digests = {**digests, **fingerprints(own)}
    check_digests(f"{checkpoint.path}: this is", base, digests, parameters, {*checkpoint.moved, *moved}, advice)


def check_digests(
    what: str,
    base: Mapping[str, str],
    digests: Mapping[str, str],
    names: Iterable[str],
    moved: Collection[str],
    advice: str = "load onto the weights that were adapted",
) -> None:
    """Refuse fingerprints of a model that are not those of a base.

    Args:
        what: is of a base, and `advice` what to do about another one, for messages.
        base: fingerprints of the base, by parameter.
        digests: those of the model, of the parameters that the base has.
        names: all parameters of the model.
        moved: parameters that are no part of a base, as forward writes them.

    Raises:
        CheckpointError: names the parameters that are missing, foreign, or differ.
    """
    missing = [name for name in base if name not in digests and name not in moved]
    foreign = [name for name in names if name not in base and name not in moved]
    changed = [name for name, digest in digests.items() if base.get(name, digest) != digest and name not in moved]
    for how, parameters in (("lacks", missing), ("has besides", foreign), ("differs in", changed)):
        if parameters:
            raise CheckpointError(
                f"{what} another base: the model {how} {named(map(sanitized, parameters))}; {advice}",
                code="base-differs",
            )


def check_plan(
    checkpoint: Checkpoint, matrices: Mapping[str, tuple[str, ...]], parameters: Mapping[str, torch.Tensor]
) -> None:
    """Refuse a plan of other weights than the model's, before a cascade is made by it.

    Args:
        checkpoint: as read.
        matrices: all names of each weight matrix, by its first.
        parameters: the model's, by first name.

    Raises:
        CheckpointError: names the weight.
    """
    manifest, plan, way = checkpoint.path / MANIFEST, checkpoint.plan, way_back(checkpoint.path)
    for site in plan.sites:
        names = matrices.get(site.weight)
        if names is None:
            raise CheckpointError(
                f"{manifest}: its plan has a site {sanitized(site.weight)}, which the model has not; {_AS_IT_WAS}",
                code="sites-differ",
            )
        if (site.weight, *site.aliases) != names:
            raise CheckpointError(
                f"{manifest}: its plan has {sanitized(site.weight)} tied to "
                f"{sanitized(', '.join(site.aliases) or 'nothing')}, the model to {', '.join(names[1:]) or 'nothing'}; "
                f"{_AS_IT_WAS}",
                code="sites-differ",
            )
        shape = tuple(parameters[site.weight].shape)
        if site.shape != shape:
            raise CheckpointError(
                f"{manifest}: its plan has {site.weight} of shape {site.shape}, the model {shape}; {way}",
                code="sites-differ",
            )
    spec, planned = plan.spec, plan.by_weight
    rank = max(spec.rank, *spec.ranks, *(rule.rank or 0 for rule in spec.rules), 0)
    for name in matrices.keys() - planned.keys():  # one that this call is the first to use would get such a branch
        size = parameters[name].shape
        if rank * (size[0] + math.prod(size[1:])) > max(_ROOM, 64 * parameters[name].numel()):
            raise CheckpointError(
                f"{manifest}: its spec asks for rank {rank}, which makes a branch of {name} larger than anything here; "
                f"{way}",
                code="sites-differ",
            )


def decoded(checkpoint: Checkpoint, taker: RunState | None = None) -> RunState:
    """Return the state that a checkpoint holds, for a cascade that is to take it over if there is one (`codec.decode`).

    Raises:
        CheckpointError: it is not what a checkpoint of its plan holds.
    """
    with refused(checkpoint):
        return decode(checkpoint.manifest, checkpoint.tensors, checkpoint.plan, str(checkpoint.path), taker)


def with_learners(checkpoint: Checkpoint) -> tuple[RunState, dict[str, Learner]]:
    """Return the state that a checkpoint holds, and what trains in its running stage by weight; no model is built.

    Raises:
        CheckpointError: it is not what a checkpoint of its plan holds.
    """
    state = decoded(checkpoint)
    with refused(checkpoint):
        learners = state.learners()
    return state, learners


def restore(run: Run, checkpoint: Checkpoint, undo: Undo | None = None) -> None:
    """Put the checkpoint's values into a cascade that has its sites; the cascade's plan is then the checkpoint's.

    With `undo` this is a part of a larger block. Where the weights are sharded, every rank takes its shards.

    Raises:
        CheckpointError: they do not fit; the cascade is as it was.
    """
    state = decoded(checkpoint, RunState.of(run))
    with refused(checkpoint):
        install(run, state, str(checkpoint.path), undo)
    run.note_fingerprints({name: checkpoint.manifest["base"][name] for name in checkpoint.bases})


@contextmanager
def refused(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn what a state of another kind raises into a CheckpointError that says what to do."""
    way = way_back(checkpoint.path)
    try:
        yield
    except CheckpointError as fault:
        raise CheckpointError(f"{fault}; {way}", code=fault.code) from fault
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError) as fault:
        what = f"{type(fault).__name__}: {sanitized(str(fault))}"
        raise CheckpointError(
            f"{checkpoint.path}: is not what a checkpoint of this plan holds: {what}; {way}"
        ) from fault
