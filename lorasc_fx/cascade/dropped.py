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
"""Places in modules (module and name), each with the parameter that it held before it was tied."""


@dataclass(frozen=True)
class Flags:
    """The flags that `release` restores: requires_grad of every parameter, training of every module."""

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
        """Restore the flags. New parameters and modules keep theirs."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.requires_grad.get(name, parameter.requires_grad))
        for name, module in model.named_modules():
            module.training = self.training.get(name, module.training)


class DropGuard:
    """Cleans up when its cascade is garbage collected, and warns if training is lost.

    It removes noise and restores requires_grad, ties and layers. Only the cascade and its shallow copies refer to it.
    The finalizer may run late, in any thread and inside any allocation, and takes no lock. Inside a backward or a trace
    it is postponed (`util.finalizers`). Changes by the user are kept: weights with other values, other flags, and the
    mode of modules. If the model is garbage too, nothing is done.

    Args:
        run, usage: of the cascade.
        flags, joined: of the model before `adapt`.
        armed: whether to act.
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
        """Act when the cascade is dropped."""
        self.armed = True
        _MODELS[id(self)] = weakref.ref(self.run.model, lambda _: None)

    def disarm(self) -> None:
        """Do nothing: the cascade was released, or never finished."""
        self.armed = False
        _MODELS.pop(id(self), None)

    def restore_structure(self, model: nn.Module, undo: Undo) -> None:
        """Restore the separate parameters that `adapt` has tied, and layers of libraries."""
        for module, leaf, value in self.joined:
            shared = module._parameters[leaf]
            if shared is not None:
                undo(partial(setattr, value, "data", value.data))
                undo(partial(setattr, module, leaf, shared))
                value.data = shared.data  # the memory that the tie has now
                setattr(module, leaf, value)
        unwrap_layers(model, undo)

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
        changed = self._remove_noise() if run.meta is None else []
        if all(p.requires_grad == (name in run.slow.trained) for name, p in model.named_parameters()):
            replace(self.flags, training={}).restore(model)
        self.restore_structure(model, lambda _: None)
        self.usage.disarm()
        run.detach()
        if lost:
            left = f", except {changed[0]}, which was changed from outside" if changed else ""
            warn(
                f"{_LOST} stage {run.plan.stage} had trained. {type(model).__name__} holds the slow weights again, "
                f"without noise{left}. {_ADVICE}",
                "training-not-kept",
            )

    def _remove_noise(self) -> list[str]:
        """Write the slow weights if the running stage started from other ones.

        Returns:
            Names of the weights that the user has changed. They are kept.
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
"""The models of living cascades, by the ids of their guards. Weak references that are garbage are cleared before
finalizers run, so they are held here. With a callback, those to a model that is garbage are cleared too."""

_LOST = "a cascade was garbage collected without release(), and what it had trained is lost:"
_ADVICE = "Keep the cascade (model = lorasc_fx.adapt(model, ...)), fold it by release(), or save it by lorasc_fx.save"
