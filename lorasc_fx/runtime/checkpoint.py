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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lorasc_fx.errors import CheckpointError, SpecError
from lorasc_fx.runtime import packing
from lorasc_fx.runtime.fingerprint import file_digest, text_digest

if TYPE_CHECKING:
    from lorasc_fx.runtime.core import Core

__all__ = ["write_version"]

FORMAT = 1
MANIFEST = "manifest.json"
TENSORS = "state.safetensors"
RNG = "rng/torch"
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
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise SpecError(f"keep is {keep!r}; give the number of versions that stay, an integer of 1 or more")
    tensors, meta = packing.pack(core)
    if optimizer is not None:
        more, meta["optimizer"] = packing.pack_optimizer(optimizer)
        tensors |= more
    if scheduler is not None:
        meta["scheduler"] = {"class": type(scheduler).__name__, "state": scheduler.state_dict()}
    meta["extra"] = extra
    tensors[RNG] = torch.get_rng_state()
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
        manifest = json.loads(json.dumps(manifest, allow_nan=False))
    except (TypeError, ValueError) as fault:
        raise CheckpointError(
            f"extra, or the state of optimizer or scheduler, holds what JSON cannot: {fault}"
        ) from fault
    _check_keys(extra)
    try:
        root.mkdir(parents=True, exist_ok=True)
        known = _versions(root)
        number = known[-1][0] + 1 if known else 1
        beside = Path(tempfile.mkdtemp(prefix=".writing-", dir=root))
    except OSError as fault:
        raise CheckpointError(f"{root}: cannot be written: {fault.strerror}; what was there stays") from fault
    whole, placed = root / f"{_PREFIX}{number:08d}", beside
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside / TENSORS)
        _sync(beside / TENSORS)
        manifest["files"] = {TENSORS: file_digest(beside / TENSORS)}
        manifest["digest"] = text_digest(_canonical(manifest))
        (beside / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False), encoding="utf-8")
        _sync(beside / MANIFEST)
        _sync(beside)
        beside.rename(whole)
        placed = whole
        _sync(root)
    except (OSError, SafetensorError) as fault:
        shutil.rmtree(placed, ignore_errors=True)
        raise CheckpointError(f"{root}: the checkpoint was not written: {fault}; what was there stays") from fault
    except BaseException:
        shutil.rmtree(placed, ignore_errors=True)
        raise
    for _, old in _versions(root)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return whole


def _check_keys(value: Any) -> None:
    """Refuse a key that JSON would turn into a string."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise CheckpointError(f"extra has the key {key!r}; JSON keeps strings as keys only")
    for each in value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ():
        _check_keys(each)


def _canonical(manifest: Mapping[str, Any]) -> str:
    """Return the text of a manifest whose digest is kept in it: everything but that digest."""
    return json.dumps({key: value for key, value in manifest.items() if key != "digest"}, sort_keys=True)


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
