"""The trainers of the command line: transformers' Trainer for classifiers, and TRL's SFTTrainer for language models."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

import lorasc_fx as lx
from lorasc_fx.cli.classifier import reading
from lorasc_fx.cli.config import Config
from lorasc_fx.cli.task import Task
from lorasc_fx.errors import SpecError, StateError
from lorasc_fx.integrations.transformers import CascadeCallback
from lorasc_fx.util.environment import module_of

_SCHEDULE = {"lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"}
"""Keys of `[train]` that replace the learning rate of `[stages]` by the Trainer's own schedule."""


class StagedTrainer(Trainer):  # type: ignore[misc]
    """Trains a cascade in stages, with the schedule of `[stages]`, or the Trainer's own if `[train]` has one."""

    optimizer: Any
    lr_scheduler: Any

    def __init__(self, *, config: Config, **more: Any) -> None:
        self._config = config
        super().__init__(**more)

    def create_optimizer(self, model: object = None) -> Any:
        """Create the optimizer that `optim` names, with the parameter groups of the cascade."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = self.model.param_groups(lr=self.args.learning_rate)
            self.optimizer = kind([{"weight_decay": self.args.weight_decay, **group} for group in groups], **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the schedule of `[stages]`, or the Trainer's own if `[train]` has one."""
        stages = self._config.stages
        if _SCHEDULE & self._config.train.keys():
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            ends = [round(stage * num_training_steps / stages.count) for stage in range(stages.count + 1)]
            steps = [max(1, end - start) for start, end in pairwise(ends)]
            plain = getattr(self.optimizer, "optimizer", self.optimizer)  # without accelerate's wrapper
            self.lr_scheduler = lx.StageSchedule(plain, self.model, steps, warmup=stages.warmup, floor=stages.floor)
        return self.lr_scheduler


class ClassifierTrainer(StagedTrainer):
    """Computes the cross-entropy and the accuracy of a classifier."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more, compute_metrics=_accuracy)
        self.model_accepts_loss_kwargs = False  # the loss is a mean, which the Trainer divides by the accumulated steps

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
        """Return the loss, or (loss, {"logits": logits}) with `return_outputs`."""
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        loss = F.cross_entropy(logits, inputs["labels"])
        return (loss, {"logits": logits}) if return_outputs else loss


def _accuracy(evaluated: Any) -> dict[str, float]:
    return {"accuracy": float((evaluated.predictions.argmax(-1) == evaluated.label_ids).mean())}


class RunCallback(TrainerCallback):  # type: ignore[misc]
    """Evaluates and saves at the end of each stage, stops after Ctrl-C, and raises if the loss is not finite."""

    def __init__(self, cascade: lx.Cascade, *, saves: bool) -> None:
        self._cascade, self._stage, self._saves = cascade, cascade.stage, saves
        self.stopped = False

    @contextmanager
    def catching(self) -> Iterator[None]:
        """Save and stop at the first Ctrl-C inside the block. A second one raises KeyboardInterrupt."""

        def stop(*_: object) -> None:
            if self.stopped:
                raise KeyboardInterrupt
            self.stopped = True

        previous = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def on_train_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
        """Remember the running stage."""
        self._stage = self._cascade.stage

    def on_step_end(self, args: object, state: object, control: Any, **kwargs: object) -> None:
        """Ask the Trainer to evaluate and save at the end of a stage, and to save and stop after Ctrl-C."""
        if self._cascade.stage != self._stage:  # CascadeCallback runs first, and has ended the stage
            self._stage = self._cascade.stage
            control.should_evaluate |= self._saves
            control.should_save |= self._saves
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: object, state: Any, control: Any, logs: Any = None, **kwargs: object) -> None:
        """Raise if the loss is inf or nan."""
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            raise StateError(
                f"the loss is {logs['loss']} at step {state.global_step}; a lower learning rate or a longer warm-up "
                "may help",
                code="non-finite",
            )


def arguments_of(config: Config, task: Task, **more: object) -> TrainingArguments:
    """Return the Trainer's arguments: defaults for the kind of task, overridden by `[train]`, overridden by `more`.

    Raises:
        SpecError: a key or a value of `[train]` is invalid.
    """
    arguments: Any = TrainingArguments
    defaults: dict[str, Any] = {
        "seed": 0, "logging_steps": 10, "report_to": [], "save_strategy": "no", "save_total_limit": 1,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "logging_nan_inf_filter": False,  # with it, the Trainer would log a finite loss instead of nan
    }  # fmt: skip
    if task.kind == "language":
        arguments = module_of("llm", "trl").SFTConfig
        defaults |= {
            "learning_rate": 2e-4, "num_train_epochs": 3, "per_device_train_batch_size": 8,
            "max_length": task.max_length,
            "activation_checkpointing": config.train.get("gradient_checkpointing", False),
            "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        }  # fmt: skip
    else:
        defaults |= {
            "learning_rate": 1e-3, "num_train_epochs": 4, "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 64, "remove_unused_columns": False, "label_names": ["labels"],
        }  # fmt: skip
    if config.train.get("dataloader_drop_last"):
        raise SpecError("train.dataloader_drop_last would also drop examples from evaluations; remove it")
    with reading("[train]"):
        return arguments(output_dir=config.output, **defaults | config.train | more)


def trainer_of(task: Task, arguments: TrainingArguments, evaluated: Any = None) -> tuple[Any, lx.Cascade, RunCallback]:
    """Return a Trainer, its cascade and its callback.

    By default, the Trainer evaluates the validation examples and saves at the end of each stage. With `evaluated`,
    {name: data set}, it does neither during the training, and `evaluate` takes one of the names.
    """
    config, data = task.config, task.data
    set_seed(arguments.seed)
    model = task.model().to(arguments.device).train()
    batch: dict[str, Any] = {name: value.to(arguments.device) for name, value in task.example().items()}
    batch |= {"use_cache": False} if task.kind == "language" else {}
    cascade = lx.adapt(model, kwargs=batch, spec=config.spec)
    callback = RunCallback(cascade, saves=evaluated is None)
    options: dict[str, Any] = {
        "model": cascade, "args": arguments, "config": config, "processing_class": task.processor,
        "train_dataset": data["train"], "eval_dataset": evaluated or data["validation"],
        "callbacks": [CascadeCallback(cascade, stages=config.stages.count), callback],
    }  # fmt: skip
    if task.kind != "language":
        return ClassifierTrainer(**options, data_collator=task.collate), cascade, callback
    kind: Any = type("LanguageTrainer", (StagedTrainer, module_of("llm", "trl").SFTTrainer), {})
    with reading(config.data.path):
        trainer = kind(**options)
    if not arguments.packing:
        _check_dropped(len(data["train"]) - len(trainer.train_dataset), len(data["train"]), task.max_length)
    return trainer, cascade, callback


def _check_dropped(dropped: int, total: int, max_length: int) -> None:
    """Warn about training examples that TRL has dropped silently. Raise SpecError if it has dropped all of them."""
    message = f"{dropped} of {total} training examples have no completion within {max_length} tokens (data.max_length)"
    if dropped == total:
        raise SpecError(f"{message}; give a larger maximum", code="invalid-data")
    if dropped:
        print(f"lorasc-fx: WARNING: {message}, and are not used", file=sys.stderr)
