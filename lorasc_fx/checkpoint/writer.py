"""Writing a version: into a temporary folder, which is synced and then renamed.

The next save deletes the temporary folders that a killed writer left, under the lock of `files.one_writer`. A version
is renamed before it is deleted, so that a partial one never has a name that loads. Only files of ours are deleted,
never a folder with its content: other programs may write into the same folder.
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
from lorasc_fx.checkpoint.codec import RunState, Tensors, encode
from lorasc_fx.checkpoint.gradients import gradients_in
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
from lorasc_fx.checkpoint.manifest import LONGEST, parsed
from lorasc_fx.errors import CheckpointError, NonFiniteBranch, SpecError, StateError, reason_of
from lorasc_fx.plan import Plan
from lorasc_fx.shards import ProcessGroup, local, shard_axis
from lorasc_fx.state.engine import all_finite
from lorasc_fx.util.checks import is_integer
from lorasc_fx.util.files import make_folder, one_writer, sync
from lorasc_fx.util.fingerprint import file_digest, text_digest

LOCK = ".lock"
_WRITING, _LEAVING = ".writing-", ".leaving-"
_TEMPORARY = re.compile(r"\.(writing|leaving)-[0-9a-f]{32}")
_PARTIAL = re.compile(r"\.tmp\w{6}")
"""What safetensors names a file while it writes it."""


def write_version(
    run: Run,
    root: Path,
    optimizer: torch.optim.Optimizer | None,
    scheduler: Any,
    extra: Mapping[str, Any],
    keep: int,
    group: ProcessGroup,
    named: Mapping[str, Any] | None = None,
    beside: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write a new version into `root`, and drop versions older than the last `keep`; see `lorasc_fx.save`.

    With `named` it says how the base is built (`model`); `beside` are tensors of the base that this name has not.

    Every rank of the group calls this. Each writes the shards that it holds; the first one writes all else.
    """
    if not is_integer(keep, 1):
        raise SpecError(f"keep is {keep!r}; give the number of versions that stay, an integer of 1 or more")
    is_first, is_alone = group.rank == 0, group.handle is None
    holds = is_first or run.is_sharded
    order = group.order if run.is_sharded else [0]
    writes = group.rank in order  # replicas hold the same
    tensors: Tensors = {}
    manifest: dict[str, Any] = {}
    version = temporary_folder = root
    made: Path | None = None
    with contextlib.ExitStack() as held:
        try:
            with group.agreed("save"):
                if not is_alone:
                    check_between_steps(run, "save")
                if holds:
                    held.enter_context(run.exclusive("save", sharded=True))
                    check_finite(run)
            if not is_alone:
                extra = {**extra, training_state.RANKS: group.gather(training_state.random_bytes(), "save")}
            with group.agreed("save"), _as_checkpoint_error(root, "cannot be written"):
                if holds:
                    tensors, manifest = contents(run, optimizer, scheduler, extra, named or {})
                    tensors |= beside or {}
                if is_first:
                    make_folder(root)
                    if held.enter_context(one_writer(root / LOCK, root)):
                        clear_interrupted(root)
                    version, temporary_folder = root / next_name(root), temporary(root)
                    made = temporary_folder
                    made.mkdir()
            temporary_folder = Path(group.gather_text(str(temporary_folder), "save")[0])
            names, digest = file_names(len(order)), ""
            with group.agreed("save"), _as_checkpoint_error(root):
                if writes:
                    shards = manifest.get("shards", {})
                    here = {name: value for name, value in tensors.items() if is_first or name in shards}
                    digest = _write_synced(here, temporary_folder / names[order.index(group.rank)])
            digests = group.gather_text(digest, "save")
            written = [digests[rank] for rank in order]
            with group.agreed("save"), _as_checkpoint_error(root):
                if is_first:
                    _write_manifest(manifest, dict(zip(names, written, strict=True)), temporary_folder)
                    temporary_folder.rename(version)
                    made = version
                    sync(root)
        except BaseException:
            if made is not None:
                _drop(made)
            raise
        for old in list_versions(root)[:-keep] if is_first else ():
            if _replaces(manifest, old):
                _drop(old)
    return Path(group.gather_text(str(version), "save")[0])


def check_between_steps(run: Run, call: str) -> None:
    """Raise StateError where gradients wait for a step: each rank may hold others."""
    waiting = run.pending.waiting(run.trainable())
    if waiting:
        raise StateError(
            f"{call}: gradients wait for a step on {waiting[0]}, and each rank may hold others; call it between "
            "optimizer.step() and the next backward",
            code="gradients-pending",
        )


def check_finite(run: Run) -> None:
    """Refuse to keep what a load would refuse; the version before is worth more."""
    run.check_buffers("save")
    if run.plan.spec.on_nonfinite == "raise" and run.slow.group.any(not all_finite(run.by_key.values())):
        broken = next(
            (name for name, branch in run.branches_by_weight().items() if not branch.finite()), "another rank"
        )
        raise NonFiniteBranch(
            f"save: the branch of {broken} holds inf or nan; nothing was written, and the last version stays. "
            "Load that one, and go on with a lower learning rate or with clipped gradients"
        )


def contents(
    run: Run,
    optimizer: torch.optim.Optimizer | None,
    scheduler: Any,
    extra: Mapping[str, Any],
    named: Mapping[str, Any],
) -> tuple[Tensors, dict[str, Any]]:
    """Return the tensors of a version, of sharded ones the part that is here, and its manifest; nothing is written."""
    meta, tensors, axes = encode(RunState.of(run))
    gradients, meta["unapplied_gradients"] = gradients_in(run)
    streams, meta["rng"] = training_state.random_state()
    parts: dict[str, Any] = {"extra": extra, **named}
    try:
        if optimizer is not None:
            check_numbers(optimizer.state_dict(), "optimizer", finite=run.plan.spec.on_nonfinite == "raise")
        if scheduler is not None:
            check_numbers(scheduler.state_dict(), "scheduler")
    except ValueError as fault:
        raise CheckpointError(
            f"save: {fault}; nothing was written, and the last version stays. Load that one, and go on with a lower "
            "learning rate or with clipped gradients",
            code="non-finite",
        ) from fault
    if optimizer is not None:
        moments, parts["optimizer"] = training_state.optimizer_state(optimizer)
        tensors |= moments
    if scheduler is not None:
        parts["scheduler"] = {"class": type(scheduler).__name__, "state": scheduler.state_dict()}
    try:
        taken = training_state.extract_tensors(parts)
        manifest = {
            "format": FORMAT,
            "plan": json.loads(run.plan.to_json()),
            "frontend": run.frontend,
            "versions": versions(),
            "base": run.fingerprints(),
            **meta,
            **taken.value,
            "tensor_references": taken.references,
        }
        manifest = json.loads(json.dumps(manifest, allow_nan=False))
    except (TypeError, ValueError) as fault:
        raise CheckpointError(
            f"extra, or the state of optimizer or scheduler, holds what neither JSON nor safetensors can: {fault}; "
            "give numbers, strings, lists, tables with strings as keys, and dense tensors",
            code="not-serializable",
        ) from fault
    _check_keys(extra)
    tensors |= gradients | streams | taken.tensors
    axes |= {name: axis for name, value in tensors.items() if (axis := shard_axis(value)) is not None}
    if axes:
        manifest["shards"] = axes
        tensors = {name: local(tensor) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not training_state.is_storable(tensor):
            raise CheckpointError(
                f"{name} is {training_state.kind_of(tensor)}, which safetensors cannot hold; "
                "make it dense or cast it before",
                code="not-serializable",
            )
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, manifest


def _check_keys(value: Any) -> None:
    """Refuse a key that JSON would turn into a string."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise CheckpointError(
                    f"extra has the key {key!r}; JSON keeps strings as keys only; give str(key)",
                    code="not-serializable",
                )
    for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ():
        _check_keys(item)


@contextlib.contextmanager
def _as_checkpoint_error(root: Path, what: str = "the checkpoint was not written") -> Iterator[None]:
    """Raise what the file system refuses as a CheckpointError."""
    try:
        yield
    except (OSError, SafetensorError) as fault:
        raise CheckpointError(
            f"{root}: {what}: {reason_of(fault)}; what was there stays", code="write-failed"
        ) from fault


def _write_synced(tensors: Tensors, path: Path) -> str:
    """Write a file of tensors, and return its digest when it is on the disk."""
    write_tensors(tensors, path)
    sync(path)
    return file_digest(path)


def _write_manifest(manifest: dict[str, Any], files: Mapping[str, str], folder: Path) -> None:
    """Complete a manifest by the digests of the files, and write it; synced, as the folder is."""
    manifest["files"] = files
    manifest["digest"] = text_digest(canonical(manifest))
    text = json.dumps(manifest, indent=1, allow_nan=False)
    if len(text) > LONGEST:  # ASCII, as json writes it
        raise OSError(f"{MANIFEST} would have {len(text)} bytes, of {LONGEST} at most; put numbers into tensors")
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file with the mode that the umask gives; safetensors lets its owner alone read it."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(dict(tensors), path)
    path.chmod(mode)


def temporary(root: Path) -> Path:
    """Return the path of a new temporary folder."""
    return root / f"{_WRITING}{uuid.uuid4().hex}"


def clear_interrupted(root: Path) -> None:
    """Delete the temporary folders that killed writers left. The caller holds the lock."""
    for path in root.iterdir():
        if _TEMPORARY.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            remove(path)


def remove(folder: Path) -> None:
    """Delete our files in a folder, the manifest last, and the folder if nothing else is in it.

    What cannot be deleted stays.
    """
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST):
            if is_our_file(path.name) or _PARTIAL.fullmatch(path.name):
                path.unlink()
        folder.rmdir()


def _drop(version: Path) -> None:
    """Delete a version, or a temporary folder that was not completed; what cannot be deleted now goes at the next save.

    A version that holds files of others keeps its name, and they stay.
    """
    with contextlib.suppress(OSError):
        if not _TEMPORARY.fullmatch(version.name) and all(is_our_file(path.name) for path in version.iterdir()):
            version = version.rename(version.with_name(f"{_LEAVING}{uuid.uuid4().hex}"))
        remove(version)


def _replaces(manifest: Mapping[str, Any], version: Path) -> bool:
    """Whether a version has an undamaged manifest of ours, for the base and the spec of this one."""
    other = _undamaged(version)
    try:
        then, now = (Plan.from_json(json.dumps(each["plan"])).spec for each in (other, manifest))
        return bool(other["base"] == manifest["base"] and then == now)
    except (CheckpointError, KeyError, TypeError):
        return False


def newest_of_training(root: Path) -> Path | None:
    """Return the newest version in a folder, if it holds the state of a training: of an optimizer, or `extra`."""
    for version in list_versions(root)[-1:]:
        manifest = _undamaged(version)
        if any(manifest.get(part) for part in ("optimizer", "scheduler", "extra")):
            return version
    return None


def _undamaged(version: Path) -> dict[str, Any]:
    """Return the manifest of a version; an empty one if it is damaged, or none of ours."""
    try:
        manifest = parsed(plain_bytes(version / MANIFEST, LONGEST))
        return manifest if manifest["digest"] == text_digest(canonical(manifest)) else {}
    except (OSError, CheckpointError, KeyError, RecursionError, TypeError, ValueError):
        return {}
