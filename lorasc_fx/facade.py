"""The class `lorasc_fx.Cascade`: a cascade that can be saved, with the methods that other libraries expect of a model.

Users pass a cascade instead of a model to code for peft, transformers, TRL, timm, accelerate and others.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from os import PathLike
from pathlib import Path
from types import FunctionType
from typing import Any, Self

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lorasc_fx.cascade import CascadeModule, graphs_of, run_of
from lorasc_fx.cascade.training import Optimizers, optimizers_of
from lorasc_fx.checkpoint import Checkpoint, from_state_dict, restore, take_over, to_state_dict, write_version
from lorasc_fx.checkpoint.content import Stateful, several
from lorasc_fx.checkpoint.content import resume as restore_training
from lorasc_fx.checkpoint.files import KEY
from lorasc_fx.errors import StateError, path_of
from lorasc_fx.shards import ProcessGroup
from lorasc_fx.util.undo import Undo, commit

__all__ = ["Cascade", "save"]

_ADAPTER_METHODS = ("transformers.integrations.peft", "diffusers.loaders.peft")
"""Modules whose methods add layers of peft to a model, or enable and disable them."""


def _with_fast_weights(name: str) -> Any:
    """Return a property of the cascade for a method of the user's model, which then computes with the fast weights.

    The user's model itself does not contain the running branches. So the fast weights are put into the model for the
    call, unless the call is inside a `cascade.weights(...)` block. If the weights are sharded, every rank must call the
    method, and the weights of each block are gathered while the block runs.
    """

    def bound(cascade: Cascade) -> Any:
        method = cascade.__getattr__(name)
        if not callable(method):
            return method

        @wraps(method)
        def call(*args: object, **kwargs: object) -> Any:
            run = run_of(cascade)
            if run.slow.group.size > 1 and "synced_gpus" in inspect.signature(method).parameters:
                kwargs["synced_gpus"] = True  # a rank that is done must keep calling the model until all ranks are done
            placed = run.released or run.placed is not None
            with nullcontext() if placed else cascade.weights("fast"), graphs_of(cascade).gathered():
                return method(*args, **kwargs)

        return call

    return property(
        bound, doc=f"The method `{name}` of the model, with the fast weights outside `weights(...)` blocks."
    )


class Cascade(CascadeModule):
    """An adapted model, created by `lorasc_fx.adapt`. A call computes `y = W_t x + b + s B_t A_t x` at every site.

    The child modules are `model`, the user's model with its weights, and `branches`, which has one branch per site. A
    graph is captured for each input signature. Graphs contain no weights. An attribute that the cascade lacks is read
    from the user's model.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loaded: Checkpoint | None = None
        # The checkpoint to load, the number of missing keys so far, and the list of errors of load_state_dict.
        self._to_load: tuple[Any, int, Sequence[str]] = None, 0, ()
        register: Any = self.register_load_state_dict_post_hook  # torch has no annotations for it
        register(Cascade._load_state)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the user's model. Raise AttributeError for a method that does not suit a cascade."""
        value = super().__getattr__(name)
        if name in ("save_pretrained", "push_to_hub") and run_of(self).placed is None and not run_of(self).released:
            raise AttributeError(
                f"{name} is not available outside `weights(...)`: it would write the weights without the running "
                "branches. Use lorasc_fx.save for a checkpoint, "
                '`with cascade.weights("slow"): cascade.model.save_pretrained(...)` for the folded model, or '
                "lorasc_fx.export.peft for an adapter"
            )
        if getattr(value, "__module__", None) in _ADAPTER_METHODS:
            raise AttributeError(
                f"{name} is for layers of peft inside a {type(self.model).__name__}, which the graphs of a cascade do "
                "not call. Use lorasc_fx.from_peft to create a cascade from an adapter, and lorasc_fx.AdapterBank to "
                "serve several adapters on one model"
            )
        return value

    # ---- Checkpoints

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
            CheckpointError: the checkpoint has no state for an optimizer or scheduler, or has that of another one.
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
            return restore_training(run_of(self), loaded.path, loaded.content, optimizers, several(scheduler), ranks)

    def state_dict(self, *, destination: object = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return copies of the cascade's state, from which `load_state_dict` resumes the training.

        The state has branches, experts, coefficients, the stage, buffers, and parameters trained in full with their W0.
        It also has gradients that no optimizer step has consumed, and the random generators (for `resume`). Noise is
        not stored, but drawn again from its key. The optimizer has a separate state dict. For the weights of the user's
        model, call `folded_state_dict`. Wrappers and containers of torch call this method too.

        Args:
            destination, prefix: the dict to which the state is added, and the prefix of each name, as in torch.
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
        local_metadata: object,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Read a checkpoint from `state_dict`. `load_state_dict` calls this, also for a cascade in a container.

        `_load_state` applies the checkpoint later, completely or not at all. The model must be the same base, adapted
        with the same spec. Parameters stay the same objects, even with `assign=True`. If `state_dict` has no entry of
        the cascade, the key of the checkpoint is reported as missing, which is an error unless `strict` is False.

        Raises:
            CheckpointError: the state is damaged.
        """
        for pre_hook in self._load_state_dict_pre_hooks.values():
            pre_hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        table = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        is_present = bool(table) or not prefix
        if not is_present:
            missing_keys.append(prefix + KEY)
        checkpoint = from_state_dict(table, "load_state_dict") if is_present else None
        self._to_load = checkpoint, len(missing_keys), error_msgs

    def _load_state(self, keys: Any) -> None:
        """Apply the checkpoint that `_load_from_state_dict` has read, after torch has visited all modules.

        `state_dict` has no entries under the names of the children's parameters, so torch's reports of missing keys for
        them are removed. If torch has collected errors, or the base, spec or sites differ, nothing is applied.
        """
        (checkpoint, missing, errors), self._to_load = self._to_load, (None, 0, ())
        del keys.missing_keys[missing:]
        if checkpoint is None or errors:
            return
        run = run_of(self)
        with run.exclusive("load_state_dict"), commit() as undo:
            placements = {site.weight: site.placement for site in run.plan.sites}
            take_over(run, checkpoint, undo)
            # Placements can differ if another machine has chosen them. Then the graphs must be built again.
            if placements != {site.weight: site.placement for site in run.plan.sites}:
                graphs_of(self).drop(undo)
            self._note_loaded(checkpoint)

    def _note_loaded(self, checkpoint: Checkpoint) -> None:
        self._loaded, graphs_of(self).origin = checkpoint, str(checkpoint.path)
        run_of(self).note_kept()

    # ---- Methods of models of transformers and sentence-transformers that call forward

    generate = _with_fast_weights("generate")
    generate_batch = _with_fast_weights("generate_batch")
    encode = _with_fast_weights("encode")
    encode_query = _with_fast_weights("encode_query")
    encode_document = _with_fast_weights("encode_document")
    predict = _with_fast_weights("predict")
    rank = _with_fast_weights("rank")

    # ---- Methods of PeftModel

    def print_trainable_parameters(self) -> None:
        """Print the number of trainable parameters of model and branches. `print(cascade)` shows more details."""
        run_of(self).check_alive("print_trainable_parameters")
        trainable = run_of(self).trained_entries
        total = sum(parameter.numel() for parameter in self.parameters())
        share = 100 * trainable / max(total, 1)
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def merge_and_unload(self, progressbar: bool = False, safe_merge: bool = True) -> nn.Module:
        """Fold the branches and return the user's model, like `release`.

        Both arguments are ignored: there is no progress bar, and branches are always checked for inf and nan.
        """
        return self.release()

    def disable_adapter(self) -> AbstractContextManager[Self]:
        """Return a context manager that uses the base weights inside the block, like `weights("base")`."""
        return self.weights("base")


def cascade_class(model: nn.Module, signature: inspect.Signature) -> type[Cascade]:
    """Return a subclass of Cascade whose forward has the signature of the model, which trainers and tracers inspect."""
    # Give each class a new code object, because torch.compile limits the number of graphs per code object.
    forward = FunctionType(Cascade.forward.__code__.replace(), Cascade.forward.__globals__, "forward")
    self_parameter = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    parameters = [self_parameter, *signature.parameters.values()]
    vars(forward)["__signature__"] = signature.replace(parameters=parameters)
    vars(forward)["__wrapped__"] = inspect.unwrap(type(model).forward)  # torch.fx reads its argument names
    forward.__doc__ = Cascade.forward.__doc__
    return type("Cascade", (Cascade,), {"forward": forward, "__module__": __name__, "__doc__": Cascade.__doc__})


def load_into(cascade: Cascade, checkpoint: Checkpoint, undo: Undo) -> None:
    """Apply a checkpoint to a new cascade, as part of a transaction."""
    restore(run_of(cascade), checkpoint, undo)
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
    after the new one is on disk. Gradients that no optimizer step has consumed are saved too. So are the states of the
    random generators of torch, Python, numpy and CUDA, which `Cascade.resume` restores.

    With DistributedDataParallel or sharded weights, every rank must call this at the same point, between two optimizer
    steps. Each rank writes its shards. The first rank also writes everything else. An error on one rank is raised on
    all ranks.

    Args:
        cascade: the cascade, or the DistributedDataParallel that wraps it. Its branches, experts, coefficients, trained
            parameters and buffers are saved.
        folder: the checkpoint folder. Every rank must be able to access it.
        optimizer, scheduler: one or a list of several, to save with the cascade.
        extra: numbers, texts, lists, tuples, dicts and tensors, in any nesting. Examples: the number of steps done
            (which determines the position in the stage and in the data), the state of a GradScaler, averaged weights.
        keep: number of versions to keep.

    Returns:
        The folder of the new version.

    Raises:
        CheckpointError: the folder cannot be written, another process saves into it, or `extra` or the scheduler
            contain values that neither JSON nor safetensors can store. Existing versions stay.
        SpecError: keep is less than 1.
        StateError: the cascade was released, or the call is inside `with cascade.weights(...)` or inside a backward.
            With several ranks, also if gradients wait for an optimizer step, or if another rank has failed.
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
