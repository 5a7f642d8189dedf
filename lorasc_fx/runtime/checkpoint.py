"""Checkpoints as they are read: a folder of versions, each safetensors and JSON only.

W0 is not copied. A fingerprint of each base parameter refuses another base and names what differs. Loading runs no code
from a file. `checkpoint_write` makes them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lorasc_fx.errors import CheckpointError
from lorasc_fx.plan import Plan
from lorasc_fx.runtime import generators, half_step, outside_json, packing
from lorasc_fx.runtime.fingerprint import file_digest, fingerprint, text_digest
from lorasc_fx.runtime.optim import check_holds
from lorasc_fx.runtime.provenance import differences

if TYPE_CHECKING:
    from lorasc_fx.runtime.core import Core

__all__ = ["Checkpoint", "check_base", "read", "restore", "resume"]

FORMAT = 1
MANIFEST = "manifest.json"
TENSORS = "state.safetensors"
RNG = generators.CPU
_PREFIX = "step-"

log = logging.getLogger("lorasc_fx")


def _canonical(manifest: Mapping[str, Any]) -> str:
    """Return the text of a manifest whose digest is kept in it: everything but that digest."""
    return json.dumps({key: value for key, value in manifest.items() if key != "digest"}, sort_keys=True)


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
        raise CheckpointError(f"{path / MANIFEST}: cannot be read: {_why(fault)}") from fault
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise CheckpointError(f"{path / MANIFEST}: format {found!r}; this version reads format {FORMAT}")
    for key in ("plan", "files", "base", "frontend", "slow", "trained", "parked", "turning", "rng", "extra"):
        if key not in manifest:
            raise CheckpointError(f"{path / MANIFEST}: has no {key!r}")
    for key in ("files", "base"):
        if not isinstance(manifest[key], dict):
            raise CheckpointError(
                f"{path / MANIFEST}: {key!r} is {type(manifest[key]).__name__}, not a table of digests"
            )
    if manifest.get("digest") != text_digest(_canonical(manifest)):
        raise CheckpointError(f"{path / MANIFEST}: differs from its own digest; the file is damaged, or was edited")
    try:
        plan = Plan.from_json(json.dumps(manifest["plan"]))
    except CheckpointError as fault:
        raise CheckpointError(f"{path / MANIFEST}: {fault}") from fault
    try:
        digest = file_digest(path / TENSORS)
        if digest != manifest["files"].get(TENSORS):
            raise CheckpointError(f"{path / TENSORS}: differs from its digest in {MANIFEST}; the file is damaged")
        tensors = load_file(path / TENSORS)
    except (OSError, SafetensorError) as fault:
        raise CheckpointError(f"{path / TENSORS}: cannot be read: {_why(fault)}") from fault
    generator = tensors.get(RNG)
    if generator is None:
        raise CheckpointError(f"{path}: has no tensor {RNG!r}")
    if generator.dtype != torch.uint8 or generator.shape != torch.get_rng_state().shape:
        raise CheckpointError(f"{path}: {RNG!r} is no state of torch's random generator")
    return Checkpoint(path, manifest, tensors, plan)


def _why(fault: Exception) -> str:
    """Return the reason without the path, which the message names already."""
    return fault.strerror if isinstance(fault, OSError) and fault.strerror else str(fault)


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
    try:
        packing.unpack(core, checkpoint.tensors, checkpoint.manifest, str(checkpoint.path))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as fault:
        what = f"{type(fault).__name__}: {fault}"
        raise CheckpointError(f"{checkpoint.path}: is not what a checkpoint of this plan holds: {what}") from fault


def resume(
    core: Core, checkpoint: Checkpoint, optimizer: torch.optim.Optimizer | None, scheduler: Any
) -> dict[str, Any]:
    """Give optimizer, scheduler, pending gradients and random generators their state back, and return `extra`."""
    manifest, where = checkpoint.manifest, str(checkpoint.path)
    parts = {key: manifest[key] for key in ("optimizer", "scheduler", "extra") if key in manifest}
    try:
        manifest = {**manifest, **outside_json.put_back(parts, manifest.get("outside", ()), checkpoint.tensors)}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as fault:
        what = f"{type(fault).__name__}: {fault}"
        raise CheckpointError(f"{where}: tensors and numbers outside of JSON have no place in it: {what}") from fault
    for what, given in (("optimizer", optimizer), ("scheduler", scheduler)):
        if given is None:
            continue
        if what not in manifest:
            raise CheckpointError(f"{checkpoint.path}: holds no {what}; it was saved without one")
        saved = manifest[what]["class"]
        if type(given).__name__ != saved:
            raise CheckpointError(
                f"{checkpoint.path}: holds the state of {saved}, the {what} is {type(given).__name__}"
            )
    if optimizer is not None:
        check_holds(optimizer, core.trainable())
        packing.unpack_optimizer(optimizer, checkpoint.tensors, manifest["optimizer"], where)
        if manifest["turning"]:
            core.turning.arm(core.parameters_by_name(), core.branches_by_weight(), optimizer)
        half_step.unpack(core, checkpoint.tensors, manifest.get("pending", ()), where)
    if scheduler is not None:
        scheduler.load_state_dict(packing.as_before(scheduler.state_dict(), manifest["scheduler"]["state"]))
    try:
        generators.unpack(checkpoint.tensors, manifest["rng"])
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as fault:
        raise CheckpointError(f"{where}: holds no state of this random generator: {fault}") from fault
    if changed := differences(manifest.get("versions")):
        log.warning("%s: written under %s; the run goes on, but perhaps not bit for bit", where, ", ".join(changed))
    extra: dict[str, Any] = manifest["extra"]
    return extra
