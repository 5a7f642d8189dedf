"""Gives the user's model back when its cascade is garbage collected without `release`."""

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
from lorasc_fx.quantized import give_layers_back, is_quantized
from lorasc_fx.util.finalizers import when_idle
from lorasc_fx.util.undo import Undo

Joined = tuple[tuple[nn.Module, str, nn.Parameter], ...]
"""Places in modules, each with the parameter that was there before it became a tie."""


@dataclass(frozen=True)
class Flags:
    """What `release` restores: requires_grad of every parameter, training of every module."""

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
        """Restore the flags; parameters and modules that are new keep their own."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.requires_grad.get(name, parameter.requires_grad))
        for name, module in model.named_modules():
            module.training = self.training.get(name, module.training)


class DropGuard:
    """Removes the noise, restores requires_grad, ties and layers, and warns of lost training, when its cascade is
    dropped.

    Only the cascade and its shallow copies hold it. The finalizer may run in any thread, inside any allocation, and
    waits for no lock. Inside a backward or a trace it is postponed (`util.finalizers`). It may also run late, by the
    garbage collector. It leaves alone what the user has changed since: weights with other values, other flags, and the
    mode of modules. If the model is garbage too, nothing is done: nobody can mistake it for the trained one.

    Args:
        run, usage: of the cascade.
        flags, joined: of the model before `adapt`.
        armed: whether to act.
    """

    armed = False  # also of an instance whose construction failed

    def __init__(self, run: Run, usage: UsageWatch, flags: Flags, joined: Joined, armed: bool = False) -> None:
        self.run, self.usage, self.flags, self.joined = run, usage, flags, joined
        if armed:
            self.arm()

    def __reduce__(self) -> tuple[Any, ...]:
        """Make a deep copy guard the copy of the model."""
        return (type(self), (self.run, self.usage, self.flags, self.joined, self.armed))

    def arm(self) -> None:
        """Act when the cascade is dropped."""
        self.armed = True
        _MODELS[id(self)] = weakref.ref(self.run.model, _nothing)

    def disarm(self) -> None:
        """Do nothing: the cascade was released, or never finished."""
        self.armed = False
        _MODELS.pop(id(self), None)

    def give_back(self, model: nn.Module, undo: Undo) -> None:
        """Restore parameters that were tied, and layers of libraries."""
        for module, leaf, value in self.joined:
            shared = module._parameters[leaf]
            if shared is not None:
                undo(partial(setattr, value, "data", value.data))
                undo(partial(setattr, module, leaf, shared))
                value.data = shared.data  # the memory that the tie has now
                setattr(module, leaf, value)
        give_layers_back(model, undo)

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        """Act, unless the interpreter is shutting down."""
        if not self.armed or is_finalizing():
            return
        model = _MODELS[id(self)]
        self.disarm()
        when_idle(partial(self._act, model))

    def _act(self, held: weakref.ref[nn.Module]) -> None:
        with torch._C.DisableTorchFunction(), torch.no_grad():  # torch.set_default_device is a function mode
            lost = self.run.loses_training()
            self.run.written = frozenset  # which holds the model
            del self.run.model
            if lost:
                gc.collect()  # graph modules are reference cycles, and hold the model
            if (model := held()) is not None:
                self._restore(model, lost)

    def _restore(self, model: nn.Module, lost: bool) -> None:
        run = self.run
        run.model = model
        if run.is_sharded:
            if lost:
                warn(f"{_LOST} Its weights are sharded, and stay as they are. {_ADVICE}", "training-not-kept")
            return
        changed = self._remove_noise() if run.holds_numbers else []
        if all(p.requires_grad == (name in run.slow.trained) for name, p in model.named_parameters()):
            replace(self.flags, training={}).restore(model)
        self.give_back(model, lambda _: None)
        self.usage.disarm()
        run.detach()
        if lost:
            left = f", but for {changed[0]}, which was changed from outside" if changed else ""
            warn(
                f"{_LOST} stage {run.plan.stage} had trained. {type(model).__name__} holds the slow weights again, "
                f"without noise{left}. {_ADVICE}",
                "training-not-kept",
            )

    def _remove_noise(self) -> list[str]:
        """Write the slow weights where the running stage started from others.

        Returns:
            Names of the weights that hold what the cascade did not write. They are the user's, and stay.
        """
        run, slow = self.run, self.run.slow
        if slow.idle:
            return []
        parameters = {
            name: parameter
            for name, parameter in run.weights_by_name().items()
            if not is_quantized(parameter) and slow.states[name].differs_from_slow(run.plan.spec.noise.is_on)
        }
        changed = run.changed_weights(parameters)
        for name, parameter in parameters.items():
            if name not in changed:
                slow.write_value(name, "slow", parameter)
        return changed


_MODELS: dict[int, weakref.ref[nn.Module]] = {}
"""The models of living cascades, by the ids of their guards. References that are garbage themselves are cleared before
finalizers run, and these are not; with a callback, a reference to a model that is garbage is."""

_LOST = "a cascade was garbage collected without release(), and what it had trained is lost:"
_ADVICE = "Keep the cascade (model = lorasc_fx.adapt(model, ...)), fold it by release(), or write it by lorasc_fx.save"


def _nothing(_: Any) -> None:
    """Do nothing."""
