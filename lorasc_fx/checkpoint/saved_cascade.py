"""Adds saving and restoring to the cascade: state dicts and checkpoint folders."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lorasc_fx.cascade import CascadeModule
from lorasc_fx.cascade.optim import Optimizers, optimizers_of
from lorasc_fx.checkpoint import content, reader, writer
from lorasc_fx.checkpoint.layout import KEY
from lorasc_fx.checkpoint.training import several
from lorasc_fx.errors import StateError, path_of
from lorasc_fx.shards import ProcessGroup
from lorasc_fx.util.undo import Undo, commit


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
        scheduler: Any = None,
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
        ranks = self._run.slow.group
        if ranks.is_alone:  # not sharded: the ranks are replicas, as under DDP
            ranks = ProcessGroup.of(group)
        with ranks.agreed("resume"):
            optimizers = optimizers_of("resume", optimizer)
            self._run.check_ready("resume", sharded=True)
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
        with ranks.agreed("resume"), self._run.exclusive("resume", sharded=True):
            return content.resume(self._run, loaded.path, loaded.content, optimizers, several(scheduler), ranks)

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
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
        self._called_by("save")
        state: Any = OrderedDict() if destination is None else destination
        for pre_hook in self._state_dict_pre_hooks.values():
            pre_hook(self, prefix, keep_vars)
        with self._run.exclusive("state_dict"):
            state.update({prefix + name: tensor for name, tensor in writer.to_state_dict(self._run).items()})
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
        run = self._run
        with run.exclusive("load_state_dict"), commit() as undo:
            placements = {site.weight: site.placement for site in run.plan.sites}
            reader.take_over(run, checkpoint, undo)
            # Placements can differ if they were chosen on another machine. The graphs must then be built again.
            if placements != {site.weight: site.placement for site in run.plan.sites}:
                self._graphs.drop(undo)
            self._note_loaded(checkpoint)

    def _take_over(self, checkpoint: reader.Checkpoint, undo: Undo) -> None:
        """Apply a checkpoint, as part of a transaction."""
        reader.restore(self._run, checkpoint, undo)
        self._note_loaded(checkpoint)

    def _note_loaded(self, checkpoint: reader.Checkpoint) -> None:
        self._loaded, self._graphs.origin = checkpoint, str(checkpoint.path)
        self._run.note_kept()
        if self._run.inputs is None:  # no graph was captured here yet
            self._run.inputs = checkpoint.content.inputs


def save(
    cascade: nn.Module,
    folder: str | PathLike[str],
    *,
    optimizer: Optimizers | None = None,
    scheduler: Any = None,
    extra: Mapping[str, Any] | None = None,
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
            (which determines the position in the stage and in `shuffled_batches`), the state of a GradScaler, averaged
            weights.
        keep: number of versions to keep.

    Returns:
        The folder of the new version.

    Raises:
        CheckpointError: the folder cannot be written, another process saves into it, or `extra` or the scheduler
            contain values that neither JSON nor safetensors can store. Existing versions stay.
        SpecError: keep is less than 1.
        StateError: the cascade was released, the call is inside `with cascade.weights(...)` or inside a backward, or
            training has made a buffer inf or nan. On several ranks also: gradients wait for an optimizer step, or
            another rank has failed.
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
    run = model._run
    group = ProcessGroup.of(wrapper.process_group) if wrapper is not None else run.slow.group
    optimizers, schedulers = optimizers_of("save", optimizer), several(scheduler)
    return writer.write_version(run, path_of(folder), optimizers, schedulers, extra or {}, keep, group)
