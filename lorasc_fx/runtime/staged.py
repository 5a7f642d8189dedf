"""What a cascade trains by: its groups for an optimizer, stages, transitions, and the way back into a saved run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lorasc_fx.errors import StateError
from lorasc_fx.runtime import past, resuming, transition
from lorasc_fx.runtime.checkpoint_read import Checkpoint
from lorasc_fx.runtime.described import Described
from lorasc_fx.runtime.optim import groups
from lorasc_fx.runtime.stages import Stage, run_stages

__all__ = ["Staged"]


class Staged(Described):
    """The part of a cascade that goes from stage to stage."""

    _loaded: Checkpoint | None

    def param_groups(self, lr: float, **options: Any) -> list[dict[str, Any]]:
        """Return groups for a torch optimizer: `lora_A`, `lora_B`, and `train` (what the spec trains in full).

        Each rule of the spec's train_rules with a learning rate has a group of its own, `train:PATTERN`; without
        train_A there is no `lora_A`.

        Args:
            lr: learning rate of every group without its own; of `lora_B` it is `lr * lr_ratio` (LoRA+, 2402.12354).
            options: anything else that the optimizer's groups take.
        """
        self.core.check_alive("param_groups")
        self.core.grouped = True
        known = self.core.slow.trained
        trained = [(parameter, known[name].rule) for name, parameter in self.core.trained_parameters().items()]
        return groups(self.core.plan.spec, self.core.by_key.values(), trained, lr, options)

    def stages(self, count: int, optimizer: torch.optim.Optimizer, scheduler: Any = None) -> Iterator[Stage]:
        """Yield `count` stages; between them fold, renew the branches and redraw the noise, and fold after the last.

        Args:
            count: number of stages.
            optimizer: holds the branches; its state for them is treated as the spec says.
            scheduler: a torch learning rate scheduler whose unit is the stage: stepped once at each transition.

        Raises:
            StateError: the optimizer does not hold the branches.
        """
        return run_stages(self.core, count, optimizer, scheduler)

    def transition(self, optimizer: torch.optim.Optimizer | None) -> None:
        """End the running stage and start the next: slow update, fold, fresh branches, new noise, optimizer state.

        All or nothing, also where a signal's handler raises (Ctrl-C). Of several threads that call this, or another
        method that reads or writes weights, one waits for the other. Calls of the cascade do not wait: one that runs in
        another thread meanwhile may see weights of both stages.

        Parameter objects stay the same, so that optimizers, compiled code and wrappers stay valid;
        where the spec's `ranks` change their shape, compiled code is compiled again, and the optimizer's state starts
        anew.

        Args:
            optimizer: holds the branches; None if there is none to be treated.

        Raises:
            StateError: inside a backward, with gradients pending, inside `weights`, or an optimizer without the
            branches. NonFiniteBranch: a branch holds inf or nan.
        """
        with self.core.exclusive("transition"):
            transition.run(self.core, optimizer, park=False)

    def rewind(self, stage: int, optimizer: torch.optim.Optimizer | None) -> None:
        """Go back to the slow weights of an earlier stage, and start a stage from them; what came after is dropped.

        All or nothing. The new stage has a number that no stage had, so that its noise and its lora_A are new. Under
        either restart it starts from the slow weights. The optimizer's state of all that trains is reset; buffers of
        the model (running statistics) stay as they are. Without `stages` it runs until `transition`.

        Args:
            stage: number of a stage that has ended; 0 is the base.
            optimizer: holds the branches; None if there is none to be treated.

        Raises:
            StateError: as `weights(stage=...)`, or as `transition`; nothing was changed.
        """
        with self.core.exclusive("rewind"):
            past.rewind(self.core, stage, optimizer)

    def resume(self, optimizer: torch.optim.Optimizer | None = None, scheduler: Any = None) -> dict[str, Any]:
        """After `lorasc_fx.load`: give optimizer, scheduler and random generators their saved state; return `extra`.

        Raises:
            StateError: the cascade was not loaded from a checkpoint, or the optimizer does not hold the branches.
            CheckpointError: the checkpoint holds no such state, or that of another optimizer.
        """
        with self.core.exclusive("resume"):
            if self._loaded is None:
                raise StateError(
                    "resume: this cascade was not loaded; make it by lorasc_fx.load(folder, model, args=...)"
                )
            return resuming.resume(self.core, self._loaded, optimizer, scheduler)
