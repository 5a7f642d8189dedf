"""Mistakes in the use of a cascade that no call would raise for. Each warning is given once a cascade.

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
from collections.abc import Callable, Iterator
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
"""Functions that write the state dict of the model that they were given as its weights."""
_PIPELINE = ("transformers.pipelines.base", "forward")
"""The function in which a pipeline calls its model."""
_PLUGIN = ("accelerate.utils.dataclasses", "set_auto_wrap_policy")
"""The function with which accelerate's FSDP plugins begin: it asks a model for its blocks."""
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
        self._run: Callable[[], Run | None] = lambda: None
        self._remove: weakref.finalize[Any, Run] | None = None
        self._train_mode = False  # whether the model came in train mode; frozen batch norms are trained in eval mode

    def arm(self, run: Run, cascade: nn.Module) -> None:
        """Watch the model of this run until `disarm`, or until the run is gone."""
        if self._remove is not None:
            return
        self._run, self._cascade = weakref.ref(run), weakref.ref(cascade)
        self._train_mode |= run.model.training
        model = weakref.ref(run.model)

        def call(*args: Any, **kwargs: Any) -> Any:
            called, ours = model(), False
            if not torch.compiler.is_dynamo_compiling():  # which cannot trace a look at frames
                frame = sys._getframe(1)  # of nn.Module.__call__; a shallow copy (DataParallel) has this function too
                called = frame.f_locals.get("self", called)
                ours = frame.f_back is not None and frame.f_back.f_code.co_filename.startswith(_PACKAGE)
            assert called is not None
            if not (ours or torch.compiler.is_compiling()):
                _untraced(self._check)("called", called)
            return called._call_impl(*args, **kwargs)

        handle = run.model.register_state_dict_pre_hook(self)
        if run.model._compiled_call_impl is None:
            run.model._compiled_call_impl = call
        self._remove = weakref.finalize(run, _detach, model, call, handle)
        self._remove.atexit = False
        _ARMED.add(self)

    def disarm(self) -> None:
        """Remove what `arm` has put onto the model."""
        if self._remove is not None:
            self._remove()
        self._run, self._remove = lambda: None, None
        _ARMED.discard(self)

    # ---- calls, saves and copies of the user's model

    def method(self, value: MethodType) -> Callable[..., Any]:
        """Return a method of the model that warns where a module computes in it with a weight that is adapted.

        The model's own call is not made then: `forward_features` and the like call its modules.
        """

        @wraps(value)
        def call(*args: Any, **kwargs: Any) -> Any:
            run = self._run()
            warned = run is None or ("model-called-inside-stage" in run.warned and not run.is_sharded)
            if run is None or warned or torch.compiler.is_compiling():
                return value(*args, **kwargs)
            model = run.model

            def watched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                self._check("called", model)
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

    def __call__(self, module: nn.Module, _prefix: str, _keep_vars: bool) -> None:
        """Check a call of the model's `state_dict`."""
        self._check("read", module)

    def __deepcopy__(self, memo: dict[int, Any]) -> UsageWatch:
        """Check a deep copy of the model, unless it is a part of one of the cascade."""
        if id(self._cascade() if self._cascade is not None else None) not in memo:
            self._check("copied")
        return UsageWatch()

    def __reduce__(self) -> tuple[type[Fresh], tuple[()]]:
        """Check a pickle of the model, by `torch.save` or otherwise."""
        self._check("pickled")
        return super().__reduce__()

    def _check(self, how: str, model: nn.Module | None = None) -> None:
        """Warn if the user's model is called, read, copied or pickled while it lacks the running branches.

        Copies and pickles are told each time: the best model so far is often kept by one.
        """
        run = self._run()
        if run is None or (model is not None and model._parameters is not run.model._parameters):
            return  # a shallow copy has the same dictionary
        called, once = how == "called", how in ("called", "read")
        kept = run.inside_weights and run.placed != "base"
        code = "model-called-inside-stage" if called else "model-saved-inside-stage"
        if how == "read" and kept:
            run.note_kept()
        if (once and code in run.warned and not run.is_sharded) or _inside_package():
            return
        if how in ("copied", "pickled") and kept:
            run.note_kept()
        if run.is_sharded and called and not run.exchanged():
            raise StateError(
                f"{type(run.model).__name__}: the model of a cascade was called, or a module in it, and its weights "
                "lie in shards on several processes: call the cascade, inside `with cascade.weights(...)` with other "
                "weights, or a method that gathers them (cascade.generate, encode, predict)",
                code="sharded",
            )
        if not _differs(run):
            return
        message = (
            f"the {'state dict of the ' if how == 'read' else ''}model of a cascade was {how} inside stage "
            f"{run.plan.stage}: it has the weights that the stage started from"
            f"{', with noise' if run.plan.spec.noise.is_on else ''}, and not what the stage has trained. Call the "
            'cascade; call, save or copy its model inside `with cascade.weights("slow"):` or "fast", or after '
            "cascade.release()"
        )
        if once:
            run.warned.once(code, message)
        else:
            warn(message, code)

    # ---- calls and saves of the cascade

    def check_evaluation(self, run: Run, cascade: nn.Module) -> bool:
        """Warn of a call in eval mode that sees noise, and watch for one that trains without dropout.

        A call with gradients may be an evaluation without torch.no_grad: whether it trains is known at its backward. A
        model that came in eval mode is trained in it, so such a call sees noise rightly.

        Returns:
            Whether a pipeline of transformers makes a call that would see noise. By its task it calls `generate` or the
            model itself, and both shall have the same weights.
        """
        noisy, grad = (
            run.plan.spec.noise.is_on and not run.slow.idle and not run.inside_weights,
            torch.is_grad_enabled(),
        )
        for frame in _called_in(_PIPELINE) if noisy and not grad else ():
            if getattr(frame.f_locals.get("self"), "model", None) is cascade:
                return True
        if cascade.training:
            return False
        if grad and "dropout-not-applied" not in run.warned:
            run.pending.at_backward = self._check_dropout
        if noisy and (not grad or self._train_mode):
            run.warned.once(
                "evaluated-with-noise",
                f"the cascade was called in eval mode inside stage {run.plan.stage}, and its weights hold noise. "
                'Evaluate inside `with cascade.weights("slow"):`, or "fast"; or after `release`',
            )
        return False

    def _check_dropout(self) -> None:
        """Warn of a backward in eval mode if there is dropout. The modules are looked at once for a cascade."""
        run = self._run()
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

    def check_saved(self, run: Run) -> None:
        """Warn of a trainer that writes the state dict of the cascade as if it were that of a model."""
        if "unfolded-save" in run.warned or run.released or not any(_called_in(*_UNFOLDED_SAVES)):
            return
        run.warned.once(
            "unfolded-save",
            "a trainer saves an unfolded cascade as a model: the file holds what cascade.load_state_dict takes, "
            "and the user's model cannot read it. In a Trainer of transformers or trl use "
            "lorasc_fx.integrations.transformers.CascadeCallback; elsewhere save cascade.release()",
        )

    def check_end(self) -> None:
        """Warn, where the program ends, of a first stage that has trained and was neither ended, saved nor released."""
        run = self._run()
        if run is None or run.looped or not run.holds_numbers or run.is_sharded or run.plan.stage > 1:
            return
        if "training-not-kept" in run.warned or not run.slow.moved(run.branches_by_weight()):
            return
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
    module = next((name for frame in callers() if (name := frame.f_globals.get("__name__")) in _AVERAGES), None)
    if module is not None:
        raise StateError(
            f"an average ({module}) was given a cascade: it would average W_t with its noise, and B and A each by "
            "itself. Give it cascade.model, and update it from cascade.model inside "
            '`with cascade.weights("slow"):` or "fast"; or give the spec average="ema" or "swa"',
            code="wrapper-not-supported",
        )


def check_plugin() -> None:
    """Raise StateError where one of accelerate's FSDP plugins asks which modules of the cascade it is to cut."""
    if any(_called_in(_PLUGIN)):
        raise StateError(
            "accelerator.prepare: accelerate's FSDP plugin would cut modules that the cascade's graphs never call, and "
            "parameters that a transition has to write. Make the Accelerator without fsdp_plugin, call "
            "lorasc_fx.parallel.fsdp.shard(cascade), and then accelerator.prepare_model(cascade, "
            "evaluation_mode=True), which adds no wrapper, and accelerator.prepare(optimizer, loader)",
            code="wrapper-not-supported",
        )


def _called_in(*functions: tuple[str, str]) -> Iterator[FrameType]:
    """Yield the frames of these functions, by module and name, that have called."""
    return (frame for frame in callers() if (frame.f_globals.get("__name__"), frame.f_code.co_name) in functions)


def _untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that dynamo does not trace where it runs between the graphs of the model."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    return function if dynamo is None else dynamo.disable(function)


def _differs(run: Run) -> bool:
    """Whether the user's model computes something else than the cascade: it lacks branches, or holds noise.

    On shards it is not known without the other processes, and not asked.
    """
    if run.released or run.inside_weights or not run.holds_numbers or run.is_sharded:
        return False
    if run.exchanged():  # torch.func.functional_call puts others in their places
        return False
    spec = run.plan.spec
    running = not run.slow.idle and (spec.noise.is_on or spec.factor_start.from_weight)
    unmerged = any(run.slow.states[name].experts for name in run.quantized)
    return running or unmerged or run.slow.moved(run.branches_by_weight())


def _inside_package() -> bool:
    """Whether the call comes from this package."""
    files = (frame.f_code.co_filename for frame in callers())
    return any(file.startswith(_PACKAGE) and file != _HERE for file in files)


def _detach(model: weakref.ref[nn.Module], call: Any, handle: Any) -> None:
    handle.remove()
    called = model()
    if called is not None and called.__dict__.get("_compiled_call_impl") is call:
        del called._compiled_call_impl


@atexit.register
def _at_exit() -> None:
    run_postponed()
    for watch in list(_ARMED):
        watch.check_end()
