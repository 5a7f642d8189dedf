"""The cascade with what saves and restores its state: state dicts, checkpoint folders, and further runs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lorasc_fx.cascade import CascadeModule, experts
from lorasc_fx.checkpoint import given_run, reader, training_state, writer
from lorasc_fx.checkpoint.state_dict import KEY, from_state_dict, take_over, to_state_dict
from lorasc_fx.errors import SpecError, StateError, nearest, path_of
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
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Any = None,
        *,
        group: dist.ProcessGroup | None = None,
    ) -> dict[str, Any]:
        """After `lorasc_fx.load`: restore optimizer, scheduler and random generators, and return `extra`.

        If a process group of torch.distributed is initialized, every rank must call this: with DistributedDataParallel
        after the wrapper was made, on shards after `shard`. The saved run may have had another number of ranks.
        If it is the same, the random generators of each rank are restored. Otherwise each rank gets a stream that is a
        function of the first rank's, the rank and the number of ranks.

        Args:
            optimizer, scheduler: built like the saved ones.
            group: of the ranks that go on; by default all ranks.

        Raises:
            StateError: the cascade was not loaded from a checkpoint, or the optimizer does not hold the branches; the
                ranks have loaded different versions, or another rank has failed or is gone.
            CheckpointError: the checkpoint has no such state, or that of another optimizer.
        """
        ranks = self._run.slow.group
        if ranks.is_alone:  # not sharded: the ranks are replicas, as under DDP
            ranks = ProcessGroup.of(group)
        with ranks.agreed("resume"):
            self._run.check_ready("resume", sharded=True)
            if (loaded := self._loaded) is None:
                raise StateError(
                    "resume: this cascade was not loaded; make it with lorasc_fx.load(folder, model)",
                    code="not-available",
                )
        names = ranks.gather_text(loaded.path.name, "resume")
        if len(set(names)) > 1:
            raise StateError(
                f"resume: the ranks have loaded different versions: {', '.join(names)}, by rank; load from a folder "
                "that every rank sees, while nobody writes into it",
                code="ranks-differ",
            )
        with ranks.agreed("resume"), self._run.exclusive("resume", sharded=True):
            return training_state.resume(self._run, loaded, optimizer, scheduler, ranks)

    def add(self, name: str, run: CascadeModule | str | PathLike[str]) -> None:
        """Add another run on the same base under a name, by which `weights` and `release` find its weights.

        Several runs can so share one model in memory. Weights are computed from W0 at each switch. The other run
        counts as its `release` would leave it. This cascade trains and saves only its own run, and after a load the
        others must be added again.

        Args:
            name: of your choice, except the names that `weights` knows already. To replace a run, `remove` it first.
            run: a checkpoint folder (its newest version), or a cascade on a copy of the base. It may have changed only
                weights that are sites, or trained in full, here too.

        Raises:
            SpecError: an invalid name, one that is taken, or the other run has changed other weights.
            CheckpointError: a folder without a complete checkpoint, or a run on another base; names what differs.
            StateError: after `release`, inside `weights` or inside a backward, or the weights are sharded.
            NonFiniteBranch: a running branch of the other run holds inf or nan.
        """
        self._run.check_ready("add")
        if not isinstance(name, str) or not name or name in (*experts.VIEW_NAMES, "stage"):
            raise SpecError(f"add: the name is {name!r}; give one that is not among {', '.join(experts.VIEW_NAMES)}")
        if name in self._run.added:
            raise SpecError(f"add: a run {name!r} was added already. Give another name, or call remove({name!r}) first")
        added = given_run.GivenRun(run._run if isinstance(run, CascadeModule) else run, repr(name), "add")
        with self._run.exclusive("add"):
            given_run.add(self._run, name, added)

    def remove(self, name: str) -> None:
        """Drop a run that `add` has added, and free its memory.

        Raises:
            StateError: no run of this name was added; after `release`, inside `weights` or inside a backward.
        """
        with self._run.exclusive("remove"):
            added = self._run.added
            if name not in added:
                raise StateError(f"remove: no run {name!r} was added{nearest(str(name), added)}", code="unknown-name")
            self._run.added = {other: part for other, part in added.items() if other != name}

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return copies of everything that a resume needs from the cascade.

        These are branches, experts, coefficients, the stage, buffers, gradients that wait for a step, random generators
        (for `resume`), and parameters trained in full with their W0. Noise is drawn again from its key. The optimizer
        has its own state dict, and `folded_state_dict` returns the weights of the user's model. Wrappers and containers
        call this method.

        Args:
            destination, prefix: table to add to, and prefix of each name, as torch passes them.
            keep_vars: has no effect.

        Raises:
            StateError: after `release`, inside `weights` or inside a backward, or the weights are sharded.
            NonFiniteBranch: a branch holds inf or nan.
        """
        self._called_by("save")
        state: Any = OrderedDict() if destination is None else destination
        for before in self._state_dict_pre_hooks.values():
            before(self, prefix, keep_vars)
        with self._run.exclusive("state_dict"):
            state.update({prefix + name: tensor for name, tensor in to_state_dict(self._run).items()})
        for after in self._state_dict_hooks.values():
            after(self, state, prefix, {})
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
        """Restore what `state_dict` returned, all or nothing. `load_state_dict` calls this, here and in containers.

        The model must be the same base, adapted with the same spec. Parameters stay the same objects, also with
        `assign`. If the state has no entry of the cascade, its key is missing, which is an error unless `strict` is
        False.

        Raises:
            CheckpointError: damage, another base, another spec, other sites. The cascade is as it was.
            StateError: after `release`, inside `weights` or inside a backward, or the weights are sharded.
        """
        for before in self._load_state_dict_pre_hooks.values():
            before(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        table = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        is_present = bool(table) or not prefix
        if not is_present:
            missing_keys.append(prefix + KEY)
        checkpoint = from_state_dict(table, "load_state_dict") if is_present else None
        self._to_load = checkpoint, len(missing_keys), error_msgs

    def _load_state(self, keys: Any) -> None:
        """Take over the checkpoint that `_load_from_state_dict` has read, after torch has visited model and branches.

        These have no entries in the state, so that keys which torch misses there do not count. Do nothing if torch has
        met an error, which it will raise.
        """
        (checkpoint, missing, errors), self._to_load = self._to_load, (None, 0, ())
        del keys.missing_keys[missing:]
        if checkpoint is None or errors:
            return
        run = self._run
        with run.exclusive("load_state_dict"), commit() as undo:
            placed = {site.weight: site.placement for site in run.plan.sites}
            take_over(run, checkpoint, undo)
            if placed != {site.weight: site.placement for site in run.plan.sites}:  # chosen on another machine
                self._graphs.drop(undo)
            self._note_loaded(checkpoint)

    def _take_over(self, checkpoint: reader.Checkpoint, undo: Undo | None = None) -> None:
        """Take over a checkpoint, by itself or as part of a larger transaction."""
        reader.restore(self._run, checkpoint, undo)
        self._note_loaded(checkpoint)

    def _note_loaded(self, checkpoint: reader.Checkpoint) -> None:
        self._loaded, self._graphs.origin = checkpoint, str(checkpoint.path)
        self._run.note_kept()
        if self._run.inputs is None:  # no graph was captured here yet
            self._run.inputs = checkpoint.manifest.get("inputs")


def save(
    cascade: nn.Module,
    folder: str | PathLike[str],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    extra: Mapping[str, Any] | None = None,
    keep: int = 1,
) -> Path:
    """Write what a resume needs as a new version in `folder`, and delete versions older than the last `keep`.

    A process that is killed at any moment leaves only complete versions: the new one exists from the moment at which it
    is on disk, and old ones are deleted after that. Gradients that wait for a step, and the states of the random
    generators of torch, Python, numpy and CUDA, are written too; `Cascade.resume` restores them.

    With DistributedDataParallel or sharded weights, every rank must call this at the same point, between two steps.
    Each rank writes its shards, the first rank everything else, and an error on one rank is raised on all.

    Args:
        cascade: whose branches, experts, coefficients, trained parameters and buffers are written; or the
            DistributedDataParallel around it.
        optimizer, scheduler: whose state is written.
        folder: that every rank sees.
        extra: anything that JSON can store, and tensors in it. Examples: the number of steps done, from which the
            position in the stage and in `shuffled_batches` follows; the state of a GradScaler; averaged weights.
        keep: number of versions to keep.

    Returns:
        The folder of the new version.

    Raises:
        CheckpointError: the folder cannot be written, another save writes into it, or extra or scheduler hold what
            neither JSON nor safetensors can store. What was there stays.
        SpecError: keep is less than 1.
        StateError: after `release`, inside `weights`, or inside a backward; training has made a buffer inf or nan; on
            several ranks, gradients wait for a step, or another rank has failed or is gone.
        NonFiniteBranch: a branch holds inf or nan.
    """
    wrapper = cascade if isinstance(cascade, DistributedDataParallel) else None
    model = wrapper.module if wrapper is not None else cascade
    if not isinstance(model, CascadeModule):
        raise StateError(
            f"save: this is {type(model).__name__}; give a cascade, or DistributedDataParallel(cascade)",
            code="invalid-value",
        )
    run = model._run
    group = ProcessGroup.of(wrapper.process_group) if wrapper is not None else run.slow.group
    return writer.write_version(run, path_of(folder), optimizer, scheduler, dict(extra or {}), keep, group)
