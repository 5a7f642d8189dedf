"""Warnings about a cascade that is used wrongly although no call fails; each is given once a cascade.

Inside a stage the user's model computes without the running branches, and its parameters may hold noise. Whoever calls
or saves it there should call the cascade, or use `weights(...)`.

A call is seen through `_compiled_call_impl`, the attribute of an nn.Module that `Module.compile` sets. Copies, pickles,
tracers and torch.jit leave it out, and it is no hook: hooks change which kernels some modules take, and are part of
what captured graphs are guarded by.
"""

from __future__ import annotations

import atexit
import os
import sys
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorasc_fx.errors import warn

if TYPE_CHECKING:
    from lorasc_fx.runtime.core import Core

__all__ = ["UsageWatch"]

_HERE = __file__
_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep

_UNFOLDED_SAVES = {("transformers.trainer", "_save"), ("accelerate.accelerator", "save_model")}
"""Functions, by module and name, that write the state dict of the model that they were given as its weights."""


_ARMED: weakref.WeakSet[UsageWatch] = weakref.WeakSet()


class UsageWatch:
    """Watches a cascade and its model; a copy (deepcopy, pickle) watches nothing.

    It is itself the state dict pre-hook of the user's model.
    """

    def __init__(self) -> None:
        self._core: weakref.ref[Core] | None = None
        self._remove: weakref.finalize[Any, Core] | None = None
        self._done: set[str] = set()
        self._train_mode = (
            False  # whether the model came in train mode; with frozen batch norms it is trained in eval mode
        )

    def once(self, code: str, message: str) -> None:
        """Warn, unless the warning of this code was given."""
        if code not in self._done:
            self._done.add(code)
            warn(message, code)

    def accept(self, code: str) -> None:
        """Never give the warning of this code: the user asked for what it warns of."""
        self._done.add(code)

    # ---- calls and saves of the user's model

    def arm(self, core: Core) -> None:
        """Watch the model of this core until `disarm`, or until the core is gone."""
        if self._remove is not None:
            return
        self._core = weakref.ref(core)
        self._train_mode |= core.model.training
        model = weakref.ref(core.model)

        def call(*args: Any, **kwargs: Any) -> Any:
            own = model()
            if not torch.compiler.is_dynamo_compiling():  # which cannot trace a look at frames
                own = sys._getframe(1).f_locals.get("self", own)  # a shallow copy (DataParallel) has this function too
            assert own is not None
            if not torch.compiler.is_compiling():
                self._check("model-called-inside-stage", own)
            return own._call_impl(*args, **kwargs)

        handle = core.model.register_state_dict_pre_hook(self)
        if core.model._compiled_call_impl is None:
            core.model._compiled_call_impl = call
        self._remove = weakref.finalize(core, _let_go, model, call, handle)
        self._remove.atexit = False
        _ARMED.add(self)

    def disarm(self) -> None:
        """Remove what `arm` has put onto the model."""
        if self._remove is not None:
            self._remove()
        self._core = self._remove = None
        _ARMED.discard(self)

    def __call__(self, module: nn.Module, _prefix: str, _keep_vars: bool) -> None:
        """Check a call of the model's `state_dict`."""
        self._check("model-saved-inside-stage", module)

    def _check(self, code: str, model: nn.Module) -> None:
        core = self._core() if self._core is not None else None
        if core is None or core.model is not model or code in self._done:
            return
        if _inside_package() or not _differs(core):
            return
        stage, noise = core.plan.stage, bool(core.plan.spec.noise.strength)
        if code == "model-called-inside-stage":
            self.once(
                "model-called-inside-stage",
                f"the model of a cascade was called inside stage {stage}, where it computes without the branches"
                f"{' and with noise' if noise else ''}. Call the cascade; for the model's own methods (generate), call "
                'them inside `with cascade.weights("slow"):` or "fast"',
            )
        else:
            self.once(
                "model-saved-inside-stage",
                f"the state dict of a cascade's model was read inside stage {stage}: it holds the weights that the "
                f"stage started from{', with noise' if noise else ''}, and not what the stage has trained. Read "
                "cascade.folded_state_dict(), save after cascade.release(), or save inside "
                '`with cascade.weights("slow"):` or "fast"',
            )

    # ---- calls and saves of the cascade

    def check_mode(self, core: Core, training: bool) -> None:
        """Warn of a call in eval mode that sees noise, unless it is a training step of a model trained in eval mode."""
        if training or (torch.is_grad_enabled() and not self._train_mode):
            return
        if not core.plan.spec.noise.strength or core.slow.parked or "evaluated-with-noise" in self._done:
            return
        self.once(
            "evaluated-with-noise",
            f"the cascade was called in eval mode inside stage {core.plan.stage}, and its weights hold noise. "
            'Evaluate inside `with cascade.weights("slow"):`, or "fast"; or after `release`',
        )

    def check_saved(self, core: Core) -> None:
        """Warn of a trainer that writes the state dict of the cascade as if it were that of a model."""
        if "unfolded-save" in self._done or core.released:
            return
        frame = sys._getframe(1)
        while frame.f_back is not None:
            frame = frame.f_back
            if (frame.f_globals.get("__name__"), frame.f_code.co_name) in _UNFOLDED_SAVES:
                self.once(
                    "unfolded-save",
                    "a trainer saves an unfolded cascade: the file holds branches beside the weights of the running "
                    "stage, noise included, and neither the user's model nor lorasc_fx.load can read it. In a Trainer "
                    "of transformers or trl use lorasc_fx.integrations.transformers.CascadeCallback; elsewhere save "
                    "cascade.release(), or a checkpoint by lorasc_fx.save",
                )

    def check_end(self) -> None:
        """Warn, where the program ends, of a first stage that has trained and was neither ended, saved nor released."""
        core = self._core() if self._core is not None else None
        if core is None or "training-not-kept" in self._done or core.looped or core.hollow is not None:
            return
        if core.slow.together is not None or core.spread is not None or core.plan.stage > 1:
            return
        if core.slow.moved(core.branches_by_weight()):
            pace = core.plan.spec.pace_at(1)
            kept = f", and keeps {pace:g} of it, the pace of the spec: give pace=1.0 to keep all" if pace < 1 else ""
            self.once(
                "training-not-kept",
                "the program ends, and what stage 1 of a cascade has trained was neither folded nor saved. Train in "
                f"`for stage in cascade.stages(...)`; `cascade.release()` folds it into the model{kept}; "
                "lorasc_fx.save keeps it for a later run",
            )

    def __reduce__(self) -> tuple[type[UsageWatch], tuple[()]]:
        return (UsageWatch, ())


def _differs(core: Core) -> bool:
    """Whether the user's model computes something else than the cascade: it lacks branches, or holds noise.

    On shards it is not known without the other processes, and not asked.
    """
    if core.released or core.placed is not None or core.hollow is not None:
        return False
    if core.slow.together is not None or core.spread is not None:
        return False
    if core.exchanged():
        return False  # torch.func.functional_call puts others in their places
    spec = core.plan.spec
    running = not core.slow.parked and (spec.noise.strength > 0 or spec.factor_start.from_weight)
    carried = any(core.slow.states[name].experts for name in core.quantized)
    return running or carried or core.slow.moved(core.branches_by_weight())


def _inside_package() -> bool:
    """Whether the call comes from this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_filename.startswith(_PACKAGE) and frame.f_code.co_filename != _HERE:
            return True
    return False


def _let_go(model: weakref.ref[nn.Module], call: Any, handle: Any) -> None:
    handle.remove()
    own = model()
    if own is not None and own.__dict__.get("_compiled_call_impl") is call:
        del own._compiled_call_impl


@atexit.register
def _at_exit() -> None:
    for watch in list(_ARMED):
        watch.check_end()
