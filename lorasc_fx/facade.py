"""The class `lorasc_fx.Cascade`: a cascade with the names that other libraries expect of a model.

Trainers, pipelines and optimizer factories of peft, timm, the Hub, transformers and accelerate get it in place of the
model. Functions of theirs that would misuse it are found on the call stack, by their names, without importing them.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatch
from functools import wraps
from types import FunctionType
from typing import Any, Self

from torch import nn

from lorasc_fx.cascade.usage import callers
from lorasc_fx.checkpoint.cascade import SavedCascade
from lorasc_fx.errors import StateError
from lorasc_fx.util.extras import module_of
from lorasc_fx.util.hub import uploading

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
    """Return a property: the model's method, with fast weights in place unless `weights` has put others there.

    If the weights are sharded, every rank must call it, and each block is gathered while it runs.
    """

    def bound(cascade: Cascade) -> Any:
        method = cascade.__getattr__(name)
        if not callable(method):
            return method

        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            run = cascade._run
            if run.slow.group.size > 1 and "synced_gpus" in inspect.signature(method).parameters:
                kwargs["synced_gpus"] = True  # ranks that are done keep computing until all are
            placed = run.released or run.inside_weights
            with nullcontext() if placed else cascade.weights("fast"), cascade._graphs.gathered():
                return method(*args, **kwargs)

        return call

    return property(bound, doc=f"The model's `{name}`, with the fast weights unless `weights` has put others there.")


class Cascade(SavedCascade):
    """The adapted model, made by `lorasc_fx.adapt`. A call computes `y = W_t x + b + s B_t A_t x` at every site.

    Its children are the user's `model`, which owns its weights, and `branches`, one per site. Graphs are captured per
    call signature and hold no weights. Missing attributes are read from the model.
    """

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the user's model, except methods that save it or put layers of peft into it."""
        value = super().__getattr__(name)
        if name in ("save_pretrained", "push_to_hub") and not (self._run.inside_weights or self._run.released):
            raise AttributeError(
                f"{name} would write the weights of the {type(self.model).__name__} without what the stage has "
                'trained. Use lorasc_fx.save for a checkpoint, `with cascade.weights("slow"): '
                f"cascade.model.{name}(...)` for the folded model, or lorasc_fx.export.peft for an adapter"
            )
        if name == "push_to_hub":
            return uploading(value)
        if getattr(value, "__module__", None) in _ADAPTER_METHODS:
            raise AttributeError(
                f"{name} is for layers of peft inside a {type(self.model).__name__}, which the graphs of a cascade do "
                "not call. Use cascade.add(name, folder) to read another run, `with cascade.weights(name):` to put it "
                "in place, and lorasc_fx.from_peft to make a cascade from an adapter"
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
        """The value of the model, for accelerate. Its FSDP plugin, which would shard these modules, is refused."""
        self._called_by("shard")
        return self.__getattr__("_no_split_modules")

    # ---- peft

    def print_trainable_parameters(self) -> None:
        """Print the number of trainable parameters of model and branches. `print(cascade)` says more."""
        self._run.check_alive("print_trainable_parameters", on_meta=True)
        trainable = self._run.trained_entries
        total = sum(parameter.numel() for parameter in self.parameters())
        share = 100 * trainable / max(total, 1)
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def merge_and_unload(self, progressbar: bool = False, safe_merge: bool = True) -> nn.Module:
        """Fold and return the user's model, as `release`. There is no bar, and inf and nan are always checked for."""
        return self.release()

    def disable_adapter(self) -> AbstractContextManager[Self]:
        """Put the base weights in place for a `with`, as `weights("base")`."""
        return self.weights("base")

    # ---- timm, which asks a model how to group its parameters

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Return a function from the name of a parameter to its layer. Parameters of a branch have that of its weight.

        timm's `create_optimizer_v2(cascade, layer_decay=...)` calls this. Its schedulers scale the learning rates.

        Args:
            coarse: as for the model's `group_matcher`. A model without one is grouped as timm does it.

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
        """Return the names of the parameters that the model wants without weight decay, and of their factors.

        timm's `create_optimizer_v2` calls this.

        Raises:
            StateError: after `release`.
        """
        self._run.check_alive("no_weight_decay", on_meta=True)
        patterns: Iterable[str] = getattr(self.model, "no_weight_decay", set)()
        names = {f"model.{name}": name for name, _ in self.model.named_parameters()} | self._weight_names()
        return {name for name, weight in names.items() if any(fnmatch(weight, pattern) for pattern in patterns)}

    def _weight_names(self) -> dict[str, str]:
        """Return the weight name of each parameter of a branch, by its name in the cascade."""
        return {
            f"branches.{key}.{name}": branch.weight_name
            for key, branch in self._run.by_key.items()
            for name, _ in branch.named_parameters()
        }


def cascade_class(model: nn.Module, signature: inspect.Signature) -> type[Cascade]:
    """Return a subclass of Cascade whose forward has the model's signature, for trainers and tracers."""
    # A copy of the code: torch.compile counts graphs per code object, and stops compiling after a few.
    forward = FunctionType(Cascade.forward.__code__.replace(), Cascade.forward.__globals__, "forward")
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    shown = signature.replace(parameters=[first, *signature.parameters.values()])
    vars(forward)["__signature__"] = shown
    vars(forward)["__wrapped__"] = inspect.unwrap(type(model).forward)  # torch.fx reads its argument names
    forward.__doc__ = Cascade.forward.__doc__
    return type("Cascade", (Cascade,), {"forward": forward, "__module__": __name__, "__doc__": Cascade.__doc__})
