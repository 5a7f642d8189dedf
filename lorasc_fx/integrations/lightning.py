"""A callback for Lightning's Trainer. The cascade is an attribute of the LightningModule."""

from __future__ import annotations

import math
from typing import Any

from lorasc_fx.cascade import run_of, transition
from lorasc_fx.errors import MissingExtra, SpecError, StateError
from lorasc_fx.facade import Cascade
from lorasc_fx.integrations.stages import Evaluated, StageEnds
from lorasc_fx.util.environment import module_of

try:
    pytorch = module_of("loops", "lightning.pytorch")
except MissingExtra as fault:  # the extra `loops` installs only lightning-fabric
    raise MissingExtra(
        "lorasc_fx.integrations.lightning needs the package 'lightning', which is not installed: pip install lightning"
    ) from fault

__all__ = ["CascadeCallback"]


class CascadeCallback(StageEnds, pytorch.Callback):  # type: ignore[misc, name-defined]
    """Ends the stages of a cascade in a LightningModule: after the optimizer step, before validation and checkpoints.

    Pass it to the Trainer: `Trainer(callbacks=[CascadeCallback(module.cascade)], ...)`. Validation, test and prediction
    use the slow weights. Checkpoints hold the state of the cascade, without W0, and `fit(ckpt_path=...)` resumes from
    them. If a stage is still running when the training ends, it is folded. The stage of each batch is logged as
    `stage`.

    A LightningModule with several optimizers steps each of them once per step: its steps are Lightning's `global_step`
    divided by their number.

    Args:
        cascade: the cascade in the LightningModule.
        stages: number of stages. The steps of the training are divided evenly among them.
        epochs: epochs per stage. The default is 1, as in the paper, unless another rule is given.
        steps: optimizer steps per stage.
        evaluate: the weights for validation, test and prediction: `slow`, `fast`, or `trained` (the current weights,
            including noise).

    Raises:
        SpecError: two rules that end stages, or a count below 1.
        StateError: the LightningModule has no such cascade, or a trained parameter is in no optimizer or in two.
    """

    def __init__(
        self,
        cascade: Cascade,
        *,
        stages: int | None = None,
        epochs: int | None = None,
        steps: int | None = None,
        evaluate: Evaluated = "slow",
    ) -> None:
        if not isinstance(evaluate, str):
            raise SpecError(
                f"CascadeCallback: evaluate is {evaluate!r}, but Lightning validates only once. Give one of slow or "
                "fast"
            )
        super().__init__(cascade, epochs=epochs, steps=steps, stages=stages, evaluate=evaluate)
        self._steps_done = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that the training can run as configured."""
        if self.cascade not in pl_module.modules():
            raise StateError(
                f"CascadeCallback: {type(pl_module).__name__} does not contain the callback's cascade. Assign the "
                "cascade to an attribute of the LightningModule",
                code="trainer-not-supported",
            )
        if self.stages is not None:
            limit = trainer.max_steps / len(trainer.optimizers) if trainer.max_steps > 0 else math.inf
            self._divide(self.stages, min(trainer.estimated_stepping_batches, limit))
        run = run_of(self.cascade)
        run.begin_loop(trainer.optimizers, "CascadeCallback")
        transition.end_idle(run)
        self._steps_done = self._steps(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        """End the stage if this was its last batch."""
        self.log("stage", float(self.cascade.stage))
        # With gradient accumulation, most batches make no optimizer step and must not end a stage a second time.
        before, self._steps_done = self._steps_done, self._steps(trainer)
        by_steps = self._steps_done > before and self._is_last_step(self._steps_done)
        last_batch = self.epochs is not None and trainer.is_last_batch
        if by_steps or (last_batch and (trainer.current_epoch + 1) % (self.epochs or 1) == 0):
            self.cascade.transition(trainer.optimizers)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Fold the stage that is still running."""
        run = run_of(self.cascade)
        if transition.has_begun(run):
            transition.next_stage(run, trainer.optimizers, idle=True)

    def _place_evaluated(self, *args: object) -> None:
        """Place the weights for an evaluation in the model, unless the user has placed some."""
        if self._evaluated[0] != "trained" and run_of(self.cascade).placed is None:
            self._place(self._evaluated[0])

    def _restore_trained(self, *args: object) -> None:
        """Restore the weights of the training after an evaluation."""
        self._place(None)

    on_validation_start = on_test_start = on_predict_start = _place_evaluated
    on_validation_end = on_test_end = on_predict_end = on_exception = _restore_trained

    def _steps(self, trainer: Any) -> int:
        return int(trainer.global_step) // len(trainer.optimizers)
