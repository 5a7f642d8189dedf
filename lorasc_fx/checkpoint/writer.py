"""Writes a version of a checkpoint into a temporary folder, which is synced and then renamed.

The next save deletes temporary folders that a killed writer has left, under the lock of `files.one_writer`. A version
is renamed before it is deleted, so that a partly deleted version is never loaded. Only the files of a version are
deleted, and never a folder with unknown files, because other programs may write into the same folder.
"""

from __future__ import annotations

import contextlib
import json
import re
import stat
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lorasc_fx.cascade.optim import check_numbers
from lorasc_fx.cascade.run import Run
from lorasc_fx.checkpoint import training_state
from lorasc_fx.checkpoint.codec import RunState, Tensors, encode, gradients_in
from lorasc_fx.checkpoint.layout import (
    FORMAT,
    MANIFEST,
    canonical,
    file_names,
    is_our_file,
    list_versions,
    next_name,
    plain_bytes,
    versions,
)
from lorasc_fx.checkpoint.manifest import MAX_MANIFEST_BYTES, parsed
from lorasc_fx.errors import CheckpointError, NonFiniteBranch, SpecError, StateError, reason_of
from lorasc_fx.plan import Plan
from lorasc_fx.shards import ProcessGroup, local, shard_axis
from lorasc_fx.state.engine import all_finite
from lorasc_fx.util.checks import is_integer
from lorasc_fx.util.files import make_folder, one_writer, sync
from lorasc_fx.util.fingerprint import file_digest, text_digest

_WRITING, _DELETING = ".writing-", ".leaving-"
_TEMPORARY = re.compile(r"\.(writing|leaving)-[0-9a-f]{32}")
_PARTIAL = re.compile(r"\.tmp\w{6}")
"""Name of a file while safetensors writes it."""


def write_version(
    run: Run,
    root: Path,
    optimizer: torch.optim.Optimizer | None,
    scheduler: Any,
    extra: Mapping[str, Any],
    keep: int,
    group: ProcessGroup,
) -> Path:
    """Write a new version into `root`, and delete all but the last `keep` versions. See `lorasc_fx.save`.

    Every rank of the group calls this. Each rank writes its shards. The first one also writes everything else.
    """
    if not is_integer(keep, 1):
        raise SpecError(f"save: keep is {keep!r}; give the number of versions to keep, an integer of 1 or more")
    is_first = group.rank == 0
    # All ranks that share the weights take part. Replicas have the same shards and do not write.
    takes_part, order = group.rank < run.slow.group.size, run.slow.group.first_replica
    tensors: Tensors = {}
    manifest: dict[str, Any] = {}
    version = temporary = root
    created: Path | None = None  # the folder to delete if anything fails
    with contextlib.ExitStack() as stack:
        try:
            # Check on all ranks that the cascade can be saved, before any rank writes.
            with group.agreed("save"):
                if not group.is_alone:
                    check_between_steps(run, "save")
                if takes_part:
                    stack.enter_context(run.exclusive("save", sharded=True))
                    check_finite(run)
            if not group.is_alone:
                extra = {**extra, training_state.RANKS: group.gather(training_state.random_bytes(), "save")}
            # Copy the state into host memory. The first rank locks the folder and creates a temporary one.
            with group.agreed("save"), _as_checkpoint_error(root, "cannot be written"):
                if takes_part:
                    tensors, manifest = contents(run, optimizer, scheduler, extra)
                if is_first:
                    make_folder(root)
                    if stack.enter_context(one_writer(root / ".lock", root)):
                        for path in root.iterdir():  # delete what killed writers have left
                            if _TEMPORARY.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                                remove(path)
                    version = root / next_name(root)
                    created = temporary = root / f"{_WRITING}{uuid.uuid4().hex}"
                    created.mkdir()
            temporary = Path(group.gather_text(str(temporary), "save")[0])
            # Each rank writes its file. The manifest is written last, because it has the digests of all files.
            names, digest = file_names(len(order)), ""
            with group.agreed("save"), _as_checkpoint_error(root):
                if group.rank in order:
                    shards = manifest.get("shards", {})
                    to_write = {name: value for name, value in tensors.items() if is_first or name in shards}
                    path = temporary / names[order.index(group.rank)]
                    write_tensors(to_write, path)
                    sync(path)
                    digest = file_digest(path)
            digests = group.gather_text(digest, "save")
            with group.agreed("save"), _as_checkpoint_error(root):
                if is_first:
                    manifest["files"] = {name: digests[rank] for name, rank in zip(names, order, strict=True)}
                    _write_manifest(manifest, temporary)
                    temporary.rename(version)
                    created = version
                    sync(root)
        except BaseException:
            if created is not None:
                _drop(created)
            raise
        for old in list_versions(root)[:-keep] if is_first else ():
            if _replaces(manifest, old):
                _drop(old)
    return Path(group.gather_text(str(version), "save")[0])


def check_between_steps(run: Run, call: str) -> None:
    """Raise StateError if gradients wait for a step, because each rank may have different ones."""
    waiting = run.pending.waiting(run.trainable())
    if waiting:
        raise StateError(
            f"{call}: {waiting[0]} has a gradient that no optimizer step has used, and each rank may have a different "
            f"one; call {call} between optimizer.step() and the next backward",
            code="gradients-pending",
        )


def check_finite(run: Run) -> None:
    """Raise if the state has inf or nan: `load` would reject such a checkpoint, and older versions are deleted.

    Raises:
        NonFiniteBranch: a branch holds inf or nan.
        StateError: training has made a buffer inf or nan.
    """
    run.check_buffers("save")
    if run.plan.spec.on_nonfinite == "raise" and run.slow.group.any(not all_finite(run.by_key.values())):
        broken = next(
            (name for name, branch in run.branches_by_weight().items() if not branch.finite()), "another rank"
        )
        raise NonFiniteBranch(
            f"save: the branch of {broken} holds inf or nan; nothing was written, and the last version is unchanged. "
            "Load it, and continue with a lower learning rate or with clipped gradients"
        )


def contents(
    run: Run,
    optimizer: torch.optim.Optimizer | None,
    scheduler: Any,
    extra: Mapping[str, Any],
) -> tuple[Tensors, dict[str, Any]]:
    """Return the tensors of a version and its manifest. Of a sharded tensor, the local shard is returned."""
    meta, tensors, axes = encode(RunState.of(run))
    gradients, meta["unapplied_gradients"] = gradients_in(run)
    if changed := run.changed_buffers():
        meta["changed_buffers"] = changed
    streams, meta["rng"] = training_state.random_state()
    parts: dict[str, Any] = {"extra": extra}
    try:
        if optimizer is not None and run.plan.spec.on_nonfinite == "raise":
            check_numbers(optimizer.state_dict(), "optimizer")
    except ValueError as fault:
        raise CheckpointError(
            f"save: {fault}; nothing was written, and the last version is unchanged. Load it, and continue with a "
            "lower learning rate or with clipped gradients",
            code="non-finite",
        ) from fault
    if optimizer is not None:
        moments, parts["optimizer"] = training_state.optimizer_state(optimizer)
        tensors |= moments
    if scheduler is not None:
        parts["scheduler"] = {"class": type(scheduler).__name__, "state": scheduler.state_dict()}
    try:
        plain, references, extracted = training_state.extract_tensors(parts)
        manifest = {
            "format": FORMAT,
            "plan": json.loads(run.plan.to_json()),
            "frontend": run.frontend,
            **({} if run.inputs is None else {"inputs": run.inputs}),
            "versions": versions(),
            "base": run.fingerprints(),
            **meta,
            **plain,
            "tensor_references": references,
        }
        manifest = json.loads(json.dumps(manifest, allow_nan=False))
        _check_keys(extra)
    except (TypeError, ValueError) as fault:
        raise CheckpointError(
            "save: extra, or the state of the optimizer or scheduler, contains a value that neither JSON nor "
            f"safetensors can store: {fault}; use numbers, strings, lists, dicts with strings as keys, and dense "
            "tensors",
            code="not-serializable",
        ) from fault
    tensors |= gradients | streams | extracted
    axes |= {name: axis for name, value in tensors.items() if (axis := shard_axis(value)) is not None}
    if axes:
        manifest["shards"] = axes
        tensors = {name: local(tensor) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not training_state.is_storable(tensor):
            raise CheckpointError(
                f"{name} is a {type(tensor).__name__} of {str(tensor.dtype).removeprefix('torch.')}, {tensor.layout}, "
                "which safetensors cannot store; make it dense, or convert it to another dtype",
                code="not-serializable",
            )
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, manifest


def _check_keys(value: Any) -> None:
    """Raise ValueError for a key that JSON would convert to a string."""
    for key in value if isinstance(value, Mapping) else ():
        if not isinstance(key, str):
            raise ValueError(f"extra has the key {key!r}, but keys in JSON are strings: use str(key)")
    for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ():
        _check_keys(item)


@contextlib.contextmanager
def _as_checkpoint_error(root: Path, failure: str = "the checkpoint was not written") -> Iterator[None]:
    """Convert errors of the file system to CheckpointErrors."""
    try:
        yield
    except (OSError, SafetensorError) as fault:
        raise CheckpointError(
            f"{root}: {failure}: {reason_of(fault)}; existing versions are unchanged", code="write-failed"
        ) from fault


def _write_manifest(manifest: dict[str, Any], folder: Path) -> None:
    """Add the digest of a manifest, write it, and sync it and its folder."""
    manifest["digest"] = text_digest(canonical(manifest))
    text = json.dumps(manifest, indent=1, allow_nan=False)
    if len(text) > MAX_MANIFEST_BYTES:  # one byte per character, because json writes ASCII
        raise OSError(
            f"{MANIFEST} would have {len(text)} bytes, but the maximum is {MAX_MANIFEST_BYTES}; store long lists of "
            "numbers in `extra` as tensors"
        )
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of the umask. safetensors would let only the owner read it."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(dict(tensors), path, metadata)
    path.chmod(mode)


def remove(folder: Path) -> None:
    """Delete the files of a version in a folder, the manifest last. Then delete the folder if it is empty.

    Files that cannot be deleted stay.
    """
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST):
            if is_our_file(path.name) or _PARTIAL.fullmatch(path.name):
                path.unlink()
        folder.rmdir()


def _drop(version: Path) -> None:
    """Delete a version, or the temporary folder of a failed save.

    Files that cannot be deleted now are deleted by the next save. If a version contains files of other programs, they
    stay, and the folder keeps its name.
    """
    with contextlib.suppress(OSError):
        if not _TEMPORARY.fullmatch(version.name) and all(is_our_file(path.name) for path in version.iterdir()):
            version = version.rename(version.with_name(f"{_DELETING}{uuid.uuid4().hex}"))
        remove(version)


def _replaces(manifest: Mapping[str, Any], version: Path) -> bool:
    """Return whether an older version has an undamaged manifest with the same base and spec as this one."""
    try:
        older = parsed(plain_bytes(version / MANIFEST, MAX_MANIFEST_BYTES))
        if older["digest"] != text_digest(canonical(older)):
            return False
        old_spec, new_spec = (Plan.from_json(json.dumps(item["plan"])).spec for item in (older, manifest))
        return bool(older["base"] == manifest["base"] and old_spec == new_spec)
    except (OSError, CheckpointError, KeyError, RecursionError, TypeError, ValueError):  # damaged, or not a manifest
        return False
