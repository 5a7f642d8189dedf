"""The trainers of the command line: transformers' Trainer for classifiers, and TRL's SFTTrainer for language models."""

from __future__ import annotations

import dataclasses
import math
import signal
import sys
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

import lorasc_fx as lx
from lorasc_fx.cli.classifier import reading
from lorasc_fx.cli.config import Config, StagesConfig
from lorasc_fx.cli.task import Task
from lorasc_fx.errors import SpecError, StateError, nearest
from lorasc_fx.integrations.transformers import CascadeCallback
from lorasc_fx.util.decode import decode
from lorasc_fx.util.environment import module_of

_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio")
"""Keys of `[train]` that replace the learning rate of `[stages]` by the Trainer's own schedule."""


class StagedTrainer(Trainer):  # type: ignore[misc]
    """Trains a cascade in `count` stages, with the schedule of `[stages]`, or the Trainer's own if that is None."""

    optimizer: Any
    lr_scheduler: Any

    def __init__(self, *, count: int, stages: StagesConfig | None, **more: Any) -> None:
        self._count, self._stages = count, stages
        super().__init__(**more)

    def create_optimizer(self, model: object = None) -> torch.optim.Optimizer:
        """Create the optimizer of `optim` for the cascade's groups."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = self.model.param_groups(lr=self.args.learning_rate)
            self.optimizer = kind([{"weight_decay": self.args.weight_decay, **group} for group in groups], **options)
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the schedule of `[stages]`, now that the number of optimizer steps is known."""
        stages = self._stages
        if stages is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            ends = [round(stage * num_training_steps / self._count) for stage in range(self._count + 1)]
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = lx.StageSchedule(
                getattr(optimizer, "optimizer", optimizer),  # accelerate has wrapped it
                self.model,
                [max(1, end - start) for start, end in pairwise(ends)],
                warmup=stages.warmup, floor=stages.floor,
            )  # fmt: skip
        return self.lr_scheduler


class ClassifierTrainer(StagedTrainer):
    """Computes the cross-entropy and the accuracy of a classifier."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more, compute_metrics=_accuracy)
        self.model_accepts_loss_kwargs = False  # the loss is a mean, which the Trainer divides by the accumulated steps

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss, and the logits with `return_outputs`."""
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        loss = F.cross_entropy(logits, inputs["labels"])
        return (loss, {"logits": logits}) if return_outputs else loss


def _accuracy(found: Any) -> dict[str, float]:
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


class RunCallback(TrainerCallback):  # type: ignore[misc]
    """Evaluates and saves at the end of each stage, stops after Ctrl-C, and raises if the loss is not finite."""

    def __init__(self, cascade: lx.Cascade, *, evaluates: bool, saves: bool) -> None:
        self._cascade, self._evaluates, self._saves = cascade, evaluates, saves
        self._stage = cascade.stage
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
        """Note the running stage."""
        self._stage = self._cascade.stage

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the Trainer to evaluate, to save and to stop. CascadeCallback has ended the stage before."""
        if self._cascade.stage != self._stage:
            self._stage = self._cascade.stage
            control.should_evaluate |= self._evaluates
            control.should_save |= self._saves
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Raise if the loss is inf or nan."""
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            raise StateError(
                f"the loss is {logs['loss']} at step {state.global_step}; a lower learning rate or a longer warm-up "
                "may help",
                code="non-finite",
            )


def arguments_of(config: Config, task: Task, **more: object) -> TrainingArguments:
    """Return the Trainer's arguments: defaults for the kind of task, then `[train]`, then `more`.

    Raises:
        SpecError: a key or a value of `[train]` is invalid.
    """
    defaults: dict[str, Any] = {
        "learning_rate": 1e-3, "num_train_epochs": 4, "per_device_train_batch_size": 16, "seed": 0,
        "per_device_eval_batch_size": 64, "remove_unused_columns": False, "label_names": ["labels"],
    }  # fmt: skip
    arguments: Any = TrainingArguments
    if task.kind == "language":
        defaults = {
            "learning_rate": 2e-4, "num_train_epochs": 3, "per_device_train_batch_size": 8, "seed": 0,
            "max_length": task.max_length,
            "activation_checkpointing": config.train.get("gradient_checkpointing", False),
            "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        }  # fmt: skip
        arguments = module_of("llm", "trl").SFTConfig
    defaults |= {
        "logging_steps": 10, "report_to": [], "eval_strategy": "no", "save_strategy": "no", "save_total_limit": 1,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "logging_nan_inf_filter": False,  # with it, the Trainer would log a finite loss instead of nan
    }  # fmt: skip
    hints = typing.get_type_hints(arguments)
    fields = {field.name for field in dataclasses.fields(arguments)} - {"output_dir"}
    for name, value in config.train.items():
        if name not in fields:
            hint = "; give output" if name == "output_dir" else nearest(name, fields)
            raise SpecError(f"train.{name} is not a key of {arguments.__name__}{hint}", code="unknown-name")
        if hints[name] in (bool, int, float):
            decode(hints[name], value, ("train", name))
    if config.train.get("dataloader_drop_last"):
        raise SpecError("train.dataloader_drop_last would also drop examples from evaluations; remove it")
    with reading("[train]"):
        return arguments(**defaults | config.train | {"output_dir": config.output} | more)


def trainer_of(task: Task, arguments: TrainingArguments, *, saves: bool = True) -> tuple[Any, lx.Cascade, RunCallback]:
    """Return a Trainer, its cascade, and its callback. With `saves`, the end of a stage evaluates and saves."""
    config, data = task.config, task.data
    set_seed(arguments.seed)
    model = task.model().to(arguments.device).train()
    batch: dict[str, Any] = {name: value.to(arguments.device) for name, value in task.example().items()}
    batch |= {"use_cache": False} if task.kind == "language" else {}
    cascade = lx.adapt(model, kwargs=batch, spec=config.spec)
    evaluates = saves and "eval_strategy" not in config.train
    callback = RunCallback(cascade, evaluates=evaluates, saves=saves and "save_strategy" not in config.train)
    count = config.stages.count
    options: dict[str, Any] = {
        "model": cascade, "args": arguments, "count": count, "processing_class": task.processor,
        "stages": None if any(name in config.train for name in _SCHEDULE) else config.stages,
        "train_dataset": data["train"], "eval_dataset": data["validation"],
        "callbacks": [CascadeCallback(cascade, stages=count), callback],
    }  # fmt: skip
    if task.kind != "language":
        return ClassifierTrainer(**options, data_collator=task.collate), cascade, callback
    with reading(config.data.path):
        trainer = _sft_trainer()(**options)
    if not arguments.packing:
        _check_dropped(len(data["train"]) - len(trainer.train_dataset), len(data["train"]), task.max_length)
    return trainer, cascade, callback


def _check_dropped(dropped: int, total: int, max_length: int) -> None:
    """Warn of training examples that TRL has dropped without a word. Raise SpecError if none is left."""
    told = f"{dropped} of {total} training examples have no completion within {max_length} tokens (data.max_length)"
    if dropped == total:
        raise SpecError(f"{told}; give a larger maximum", code="invalid-data")
    if dropped:
        print(f"lorasc-fx: WARNING: {told}, and are not learned", file=sys.stderr)


def _sft_trainer() -> Any:
    """Return TRL's trainer with the parts that all trainers share."""

    class LanguageTrainer(StagedTrainer, module_of("llm", "trl").SFTTrainer):  # type: ignore[misc]
        """TRL's SFTTrainer: chat template, loss on the completion, no packing unless `[train]` asks for it."""

    return LanguageTrainer
