"""Detects calls and saves of the model instead of its cascade, and cascades that are dropped without `release`."""

from __future__ import annotations

import gc
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial, wraps
from types import FrameType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DistributedDataParallel

from lorasc_fx.cascade.run import Run
from lorasc_fx.cascade.training import Fresh
from lorasc_fx.errors import StateError, named, warn
from lorasc_fx.quantized import unwrap_layers
from lorasc_fx.util.undo import Undo

_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep

_ATTENTION = F.scaled_dot_product_attention
"""The original attention function, which context parallelism replaces in torch.nn.functional."""


class UsageWatch(Fresh):
    """Checks calls of a cascade, and calls, saves, copies and pickles of its model.

    The watch is registered as a state dict pre-hook of the user's model. To copy or pickle the model, Python copies or
    pickles the hook too, and so calls `__deepcopy__` or `__reduce__` of the watch.
    """

    def __init__(self) -> None:
        self._cascade: weakref.ref[nn.Module] | None = None
        self._run: Callable[[], Run | None] = lambda: None
        self._remove: weakref.finalize[Any, Run] | None = None
        self._train_mode = False  # whether the model was in train mode; some models are always trained in eval mode
        self._checked: dict[bool, tuple[object, ...]] = {}  # the environment of the last checked call, by grad mode

    def arm(self, run: Run, cascade: nn.Module) -> None:
        """Watch the model of this run until `disarm`, or until the run is garbage collected."""
        if self._remove is not None:
            return
        self._run, self._cascade = weakref.ref(run), weakref.ref(cascade)
        self._train_mode |= run.model.training
        call, handle = self._checked_call(run.model), run.model.register_state_dict_pre_hook(self)
        if run.model._compiled_call_impl is None:
            run.model._compiled_call_impl = call
        self._remove = weakref.finalize(run, _detach, weakref.ref(run.model), call, handle)
        self._remove.atexit = False

    def disarm(self) -> None:
        """Remove the hooks from the model."""
        if self._remove is not None:
            self._remove()
        self._run, self._remove = lambda: None, None

    # ---- calls, saves and copies of the user's model

    def _checked_call(self, module: nn.Module) -> Callable[..., Any]:
        """Return a `_compiled_call_impl` for a module, which runs a check and then calls the module normally."""
        reference = weakref.ref(module)

        def call(*args: object, **kwargs: object) -> Any:
            called, from_package = reference(), False
            if not torch.compiler.is_dynamo_compiling():  # dynamo cannot trace frames
                frame = sys._getframe(1)  # nn.Module.__call__; a shallow copy (DataParallel) has this function too
                called = frame.f_locals.get("self", called)
                from_package = frame.f_back is not None and frame.f_back.f_code.co_filename.startswith(_PACKAGE)
            assert called is not None
            if not (from_package or torch.compiler.is_compiling()) and _shares_parameters(called, reference()):
                dynamo: Any = sys.modules.get("torch._dynamo")  # after a graph break, dynamo may run this function
                check = self._check if dynamo is None else dynamo.disable(self._check)
                check("called")
            return called._call_impl(*args, **kwargs)

        return call

    def method(self, value: MethodType) -> Callable[..., Any]:
        """Wrap a method of the model, so that it warns if it calls a module with an adapted weight.

        Methods such as `forward_features` call submodules, and not the model itself.
        """

        @wraps(value)
        def call(*args: object, **kwargs: object) -> Any:
            run = self._run()
            if run is None or torch.compiler.is_compiling() or "model-called-inside-stage" in run.warned:
                return value(*args, **kwargs)
            if _from_package():  # Then the calls of modules inside need no check, each of which would walk the stack.
                return value(*args, **kwargs)
            sites = {run.model.get_submodule(weight.rpartition(".")[0]) for weight in run.branches_by_weight()}
            modules = [module for module in sites if module._compiled_call_impl is None]
            for module in modules:
                module._compiled_call_impl = self._checked_call(module)
            try:
                return value(*args, **kwargs)
            finally:
                for module in modules:
                    del module._compiled_call_impl

        return call

    def __call__(self, module: nn.Module, _prefix: str, _keep_vars: bool) -> None:
        """Check a call of the model's `state_dict`."""
        run = self._run()
        if run is not None and _shares_parameters(module, run.model):
            self._check("read")

    def __deepcopy__(self, memo: dict[int, object]) -> UsageWatch:
        """Check a deep copy of the model, unless it is part of a deep copy of the cascade, which has the branches."""
        if id(self._cascade() if self._cascade is not None else None) not in memo:
            self._check("copied")
        return UsageWatch()

    def __reduce__(self) -> tuple[type[Fresh], tuple[()]]:
        """Check a pickle of the model, by `torch.save` or otherwise."""
        self._check("pickled")
        return super().__reduce__()

    def _check(self, how: str) -> None:
        """Warn if the user's model is called, read, copied or pickled while its outputs differ from the cascade's.

        Copies and pickles are reported each time, because a training loop may keep its best model that way.

        Raises:
            StateError: the model is called and its weights are sharded, or by a Trainer that trains it.
        """
        run = self._run()
        if run is None:
            return
        if how == "called" and torch.is_grad_enabled() and _in_training_step() and not _from_package():
            raise StateError(
                f"a Trainer trains the {type(run.model).__name__} that was given to adapt, whose weights are frozen. "
                "Give it the cascade: Trainer(model=cascade, "
                "callbacks=[lorasc_fx.integrations.transformers.CascadeCallback(cascade)], ...)",
                code="trainer-not-supported",
            )
        if how != "called" and run.placed not in (None, "base"):
            run.note_kept()
        code = "model-called-inside-stage" if how == "called" else "model-saved-inside-stage"
        once = how in ("called", "read")
        if (once and code in run.warned) or _from_package():
            return
        if how == "called" and run.is_sharded and not run.exchanged():
            raise StateError(
                f"{type(run.model).__name__}: the model of a cascade, or a submodule, was called, but its weights are "
                "sharded over several processes. Call the cascade, if you want other weights inside "
                "`with cascade.weights(...)`, or a method that gathers them (cascade.generate, encode, predict)",
                code="sharded",
            )
        if not run.differs_from_model():
            return
        message = (
            f"the {'state dict of the ' if how == 'read' else ''}model of a cascade was {how} inside stage "
            f"{run.plan.stage}. It has the weights from the start of the stage"
            f"{', with noise' if run.plan.spec.noise.is_on else ''}, without the training of the stage. Call the "
            'cascade instead. To call, save or copy the model, do it inside `with cascade.weights("slow"):` (or '
            '"fast"), or after cascade.release()'
        )
        if once:
            run.warned.once(code, message)
        else:
            warn(message, code)

    # ---- calls of the cascade

    def check_call(self, run: Run, cascade: Any) -> None:
        """Check a call of the cascade: noise and dropout in eval mode, and wrappers of other libraries.

        Wrappers are checked again only if the environment has changed since the last call: another stage, wrapper, or
        new branches.

        Raises:
            StateError: the call is inside context parallelism, or a wrapper shards or copies parameters or does not
                know all trained ones. Or the ranks of DistributedDataParallel have different runs.
        """
        grad, wrapper = torch.is_grad_enabled(), DistributedDataParallel._active_ddp_module
        # A call in eval mode with gradients may be an evaluation without no_grad. Only a backward shows that it trains.
        if not cascade.training and grad and "dropout-not-applied" not in run.warned:
            run.pending.at_backward = self._check_dropout
        # If the model was never in train mode, the user trains in eval mode, and training calls should have noise.
        if not cascade.training and run.is_noisy and (not grad or self._train_mode):
            run.warned.once(
                "evaluated-with-noise",
                f"the cascade was called in eval mode inside stage {run.plan.stage}, and its weights have noise. "
                'Evaluate inside `with cascade.weights("slow"):` (or "fast"), or after `release`',
            )
        reference = None if wrapper is None else weakref.ref(wrapper)
        attention, kind = F.scaled_dot_product_attention, type(cascade)
        environment = (reference, attention, kind, run.plan.stage, len(run.branches), run.grouped)
        if self._checked.get(grad) == environment:
            return
        run.replicas.check(run.trainable)
        if attention is not _ATTENTION and str(getattr(attention, "__module__", "")).startswith("torch.distributed"):
            raise StateError(
                "forward: torch's context_parallel cannot split the attention in a captured graph, so each rank would "
                "attend only to its own part of the sequence. Call the cascade outside context_parallel. For long "
                "sequences, use activation checkpointing",
                code="wrapper-not-supported",
            )
        if grad:
            cascade._called_by("train")
        self._checked[grad] = environment
        # DistributedDataParallel has broadcast the parameters of rank 0, but not its W0, so compare the runs.
        if grad and (group := run.replicas.new_group()) is not None:
            run.check_ranks("DistributedDataParallel", group)

    def _check_dropout(self) -> None:
        """Warn if a backward runs in eval mode and the model or the spec has dropout. Done once per cascade."""
        run = self._run()
        if run is None or run.branches.training:
            return
        skipped = [f"dropout={run.plan.spec.dropout:g} of the spec"] if run.plan.spec.dropout else []
        skipped += [
            f"{name}={value:g} of {path or type(run.model).__name__}"
            for path, module in run.model.named_modules()
            for name, value in vars(module).items()
            if "drop" in name or (name == "p" and isinstance(module, _DropoutNd))
            if isinstance(value, float) and value > 0 and not module.training
        ]
        if not skipped:
            run.warned.accept("dropout-not-applied")
            return
        run.warned.once(
            "dropout-not-applied",
            f"a training step ran in eval mode, in which dropout does nothing: {named(skipped)}. Models from "
            "from_pretrained are in eval mode. Call cascade.train() before training, or set dropout to 0",
        )


def callers() -> Iterator[FrameType]:
    """Yield the frames of the callers of the function that iterates, innermost first."""
    frame = sys._getframe(1).f_back
    while frame is not None:
        yield frame
        frame = frame.f_back


def _shares_parameters(module: nn.Module, reference: nn.Module | None) -> bool:
    """Whether two modules are the same, or one is a shallow copy of the other."""
    return reference is not None and module._parameters is reference._parameters


def _from_package() -> bool:
    """Whether the caller of the model, at any depth, is this package itself."""
    files = (frame.f_code.co_filename for frame in callers())
    return any(file.startswith(_PACKAGE) and file != __file__ for file in files)


def _in_training_step() -> bool:
    """Whether a Trainer of transformers is the caller, at any depth."""
    trainer = sys.modules.get("transformers.trainer")
    return trainer is not None and any(
        frame.f_code.co_name == "training_step" and frame.f_globals is vars(trainer) for frame in callers()
    )


def _detach(model: weakref.ref[nn.Module], call: Any, handle: Any) -> None:
    """Remove the hook and the intercepted call, unless somebody has replaced the call since."""
    handle.remove()
    called = model()
    if called is not None and called.__dict__.get("_compiled_call_impl") is call:
        del called._compiled_call_impl


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
