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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lorasc_fx.cascade.optim import check_numbers
from lorasc_fx.cascade.run import Run
from lorasc_fx.checkpoint.content import Content
from lorasc_fx.checkpoint.layout import (
    FORMAT,
    KEY,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    canonical,
    digest_of,
    file_names,
    is_our_file,
    list_versions,
    next_name,
    parsed,
    plain_bytes,
)
from lorasc_fx.checkpoint.training import gathered_random_states
from lorasc_fx.checkpoint.tree import Tensors, pack
from lorasc_fx.errors import CheckpointError, NonFiniteBranch, SpecError, StateError, reason_of
from lorasc_fx.plan import Plan
from lorasc_fx.shards import ProcessGroup, local
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
    optimizers: Sequence[torch.optim.Optimizer],
    schedulers: Sequence[Any],
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
            rng = gathered_random_states(group, "save")
            # Copy the state into host memory. The first rank locks the folder and creates a temporary one.
            with group.agreed("save"), _as_checkpoint_error(root, "cannot be written"):
                if takes_part:
                    tensors, manifest = contents(Content.of(run, optimizers, schedulers, extra, rng), run)
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
                    shards = manifest["shards"]
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


def contents(content: Content, run: Run) -> tuple[Tensors, dict[str, Any]]:
    """Return copies of the tensors of a version, and its manifest. Of a sharded tensor, the local shard is copied."""
    try:
        if run.plan.spec.on_nonfinite == "raise":
            for owner in content.optimizers:
                check_numbers(owner.state, "optimizer")
    except ValueError as fault:
        raise CheckpointError(
            f"save: {fault}; nothing was written, and the last version is unchanged. Load it, and continue with a "
            "lower learning rate or with clipped gradients",
            code="non-finite",
        ) from fault
    axes = content.axes(run.slow)
    try:
        plain, tensors = pack(content)
        manifest = json.loads(json.dumps({"format": FORMAT, "content": plain}, allow_nan=False))
    except (RecursionError, TypeError, ValueError) as fault:
        raise CheckpointError(
            "save: a buffer, a gradient, extra, or the state of the optimizer or scheduler contains a value that "
            f"neither JSON nor safetensors can store: {fault}; use numbers, strings, lists, dicts and dense tensors",
            code="not-serializable",
        ) from fault
    shards = {name: axes[id(tensor)] for name, tensor in tensors.items() if id(tensor) in axes}
    copies = {
        name: local(tensor.detach()).clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    return copies, {**manifest, "shards": shards}


def to_state_dict(run: Run) -> dict[str, torch.Tensor]:
    """Return copies of the state of a cascade, without optimizer and scheduler, as tensors by name.

    Raises:
        NonFiniteBranch: a branch holds inf or nan.
    """
    check_finite(run)
    tensors, manifest = contents(Content.of(run), run)
    return {**tensors, KEY: packed(manifest, [digest_of(tensors)])}


def packed(manifest: dict[str, Any], digests: Sequence[str]) -> torch.Tensor:
    """Add the digest of each rank's tensors (`digest_of`) to a manifest, and return its bytes as a tensor."""
    manifest["files"] = dict(zip(file_names(len(digests)), digests, strict=True))
    manifest["digest"] = text_digest(canonical(manifest))
    text = json.dumps(manifest, allow_nan=False).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


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
        old, new = older["content"], manifest["content"]
        specs = [Plan.from_json(json.dumps(item["plan"])).spec for item in (old, new)]
        return bool(old["base"] == new["base"] and specs[0] == specs[1])
    except (OSError, CheckpointError, KeyError, RecursionError, TypeError, ValueError):  # damaged, or not a manifest
        return False
