"""A run: starts it, adds the sites of new graphs, commits new states, and checks whether a call is allowed now."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lorasc_fx.branch import Decided
from lorasc_fx.cascade.run_base import Planned, RunBase, write_planned
from lorasc_fx.cascade.training import check_holds, check_rates, groups
from lorasc_fx.errors import SpecError, StateError, named, warn
from lorasc_fx.plan import Reason
from lorasc_fx.quantized import quantized_in
from lorasc_fx.shards import ProcessGroup
from lorasc_fx.state import SlowWeights
from lorasc_fx.util.torch_private import current_backward
from lorasc_fx.util.undo import PROCESS, Undo, commit

log = logging.getLogger("lorasc_fx")


class Run(RunBase):
    """The training run of a cascade, with the methods that change it. If a method raises, nothing is changed."""

    def begin(
        self,
        trained: Mapping[str, nn.Parameter],
        undo: Undo,
        empty: bool = False,
    ) -> None:
        """Start the first stage: keep W0 of the sites and draw the noise.

        Args:
            trained: the parameters trained in full, by name.
            empty: whether slow state and branches are loaded next. Then branches need no initial values.
        """
        self.slow = self.slow.with_trained(trained)
        self.register_sites(undo, empty)

    def grow(self, decided: Decided, undo: Undo | None = None) -> None:
        """Add the sites, refusals and branches of a new graph. With `undo` this is part of a larger transaction."""
        if undo is None:
            with self.lock, commit() as block:
                self.grow(decided, block)
            return
        undo(self.restorer())
        new = {name: branch for name, branch in decided.branches.items() if name not in self.branches}
        self.branches.update(new)
        self.branches.train(self.branches.training)  # a new module is in train mode
        self.plan, self.refusals = decided.plan, decided.refusals
        reached = decided.plan.by_weight.keys() | {refusal.weight for refusal in decided.refusals}
        self.unreached = tuple(name for name in self.unreached if name in decided.unreached and name not in reached)
        weights = [branch.weight_name for branch in new.values()]
        self.register_sites(undo, adapted=weights)
        if new and not self.grouped and not self.pending.accumulated:
            log.info("%d sites were added by a new graph: %s", len(new), weights)
        elif new:  # an optimizer probably exists already
            warn(
                f"{len(new)} sites were added by a call of a new kind: {named(weights)}. The optimizer does not hold "
                "their branches. Add them by optimizer.add_param_group, or call the cascade once in each mode and with "
                "each kind of arguments before you make the optimizer",
                "late-sites",
            )

    def register_sites(self, undo: Undo, empty: bool = False, adapted: Collection[str] = ()) -> None:
        """Keep W0 of new sites and start their stage. `adapt` and each new graph end with this.

        Args:
            empty: as for `begin`.
            adapted: weights with a new branch, some of which may have had noise already.
        """
        undo(self.pending.restorer())
        unsaved = self.has_unsaved_training
        if not self._buffers:
            self.note_buffers()
        # Step 1: find the new weights: sites, and with noise.where="all" the other matrices as well.
        parameters, noise = self.parameters_by_name(), self.plan.spec.noise
        names = [site.weight for site in self.plan.sites]
        reasons = (Reason.EXCLUDED, Reason.SHARED_MEMORY)
        skipped = {*names, *(refusal.weight for refusal in self.refusals if refusal.reason in reasons)}
        matrices = (name for name, value in parameters.items() if value.dim() > 1 and value.is_floating_point())
        names += [name for name in noise.on_others(matrices) if name not in skipped]
        new = {name: parameters[name] for name in names if name not in self.slow.states}
        started = new | {name: parameters[name] for name in adapted}
        # Step 2: check them.
        self._check_quantized(new)
        # Step 3: compute the state of the stage, then write it.
        slow, branches = self.slow.with_weights(new, self.plan, self.memory), self.branches_by_weight()
        starting = {name: branches[name] for name in started if name in branches and not empty}
        slow, factors = slow.begin_stage(self.plan, starting)
        written = started if (noise.is_on or factors) and not slow.idle else {}
        self.commit(Planned(self.plan, slow, written, factors=factors), undo)
        if not empty:  # a loader writes the weights next, and records them then
            self.note_weights({name: new[name] for name in new if name not in written})
        if not unsaved:
            self.note_kept()
        self._watch()

    def _check_quantized(self, new: Mapping[str, nn.Parameter]) -> None:
        """Raise SpecError if the spec writes noise or residuals into weights, and a new weight is quantized."""
        spec, quantized = self.plan.spec, next(iter(quantized_in(new)), None)
        for is_used, option, value, advice in (
            (spec.noise.is_on, f"noise.strength is {spec.noise.strength}", "noise", "noise.strength=0"),
            (spec.decomposes, f"start is {spec.start!r}", "the residual", "start='lora'"),
        ):
            if is_used and quantized is not None:
                raise SpecError(
                    f"{option}, but {quantized} is quantized, and {value} cannot be written into it. "
                    f"Give {advice}, or exclude the weight: exclude=({quantized!r},)",
                    code="quantized-not-supported",
                )

    def _watch(self) -> None:
        """Watch gradients."""
        if not self.is_sharded:  # FSDP has other hooks
            self.pending.arm(self.trainable().values())

    def __setstate__(self, state: dict[str, object]) -> None:
        """Set the state of a deep copy. Its watches start empty, so they are armed for the copied parameters."""
        vars(self).update(state)
        if not self.released:
            self._watch()

    def commit(self, planned: Planned, undo: Undo | None = None) -> None:
        """Write a planned state, all or nothing. With `undo` this is part of a larger transaction."""
        if undo is not None:
            write_planned(self, planned, undo)
            return
        with self.lock, commit() as block:
            write_planned(self, planned, block)

    def detach(self) -> None:
        """End the run: remove all hooks."""
        self.released = True
        self.pending.disarm()

    def take_shards(self, slow: SlowWeights) -> None:
        """Use these slow weights, which are for this rank's shards. Called after FSDP has sharded the parameters.

        Hooks on parameters are removed, because FSDP does not call them.
        """
        self.slow = slow
        self.pending.disarm()
        self.note_weights()

    def param_groups(self, lr: float, options: Mapping[str, object]) -> list[dict[str, Any]]:
        """Return parameter groups for an optimizer; see `Cascade.param_groups`."""
        self.check_alive("param_groups")
        self.grouped = True
        return self._groups(lr, options)

    def _groups(self, lr: float, options: Mapping[str, object]) -> list[dict[str, Any]]:
        trained = self.present(self.slow.trained).values()
        return groups(self.plan.spec, self.by_key.values(), trained, lr, options)

    def begin_loop(self, optimizers: Sequence[torch.optim.Optimizer], call: str = "stages") -> None:
        """Check that a loop over stages can start, and record that this run has one. `call` names it in messages."""
        self.check_ready(call, sharded=True)
        check_holds(optimizers, self.trainable())
        check_rates(optimizers, lambda lr: self._groups(lr, {}))
        self.looped = True

    # ---- checks before a call

    def check_call(self, training: bool) -> None:
        """Check a call of the cascade: DistributedDataParallel around it, and noise in eval mode without gradients."""
        if not torch.is_grad_enabled():
            if self.is_noisy and not training:
                self.warned.once(
                    "evaluated-with-noise",
                    f"the cascade was called in eval mode inside stage {self.plan.stage}, and its weights have noise. "
                    'Evaluate inside `with cascade.weights("slow"):` (or "fast"), or after `release`',
                )
        elif (group := self.replicas.check(self.trainable)) is not None:
            # The wrapper has broadcast the parameters of rank 0, but not its W0, so compare the runs.
            ProcessGroup.of(group).check_equal("DistributedDataParallel", self.facts(self._checksums))

    def check_alive(self, call: str) -> None:
        """Raise StateError after `release`."""
        if self.released:
            raise StateError(
                f"{call}: this cascade was released. Call lorasc_fx.adapt(model, ...) to train its model further",
                code="released",
            )

    def check_copy(self) -> None:
        """Raise StateError if the weights are sharded, because FSDP would not manage a deep copy."""
        if self.is_sharded:
            raise StateError(
                "deepcopy: the weights are sharded over processes, and FSDP would not manage the copy. Write a "
                "checkpoint by lorasc_fx.save and load it onto another model by lorasc_fx.load",
                code="sharded",
            )

    @contextmanager
    def exclusive(self, call: str, **allowed: bool) -> Iterator[None]:
        """Context manager around changes of weights: take the lock and call `check_ready` with these arguments.

        It first waits for the end of a capture, which replaces parameters of the model by tensors without values.
        """
        with PROCESS, self.lock:
            self.check_ready(call, **allowed)
            yield

    def check_ready(
        self,
        call: str,
        *,
        sharded: bool = False,
        ends_stage: bool = False,
        keeps: bool = False,
    ) -> None:
        """Raise StateError if the call is not allowed now: after `release`, inside `weights` or inside a backward.

        Args:
            sharded: whether the call supports sharded weights.
            ends_stage: whether it ends the running stage. Then no gradient may be pending.
            keeps: whether it saves or folds the training of the running stage, which is then not lost with the cascade.
        """
        self.check_alive(call)
        if self.is_sharded and not sharded:
            raise StateError(
                f"{call}: not supported for sharded weights. They support transition, stages, rewind, weights, "
                "lorasc_fx.save, resume, and lorasc_fx.parallel.fsdp.folded_state_dict",
                code="sharded",
            )
        if self.placed is not None:
            view = f"stage={self.placed}" if isinstance(self.placed, int) else repr(self.placed)
            raise StateError(
                f"{call}: not allowed inside `with cascade.weights({view})`. Call it after the block",
                code="inside-weights",
            )
        if current_backward() != -1:
            raise StateError(
                f"{call}: called inside a backward, which still needs the weights. Call it after the backward",
                code="inside-backward",
            )
        self.check_weights(call)
        waiting = self.pending.waiting(self.trainable()) if ends_stage else []
        if self.slow.group.any(bool(waiting)):
            waiting = waiting or ["a parameter on another process"]
            raise StateError(
                f"{call}: gradients are pending on {named(waiting, 1)}, and they belong to the stage that ends. "
                "Call optimizer.step() or optimizer.zero_grad() first. If you did, the optimizer holds other Parameter "
                "objects, because a move to some devices makes new ones: build it from cascade.param_groups(lr=...) "
                "after the move. cascade.zero_grad() drops the gradients",
                code="gradients-pending",
            )
        if keeps:
            self.note_kept()

    def differs_from_model(self) -> bool:
        """Whether the user's model computes something else than the cascade, because of branches or noise.

        False if the weights are sharded, because the answer would need communication.
        """
        if self.released or self.placed is not None or self.is_sharded:
            return False
        if self.exchanged():  # torch.func.functional_call runs the model with other tensors
            return False
        residual = any(state.residual is not None for state in self.slow.states.values())
        return self.is_noisy or residual or self.branches_add()

    def loss_if_dropped(self) -> str | None:
        """Return what is lost if the cascade is garbage collected now, with "{model}" for the class of its model.

        Reads counters and flags only. None if nothing is lost, because the model has the slow weights.
        """
        if self.released:
            return None
        losses = [f"the training of stage {self.plan.stage} is lost"] if self.has_unsaved_training else []
        if self.is_noisy:
            losses.append("the weights of {model} keep the noise of the stage")
        if any(state.residual is not None for state in self.slow.states.values()):
            losses.append("the weights of {model} lack the initial factors of their branches")
        return ", and ".join(losses) or None
