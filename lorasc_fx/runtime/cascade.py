"""The cascade: the adapted model as an nn.Module, with the user's model and the branches as its children."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lorasc_fx.branch import Which
from lorasc_fx.errors import StateError, named, warn
from lorasc_fx.plan import Plan
from lorasc_fx.runtime import checkpoint_read, folding, past
from lorasc_fx.runtime.core import Core
from lorasc_fx.runtime.flags import Flags, Joined, give_back
from lorasc_fx.runtime.recalibrating import recalibrate
from lorasc_fx.runtime.rigid import Requantize
from lorasc_fx.runtime.staged import Staged
from lorasc_fx.runtime.variants import NOT_COMPILED, Call, Made, Variant, VariantMaker, Variants
from lorasc_fx.undo import AllOrNothing, Block, Commit, Lock, Undo, grad_mode, isolated, no_inference_mode

__all__ = ["Cascade"]

log = logging.getLogger("lorasc_fx")

_CAPTURING = Lock()

WHICH: tuple[Which, ...] = ("slow", "fast", "base", "averaged")


class Cascade(Staged):
    """The adapted model. `lorasc_fx.adapt` makes it; calling it computes `y = W_t x + b + s B_t A_t x` at every site.

    Children: `model`, the user's own, which stays the only owner of its weights; `branches`, one per site. Graphs are
    made per call signature and hold no weights.
    """

    def __init__(
        self, model: nn.Module, maker: VariantMaker, made: Made, example: tuple[Any, Any], flags: Flags
    ) -> None:
        super().__init__()
        self.model = model
        self.branches = nn.ModuleDict(dict(made.branches))
        self.training = model.training
        self.core = Core(model, self.branches, made.plan, maker.frontend)
        self.core.leave_alone(made.refusals)
        self._refusals, self._unreached = made.refusals, made.unreached
        self._maker, self._example, self._flags = maker, example, flags
        self._refused_frontends = made.refused_frontends
        self._joined: Joined = ()
        self._variants = Variants()
        self._variants.add(maker.call(*example), made.variant, model.training)
        if made.variant.attach is not None:
            made.variant.attach(self._grow, self._running)
        self._frontend = made.variant.frontend
        self._loaded = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; the model and the branches stay those of `adapt`, of which graphs and folds are.

        Raises:
            StateError: another model, or other branches.
        """
        held = self.__dict__.get("_modules", {}).get(name) if name in ("model", "branches") else None
        if held is not None and value is not held:
            raise StateError(
                f"cascade.{name} cannot be exchanged: the cascade computes with, and folds into, the one of adapt. "
                "Call release and adapt the other model; to compile, compile the cascade"
            )
        super().__setattr__(name, value)

    # ---- computing

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the user's model computes for these arguments, with the branches; the model's own types.

        Raises:
            StateError: after `release`.
            CaptureError: a new signature that no front end takes.
        """
        self.core.check_alive("forward")
        if self.core.spread is not None:
            return self.core.spread(self, args, kwargs)
        if self.core.placed is not None and self.core.slow.together is None:
            return self.model(*args, **kwargs)
        if torch.compiler.is_compiling():  # dynamo guards inputs itself, and cannot hash a signature
            bound, named = self._maker.bind(args, kwargs)
            compiled = self._variants.compiled(self.training, pytree.tree_leaves((bound, named)))
            return compiled.module(*bound, **named) if compiled is not None else NOT_COMPILED[0](self, args, kwargs)
        call = self._maker.call(args, kwargs)
        if call.key is None:
            variant, count = self._variants.symbolic(self.training)
            return variant.module.forward(*call.args[:count], **call.kwargs)  # type: ignore[attr-defined]
        self.core.usage.check_mode(self.core, self.training)
        return self._variant(call).module(*call.args, **call.kwargs)

    def variant(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Variant:
        """Return the variant for a call; capture it if there is none yet."""
        return self._variant(self._maker.call(args, kwargs))

    def _variant(self, call: Call) -> Variant:
        self.core.check_called("variant")
        if (found := self._variants.find(call)) is not None:
            return found
        grad = torch.is_grad_enabled()  # which leaving the inference mode would set
        with AllOrNothing(_CAPTURING), no_inference_mode(), grad_mode(grad):  # tracers work on the whole process
            while (found := self._variants.find(call) or self._make_variant(call)) is None:
                pass
            return found

    def _make_variant(self, call: Call) -> Variant | None:
        """Capture, then take over what came of it; None where another thread has started another stage meanwhile."""
        plan, wide, begun = self.core.plan, self._variants.known(call), time.monotonic()
        given = (plan, self.core.by_key, self._refusals)
        made = self._maker.make(self.model, *given, call.args, call.kwargs, wide)
        number, sizes, seconds = len(self._variants) + 1, ", other sizes" if wide else "", time.monotonic() - begun
        log.info("variant %d by %s%s, in %.2f s", number, made.variant.frontend, sizes, seconds)
        with Commit(self.core.lock) as undo:
            if self.core.plan is not plan:
                return None
            self._grow(made, undo)
            self._variants.add(call, made.variant, self.training)
            if made.variant.attach is not None:
                made.variant.attach(self._grow, self._running)
            return made.variant

    def _grow(self, made: Made, undo: Undo | None = None) -> None:
        """Take over sites, refusals and branches that came with a new graph, all or nothing, or as a part of more."""
        if undo is None:
            with Commit(self.core.lock) as own:
                self._grow(made, own)
            return
        undo(self._held())
        new = {name: branch for name, branch in made.branches.items() if name not in self.branches}
        self.branches.update(new)
        self.core.plan, self._refusals = made.plan, made.refusals
        self.core.leave_alone(made.refusals)
        told = made.plan.by_weight.keys() | {each.weight for each in made.refusals}
        self._unreached = tuple(name for name in self._unreached if name in made.unreached and name not in told)
        self.core.know_sites(undo)
        if new:
            weights = [branch.weight_name for branch in new.values()]
            if not self.core.grouped and not self.core.pending.accumulated:
                log.info("%d sites came with a new variant: %s", len(new), weights)
                return
            warn(
                f"{len(new)} sites came with a call that no earlier one was like: {named(weights)}. The optimizer does "
                "not hold their branches: add_param_group them, or call the cascade once in each mode and with each "
                "kind of arguments before you make the optimizer"
            )

    def _running(self) -> Plan:
        """Return the plan of the running stage, as variants ask for it."""
        return self.core.plan

    # ---- weights

    def weights(self, which: Which | None = None, *, stage: int | None = None) -> AbstractContextManager[Cascade]:
        """Put slow, fast, base, averaged or an earlier stage's weights in place, exactly, for the time of a `with`.

        Inside, the branches rest, cascade and model compute the same, and the model's own methods (`generate`) work.
        `slow` is W0 + S as of the last transition, `fast` is W0 + F with the running branches in it, `base` is W0, and
        `averaged` the mean of the slow weights that the spec's `average` asks for; none holds noise.

        Args:
            which: `slow`, `fast`, `base` or `averaged`.
            stage: in its place the number of a stage that has ended: the slow weights at its end; 0 is the base.

        Raises:
            StateError: another name, a stage that has not ended or whose experts are gone into a dense delta, averaged
                weights where none are kept, inside another `weights`, inside a backward, or after `release`. At the
                end of the `with`: a weight was written inside; that write is dropped, and the weights are back.
        """
        return _weights(self, which, stage)

    def recalibrate(self, batches: Iterable[Any], call: Callable[[Cascade, Any], Any] | None = None) -> None:
        """Estimate the running statistics of batch norms anew, for the weights that are in place.

        As torch.optim.swa_utils.update_bn: the statistics are reset, and are then the mean over the batches, without
        gradients, in train mode. Inside `weights(...)` those weights count, and the statistics of before are put back
        at its end; elsewhere the fast weights count, and the new statistics stay.

        Args:
            batches: of inputs; a mapping is given by name, of a tuple or list the first entry.
            call: runs the cascade on a batch, where another reading is wanted.

        Raises:
            StateError: the model has no such batch norm, there is no batch, inside a backward, or after `release`.
                Whatever raises, the statistics are as they were.
        """
        recalibrate(self, batches, call)

    def folded_state_dict(
        self, quantized: Literal["dequantize"] | None = None, *, which: Literal["slow", "averaged"] = "slow"
    ) -> dict[str, torch.Tensor]:
        """Return the model's state dict with the slow weights in it, as copies; loads with strict=True.

        A stage that has trained is counted as `release` would: it is folded.

        Args:
            quantized: `dequantize` to get dense tensors for quantized weights that have trained; else they are refused.
            which: `slow`, or their average over stages.
        """
        with self.core.exclusive("folded_state_dict"):
            return folding.folded_state(self.core, "folded_state_dict", quantized, which)

    def folded_graph(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        quantized: Literal["dequantize"] | None = None,
        *,
        which: Literal["slow", "averaged"] = "slow",
    ) -> nn.Module:
        """Return a plain GraphModule: names, nodes and shapes as captured, slow weights as its own constants.

        Args:
            args, kwargs: inputs whose graph is wanted; without, those of `adapt`. The model's present mode counts.
            quantized, which: as for `folded_state_dict`.
        """
        self.core.check_ready("folded_graph")
        example = self._example if args is None and kwargs is None else (tuple(args or ()), dict(kwargs or {}))
        call = self._maker.call(*example)
        variant = self._variant(call)
        with self.core.exclusive("folded_graph"):
            state = folding.folded_state(self.core, "folded_graph", quantized, which)
        return self._maker.fold(variant, self.model, self.stage, state, call.args, call.kwargs)

    def release(self, quantized: Requantize = None, *, which: Literal["slow", "averaged"] = "slow") -> nn.Module:
        """Return the user's own model with the slow weights in it, and its flags as they were; the cascade ends.

        A running stage that has trained is folded first, so that nothing is lost.

        Args:
            quantized: what to do with quantized weights that have trained: `dequantize` leaves them dense; a callable
                is given each module with its dense weight and quantizes it again, as torchao's
                `lambda module: quantize_(module, config)` does. What was done is logged.
            which: `slow`, or their average over stages.

        Raises:
            StateError: gradients are pending, it was released before, or quantized weights have trained and `quantized`
                does not say what to do.
            NonFiniteBranch: a branch holds inf or nan; nothing was changed.
        """
        with self.core.exclusive("release"), Commit() as undo:
            undo(self._held())
            undo(partial(Flags.of(self.model).restore, self.model))
            undo(self.core.turning.restorer())
            undo(self.core.pending.restorer(self.core.trainable()))
            undo(partial(self.core.usage.arm, self.core))
            folding.release(self.core, quantized, which, undo)
            self.core.turning.call_off()
            self._flags.restore(self.model)
            give_back(self._joined, undo)
            self._variants.detach()
            self._variants = Variants()
            self.core.let_go()
            return self.model

    def _held(self) -> Callable[[], None]:
        """Return what brings back the decisions, branches and graphs of this moment."""
        core, branches = self.core, dict(self.branches.items())
        decided = (self._variants, self._refusals, self._unreached, core.plan, core.untouched, core.released)
        variants = self._variants.copy()

        def restore() -> None:
            self._variants, self._refusals, self._unreached, core.plan, core.untouched, core.released = decided
            self._variants.held, self._variants.plain = variants.held, variants.plain
            for key in [key for key in self.branches if key not in branches]:
                del self.branches[key]

        return restore

    # ---- moving

    def _apply(self, fn: Any, recurse: bool = True) -> Cascade:
        """Move or cast; graphs are dropped (constants in them do not move), branches and slow state stay."""
        with AllOrNothing(self.core.lock) as undo:
            if (before := folding.before_cast(self.core, fn)) is None:
                return self
            undo(partial(self.__dict__.update, _variants=self._variants, _example=self._example))
            undo(folding.tensors_writer(self.core, self))
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            self._variants.detach()
            self._variants = Variants()
            self._example = pytree.tree_map_only(torch.Tensor, fn, self._example)
            folding.recast(self.core, before)
            return self

    def train(self, mode: bool = True) -> Cascade:
        """Set the mode of model and cascade; an exported program's graph has one mode and keeps it."""
        self.core.check_alive("train")
        self.training = self.branches.train(mode).training
        if "train" not in vars(self.model):
            self.model.train(mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the entries of model and branches, as torch does; `lorasc_fx.save` writes what a resume needs."""
        if not self._state_dict_hooks:  # an integration's checkpoints keep the small state
            self.core.usage.check_saved(self.core)
        return super().state_dict(*args, **kwargs)

    def load(self, found: checkpoint_read.Checkpoint) -> None:
        """Take over a checkpoint that was read; the cascade was made by its plan."""
        checkpoint_read.restore(self.core, found)
        self._loaded = found


@isolated
def _weights(undo: Block[Any], cascade: Cascade, which: Which | None, stage: int | None) -> Cascade:
    """Put other weights in place; see `Cascade.weights`."""
    core = cascade.core
    if stage is not None and which is not None:
        raise StateError(f"weights({which!r}, stage={stage!r}): give one of the two")
    if stage is None:
        folding.check_which(f"weights({which!r})", str(which), core.plan.spec, WHICH)
    with core.exclusive("weights"):
        parameters = core.parameters_by_name()
        live = folding.trained_now(core, parameters)
        earlier = past.at_stage(core.slow, stage, "weights") if stage is not None else None
        undo(partial(folding.rest, core, parameters, live, folding.Held.of(core, parameters)))
        folding.place(core, which or ("slow" if stage else "base"), parameters, live, earlier)
        core.placed = which if stage is None else stage
    return cascade
