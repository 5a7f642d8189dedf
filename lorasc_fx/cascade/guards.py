"""Detects calls and reads of the model instead of its cascade, and cascades that are dropped without `release`."""

from __future__ import annotations

import gc
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import nn

from lorasc_fx.cascade.run import Run
from lorasc_fx.cascade.training import Fresh
from lorasc_fx.errors import StateError, warn
from lorasc_fx.quantized import unwrap_layers
from lorasc_fx.util.undo import Undo

_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep


class UsageWatch(Fresh):
    """Warns if the user's model is called, or its state dict is read, while the cascade has other weights.

    The watch is a state dict pre-hook of the model, and its `_compiled_call_impl`, which copies and pickles leave out.
    """

    def __init__(self) -> None:
        self._run: Callable[[], Run | None] = lambda: None
        self._remove: Callable[[], None] = lambda: None

    def arm(self, run: Run) -> None:
        """Watch the model of this run until `disarm`."""
        self.disarm()
        self._run, model, call = weakref.ref(run), weakref.ref(run.model), self._checked_call(run.model)
        handle = run.model.register_state_dict_pre_hook(self)
        if run.model._compiled_call_impl is None:
            run.model._compiled_call_impl = call

        def remove() -> None:
            handle.remove()
            if (watched := model()) is not None and vars(watched).get("_compiled_call_impl") is call:
                del watched._compiled_call_impl

        self._remove = remove

    def disarm(self) -> None:
        """Stop watching."""
        self._remove()
        self._run = self._remove = lambda: None

    def _checked_call(self, module: nn.Module) -> Callable[..., Any]:
        """Return a `_compiled_call_impl` for the model, which runs a check and then calls the model normally."""
        reference = weakref.ref(module)

        def call(*args: object, **kwargs: object) -> Any:
            called = reference()
            if not torch.compiler.is_dynamo_compiling():  # dynamo cannot trace frames
                called = sys._getframe(1).f_locals.get("self", called)  # a shallow copy has this function too
            assert called is not None
            if not torch.compiler.is_compiling():
                self._check("model-called-inside-stage", "the model of a cascade was called")
            return called._call_impl(*args, **kwargs)

        return call

    def __call__(self, module: nn.Module, _prefix: str, _keep_vars: bool) -> None:
        """Check a call of the model's `state_dict`."""
        self._note_kept()
        self._check("model-saved-inside-stage", "the state dict of the model of a cascade was read")

    def __reduce__(self) -> tuple[type[Fresh], tuple[()]]:
        """Note a copy or a pickle of the model, which has this hook."""
        self._note_kept()
        return super().__reduce__()

    def _note_kept(self) -> None:
        """Inside `weights`, record that the training of the stage is kept by the caller."""
        if (run := self._run()) is not None and run.placed not in (None, "base"):
            run.note_kept()

    def _check(self, code: str, what: str) -> None:
        """Warn once if the model's outputs differ from the cascade's, unless this package is the caller."""
        run, callers = self._run(), tuple(_callers())
        if run is None or any(frame.f_code.co_filename.startswith(_PACKAGE) for frame in callers):
            return
        if torch.is_grad_enabled() and any(
            frame.f_code.co_name == "training_step" and frame.f_globals["__name__"] == "transformers.trainer"
            for frame in callers
        ):
            raise StateError(
                f"a Trainer trains the {type(run.model).__name__} that was given to adapt, whose weights are frozen. "
                "Give it the cascade: Trainer(model=cascade, "
                "callbacks=[lorasc_fx.integrations.transformers.CascadeCallback(cascade)], ...)",
                code="trainer-not-supported",
            )
        if code not in run.warned and run.differs_from_model():
            run.warned.once(
                code,
                f"{what} inside stage {run.plan.stage}. It has the weights from the start of the stage"
                f"{', with noise' if run.plan.spec.noise.strength > 0 else ''}"
                f"{', not on their grid' if run.plan.spec.grid else ''}, without the training of the stage. Call the "
                'cascade instead. To call, save or copy the model, do it inside `with cascade.weights("slow"):` (or '
                '"fast"), or after cascade.release()',
            )


def _callers() -> Iterator[FrameType]:
    """Yield the frames outside of this file, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename != __file__:
            yield frame
        frame = frame.f_back


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

    def __init__(self, run: Run, usage: UsageWatch) -> None:
        self.run, self.usage = run, usage
        _MODELS[id(self)] = weakref.ref(run.model, lambda _: None)

    def __reduce__(self) -> tuple[type[DropWarning], tuple[Run, UsageWatch]]:
        """Let a deep copy watch the copied cascade."""
        return (type(self), (self.run, self.usage))

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        """Remove the hooks of the run. Warn, unless nothing is lost or the model is garbage too."""
        model = _MODELS.pop(id(self), None)
        if is_finalizing() or model is None:  # the interpreter is shutting down, or the construction failed
            return
        loss = self.run.loss_if_dropped()
        self.run.detach()
        self.usage.disarm()
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
