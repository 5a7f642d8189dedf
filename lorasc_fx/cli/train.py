"""`lorasc-fx train`: one cascade from a configuration to a run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro

import lorasc_fx as lx
from lorasc_fx.cli.config import Config
from lorasc_fx.cli.models import set_mode, warn_of_random_weights
from lorasc_fx.cli.run_folder import RunFolder
from lorasc_fx.cli.training import (
    Diverged,
    Setup,
    Step,
    accuracy,
    make_optimizer,
    on_ctrl_c,
    predict,
    train_steps,
)
from lorasc_fx.errors import NonFiniteBranch
from lorasc_fx.integrations.progress import Metrics, reporting

__all__ = ["TrainArguments", "run_train"]


@dataclass(frozen=True)
class TrainArguments:
    """Adapt a model as a configuration file says; each of its keys can be given here as well."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    resume: bool = False
    """Go on with the run that stands in the output folder."""
    overwrite: bool = False
    """Delete the run that stands in the output folder, and start again."""


def run_train(arguments: TrainArguments) -> int:
    """Train, or go on with training, and return the exit code (130 after Ctrl-C, with a checkpoint written)."""
    config, resume, overwrite = arguments.config, arguments.resume, arguments.overwrite
    folder = RunFolder(Path(config.output))
    folder.check(config, resume=resume, overwrite=overwrite)
    setup = Setup.of(config)
    warn_of_random_weights(config.model)
    cascade, optimizer, start = _begin(setup, folder, resume=resume, overwrite=overwrite)
    schedule, order = setup.schedule(config.train.stages), setup.order(config.train.seed)
    with reporting() as reporter, Metrics(folder.path) as metrics, on_ctrl_c() as interrupt:
        reporter.begin("train", schedule.steps, start)
        done = start

        def save() -> None:
            lx.save(cascade, folder.checkpoint, optimizer=optimizer, extra={"step": done})

        def validate(step: Step, which: Literal["slow", "fast"]) -> float:
            mode, examples = cascade.training, setup.splits.validation
            cascade.eval()
            with cascade.weights(which) as model:
                logits = predict(model, examples, config.train.device)
            cascade.train(mode)
            share, loss = accuracy(logits, examples), F.cross_entropy(logits, examples.labels).item()
            suffix = "" if which == "slow" else "_fast"
            entry = {f"validation{suffix}": share, f"validation_loss{suffix}": loss}
            metrics.log(step=step.done, stage=step.stage, **entry)
            return share

        def before_fold(step: Step) -> None:
            validate(step, "fast")
            folder.write_experts(cascade, step.stage)

        def observe(step: Step) -> None:
            nonlocal done
            done = step.done
            reporter.step(done, f"stage {step.stage}/{schedule.stages}", step.loss)
            if done % config.train.log_every == 0 or step.ends_stage:
                metrics.log(step=done, stage=step.stage, loss=step.loss, lr=step.lr, seconds=step.seconds)
            if step.ends_stage:
                share = validate(step, "slow")
                reporter.say(f"stage {step.stage}/{schedule.stages} ends at step {done}: validation {share:.3f}")
            if step.ends_stage or (config.train.checkpoint_every and done % config.train.checkpoint_every == 0):
                save()

        try:
            whole = train_steps(
                cascade, optimizer, setup, schedule, order, observe,
                interrupt=interrupt, start=start, before_fold=before_fold,
            )  # fmt: skip
        except (Diverged, NonFiniteBranch) as fault:
            raise Diverged(f"{fault}; --overwrite starts this run again") from fault
        if not whole:
            save()
            reporter.say(f"Stopped after step {done}; go on with: lorasc-fx train {folder.config} --resume")
            return 130
        if start == schedule.steps:
            reporter.say("This run was at its end already.")
        folder.write_spectrum(cascade)
        folder.write_weights(cascade.folded_state_dict())
        model = set_mode(cascade.release(), False)
        parts = setup.splits.test_sets.items()
        shares = {part: accuracy(predict(model, examples, config.train.device), examples) for part, examples in parts}
        metrics.log(event="result", **shares)
        reporter.say(" ".join(f"{part} {share:.3f}" for part, share in shares.items()))
        reporter.say(f"folded weights: {folder.folded}")
    return 0


def _begin(
    setup: Setup, folder: RunFolder, *, resume: bool, overwrite: bool
) -> tuple[lx.Cascade, torch.optim.Optimizer, int]:
    """Return the cascade, its optimizer, and the number of steps that are done."""
    config = setup.config
    seed, lr, decay = config.train.seed, config.train.lr, config.train.weight_decay
    if not resume or not folder.saved:
        cascade = setup.adapt(seed, config.spec)  # first: what it refuses must not leave a run folder behind
        folder.begin(config, resume=resume, overwrite=overwrite)
        folder.write_cascade(cascade, setup.splits.classes)
        return cascade, make_optimizer(cascade, lr, decay), 0
    folder.begin(config, resume=True)
    model, sample = setup.model(seed), setup.sample(seed)
    mode = model.training
    cascade = lx.load(folder.checkpoint, model, args=sample.args, kwargs=sample.kwargs)
    cascade.train(mode)
    optimizer = make_optimizer(cascade, lr, decay)
    extra = cascade.resume(optimizer)
    return cascade, optimizer, int(extra["step"])
