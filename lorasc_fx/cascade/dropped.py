"""Restores the user's model when its cascade is garbage collected without `release`."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lorasc_fx.cascade.run import Run
from lorasc_fx.cascade.usage import UsageWatch
from lorasc_fx.errors import warn
from lorasc_fx.quantized import unwrap_layers, writable
from lorasc_fx.util.finalizers import when_idle
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


class DropGuard:
    """Restores the user's model when its cascade is garbage collected, and warns if training is lost.

    It removes noise, and restores requires_grad, untied parameters and layers of libraries. Changes by the user are
    kept: weights with other values, other flags, and the mode of modules. If the model is garbage too, nothing is done.

    Only the cascade and its shallow copies refer to the guard, so its finalizer runs when they are gone. A finalizer
    may run in any thread and inside any allocation, so it takes no lock. Inside a backward or a trace it is postponed
    (`util.finalizers`).

    Args:
        run, usage: the run and the watch of the cascade.
        flags, joined: the flags, and the parameters that `adapt` has tied, of the model before `adapt`.
        armed: whether the guard acts.
    """

    armed = False  # on the class, for an instance whose construction failed

    def __init__(self, run: Run, usage: UsageWatch, flags: Flags, joined: Joined, armed: bool = False) -> None:
        self.run, self.usage, self.flags, self.joined = run, usage, flags, joined
        if armed:
            self.arm()

    def __reduce__(self) -> tuple[Any, ...]:
        """Let a deep copy guard the copied model."""
        return (type(self), (self.run, self.usage, self.flags, self.joined, self.armed))

    def arm(self) -> None:
        """Start guarding."""
        self.armed = True
        _MODELS[id(self)] = weakref.ref(self.run.model, lambda _: None)

    def disarm(self) -> None:
        """Stop guarding, because the cascade was released or its construction failed."""
        self.armed = False
        _MODELS.pop(id(self), None)

    def restore_structure(self, model: nn.Module, undo: Undo) -> None:
        """Restore the parameters that `adapt` has tied, with the values of the tie, and layers of libraries."""
        for module, leaf, value in self.joined:
            shared = module._parameters[leaf]
            if shared is not None:
                undo(partial(setattr, value, "data", value.data))
                undo(partial(setattr, module, leaf, shared))
                value.data = shared.data
                setattr(module, leaf, value)
        unwrap_layers(model, undo)

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        """Restore the model if the guard is armed, unless the interpreter is shutting down."""
        if not self.armed or is_finalizing():
            return
        model = _MODELS[id(self)]
        self.disarm()
        when_idle(partial(self._act, model))

    def _act(self, model_reference: weakref.ref[nn.Module]) -> None:
        """Drop all references of the cascade to the model, and restore the model if it is still alive."""
        with torch._C.DisableTorchFunction(), torch.no_grad():  # torch.set_default_device is a function mode
            lost = self.run.loses_training()
            self.run.written = frozenset  # this function refers to the model
            del self.run.model
            if lost:
                gc.collect()  # graph modules refer to the model, and are reference cycles
            if (model := model_reference()) is not None:
                self._restore(model, lost)

    def _restore(self, model: nn.Module, lost: bool) -> None:
        """Restore a model that is still alive. `lost`: whether to warn that training is lost."""
        run = self.run
        run.model = model
        if run.is_sharded:
            if lost:
                warn(f"{_LOST} Its weights are sharded, so they were not restored. {_ADVICE}", "training-not-kept")
            return
        changed = self._remove_noise() if run.meta is None else []
        # Restore the flags only if nobody has changed them since `adapt`.
        if all(p.requires_grad == (name in run.slow.trained) for name, p in model.named_parameters()):
            replace(self.flags, training={}).restore(model)
        self.restore_structure(model, lambda _: None)
        self.usage.disarm()
        run.detach()
        if lost:
            exception = f", except {changed[0]}, which was changed from outside" if changed else ""
            warn(
                f"{_LOST} stage {run.plan.stage} had trained. {type(model).__name__} has the slow weights again, "
                f"without noise{exception}. {_ADVICE}",
                "training-not-kept",
            )

    def _remove_noise(self) -> list[str]:
        """Write the slow weights into parameters that differ from them because of noise or initial factors.

        Returns:
            Names of the weights that the user has changed. They are not written.
        """
        run, slow = self.run, self.run.slow
        if slow.idle:
            return []
        parameters = {
            name: parameter
            for name, parameter in writable(run.weights_by_name()).items()
            if slow.states[name].differs_from_slow(run.plan.spec.noise.is_on)
        }
        changed = run.not_written_here(parameters)
        for name, parameter in parameters.items():
            if name not in changed:
                slow.write_value(name, "slow", parameter)
        return changed


_MODELS: dict[int, weakref.ref[nn.Module]] = {}
"""Weak references to the models of armed guards, by the id of the guard. They are kept here and not in the guard,
because the garbage collector clears weak references that are garbage themselves before finalizers run. They have a
callback, so that the collector also clears references to a model that is garbage."""

_LOST = "a cascade was garbage collected without release(), and its training is lost:"
_ADVICE = "Keep the cascade (model = lorasc_fx.adapt(model, ...)), fold it by release(), or save it by lorasc_fx.save"
