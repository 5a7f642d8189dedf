"""The class `lorasc_fx.Cascade`: a cascade with the methods that other libraries expect of a model.

Users pass a cascade instead of a model to code for peft, transformers, TRL, timm, accelerate and others.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from types import FunctionType
from typing import Any, Self

from torch import nn

from lorasc_fx.cascade import graphs_of, run_of
from lorasc_fx.checkpoint.saved import SavedCascade

__all__ = ["Cascade"]

_ADAPTER_METHODS = ("transformers.integrations.peft", "diffusers.loaders.peft")
"""Modules whose methods add layers of peft to a model, or enable and disable them."""


def _with_fast_weights(name: str) -> Any:
    """Return a property for a method of the user's model that computes with the fast weights.

    The user's model itself does not contain the running branches. So the fast weights are put into the model for the
    call, unless it is inside a `cascade.weights(...)` block. If the weights are sharded, every rank must call the
    method, and each block is gathered while it runs.
    """

    def bound(cascade: Cascade) -> Any:
        method = cascade.__getattr__(name)
        if not callable(method):
            return method

        @wraps(method)
        def call(*args: object, **kwargs: object) -> Any:
            run = run_of(cascade)
            if run.slow.group.size > 1 and "synced_gpus" in inspect.signature(method).parameters:
                kwargs["synced_gpus"] = True  # a rank that is done must keep calling until all ranks are done
            placed = run.released or run.placed is not None
            with nullcontext() if placed else cascade.weights("fast"), graphs_of(cascade).gathered():
                return method(*args, **kwargs)

        return call

    return property(
        bound, doc=f"The method `{name}` of the model, with the fast weights outside `weights(...)` blocks."
    )


class Cascade(SavedCascade):
    """An adapted model, created by `lorasc_fx.adapt`. A call computes `y = W_t x + b + s B_t A_t x` at every site.

    Its child modules are `model`, the user's model, which owns its weights, and `branches`, which has one branch per
    site. A graph is captured for each input signature. Graphs contain no weights. Missing attributes are read from the
    user's model.
    """

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the user's model, except methods that need other weights or add layers of peft."""
        value = super().__getattr__(name)
        if name in ("save_pretrained", "push_to_hub") and run_of(self).placed is None and not run_of(self).released:
            raise AttributeError(
                f"{name} is not available outside `weights(...)`: it would write the weights without what the stage "
                "has trained. Use lorasc_fx.save for a checkpoint, "
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

    # ---- Methods of models of transformers and sentence-transformers that compute

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
        """Fold the branches and return the user's model, like `release`. Both arguments are ignored.

        There is no progress bar, and inf and nan are always checked.
        """
        return self.release()

    def disable_adapter(self) -> AbstractContextManager[Self]:
        """Return a context manager that uses the base weights inside the block, like `weights("base")`."""
        return self.weights("base")


def cascade_class(model: nn.Module, signature: inspect.Signature) -> type[Cascade]:
    """Return a subclass of Cascade whose forward has the signature of the model, which trainers and tracers inspect."""
    # A new code object, because torch.compile limits the number of graphs per code object.
    forward = FunctionType(Cascade.forward.__code__.replace(), Cascade.forward.__globals__, "forward")
    self_parameter = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    parameters = [self_parameter, *signature.parameters.values()]
    vars(forward)["__signature__"] = signature.replace(parameters=parameters)
    vars(forward)["__wrapped__"] = inspect.unwrap(type(model).forward)  # torch.fx reads its argument names
    forward.__doc__ = Cascade.forward.__doc__
    return type("Cascade", (Cascade,), {"forward": forward, "__module__": __name__, "__doc__": Cascade.__doc__})
