"""A callback for Lightning's Trainer, whose LightningModule holds a cascade."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorasc_fx.cascade import transition
from lorasc_fx.errors import MissingExtra, SpecError, StateError
from lorasc_fx.facade import Cascade
from lorasc_fx.integrations.stages import Evaluated, StageEnds
from lorasc_fx.util.extras import module_of

try:
    pytorch = module_of("loops", "lightning.pytorch")
except MissingExtra as fault:  # the extra has only lightning-fabric
    raise MissingExtra("this needs the package 'lightning', which is not installed: pip install lightning") from fault

__all__ = ["CascadeCallback"]


class CascadeCallback(StageEnds, pytorch.Callback):  # type: ignore[misc, name-defined]
    """Runs the transitions of a cascade in a LightningModule, after the optimizer's step, before validation and save.

    `Trainer(callbacks=[CascadeCallback(module.cascade)], ...)`. Validation, test and prediction see the slow weights.
    Checkpoints hold the state of the cascade, without W0, and `fit(ckpt_path=...)` resumes from them. A stage that is
    running at the end of the training is folded. The logger gets `stage`, that of the batch. Under pace="loss" the loss
    of a stage is that of its last batch.

    Args:
        cascade: the cascade in the LightningModule.
        stages: number of stages, among which the steps of the training are divided evenly.
        epochs: epochs per stage. The default is 1, as in the paper, unless another rule is given.
        steps: optimizer steps per stage.
        evaluate: the weights for validation, test and prediction: `slow`, `fast`, or `trained` (the cascade as it is
            now, including noise).

    Raises:
        SpecError: two ways to end stages, a count below 1, or several optimizers.
        StateError: the LightningModule does not hold the cascade, or the optimizer does not hold the branches.
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
                f"CascadeCallback: evaluate is {evaluate!r}, but Lightning validates only once. Give slow or fast"
            )
        super().__init__(cascade, epochs=epochs, steps=steps, stages=stages, evaluate=evaluate)
        self._done = 0
        self._batch_loss: Any = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that the training can run as configured."""
        if self.cascade not in pl_module.modules():
            raise StateError(
                f"CascadeCallback: {type(pl_module).__name__} does not hold the cascade of the callback. Make it an "
                "attribute of the LightningModule",
                code="trainer-not-supported",
            )
        if self.stages is not None:
            self._divide(self.stages, trainer.estimated_stepping_batches)
        run, optimizer = self.cascade._run, self._optimizer(trainer)
        run.begin_loop(optimizer, "CascadeCallback")
        transition.end_idle(run)
        self._done = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *about: Any) -> None:
        """End a stage if this is its last batch."""
        if self._needs_loss:
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            self._batch_loss = loss if loss is None else trainer.strategy.reduce(loss, reduce_op="mean")
        self.log("stage", float(self.cascade.stage))
        stepped, self._done = trainer.global_step > self._done, trainer.global_step
        by_steps = stepped and self._ends_after(trainer.global_step)
        last = self.epochs is not None and trainer.is_last_batch
        if by_steps or (last and (trainer.current_epoch + 1) % (self.epochs or 1) == 0):
            self.cascade.transition(self._optimizer(trainer), loss=self._loss())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Fold a stage that was cut short."""
        if transition.has_begun(self.cascade._run):
            self._end_last(self._optimizer(trainer))

    def _loss(self) -> Any:
        return self._batch_loss

    def _begin(self, *about: Any) -> None:
        """Put the weights for an evaluation in place."""
        if self._passes[0] != "trained" and self.cascade._run.placed is None:
            self._put(self._passes[0])

    def _end(self, *about: Any) -> None:
        """Restore the weights of the training."""
        self._put(None)

    on_validation_start = on_test_start = on_predict_start = _begin
    on_validation_end = on_test_end = on_predict_end = on_exception = _end

    def _optimizer(self, trainer: Any) -> Any:
        if len(trainer.optimizers) != 1:
            raise SpecError(
                f"CascadeCallback: the LightningModule has {len(trainer.optimizers)} optimizers. Give it one that "
                "holds the branches: torch.optim.AdamW(cascade.param_groups(lr=...))",
                code="conflicting-options",
            )
        return trainer.optimizers[0]
