"""Checkpoints of sharded weights by torch.distributed.checkpoint: each process writes and reads its own rows.

What torch writes by default is unpickled when it is read; here it writes safetensors, and beside them stands the
manifest of `lorasc_fx.save`, with the shape of every tensor. So loading runs no code from a file, and a run goes on
with any number of processes.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as read_shards
from torch.distributed.checkpoint.state_dict_saver import save as write_shards
from torch.distributed.tensor import zeros

from lorasc_fx.errors import CheckpointError, StateError, path_of
from lorasc_fx.integrations.processes import RANKS, agreed, gathered, reseed, streams, text_of_rank_0
from lorasc_fx.plan import Plan
from lorasc_fx.runtime import Cascade
from lorasc_fx.runtime.checkpoint import (
    MANIFEST,
    TENSORS,
    canonical,
    list_versions,
    next_name,
    plain_bytes,
    sanitized,
    way_back,
)
from lorasc_fx.runtime.checkpoint_read import Checkpoint, branch_faults
from lorasc_fx.runtime.checkpoint_write import (
    clear_interrupted,
    contents,
    exclusive,
    make_folder,
    remove,
    sync,
    temporary,
)
from lorasc_fx.runtime.codec import RunState
from lorasc_fx.runtime.fingerprint import file_digest, text_digest
from lorasc_fx.runtime.manifest import LONGEST, check_fields, check_kinds, parsed
from lorasc_fx.runtime.run import Run
from lorasc_fx.shards import Rows, local
from lorasc_fx.state import Side, Tree

__all__ = ["fill", "read", "resume", "save"]

T = TypeVar("T", bound=Tree)

KIND = "lorasc_fx.sharded"
FORMAT = 1


def save(
    cascade: Cascade,
    folder: str | PathLike[str],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint of a sharded cascade as a new version in `folder`; each process writes its own shards.

    Every process calls it, between two steps. The version gets its name when all of it is on disk. W0 is not in it.

    Args:
        cascade: that was sharded.
        folder: that every process sees.
        optimizer, scheduler, extra: as for `lorasc_fx.save`.

    Returns:
        The folder of the new version, on every process.

    Raises:
        StateError: the cascade is not sharded, or not between two steps, or another process has failed or is gone.
        CheckpointError, NonFiniteBranch: as `lorasc_fx.save`; what was there stays.
    """
    core = cascade._run
    if core.slow.together is None:
        raise StateError("save: this cascade is not sharded; use lorasc_fx.save", code="not-sharded")
    core.check_ready("save", sharded=True)
    if any(each.grad is not None for each in core.trainable().values()):
        raise StateError(
            "save: there are gradients; call it after optimizer.step() and optimizer.zero_grad()",
            code="gradients-pending",
        )
    group, root = core.slow.together.group, path_of(folder)
    first = dist.get_rank(group) == 0
    whole = {**(extra or {}), RANKS: gathered(streams(), group, "save")}
    with agreed("save", group):
        tensors, manifest = contents(core, optimizer, scheduler, whole, _as_sharded(core))
    beside = Path(text_of_rank_0(str(temporary(root)), group, "save"))
    path = ""
    with contextlib.ExitStack() as held:
        with agreed("save", group):
            if first:
                make_folder(root)
                if held.enter_context(exclusive(root)):
                    clear_interrupted(root)
                beside.mkdir()
        try:
            with agreed("save", group):
                own = {name: each for name, each in tensors.items() if first or hasattr(each, "to_local")}
                writer = HuggingFaceStorageWriter(str(beside), save_distributed=True)
                write_shards(own, storage_writer=writer, process_group=group)
            with agreed("save", group):
                if first:
                    manifest["tensors"] = {name: _described(each) for name, each in tensors.items()}
                    path = str(_named(beside, root, manifest))
        except BaseException:
            if first:
                remove(beside)
            raise
    return Path(text_of_rank_0(path, group, "save"))


def _named(beside: Path, root: Path, manifest: dict[str, Any]) -> Path:
    """Write the manifest, sync, and give the folder its name."""
    files = sorted(beside.iterdir())
    for each in files:
        sync(each)
    manifest |= {"kind": KIND, "format": FORMAT, "files": {each.name: file_digest(each) for each in files}}
    manifest["digest"] = text_digest(canonical(manifest))
    (beside / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False), encoding="utf-8")
    sync(beside / MANIFEST)
    sync(beside)
    version = root / next_name(root)
    beside.rename(version)
    sync(root)
    return version


def fill(cascade: Cascade, found: Checkpoint, group: dist.ProcessGroup | None) -> None:
    """Read the tensors of a checkpoint into a sharded cascade that has its plan; each process reads its own shards."""
    parameter: Any = next(iter(cascade.parameters()))
    with agreed("load", group):
        tensors = _targets(found, parameter)
    with agreed("load", group):
        read_shards(tensors, storage_reader=HuggingFaceStorageReader(str(found.path)), process_group=group)
        here = {name: each if name.startswith("optimizer/") else local(each).cpu() for name, each in tensors.items()}
        cascade._take_over(Checkpoint(found.path, found.manifest, here, found.plan))


def resume(cascade: Cascade, optimizer: torch.optim.Optimizer | None = None, scheduler: Any = None) -> dict[str, Any]:
    """After `load`: give optimizer, scheduler and random generators their saved state; return `extra`.

    The optimizer is built of `cascade.param_groups(...)` after `load`. On as many processes as saved, each gets its own
    random generators back, on another number each a stream of its own.

    Raises:
        StateError: the cascade is not sharded, was not loaded, or another process has failed or is gone.
        CheckpointError: as `Cascade.resume`.
    """
    core = cascade._run
    if core.slow.together is None:
        raise StateError("resume: this cascade is not sharded; use cascade.resume", code="not-sharded")
    group = core.slow.together.group
    with agreed("resume", group):
        extra = cascade.resume(optimizer, scheduler)
        reseed(extra.pop(RANKS), dist.get_rank(group), dist.get_world_size(group), core.stage)
    return extra


def _as_sharded(core: Run) -> RunState:
    """Return the state of a cascade with DTensors for the tensors of which parts are here."""
    state, parameters = RunState.of(core), core.parameters_by_name()

    def sharded(tree: T, name: str, axis_of: Callable[[Side], int | None]) -> T:
        like = parameters[name]
        part = Rows.of(like)
        return tree.map(lambda value, side: value if axis_of(side) is None else part.sharded(value, like))

    states = {name: sharded(weight, name, weight.axis) for name, weight in state.slow.states.items()}
    trained = {name: sharded(kept, name, lambda side: 0) for name, kept in state.slow.trained.items()}
    return replace(state, slow=replace(state.slow, states=states, trained=trained))


def _described(tensor: torch.Tensor) -> dict[str, Any]:
    rows = hasattr(tensor, "to_local")
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."), "rows": rows}


def read(root: Path) -> Checkpoint:
    """Read the manifest of the newest version in a folder; rank 0 holds the files against their digests."""
    versions = list_versions(root)
    if not versions:
        raise CheckpointError(
            f"{root}: no checkpoint of sharded weights in this folder; give the one that save was given",
            code="no-checkpoint",
        )
    path = versions[-1]
    try:
        manifest = parsed(plain_bytes(path / MANIFEST, LONGEST))
        if not isinstance(manifest, dict) or manifest.get("kind") != KIND or manifest.get("format") != FORMAT:
            raise ValueError(
                "it is none of sharded weights, or of another format; lorasc_fx.load reads what save wrote"
            )
        check_kinds(manifest)
        if manifest.get("digest") != text_digest(canonical(manifest)):
            raise ValueError("it differs from its own digest; the file is damaged, or was edited")
        plan = Plan.from_json(json.dumps(manifest["plan"]))
        check_fields({**manifest, "files": {TENSORS: "0" * 64}}, plan, TENSORS)
        if dist.get_rank() == 0:
            there = sorted(each.name for each in path.iterdir() if each.name != MANIFEST)
            if there != sorted(manifest["files"]):
                raise ValueError(f"it tells of {len(manifest['files'])} files, beside it are {len(there)} or others")
            for name in there:
                if file_digest(path / name) != manifest["files"][name]:
                    raise ValueError(f"{name} differs from its digest; the file is damaged")
    except (OSError, ValueError) as fault:
        raise CheckpointError(f"{path / MANIFEST}: cannot be read: {fault}; {way_back(path)}") from fault
    return Checkpoint(path, manifest, described(path, manifest.get("tensors"), plan), plan)


def described(path: Path, table: Any, plan: Plan) -> dict[str, torch.Tensor]:
    """Return the tensors of a version without their numbers, on the meta device.

    What they claim is held against the bytes of the files: offsets in the headers may say any shape.

    Raises:
        CheckpointError: manifest and files disagree, or claim more than the files hold.
    """
    files = [each for each in path.iterdir() if each.name != MANIFEST]
    try:
        sizes: dict[str, Any] = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except (
        AttributeError,
        IndexError,
        KeyError,
        OverflowError,
        RuntimeError,
        SafetensorError,
        TypeError,
        ValueError,
    ) as fault:
        raise CheckpointError(
            f"{path}: its files cannot be read: {sanitized(str(fault), 300)}; {way_back(path)}", code="unreadable-file"
        ) from fault
    if not isinstance(table, dict) or set(table) != set(sizes):
        raise CheckpointError(f"{path}: manifest and files name other tensors; {way_back(path)}")
    claimed, room = 0, sum(each.stat().st_size for each in files)
    made = {}
    for name, entry in table.items():
        size, dtype = sizes[name].size, sizes[name].properties.dtype
        if (
            not isinstance(entry, dict)
            or entry.get("shape") != list(size)
            or f"torch.{entry.get('dtype')}" != str(dtype)
        ):
            raise CheckpointError(f"{path}: manifest and files disagree about {sanitized(name)!r}; {way_back(path)}")
        claimed += math.prod(size) * dtype.itemsize
        if min(size, default=0) < 0 or claimed > room:
            raise CheckpointError(
                f"{path}: {sanitized(name)!r} is {tuple(size)}, more than the {room} bytes of the files can hold; "
                f"{way_back(path)}"
            )
        made[name] = torch.empty(size, dtype=dtype, device="meta")
    for sentence in branch_faults(plan, made):
        raise CheckpointError(f"{path}: {sentence}; {way_back(path)}")
    return made


def _targets(found: Checkpoint, like: Any) -> dict[str, torch.Tensor]:
    """Return tensors to read into; sharded as `like` is."""
    made: dict[str, torch.Tensor] = {}
    for name, each in found.tensors.items():
        if found.manifest["tensors"][name].get("rows") is True:
            made[name] = zeros(each.shape, dtype=each.dtype, device_mesh=like.device_mesh, placements=like.placements)
        else:
            made[name] = torch.zeros(each.shape, dtype=each.dtype)
    return made
