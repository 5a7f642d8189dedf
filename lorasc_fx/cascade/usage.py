"""Warnings about a cascade that is used wrongly although no call fails; each is given once a cascade.

Inside a stage the user's model computes without the running branches, and its parameters may hold noise. A
program that calls or saves it there should call the cascade, or use `weights(...)`.

A call is seen through `_compiled_call_impl`, the attribute of an nn.Module that `Module.compile` sets. Copies, pickles,
tracers and torch.jit leave it out, and it is no hook: hooks change which kernels some modules take, and are part of
what captured graphs are guarded by.
"""

from __future__ import annotations

import atexit
import os
import sys
import weakref
from collections.abc import Callable
from functools import partial, wraps
from types import FrameType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from lorasc_fx.cascade.run import Run
from lorasc_fx.cascade.watches import Fresh, callers
from lorasc_fx.errors import StateError, named, warn
from lorasc_fx.util.finalizers import run_postponed

_HERE = __file__
_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep

_UNFOLDED_SAVES = {("transformers.trainer", "_save"), ("accelerate.accelerator", "save_model")}
"""Functions, by module and name, that write the state dict of the model that they were given as its weights."""

_PIPELINE = ("transformers.pipelines.base", "forward")
"""The function, by module and name, in which a pipeline calls its model."""

_PLUGIN = ("accelerate.utils.dataclasses", "set_auto_wrap_policy")
"""The function, by module and name, with which accelerate's FSDP plugins begin: it asks a model for its blocks."""

_AVERAGES = (
    "torch.optim.swa_utils", "timm.utils.model_ema", "ultralytics.utils.torch_utils",
    "lightning.pytorch.callbacks.stochastic_weight_avg", "pytorch_lightning.callbacks.stochastic_weight_avg",
)  # fmt: skip
"""Modules of averages of parameters, which begin with a copy of the model."""

_ARMED: weakref.WeakSet[UsageWatch] = weakref.WeakSet()


class UsageWatch(Fresh):
    """Watches a cascade and its model.

    It is itself the state dict pre-hook of the user's model. So a copy or a pickle of the model copies it too, and that
    is how it sees them.
    """

    def __init__(self) -> None:
        self._cascade: weakref.ref[nn.Module] | None = None
        self._run: weakref.ref[Run] | None = None
        self._remove: weakref.finalize[Any, Run] | None = None
        self._train_mode = (
            False  # whether the model came in train mode; with frozen batch norms it is trained in eval mode
        )

    # ---- calls and saves of the user's model

    def arm(self, run: Run, cascade: nn.Module) -> None:
        """Watch the model of this run until `disarm`, or until the run is gone."""
        if self._remove is not None:
            return
        self._run, self._cascade = weakref.ref(run), weakref.ref(cascade)
        self._train_mode |= run.model.training
        model = weakref.ref(run.model)

        def call(*args: Any, **kwargs: Any) -> Any:
            called = model()
            if not torch.compiler.is_dynamo_compiling():  # which cannot trace a look at frames
                # A shallow copy (DataParallel) has this function too.
                called = sys._getframe(1).f_locals.get("self", called)
            assert called is not None
            if not torch.compiler.is_compiling():
                _untraced(self._check)("model-called-inside-stage", called)
            return called._call_impl(*args, **kwargs)

        handle = run.model.register_state_dict_pre_hook(self)
        if run.model._compiled_call_impl is None:
            run.model._compiled_call_impl = call
        self._remove = weakref.finalize(run, _let_go, model, call, handle)
        self._remove.atexit = False
        _ARMED.add(self)

    def method(self, value: MethodType) -> Callable[..., Any]:
        """Return a method of the model that warns where a module computes in it with a weight that is adapted.

        The model's own call is not made then: `forward_features` and the like call its modules.
        """

        @wraps(value)
        def call(*args: Any, **kwargs: Any) -> Any:
            run = self._run() if self._run is not None else None
            warned = run is None or ("model-called-inside-stage" in run.warned and not run.is_sharded)
            if run is None or warned or torch.compiler.is_compiling():
                return value(*args, **kwargs)
            model = run.model

            def watched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                self._check("model-called-inside-stage", model)
                return module._call_impl(*args, **kwargs)

            sites = {model.get_submodule(weight.rpartition(".")[0]) for weight in run.branches_by_weight()}
            modules = [module for module in sites if module._compiled_call_impl is None]
            for module in modules:
                vars(module)["_compiled_call_impl"] = partial(watched, module)
            try:
                return value(*args, **kwargs)
            finally:
                for module in modules:
                    del module._compiled_call_impl

        return call

    def disarm(self) -> None:
        """Remove what `arm` has put onto the model."""
        if self._remove is not None:
            self._remove()
        self._run = self._remove = None
        _ARMED.discard(self)

    def __call__(self, module: nn.Module, _prefix: str, _keep_vars: bool) -> None:
        """Check a call of the model's `state_dict`."""
        run = self._run() if self._run is not None else None
        if run is not None and run.inside_weights and run.placed != "base":
            run.note_kept()
        self._check("model-saved-inside-stage", module)

    def __deepcopy__(self, memo: dict[int, Any]) -> UsageWatch:
        """Check a deep copy of the model, unless it is a part of one of the cascade."""
        cascade = self._cascade() if self._cascade is not None else None
        if id(cascade) not in memo:
            self._check_copied("copied")
        return UsageWatch()

    def __reduce__(self) -> tuple[type[Fresh], tuple[()]]:
        """Check a pickle of the model, by `torch.save` or otherwise."""
        self._check_copied("pickled")
        return super().__reduce__()

    def _check_copied(self, how: str) -> None:
        """Warn of each copy: the best model so far is often kept by one."""
        run = self._run() if self._run is not None else None
        if run is None or _inside_package():
            return
        if run.inside_weights and run.placed != "base":
            run.note_kept()
        if not _differs(run):
            return
        noise = ", with noise" if run.plan.spec.noise.is_on else ""
        warn(
            f"the model of a cascade was {how} inside stage {run.plan.stage}: the copy holds the weights that the "
            f"stage started from{noise}, and not what the stage has trained. Copy it inside "
            '`with cascade.weights("fast"):` or "slow", keep cascade.folded_state_dict(), or copy it after '
            "cascade.release()",
            "model-saved-inside-stage",
        )

    def _check(self, code: str, model: nn.Module) -> None:
        run = self._run() if self._run is not None else None
        if run is None or (run.model is not model and run.model._parameters is not model._parameters):
            return  # a shallow copy has the same dictionary
        if run.is_sharded and code == "model-called-inside-stage" and not _inside_package() and not run.exchanged():
            raise StateError(
                f"{type(model).__name__}: the model of a cascade was called, or a module in it, and its weights lie in "
                "shards on several processes: call the cascade, inside `with cascade.weights(...)` with other weights, "
                "or a method that gathers them (cascade.generate, encode, predict)",
                code="sharded",
            )
        if code in run.warned or _inside_package() or not _differs(run):
            return
        stage, noise = run.plan.stage, run.plan.spec.noise.is_on
        if code == "model-called-inside-stage":
            run.warned.once(
                "model-called-inside-stage",
                f"the model of a cascade was called inside stage {stage}, where it computes without the branches"
                f"{' and with noise' if noise else ''}. Call the cascade; for the model's own methods (generate), call "
                'them inside `with cascade.weights("slow"):` or "fast"',
            )
        else:
            run.warned.once(
                "model-saved-inside-stage",
                f"the state dict of a cascade's model was read inside stage {stage}: it holds the weights that the "
                f"stage started from{', with noise' if noise else ''}, and not what the stage has trained. Read "
                "cascade.folded_state_dict(), save after cascade.release(), or save inside "
                '`with cascade.weights("slow"):` or "fast"',
            )

    # ---- calls and saves of the cascade

    def check_mode(self, run: Run, training: bool) -> None:
        """Warn of a call in eval mode that sees noise, and of one that trains without the dropout that was asked for.

        A call with gradients may be an evaluation without torch.no_grad: whether it trains is known at its backward. A
        model that came in eval mode is trained in it, so such a call sees noise rightly.
        """
        if training:
            return
        if torch.is_grad_enabled() and "dropout-not-applied" not in run.warned:
            run.pending.at_backward = self._check_dropout
        if torch.is_grad_enabled() and not self._train_mode:
            return
        if not _noisy(run) or "evaluated-with-noise" in run.warned:
            return
        run.warned.once(
            "evaluated-with-noise",
            f"the cascade was called in eval mode inside stage {run.plan.stage}, and its weights hold noise. "
            'Evaluate inside `with cascade.weights("slow"):`, or "fast"; or after `release`',
        )

    def _check_dropout(self) -> None:
        """Warn of a backward in eval mode if there is dropout. The modules are looked at once for a cascade."""
        run = self._run() if self._run is not None else None
        if run is None or run.branches.training:
            return
        asked = [f"dropout={run.plan.spec.dropout:g} of the spec"] if run.plan.spec.dropout else []
        asked += [
            f"{name}={value:g} of {path or type(run.model).__name__}"
            for path, module in run.model.named_modules()
            for name, value in vars(module).items()
            if "drop" in name or (name == "p" and isinstance(module, _DropoutNd))
            if isinstance(value, float) and value > 0 and not module.training
        ]
        if not asked:
            run.warned.accept("dropout-not-applied")
            return
        run.warned.once(
            "dropout-not-applied",
            f"a training step ran in eval mode, in which dropout does nothing: {named(asked)}. Models of "
            "from_pretrained come in eval mode. Call train() of the cascade before training (model.train() if that is "
            "its name), or set dropout to 0",
        )

    def in_pipeline(self, run: Run, cascade: nn.Module) -> bool:
        """Whether a pipeline of transformers computes with the cascade while its weights hold noise.

        It calls `generate` or the model itself, by its task, and both shall have the same weights.
        """
        if torch.is_grad_enabled() or run.inside_weights or not _noisy(run):
            return False
        frame = next((frame for frame in callers() if _function(frame) == _PIPELINE), None)
        return frame is not None and getattr(frame.f_locals.get("self"), "model", None) is cascade

    def check_saved(self, run: Run) -> None:
        """Warn of a trainer that writes the state dict of the cascade as if it were that of a model."""
        if "unfolded-save" in run.warned or run.released:
            return
        if any(_function(frame) in _UNFOLDED_SAVES for frame in callers()):
            run.warned.once(
                "unfolded-save",
                "a trainer saves an unfolded cascade as a model: the file holds what cascade.load_state_dict takes, "
                "and the user's model cannot read it. In a Trainer of transformers or trl use "
                "lorasc_fx.integrations.transformers.CascadeCallback; elsewhere save cascade.release()",
            )

    def check_end(self) -> None:
        """Warn, where the program ends, of a first stage that has trained and was neither ended, saved nor released."""
        run = self._run() if self._run is not None else None
        if run is None or "training-not-kept" in run.warned or run.looped or not run.holds_numbers:
            return
        if run.is_sharded or run.plan.stage > 1:
            return
        if run.slow.moved(run.branches_by_weight()):
            pace = run.plan.spec.pace_at(1)
            kept = f", and keeps {pace:g} of it, the pace of the spec: give pace=1.0 to keep all" if pace < 1 else ""
            run.warned.once(
                "training-not-kept",
                "the program ends, and what stage 1 of a cascade has trained was neither folded nor saved. Train in "
                f"`for stage in cascade.stages(...)`; `cascade.release()` folds it into the model{kept}; "
                "lorasc_fx.save keeps it for a later run",
            )


def check_not_averaged() -> None:
    """Raise StateError where a cascade is copied for an average of all parameters, each by itself."""
    module = next((name for frame in callers() if (name := _function(frame)[0]) in _AVERAGES), None)
    if module is not None:
        raise StateError(
            f"an average ({module}) was given a cascade: it would average W_t with its noise, and B and A each by "
            "itself. Give it cascade.model, and update it from cascade.model inside "
            '`with cascade.weights("slow"):` or "fast"; or give the spec average="ema" or "swa"',
            code="wrapper-not-supported",
        )


def check_plugin() -> None:
    """Raise StateError where one of accelerate's FSDP plugins asks which modules of the cascade it is to cut."""
    if any(_function(frame) == _PLUGIN for frame in callers()):
        raise StateError(
            "accelerator.prepare: accelerate's FSDP plugin would cut modules that the cascade's graphs never call, and "
            "parameters that a transition has to write. Make the Accelerator without fsdp_plugin, call "
            "lorasc_fx.parallel.fsdp.shard(cascade), and then accelerator.prepare_model(cascade, "
            "evaluation_mode=True), which adds no wrapper, and accelerator.prepare(optimizer, loader)",
            code="wrapper-not-supported",
        )


def _function(frame: FrameType) -> tuple[Any, str]:
    """Return module and name of the function that runs in a frame."""
    return frame.f_globals.get("__name__"), frame.f_code.co_name


def _untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that dynamo does not trace where it runs between the graphs of the model."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    return function if dynamo is None else dynamo.disable(function)


def _differs(run: Run) -> bool:
    """Whether the user's model computes something else than the cascade: it lacks branches, or holds noise.

    On shards it is not known without the other processes, and not asked.
    """
    if run.released or run.inside_weights or not run.holds_numbers:
        return False
    if run.is_sharded:
        return False
    if run.exchanged():
        return False  # torch.func.functional_call puts others in their places
    spec = run.plan.spec
    running = not run.slow.idle and (spec.noise.is_on or spec.factor_start.from_weight)
    unmerged = any(run.slow.states[name].experts for name in run.quantized)
    return running or unmerged or run.slow.moved(run.branches_by_weight())


def _noisy(run: Run) -> bool:
    """Whether the weights hold noise now."""
    return run.plan.spec.noise.is_on and not run.slow.idle and not run.inside_weights


def _inside_package() -> bool:
    """Whether the call comes from this package."""
    files = (frame.f_code.co_filename for frame in callers())
    return any(file.startswith(_PACKAGE) and file != _HERE for file in files)


def _let_go(model: weakref.ref[nn.Module], call: Any, handle: Any) -> None:
    handle.remove()
    called = model()
    if called is not None and called.__dict__.get("_compiled_call_impl") is call:
        del called._compiled_call_impl


@atexit.register
def _at_exit() -> None:
    run_postponed()
    for watch in list(_ARMED):
        watch.check_end()
