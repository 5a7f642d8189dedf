"""Checkpoints: a folder of versions, each safetensors and JSON only, written beside and renamed when it is whole.

W0 is not copied. A fingerprint of each base parameter refuses another base and names what differs. Loading runs no code
from a file.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lorasc_fx.errors import CheckpointError
from lorasc_fx.plan import Plan
from lorasc_fx.runtime import packing
from lorasc_fx.runtime.fingerprint import file_digest, fingerprint

if TYPE_CHECKING:
    from lorasc_fx.runtime.core import Core

__all__ = ["Checkpoint", "check_base", "read", "restore", "resume", "write_version"]

FORMAT = 1
MANIFEST = "manifest.json"
TENSORS = "state.safetensors"
_PREFIX = "step-"


def write_version(
    core: Core,
    root: Path,
    optimizer: torch.optim.Optimizer | None,
    scheduler: Any,
    extra: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write a new version into `root`, and drop versions older than the last `keep`; see `lorasc_fx.save`."""
    tensors, meta = packing.pack(core)
    if optimizer is not None:
        more, meta["optimizer"] = packing.pack_optimizer(optimizer)
        tensors |= more
    if scheduler is not None:
        meta["scheduler"] = scheduler.state_dict()
    meta["extra"] = extra
    tensors["rng/torch"] = torch.get_rng_state()
    meta["rng"] = {"python": random.getstate()}
    manifest = {
        "format": FORMAT,
        "plan": json.loads(core.plan.to_json()),
        "frontend": core.frontend,
        "versions": {"torch": str(torch.__version__)},
        "base": core.fingerprints(),
        **meta,
    }
    try:
        json.dumps(manifest, allow_nan=False)
    except (TypeError, ValueError) as fault:
        raise CheckpointError(f"extra or the scheduler's state holds what JSON cannot: {fault}") from fault
    try:
        root.mkdir(parents=True, exist_ok=True)
        known = _versions(root)
        number = known[-1][0] + 1 if known else 1
        beside = Path(tempfile.mkdtemp(prefix=".writing-", dir=root))
    except OSError as fault:
        raise CheckpointError(f"{root}: cannot be written: {fault.strerror}; what was there stays") from fault
    whole = root / f"{_PREFIX}{number:08d}"
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside / TENSORS)
        _sync(beside / TENSORS)
        manifest["files"] = {TENSORS: file_digest(beside / TENSORS)}
        (beside / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False), encoding="utf-8")
        _sync(beside / MANIFEST)
        _sync(beside)
        beside.rename(whole)
        _sync(root)
    except (OSError, SafetensorError) as fault:
        shutil.rmtree(beside, ignore_errors=True)
        raise CheckpointError(f"{root}: the checkpoint was not written: {fault}; what was there stays") from fault
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    for _, old in _versions(root)[: -max(keep, 1)]:
        shutil.rmtree(old, ignore_errors=True)
    return whole


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _versions(root: Path) -> list[tuple[int, Path]]:
    """Return the versions of a folder, oldest first."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        number = path.name.removeprefix(_PREFIX)
        if path.name.startswith(_PREFIX) and number.isdecimal() and path.is_dir() and not path.is_symlink():
            found.append((int(number), path))
    return sorted(found)


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


def read(folder: str | PathLike[str]) -> Checkpoint:
    """Read the newest version of a checkpoint folder.

    Raises:
        CheckpointError: there is none, or it is damaged; names the file and the reason.
    """
    root = Path(folder)
    versions = _versions(root)
    if not versions:
        raise CheckpointError(f"{root}: no checkpoint in this folder")
    path = versions[-1][1]
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise CheckpointError(f"{path / MANIFEST}: cannot be read: {fault}") from fault
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise CheckpointError(f"{path / MANIFEST}: format {found!r}; this version reads format {FORMAT}")
    for key in ("plan", "files", "base", "frontend", "slow", "trained", "parked"):
        if key not in manifest:
            raise CheckpointError(f"{path / MANIFEST}: has no {key!r}")
    try:
        digest = file_digest(path / TENSORS)
        if digest != manifest["files"].get(TENSORS):
            raise CheckpointError(f"{path / TENSORS}: differs from its digest in {MANIFEST}; the file is damaged")
        tensors = load_file(path / TENSORS)
    except (OSError, SafetensorError) as fault:
        raise CheckpointError(f"{path / TENSORS}: cannot be read: {fault}") from fault
    return Checkpoint(path, manifest, tensors, Plan.from_json(json.dumps(manifest["plan"])))


def check_base(checkpoint: Checkpoint, parameters: Mapping[str, torch.Tensor]) -> None:
    """Refuse a model that is not the checkpoint's base.

    Raises:
        CheckpointError: names the parameters that are missing, foreign, or differ.
    """
    base: Mapping[str, str] = checkpoint.manifest["base"]
    missing = [name for name in base if name not in parameters]
    foreign = [name for name in parameters if name not in base]
    changed = [name for name, value in parameters.items() if name in base and fingerprint(value) != base[name]]
    for what, names in (("lacks", missing), ("has besides", foreign), ("differs in", changed)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(
                f"{checkpoint.path}: this is another base: the model {what} {', '.join(names[:3])}{more}; "
                "load onto the weights that were adapted"
            )


def restore(core: Core, checkpoint: Checkpoint) -> None:
    """Put the checkpoint's values into a cascade that was made by its plan."""
    packing.unpack(core, checkpoint.tensors, checkpoint.manifest, str(checkpoint.path))


def resume(checkpoint: Checkpoint, optimizer: torch.optim.Optimizer | None, scheduler: Any) -> dict[str, Any]:
    """Give optimizer, scheduler and random generators their state back, and return `extra`."""
    manifest = checkpoint.manifest
    if optimizer is not None:
        if "optimizer" not in manifest:
            raise CheckpointError(f"{checkpoint.path}: holds no optimizer; it was saved without one")
        packing.unpack_optimizer(optimizer, checkpoint.tensors, manifest["optimizer"], str(checkpoint.path))
    if scheduler is not None:
        if "scheduler" not in manifest:
            raise CheckpointError(f"{checkpoint.path}: holds no scheduler; it was saved without one")
        scheduler.load_state_dict(manifest["scheduler"])
    torch.set_rng_state(checkpoint.tensors["rng/torch"])
    version, words, gauss = manifest["rng"]["python"]
    random.setstate((version, tuple(words), gauss))
    extra: dict[str, Any] = manifest["extra"]
    return extra
