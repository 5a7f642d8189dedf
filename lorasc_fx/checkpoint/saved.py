"""Saves a cascade: versions in a folder, state dicts, and the methods that save and restore.

A version is written into a temporary folder, which is synced and then renamed.

The next save deletes temporary folders that a killed writer has left, under the lock of `files.one_writer`. A version
is renamed before it is deleted, so that a partly deleted version is never loaded. Only versions of the same run are
deleted, because other programs may write into the same folder.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import stat
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lorasc_fx.cascade import CascadeModule, graphs_of, run_of
from lorasc_fx.cascade.run import Run
from lorasc_fx.cascade.training import Optimizers, check_numbers, optimizers_of
from lorasc_fx.checkpoint import content, reader
from lorasc_fx.checkpoint.content import Content, Stateful, gathered_random_states, several
from lorasc_fx.checkpoint.files import (
    FORMAT,
    KEY,
    MANIFEST,
    Tensors,
    canonical,
    digest_of,
    file_names,
    list_versions,
    next_name,
    pack,
    packed,
)
from lorasc_fx.errors import CheckpointError, NonFiniteBranch, SpecError, StateError, path_of, reason_of
from lorasc_fx.shards import ProcessGroup, local
from lorasc_fx.state.stage import all_finite
from lorasc_fx.util.decode import is_integer
from lorasc_fx.util.files import make_folder, one_writer, sync
from lorasc_fx.util.fingerprint import file_digest, text_digest
from lorasc_fx.util.undo import Undo, commit

_WRITING, _DELETING = ".writing-", ".leaving-"
_TEMPORARY = re.compile(r"\.(writing|leaving)-[0-9a-f]{32}")


def write_version(
    run: Run,
    root: Path,
    optimizers: Sequence[torch.optim.Optimizer],
    schedulers: Sequence[Stateful],
    extra: Mapping[str, object],
    keep: int,
    group: ProcessGroup,
) -> Path:
    """Write a new version into `root`, and delete all but the last `keep` versions. See `lorasc_fx.save`.

    Every rank of the group calls this. Each rank writes its shards. The first one also writes everything else.
    """
    if not is_integer(keep, 1):
        raise SpecError(f"save: keep is {keep!r}; give the number of versions to keep, an integer of 1 or more")
    is_first = group.rank == 0
    writers = run.slow.group.size  # the ranks that share the weights; all other ranks are replicas
    takes_part = group.rank < writers
    tensors: Tensors = {}
    manifest: dict[str, Any] = {}
    version = temporary = root
    created: Path | None = None  # the folder to delete if anything fails
    with contextlib.ExitStack() as stack:
        reading = stack.enter_context(contextlib.ExitStack())
        try:
            # Check on all ranks that the cascade can be saved, before any rank writes.
            with group.agreed("save"):
                if not group.is_alone:
                    check_between_steps(run, "save")
                if takes_part:
                    reading.enter_context(run.exclusive("save", sharded=True, keeps=True))
                    check_finite(run)
            rng = gathered_random_states(group, "save")
            # Copy the state into host memory. The first rank locks the folder and creates a temporary one.
            with group.agreed("save"), _as_checkpoint_error(root, "cannot be written"):
                if takes_part:
                    tensors, manifest = contents(Content.of(run, optimizers, schedulers, extra, rng), run)
                reading.close()  # the copies are written without holding the locks of the weights
                if is_first:
                    make_folder(root)
                    if stack.enter_context(one_writer(root)):
                        for path in root.iterdir():  # delete what killed writers have left
                            if _TEMPORARY.fullmatch(path.name):
                                remove(path)
                    version = root / next_name(root)
                    created = temporary = root / f"{_WRITING}{uuid.uuid4().hex}"
                    created.mkdir()
            temporary = Path(group.gather_text(str(temporary), "save")[0])
            # Each rank writes its file. The manifest is written last, because it has the digests of all files.
            names, digest = file_names(writers), ""
            with group.agreed("save"), _as_checkpoint_error(root):
                if takes_part:
                    shards = manifest["shards"]
                    to_write = {name: value for name, value in tensors.items() if is_first or name in shards}
                    path = temporary / names[group.rank]
                    write_tensors(to_write, path)
                    sync(path)
                    digest = file_digest(path)
            digests = group.gather_text(digest, "save")
            with group.agreed("save"), _as_checkpoint_error(root):
                if is_first:
                    manifest["files"] = dict(zip(names, digests[:writers], strict=True))
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
    """
    if run.slow.group.any(not all_finite(run.by_key.values())):
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
        for owner in content.optimizers:
            check_numbers(owner.state, "optimizer")
    except ValueError as fault:
        raise CheckpointError(
            f"save: {fault}; nothing was written, and the last version is unchanged. Load it, and continue with a "
            "lower learning rate or with clipped gradients",
            code="non-finite",
        ) from fault
    axes = content.axes(run.slow) if run.is_sharded else {}
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
    return {**tensors, KEY: packed(manifest, digest_of(tensors))}


@contextlib.contextmanager
def _as_checkpoint_error(root: Path, failure: str = "the checkpoint was not written") -> Iterator[None]:
    """Convert errors of the file system to CheckpointErrors."""
    try:
        yield
    except (OSError, SafetensorError) as fault:
        raise CheckpointError(
            f"{root}: {failure}: {reason_of(fault)}; existing versions are unchanged", code="write-failed"
        ) from fault


def _write_manifest(manifest: dict[str, object], folder: Path) -> None:
    """Add the digest of a manifest, write it, and sync it and its folder."""
    manifest["digest"] = text_digest(canonical(manifest))
    text = json.dumps(manifest, indent=1, allow_nan=False)
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
    """Delete a folder. Files that cannot be deleted stay."""
    shutil.rmtree(folder, ignore_errors=True)


def _drop(version: Path) -> None:
    """Delete a version, or the temporary folder of a failed save. If it is busy, a later save deletes it."""
    with contextlib.suppress(OSError):
        if not _TEMPORARY.fullmatch(version.name):
            version = version.rename(version.with_name(f"{_DELETING}{uuid.uuid4().hex}"))
        remove(version)


def _replaces(manifest: Mapping[str, Any], version: Path) -> bool:
    """Return whether an older version is of the same run: it has the same base and spec."""
    with contextlib.suppress(OSError, LookupError, TypeError, ValueError):  # damaged, or not a manifest
        old, new = json.loads((version / MANIFEST).read_bytes())["content"], manifest["content"]
        return bool(old["base"] == new["base"] and old["plan"]["spec"] == new["plan"]["spec"])
    return False


class SavedCascade(CascadeModule):
    """A cascade that can be saved, and restored from a checkpoint."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loaded: reader.Checkpoint | None = None
        # The state to load, the number of keys that were missing before it, and the errors of load_state_dict.
        self._to_load: tuple[Any, int, Sequence[str]] = None, 0, ()
        register: Any = self.register_load_state_dict_post_hook  # torch has no annotations for it
        register(SavedCascade._load_state)

    def resume(
        self,
        optimizer: Optimizers | None = None,
        scheduler: Stateful | Sequence[Stateful] | None = None,
        *,
        group: dist.ProcessGroup | None = None,
    ) -> dict[str, Any]:
        """Restore optimizer, scheduler and random generators after `lorasc_fx.load`, and return `extra`.

        If a process group of torch.distributed is initialized, every rank must call this. Call it after wrapping the
        cascade in DistributedDataParallel, or after `shard`. The saved run may have had another number of ranks. If the
        number is the same, the random generators of each rank are restored. Otherwise each rank gets a new stream,
        derived from the first rank's stream, the rank and the number of ranks.

        Args:
            optimizer, scheduler: built in the same way as the saved ones, in the same order if there are several.
            group: the ranks that resume. The default is all ranks.

        Raises:
            StateError: the cascade was not loaded from a checkpoint, the optimizer does not have the branches'
                parameters, the ranks have loaded different versions, or another rank has failed.
            CheckpointError: the checkpoint has no state of an optimizer or scheduler, or it is from another one.
        """
        ranks = run_of(self).slow.group
        if ranks.is_alone:  # not sharded: the ranks are replicas, as under DDP
            ranks = ProcessGroup.of(group)
        with ranks.agreed("resume"):
            optimizers = optimizers_of("resume", optimizer)
            run_of(self).check_ready("resume", sharded=True)
            if (loaded := self._loaded) is None:
                raise StateError(
                    "resume: this cascade was not loaded from a checkpoint; create it with "
                    "lorasc_fx.load(folder, model)",
                    code="not-available",
                )
        names = ranks.gather_text(loaded.path.name, "resume")
        if len(set(names)) > 1:
            raise StateError(
                f"resume: the ranks have loaded different versions: {', '.join(names)} (in the order of the ranks). "
                "Load from a folder that every rank can read, while no process saves into it",
                code="ranks-differ",
            )
        with ranks.agreed("resume"), run_of(self).exclusive("resume", sharded=True):
            return content.resume(run_of(self), loaded.path, loaded.content, optimizers, several(scheduler), ranks)

    def state_dict(self, *, destination: object = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return copies of the cascade's state, from which `load_state_dict` resumes the training.

        The state has branches, experts, coefficients, the stage, buffers, and parameters trained in full with their W0.
        It also has gradients that no optimizer step has consumed, and the random generators (for `resume`). Noise is
        drawn again from its key. The optimizer has a separate state dict. For the weights of the user's model, call
        `folded_state_dict`. Wrappers and containers of torch call this method too.

        Args:
            destination, prefix: the dict to add to, and the prefix of each name, as torch passes them.
            keep_vars: has no effect.

        Raises:
            StateError: the cascade was released, the weights are sharded, or the call is inside
                `with cascade.weights(...)` or inside a backward.
            NonFiniteBranch: a branch holds inf or nan.
        """
        state: Any = OrderedDict() if destination is None else destination
        for pre_hook in self._state_dict_pre_hooks.values():
            pre_hook(self, prefix, keep_vars)
        with run_of(self).exclusive("state_dict", keeps=True):
            state.update({prefix + name: tensor for name, tensor in to_state_dict(run_of(self)).items()})
        for hook in self._state_dict_hooks.values():
            hook(self, state, prefix, {})
        return state

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Read a state from `state_dict`. torch calls this in `load_state_dict`, also for a cascade in a container.

        `_load_state` applies the state later, completely or not at all. The model must be the same base, adapted with
        the same spec. Parameters stay the same objects, even with `assign=True`. If the state has no entry of the
        cascade, its key is reported as missing, which is an error unless `strict` is False.

        Raises:
            CheckpointError: the state is damaged.
        """
        for pre_hook in self._load_state_dict_pre_hooks.values():
            pre_hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        table = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        is_present = bool(table) or not prefix
        if not is_present:
            missing_keys.append(prefix + KEY)
        checkpoint = reader.from_state_dict(table, "load_state_dict") if is_present else None
        self._to_load = checkpoint, len(missing_keys), error_msgs

    def _load_state(self, keys: Any) -> None:
        """Apply the checkpoint that `_load_from_state_dict` has read, after torch has visited all modules.

        The state has no entries of model and branches, so keys that torch misses there are not reported. If torch has
        collected errors, it raises them, and nothing is applied. Nor is it if the base, spec or sites differ.
        """
        (checkpoint, missing, errors), self._to_load = self._to_load, (None, 0, ())
        del keys.missing_keys[missing:]
        if checkpoint is None or errors:
            return
        run = run_of(self)
        with run.exclusive("load_state_dict"), commit() as undo:
            placements = {site.weight: site.placement for site in run.plan.sites}
            reader.take_over(run, checkpoint, undo)
            # Placements can differ if they were chosen on another machine. The graphs must then be built again.
            if placements != {site.weight: site.placement for site in run.plan.sites}:
                graphs_of(self).drop(undo)
            self._note_loaded(checkpoint)

    def _note_loaded(self, checkpoint: reader.Checkpoint) -> None:
        self._loaded, graphs_of(self).origin = checkpoint, str(checkpoint.path)
        run_of(self).note_kept()


def load_into(cascade: SavedCascade, checkpoint: reader.Checkpoint, undo: Undo) -> None:
    """Apply a checkpoint to a new cascade, as part of a transaction."""
    reader.restore(run_of(cascade), checkpoint, undo)
    undo(partial(setattr, cascade, "_loaded", cascade._loaded))
    cascade._note_loaded(checkpoint)


def save(
    cascade: nn.Module,
    folder: str | PathLike[str],
    *,
    optimizer: Optimizers | None = None,
    scheduler: Stateful | Sequence[Stateful] | None = None,
    extra: Mapping[str, object] | None = None,
    keep: int = 1,
) -> Path:
    """Save a cascade as a new version in `folder`, and delete all but the last `keep` versions.

    A version is either complete or absent, even if the process is killed at any moment. Old versions are deleted only
    after the new one is on disk. Gradients that no optimizer step has consumed are saved, and the random generators of
    torch, Python, numpy and CUDA. `Cascade.resume` restores them.

    With DistributedDataParallel or sharded weights, every rank must call this at the same point, between two optimizer
    steps. Each rank writes its shards. The first rank also writes everything else. An error on one rank is raised on
    all ranks.

    Args:
        cascade: the cascade, or the DistributedDataParallel that wraps it. Its branches, experts, coefficients, trained
            parameters and buffers are saved.
        folder: the checkpoint folder. Every rank must be able to access it.
        optimizer, scheduler: are saved with the cascade, if they are given. One, or a list of several.
        extra: numbers, texts, lists, tuples, dicts and tensors, in any nesting. Examples: the number of steps done
            (which determines the position in the stage and in the data), the state of a GradScaler, averaged weights.
        keep: number of versions to keep.

    Returns:
        The folder of the new version.

    Raises:
        CheckpointError: the folder cannot be written, another process saves into it, or `extra` or the scheduler
            contain values that neither JSON nor safetensors can store. Existing versions stay.
        SpecError: keep is less than 1.
        StateError: the cascade was released, or the call is inside `with cascade.weights(...)` or inside a backward. On
            several ranks also if gradients wait for an optimizer step, or if another rank has failed.
        NonFiniteBranch: a branch holds inf or nan.
    """
    wrapper = cascade if isinstance(cascade, DistributedDataParallel) else None
    model = wrapper.module if wrapper is not None else cascade
    if not isinstance(model, CascadeModule):
        raise StateError(
            f"save: the first argument is a {type(model).__name__}; give a cascade, or "
            "DistributedDataParallel(cascade)",
            code="invalid-value",
        )
    run = run_of(model)
    group = ProcessGroup.of(wrapper.process_group) if wrapper is not None else run.slow.group
    optimizers, schedulers = optimizers_of("save", optimizer), several(scheduler)
    return write_version(run, path_of(folder), optimizers, schedulers, extra or {}, keep, group)
