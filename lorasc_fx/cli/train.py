"""`lorasc-fx train`: one cascade from a configuration to a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

import lorasc_fx as lx
from lorasc_fx.cli.batches import Batch
from lorasc_fx.cli.interrupt import on_ctrl_c
from lorasc_fx.cli.learners import CascadeLearner, PlainLearner
from lorasc_fx.cli.models import set_mode, warn_of_random_weights
from lorasc_fx.cli.recorder import record_cascade, record_experts, record_spectrum
from lorasc_fx.cli.run_folder import RunFolder
from lorasc_fx.cli.schema import Config
from lorasc_fx.cli.setup import Setup
from lorasc_fx.cli.training import Diverged, Step, accuracy, evaluate, make_optimizer, predict, train_steps
from lorasc_fx.errors import NonFiniteBranch
from lorasc_fx.integrations.metrics import Metrics
from lorasc_fx.integrations.reporter import Reporter, reporting

__all__ = ["run_train"]

_SECTIONS = ("model", "data", "train", "spec")


def run_train(config: Config, *, resume: bool = False, overwrite: bool = False) -> int:
    """Train, or go on with training, and return the exit code (130 after Ctrl-C, with a checkpoint written)."""
    folder = RunFolder(Path(config.output))
    folder.check(config, _SECTIONS, resume=resume, overwrite=overwrite)
    setup = Setup.of(config)
    warn_of_random_weights(config.model)
    learner, optimizer, start = _begin(setup, folder, resume=resume, overwrite=overwrite)
    schedule = setup.schedule(config.train.stages)
    device = config.train.device
    with reporting() as reporter, Metrics(folder.path) as metrics, on_ctrl_c() as interrupt:
        reporter.begin("train", schedule.steps, start)
        watch = _Watch(setup, folder, metrics, learner, optimizer, reporter, schedule.stages, start)
        try:
            whole = train_steps(
                learner,
                optimizer,
                setup.splits.train,
                schedule,
                setup.order(config.train.seed),
                watch,
                interrupt=interrupt,
                start=start,
                device=device,
                before_fold=watch.before_fold,
            )
        except (Diverged, NonFiniteBranch) as fault:
            raise Diverged(f"{fault}; --overwrite starts this run again") from fault
        if not whole:
            watch.save()
            reporter.say(f"Stopped after step {watch.done}; go on with: lorasc-fx train {folder.config} --resume")
            return 130
        if start == schedule.steps:
            reporter.say("This run was at its end already.")
        _end(setup, folder, metrics, learner, reporter)
    return 0


def _begin(
    setup: Setup, folder: RunFolder, *, resume: bool, overwrite: bool
) -> tuple[CascadeLearner, torch.optim.Optimizer, int]:
    """Return the cascade, its optimizer, and the steps that are done."""
    config = setup.config
    seed = config.train.seed
    model = setup.model(seed)
    mode, sample = setup.trains(model), setup.sample(seed)
    if not resume or not folder.saved:
        # The cascade first: what it refuses must not leave a run folder behind.
        learner = CascadeLearner.adapt(model, sample, config.spec, train=mode)
        folder.begin(config, _SECTIONS, resume=resume, overwrite=overwrite)
        record_cascade(folder, learner.cascade)
        return learner, make_optimizer(learner, config.train.lr, config.train.weight_decay), 0
    folder.begin(config, _SECTIONS, resume=True)
    set_mode(model, mode)
    cascade = lx.load(folder.checkpoint, model, args=sample.args, kwargs=sample.kwargs)
    cascade.train(mode)
    learner = CascadeLearner(cascade)
    optimizer = make_optimizer(learner, config.train.lr, config.train.weight_decay)
    extra = cascade.resume(optimizer)
    return learner, optimizer, int(extra["step"])


class _Watch:
    """What happens after each step: metrics, bar, checkpoints, and a validation at each end of a stage."""

    def __init__(
        self,
        setup: Setup,
        folder: RunFolder,
        metrics: Metrics,
        learner: CascadeLearner,
        optimizer: torch.optim.Optimizer,
        reporter: Reporter,
        stages: int,
        start: int,
    ) -> None:
        self._setup, self._folder, self._learner, self._optimizer = setup, folder, learner, optimizer
        self._reporter, self._metrics, self._stages = reporter, metrics, stages
        self.done = start

    def __call__(self, step: Step) -> None:
        train = self._setup.config.train
        self.done = step.done
        self._reporter.step(step.done, f"stage {step.stage}/{self._stages}", step.loss)
        if step.done % train.log_every == 0 or step.ends_stage:
            self._metrics.log(step=step.done, stage=step.stage, loss=step.loss, lr=step.lr, seconds=step.seconds)
        if step.ends_stage:
            share = self._validate(step, "slow")
            self._reporter.say(f"stage {step.stage}/{self._stages} ends at step {step.done}: validation {share:.3f}")
        if step.ends_stage or (train.checkpoint_every and step.done % train.checkpoint_every == 0):
            self.save()

    def before_fold(self, step: Step) -> None:
        """Measure the fast weights and the experts of the stage that ends, while they are there."""
        self._validate(step, "fast")
        record_experts(self._folder, self._learner.cascade, step.stage)

    def save(self) -> None:
        """Write the checkpoint."""
        lx.save(self._learner.cascade, self._folder.checkpoint, optimizer=self._optimizer, extra={"step": self.done})

    def _validate(self, step: Step, which: Literal["slow", "fast"]) -> float:
        splits, device = self._setup.splits, self._setup.config.train.device
        cascade, mode = self._learner.cascade, self._learner.cascade.training
        cascade.eval()
        with cascade.weights(which):
            share, loss = evaluate(self._learner.logits, splits.validation, device)
        cascade.train(mode)
        suffix = "" if which == "slow" else "_fast"
        entry = {f"validation{suffix}": share, f"validation_loss{suffix}": loss}
        self._metrics.log(step=step.done, stage=step.stage, **entry)
        return share


def _end(setup: Setup, folder: RunFolder, metrics: Metrics, learner: CascadeLearner, reporter: Reporter) -> None:
    """Write the folded weights, then report on the released model."""
    record_spectrum(folder, learner.cascade)
    folder.write_weights(learner.cascade.folded_state_dict())
    model = set_mode(learner.finish(), False)
    device = setup.config.train.device

    def call(batch: Batch) -> torch.Tensor:
        return PlainLearner(model, ()).logits(batch)

    parts = {"test": setup.splits.test, **setup.splits.shifts}
    shares: dict[str, Any] = {
        part: accuracy(predict(call, examples, device), examples) for part, examples in parts.items()
    }
    metrics.log(event="result", **shares)
    reporter.say(" ".join(f"{part} {share:.3f}" for part, share in shares.items()))
    reporter.say(f"folded weights: {folder.folded}")
