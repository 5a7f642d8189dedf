"""`lorasc-fx train`: trains a cascade from a configuration file and writes a run folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro

import lorasc_fx as lx
from lorasc_fx.cli.config import Config
from lorasc_fx.cli.models import set_mode
from lorasc_fx.cli.progress import Metrics, reporting
from lorasc_fx.cli.run_folder import RunFolder, read_lines, write_weights
from lorasc_fx.cli.training import (
    Diverged,
    Setup,
    accuracy,
    describe,
    make_optimizer,
    note_short_stages,
    on_ctrl_c,
    predict,
    train_steps,
)
from lorasc_fx.errors import NonFiniteBranch


@dataclass(frozen=True)
class TrainArguments:
    """Adapt a model with the settings in CONFIG.toml, and write a run folder. Options override keys of the file."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    resume: bool = False
    """Continue the run in the output folder."""
    overwrite: bool = False
    """Delete the run in the output folder and start a new one."""


def run_train(arguments: TrainArguments) -> int:
    """Train or resume, and return the exit code. After Ctrl-C, it saves a checkpoint and returns 130."""
    config, resume, overwrite = arguments.config, arguments.resume, arguments.overwrite
    folder = RunFolder(Path(config.output))
    folder.check(config, resume=resume, overwrite=overwrite)
    setup = Setup.of(config)
    describe(setup)
    steps = setup.stage_steps(config.train.stages)
    cascade, optimizer, schedule, start = _begin(setup, folder, steps, resume=resume, overwrite=overwrite)
    _describe_cascade(cascade)
    note_short_stages(setup, rates="train.lr")
    done, total = start, sum(steps)
    with reporting() as reporter, closing(Metrics(folder.path)) as metrics, on_ctrl_c() as interrupt:

        def save() -> None:
            lx.save(cascade, folder.checkpoint, optimizer=optimizer, scheduler=schedule, extra={"step": done})

        def validate(view: Literal["slow", "fast"], suffix: str, **at: int) -> float:
            mode, examples = cascade.training, setup.splits.validation
            cascade.eval()
            with cascade.weights(view) as model:
                logits = predict(model, examples, config.train.device)
            cascade.train(mode)
            share, loss = accuracy(logits, examples), F.cross_entropy(logits, examples.labels).item()
            metrics.log(**at, **{f"validation{suffix}": share, f"validation_loss{suffix}": loss})
            return share

        baseline = validate("slow", "_before", step=0) if start == 0 else _validation_before(folder)
        if baseline is not None:
            majority = setup.splits.validation.labels.bincount().max().item() / len(setup.splits.validation)
            reporter.say(f"validation before training {baseline:.3f} (always the most frequent class: {majority:.3f})")
        reporter.begin("train", total, start)
        try:
            for step in train_steps(
                cascade, optimizer, schedule, setup, config.train.seed, steps, interrupt=interrupt, start=start
            ):
                done = step.done
                if step.folded:
                    share = validate("slow", "", step=done, stage=step.stage)
                    reporter.say(f"stage {step.stage}/{len(steps)} ends at step {done}: validation {share:.3f}")
                    save()
                    continue
                reporter.step(done, f"stage {step.stage}/{len(steps)}", step.loss)
                if done % config.train.log_every == 0 or step.ends_stage:
                    metrics.log(step=done, stage=step.stage, loss=step.loss, lr=step.lr, seconds=step.seconds)
                if step.ends_stage:
                    validate("fast", "_fast", step=done, stage=step.stage)
                    folder.write_experts(cascade, step.stage)
                elif config.train.checkpoint_every and done % config.train.checkpoint_every == 0:
                    save()
        except (Diverged, NonFiniteBranch) as fault:
            raise Diverged(f"{fault}; --overwrite deletes this run and starts a new one") from fault
        # The training has ended or was stopped. A complete run is folded and evaluated.
        if done < total:
            save()
            reporter.say(f"Stopped after step {done}; continue with: lorasc-fx train {folder.config} --resume")
            return 130
        if start == total:
            reporter.say("This run has already ended.")
        write_weights(folder.folded, cascade.folded_state_dict())
        model = set_mode(cascade.release(), False)
        parts = setup.splits.test_sets.items()
        shares = {part: accuracy(predict(model, examples, config.train.device), examples) for part, examples in parts}
        metrics.log(event="result", **shares)
        reporter.say(" ".join(f"{part} {share:.3f}" for part, share in shares.items()))
        reporter.say(f"folded weights: {folder.folded}")
    return 0


def _describe_cascade(cascade: lx.Cascade) -> None:
    """Print how many weights are adapted, and how many parameters are trained."""
    trained = cascade._run.trained_entries
    total = sum(parameter.numel() for parameter in cascade.model.parameters())
    reasons = Counter(refusal.reason.value for refusal in cascade.refusals)
    refused = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    print(
        f"weights adapted: {len(cascade.sites)}{f' (not adapted: {refused})' if refused else ''}; "
        f"{trained:,} parameters trained, {trained / total:.2%} of the model's {total:,}",
        flush=True,
    )


def _validation_before(folder: RunFolder) -> float | None:
    """Return the accuracy before training from the metrics of a resumed run, if they have it."""
    return next((line["validation_before"] for line in read_lines(folder.metrics) if "validation_before" in line), None)


def _begin(
    setup: Setup, folder: RunFolder, steps: Sequence[int], *, resume: bool, overwrite: bool
) -> tuple[lx.Cascade, torch.optim.Optimizer, lx.StageSchedule, int]:
    """Start or resume the run. Return the cascade, its optimizer and schedule, and the number of steps already done."""
    config = setup.config
    seed, lr, decay = config.train.seed, config.train.lr, config.train.weight_decay
    resumed = resume and folder.saved
    if resumed:
        call = setup.call(seed)
        mode = call["model"].training
        cascade = lx.load(folder.checkpoint, **call)
        cascade.train(mode)
    else:
        cascade = lx.adapt(**setup.call(seed), spec=config.spec)
    folder.begin(config, overwrite=overwrite)  # last, so that nothing is written if anything fails
    optimizer = make_optimizer(cascade, lr, decay)
    schedule = setup.schedule(optimizer, cascade, steps)
    if resumed:
        return cascade, optimizer, schedule, int(cascade.resume(optimizer, schedule)["step"])
    folder.write_cascade(cascade, setup.splits.classes)
    if setup.tokenizer is not None:
        setup.tokenizer.save_pretrained(folder.tokenizer)
    return cascade, optimizer, schedule, 0
