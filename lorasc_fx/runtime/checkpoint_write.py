"""How a version comes to be: made beside, synced, and renamed into its place when it is whole.

One writer at a time, held by a lock that the system takes back when its holder dies. So what a killed writer left in
the folder is nobody's, and goes at the next save. A version that leaves loses its name first, so that half of one is
never seen under a name that loads.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lorasc_fx.branch.rows import local
from lorasc_fx.branch.stage import all_finite
from lorasc_fx.errors import CheckpointError, NonFiniteBranch, SpecError
from lorasc_fx.runtime import generators, half_step, outside_json, packing
from lorasc_fx.runtime.checkpoint import _PREFIX, FORMAT, MANIFEST, TENSORS, _canonical, _versions
from lorasc_fx.runtime.fingerprint import file_digest, text_digest
from lorasc_fx.runtime.manifest import LONGEST
from lorasc_fx.runtime.provenance import versions

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from lorasc_fx.runtime.core import Core

__all__ = ["check_finite", "contents", "sync", "write_version"]

_WRITING, _LEAVING = ".writing-", ".leaving-"


def write_version(
    core: Core,
    root: Path,
    optimizer: torch.optim.Optimizer | None,
    scheduler: Any,
    extra: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write a new version into `root`, and drop versions older than the last `keep`; see `lorasc_fx.save`."""
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise SpecError(f"keep is {keep!r}; give the number of versions that stay, an integer of 1 or more")
    check_finite(core)
    tensors, manifest = contents(core, optimizer, scheduler, extra)
    with contextlib.ExitStack() as held:
        try:
            _make(root)
            if held.enter_context(_alone_in(root)):
                _clear(root)
            known = _versions(root)
            whole = root / f"{_PREFIX}{known[-1][0] + 1 if known else 1:08d}"
            beside = root / f"{_WRITING}{uuid.uuid4().hex}"
            beside.mkdir()
        except OSError as fault:
            raise CheckpointError(f"{root}: cannot be written: {fault.strerror}; what was there stays") from fault
        _place(tensors, manifest, beside, whole)
        for _, old in _versions(root)[:-keep]:
            _drop(old)
    return whole


def check_finite(core: Core) -> None:
    """Refuse to keep what a load would refuse; the version before is worth more."""
    if core.plan.spec.on_nonfinite == "raise" and not all_finite(core.by_key.values()):
        broken = next(branch.weight_name for branch in core.by_key.values() if not branch.finite())
        raise NonFiniteBranch(
            f"save: the branch of {broken} holds inf or nan; nothing was written, and the last version stays. "
            "Load that one, and go on with a lower learning rate or with clipped gradients"
        )


def contents(
    core: Core, optimizer: torch.optim.Optimizer | None, scheduler: Any, extra: Mapping[str, Any]
) -> tuple[packing.Tensors, dict[str, Any]]:
    """Return what the two files of a version hold; nothing is written yet."""
    tensors, meta = packing.pack(core)
    gradients, meta["pending"] = half_step.pack(core)
    streams, meta["rng"] = generators.pack()
    parts: dict[str, Any] = {"extra": extra}
    if optimizer is not None:
        more, parts["optimizer"] = packing.pack_optimizer(optimizer)
        tensors |= more
    if scheduler is not None:
        parts["scheduler"] = {"class": type(scheduler).__name__, "state": scheduler.state_dict()}
    try:
        taken = outside_json.take_out(parts)
        manifest = {
            "format": FORMAT,
            "plan": json.loads(core.plan.to_json()),
            "frontend": core.frontend,
            "versions": versions(),
            "base": core.fingerprints(),
            **meta,
            **taken.value,
            "outside": taken.notes,
        }
        manifest = json.loads(json.dumps(manifest, allow_nan=False))
    except (TypeError, ValueError) as fault:
        raise CheckpointError(
            f"extra, or the state of optimizer or scheduler, holds what neither JSON nor safetensors can: {fault}; "
            "give numbers, strings, lists, tables with strings as keys, and dense tensors"
        ) from fault
    _check_keys(extra)
    tensors |= gradients | streams | taken.tensors
    for name, tensor in tensors.items():
        if not outside_json.fits(local(tensor)):
            raise CheckpointError(
                f"{name} is {outside_json.kind(tensor)}, which safetensors cannot hold; make it dense or cast it before"
            )
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, manifest


def _check_keys(value: Any) -> None:
    """Refuse a key that JSON would turn into a string."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise CheckpointError(f"extra has the key {key!r}; JSON keeps strings as keys only; give str(key)")
    for each in value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ():
        _check_keys(each)


def _place(tensors: packing.Tensors, manifest: dict[str, Any], beside: Path, whole: Path) -> None:
    """Write both files beside, and give the folder its name: synced in this order, the name last."""
    root, made = whole.parent, beside
    try:
        save_file(tensors, beside / TENSORS)
        sync(beside / TENSORS)
        manifest["files"] = {TENSORS: file_digest(beside / TENSORS)}
        manifest["digest"] = text_digest(_canonical(manifest))
        text = json.dumps(manifest, indent=1, allow_nan=False)
        if len(text) > LONGEST:  # ASCII, as json writes it
            raise OSError(f"{MANIFEST} would have {len(text)} bytes, of {LONGEST} at most; put numbers into tensors")
        (beside / MANIFEST).write_text(text, encoding="utf-8")
        shutil.copymode(beside / MANIFEST, beside / TENSORS)  # safetensors would keep it from everybody else
        sync(beside / MANIFEST)
        sync(beside)
        beside.rename(whole)
        made = whole
        sync(root)
    except (OSError, SafetensorError) as fault:
        _undo(made)
        raise CheckpointError(f"{root}: the checkpoint was not written: {fault}; what was there stays") from fault
    except BaseException:
        _undo(made)
        raise


def _undo(made: Path) -> None:
    """Delete what a failed write has made, under whichever of its names."""
    if made.name.startswith(_WRITING):
        shutil.rmtree(made, ignore_errors=True)
    else:
        _drop(made)


def _make(root: Path) -> None:
    """Make a folder, and sync those that hold the new entries: its own, and those of parents that were missing too."""
    new = [each for each in (root, *root.parents) if not each.exists()]
    root.mkdir(parents=True, exist_ok=True)
    for each in reversed(new):
        sync(each.parent)


@contextlib.contextmanager
def _alone_in(root: Path) -> Iterator[bool]:
    """Keep other writers out of a folder, and say whether that is possible: some file systems know no locks.

    Without a lock two writers still do no harm: a version's name is given once, and the later one fails at it.
    """
    handle = os.open(root, os.O_RDONLY)
    try:
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = fcntl is not None
        except BlockingIOError as fault:
            raise CheckpointError(
                f"{root}: another save is writing into this folder at this moment; give each run a folder of its own, "
                "and save from one process of a run"
            ) from fault
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(handle)


def _clear(root: Path) -> None:
    """Delete what writers that were killed left behind; nobody else writes now."""
    for path in root.iterdir():
        if path.name.startswith((_WRITING, _LEAVING)) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def _drop(version: Path) -> None:
    """Delete a version, its name first; what cannot be deleted now goes at the next save."""
    leaving = version.with_name(f"{_LEAVING}{uuid.uuid4().hex}")
    with contextlib.suppress(OSError):
        version.rename(leaving)
        shutil.rmtree(leaving, ignore_errors=True)


def sync(path: Path) -> None:
    """Have the system put a file or folder on its disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
