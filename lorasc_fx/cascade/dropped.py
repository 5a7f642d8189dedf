"""What `release` restores besides the weights, and the warning for a cascade that is garbage collected without it."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import nn

from lorasc_fx.cascade.run import Run
from lorasc_fx.errors import warn
from lorasc_fx.quantized import unwrap_layers
from lorasc_fx.util.undo import Undo

Joined = tuple[tuple[nn.Module, str, nn.Parameter], ...]
"""Parameters that `adapt` has tied: the module and the name of each place, and the original parameter there."""


@dataclass(frozen=True)
class Flags:
    """Flags of a model that `release` restores: requires_grad by parameter name, and training by module name."""

    requires_grad: Mapping[str, bool]
    training: Mapping[str, bool]

    @classmethod
    def of(cls, model: nn.Module) -> Flags:
        """Read the flags of a model."""
        return cls(
            {name: parameter.requires_grad for name, parameter in model.named_parameters()},
            {name: module.training for name, module in model.named_modules()},
        )

    def restore(self, model: nn.Module) -> None:
        """Restore the flags. Parameters and modules that were added since keep theirs."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.requires_grad.get(name, parameter.requires_grad))
        for name, module in model.named_modules():
            module.training = self.training.get(name, module.training)


def restore_structure(model: nn.Module, joined: Joined, undo: Undo) -> None:
    """Restore the parameters that `adapt` has tied, with the values of the tie, and layers of libraries."""
    for module, leaf, value in joined:
        shared = module._parameters[leaf]
        if shared is not None:
            undo(partial(setattr, value, "data", value.data))
            undo(partial(setattr, module, leaf, shared))
            value.data = shared.data
            setattr(module, leaf, value)
    unwrap_layers(model, undo)


class DropWarning:
    """Warns if a cascade is garbage collected without `release` while its model is alive, and says what that loses.

    Only the cascade and its shallow copies refer to this object, so its finalizer runs when they are gone. A finalizer
    may run in any thread, in a trace or in a backward, so it computes nothing.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        _MODELS[id(self)] = weakref.ref(run.model, lambda _: None)

    def __reduce__(self) -> tuple[type[DropWarning], tuple[Run]]:
        """Let a deep copy watch the copied cascade."""
        return (type(self), (self.run,))

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        """Remove the hooks of the run. Warn, unless nothing is lost or the model is garbage too."""
        model = _MODELS.pop(id(self), None)
        if is_finalizing() or model is None:  # the interpreter is shutting down, or the construction failed
            return
        loss = self.run.loss_if_dropped()
        self.run.detach()
        del self.run
        if loss is None:
            return
        gc.collect()  # graph modules refer to the model, and are reference cycles
        if (alive := model()) is not None:
            warn(
                f"a cascade was garbage collected without release(): {loss.format(model=type(alive).__name__)}. Keep "
                "the cascade (model = lorasc_fx.adapt(model, ...)), fold it by release(), or save it by lorasc_fx.save",
                "training-not-kept",
            )


_MODELS: dict[int, weakref.ref[nn.Module]] = {}
"""Weak references to the models, by the id of the `DropWarning`. They are kept here and not in the object, because the
garbage collector clears weak references that are garbage themselves before finalizers run. They have a callback, so
that the collector also clears references to a model that is garbage."""
