"""The class `lorasc_fx.Cascade`: a cascade with the names that other libraries expect of a model.

Trainers, pipelines and optimizer factories of peft, timm, the Hub, transformers and accelerate get it in place of the
model. Functions of theirs that would misuse it are found on the call stack, by their names, without importing them.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatch
from functools import wraps
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FunctionType
from typing import Any, Self

import torch
from torch import nn

from lorasc_fx.cascade.usage import callers
from lorasc_fx.checkpoint import writer
from lorasc_fx.checkpoint.base_model import BaseModel
from lorasc_fx.checkpoint.cascade import SavedCascade
from lorasc_fx.errors import SpecError, StateError, path_of
from lorasc_fx.shards import ONE_PROCESS
from lorasc_fx.util.extras import module_of

__all__ = ["Cascade"]

_ADAPTER_METHODS = ("transformers.integrations.peft", "diffusers.loaders.peft")
"""Modules whose methods put layers of peft into a model and switch them."""

_CALLERS = {
    # An average of all parameters begins with a copy.
    "copy": (
        "torch.optim.swa_utils",
        "timm.utils.model_ema",
        "ultralytics.utils.torch_utils",
        "lightning.pytorch.callbacks.stochastic_weight_avg",
        "pytorch_lightning.callbacks.stochastic_weight_avg",
    ),
    # accelerate's FSDP plugins begin by asking a model for its blocks.
    "shard": ("accelerate.utils.dataclasses.set_auto_wrap_policy",),
    # They write the state dict of the model that they were given as its weights.
    "save": ("transformers.trainer._save", "accelerate.accelerator.save_model"),
    # They shard the parameters, or train copies of them.
    "train": (
        "deepspeed.runtime.engine.forward",
        "torch.distributed.fsdp.fully_sharded_data_parallel.forward",
    ),
    # A pipeline calls `generate` or the model itself, depending on its task. Both must see the same weights.
    "evaluate": ("transformers.pipelines.base.forward",),
}
"""Modules, or functions of modules, by the event of a cascade that they cause."""

_REFUSED = {
    "copy": "an average of parameters ({caller}) copies a cascade: it would average W_t with its noise, and B and A "
    "separately. Give it cascade.model, and update it from cascade.model inside "
    '`with cascade.weights("slow"):` or "fast". Or give the spec average="ema" or "swa"',
    "shard": "accelerator.prepare: accelerate's FSDP plugin would shard modules that the cascade's graphs never call, "
    "and parameters that a transition has to write. Make the Accelerator without fsdp_plugin, call "
    "lorasc_fx.parallel.fsdp.shard(cascade), then accelerator.prepare_model(cascade, evaluation_mode=True), which adds "
    "no wrapper, and accelerator.prepare(optimizer, loader)",
    "train": "forward: {caller} holds the cascade and has sharded or copied its parameters, so a transition could not "
    "write them. Call lorasc_fx.parallel.fsdp.shard(cascade) instead, in a training loop of your own (with accelerate: "
    "prepare the data, not the cascade), or wrap the cascade in DistributedDataParallel",
}
"""Messages, by event, where the caller would do something wrong."""


def _with_fast_weights(name: str) -> Any:
    """Return a property: the model's method of this name, with the fast weights in place unless `weights` has put
    others there. On shards every rank must call it; a block is gathered while it runs.
    """

    def bound(cascade: Cascade) -> Any:
        method = cascade.__getattr__(name)
        if not callable(method):
            return method

        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            run = cascade._run
            if run.slow.group.size > 1 and "synced_gpus" in inspect.signature(method).parameters:
                kwargs["synced_gpus"] = True  # ranks that are done compute on until all are
            placed = run.released or run.inside_weights
            with nullcontext() if placed else cascade.weights("fast"), cascade._graphs.gathered():
                return method(*args, **kwargs)

        return call

    return property(bound, doc=f"The model's `{name}`, with the fast weights unless `weights` has put others there.")


class Cascade(SavedCascade):
    """The adapted model. `lorasc_fx.adapt` makes it; calling it computes `y = W_t x + b + s B_t A_t x` at every site.

    Children: `model`, the user's own, which stays the only owner of its weights; `branches`, one per site. Graphs are
    made per call signature and hold no weights. Attributes that a cascade does not have itself are those of the model.
    """

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the user's model, except methods that put layers of peft into it."""
        value = super().__getattr__(name)
        if getattr(value, "__module__", None) in _ADAPTER_METHODS:
            raise AttributeError(
                f"{name} is for layers of peft inside a {type(self.model).__name__}, which the graphs of a cascade do "
                "not call. cascade.add(name, folder) reads another run, `with cascade.weights(name):` puts it in "
                "place, and lorasc_fx.from_peft makes a cascade of an adapter"
            )
        return value

    def _called_by(self, event: str) -> bool:
        """Whether a function of the table `_CALLERS` causes this event.

        Raises:
            StateError: the function would do something wrong with the cascade.
        """
        caller = "fully_shard" if event == "train" and hasattr(type(self), "_get_fsdp_state") else ""
        known = any(name in sys.modules or name.rpartition(".")[0] in sys.modules for name in _CALLERS[event])
        for frame in callers() if known and not caller else ():
            module = frame.f_globals.get("__name__")
            if module in _CALLERS[event] or f"{module}.{frame.f_code.co_name}" in _CALLERS[event]:
                caller = type(frame.f_locals["self"]).__name__ if "self" in frame.f_locals else str(module)
                break
        if caller and event in _REFUSED:
            raise StateError(_REFUSED[event].format(caller=caller), code="wrapper-not-supported")
        if caller and event == "save" and not self._run.released:
            self._run.warned.once(
                "unfolded-save",
                "a trainer saves an unfolded cascade as a model: only cascade.load_state_dict can read the file, the "
                "user's model cannot. In a Trainer of transformers or trl use "
                "lorasc_fx.integrations.transformers.CascadeCallback; elsewhere save cascade.release()",
            )
        return bool(caller)

    # ---- methods of the model that compute, for transformers and sentence-transformers

    generate = _with_fast_weights("generate")
    encode = _with_fast_weights("encode")
    encode_query = _with_fast_weights("encode_query")
    encode_document = _with_fast_weights("encode_document")
    predict = _with_fast_weights("predict")
    rank = _with_fast_weights("rank")

    @property
    def _no_split_modules(self) -> Any:
        """The model's own, for accelerate; its FSDP plugin, which asks for them to cut modules, is refused."""
        self._called_by("shard")
        return self.__getattr__("_no_split_modules")

    # ---- peft

    def print_trainable_parameters(self) -> None:
        """Print the number of parameters that train, of all those of model and branches; `print(cascade)` says more."""
        self._run.check_alive("print_trainable_parameters", on_meta=True)
        trainable = self._run.trained_entries
        total = sum(parameter.numel() for parameter in self.parameters())
        share = 100 * trainable / max(total, 1)
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def merge_and_unload(self, progressbar: bool = False, safe_merge: bool = True) -> nn.Module:
        """Fold, and return the user's model: `release`, which shows no bar and always checks for inf and nan."""
        return self.release()

    def disable_adapter(self) -> AbstractContextManager[Self]:
        """Put the base's weights in place for the time of a `with`: `weights("base")`."""
        return self.weights("base")

    # ---- timm, which asks a model how to group its parameters

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Return the layer of a parameter of the cascade, by its name: of a branch that of its weight.

        timm's `create_optimizer_v2(cascade, layer_decay=...)` asks for it; its schedulers scale the learning rates.

        Args:
            coarse: as of the model's own `group_matcher`. A model without one is grouped as timm groups such a model.

        Raises:
            StateError: after `release`. MissingExtra: timm is not installed.
        """
        self._run.check_alive("group_matcher", on_meta=True)
        model: Any = self.model
        if hasattr(model, "group_matcher"):
            matcher = model.group_matcher(coarse)
            layers = module_of("vision", "timm.models").group_parameters(model, matcher, reverse=True)
        else:
            layers = module_of("vision", "timm.optim").auto_group_layers(model)
        by_name = {f"model.{name}": layer for name, layer in layers.items()}
        by_name |= {name: layers[weight] for name, weight in self._weight_names().items() if weight in layers}
        last = max(layers.values(), default=0)
        return lambda name: by_name.get(name, last)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that the model wants without weight decay, in the cascade, with the
        factors of such weights. timm's `create_optimizer_v2` asks for it.

        Raises:
            StateError: after `release`.
        """
        self._run.check_alive("no_weight_decay", on_meta=True)
        patterns: Iterable[str] = getattr(self.model, "no_weight_decay", set)()
        names = {f"model.{name}": name for name, _ in self.model.named_parameters()} | self._weight_names()
        return {name for name, weight in names.items() if any(fnmatch(weight, pattern) for pattern in patterns)}

    def _weight_names(self) -> dict[str, str]:
        """The names of the branches' parameters in the cascade, each with that of its weight."""
        return {
            f"branches.{key}.{name}": branch.weight_name
            for key, branch in self._run.by_key.items()
            for name, _ in branch.named_parameters()
        }

    # ---- the Hub: folders that name their base

    def save_pretrained(
        self,
        folder: str | PathLike[str],
        *,
        base_model: str | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Any = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write what the run has learnt, and the name of its base: `lorasc_fx.load(folder)` needs nothing more.

        As peft's adapters, the folder holds no data and no base, but for W0 of what is trained in full, and of what the
        files of the base have not (a new head). For the model with its slow weights, in its library's layout:
        `with cascade.weights("slow"): cascade.model.save_pretrained(folder)`, or `release` before.

        Args:
            folder: as of `lorasc_fx.save`.
            base_model: name or folder of the base, by default what a model of transformers (`name_or_path`) or timm
                (`pretrained_cfg`) says of itself.
            optimizer, scheduler, extra: as of `lorasc_fx.save`, for a folder from which a training is to go on.

        Returns:
            The folder of the version.

        Raises:
            StateError: the base cannot be named, or its files are not here; the newest version in the folder holds the
                state of a training, and no optimizer is given; after `release`, inside `weights` or inside a backward,
                or the weights are sharded.
            CheckpointError: the folder cannot be written. What was there stays.
            NonFiniteBranch: a branch holds inf or nan.
        """
        root = path_of(folder)
        without = optimizer is None and scheduler is None and not extra
        if without and (version := writer.newest_of_training(root)) is not None:
            raise StateError(
                f"save_pretrained: {version} holds the state of a training, with which a resume goes on, and a new "
                "version without it would come first. Give optimizer= (scheduler=, extra=) here as well, or another "
                "folder",
                code="state-not-saved",
            )
        return self._write_named(root, "save_pretrained", base_model, optimizer, scheduler, extra)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        base_model: str | None = None,
        private: bool | None = None,
        commit_message: str = "lorasc-fx run",
        token: str | bool | None = None,
        revision: str | None = None,
        api: Any = None,
    ) -> str:
        """Upload what `save_pretrained` writes to a repository on the hub, which is made if it is not there.

        `huggingface_hub.snapshot_download(repo_id, local_dir=folder)` brings it back for `lorasc_fx.load(folder)`.

        Args:
            repo_id: `user/name`.
            base_model: as of `save_pretrained`.
            private, commit_message, token: as of huggingface_hub.
            revision: a branch, which is made if it is not there.
            api: a `huggingface_hub.HfApi` with an endpoint and token of its own.

        Returns:
            The address of the commit.

        Raises:
            MissingExtra: huggingface_hub is not installed.
            StateError, NonFiniteBranch: as of `save_pretrained`. What the hub refuses is huggingface_hub's to raise.
            SpecError: both a token and an api.
        """
        self._run.check_alive("push_to_hub")
        if api is not None and token is not None:
            raise SpecError(
                "push_to_hub: both token and api are given, and an api has a token of its own; give one of them",
                code="conflicting-options",
            )
        api = module_of("text", "huggingface_hub").HfApi(token=token) if api is None else api
        with TemporaryDirectory() as folder:
            self._write_named(Path(folder), "push_to_hub", base_model)
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            done = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=revision
            )
        return str(done.commit_url)

    def _write_named(
        self,
        root: Path,
        call: str,
        base_model: str | None,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Any = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write a version that names its base."""
        self._run.check_ready(call)
        base = BaseModel.of(self._run, call, base_model)
        named, beside = {"model": base.to_dict()}, base.tensors_beside(self._run, call)
        return writer.write_version(self._run, root, optimizer, scheduler, extra or {}, 1, ONE_PROCESS, named, beside)


def cascade_class(model: nn.Module, signature: inspect.Signature) -> type[Cascade]:
    """Return Cascade with a forward that shows the model's signature, which trainers and tracers read."""
    # Code of its own: torch.compile counts the graphs of each code object, and stops compiling at a few.
    forward = FunctionType(Cascade.forward.__code__.replace(), Cascade.forward.__globals__, "forward")
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    shown = signature.replace(parameters=[first, *signature.parameters.values()])
    vars(forward)["__signature__"] = shown
    vars(forward)["__wrapped__"] = inspect.unwrap(type(model).forward)  # whose names of arguments torch.fx reads
    forward.__doc__ = Cascade.forward.__doc__
    return type("Cascade", (Cascade,), {"forward": forward, "__module__": __name__, "__doc__": Cascade.__doc__})
