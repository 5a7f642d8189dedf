"""A training of a small net in each loop that the package supports, all behind one function.

A loop is called with a specification, a folder and, to resume, the number of steps after which the run in that folder
was saved. It returns the losses that it has seen and the cascade.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import CheckpointSaver, NativeScaler
from torch import Tensor, nn
from transformers import Trainer

import lorasc_fx as lx
from tests.integrations.kit import adapted, arguments, rows

SPECS: dict[str, dict[str, Any]] = {
    "noise": {"noise": lx.Noise(0.2), "pace": 0.5, "train": ("*head.bias",)},
    "fast": {"restart": "fast", "optimizer_state": "kept", "restart_factors": "B"},
    "noise, A kept": {"restart_factors": "B", "noise": lx.Noise(0.2)},
    "dora": {"adapter": "dora"},
    "pairs": {"restart_factors": "none", "pace": 1.0},
    "mean": {"pace": "mean", "restart": "fast"},
    "pissa, average": {"start": "pissa", "average": True},
}
STOPS = (4, 5, 6)
"""After how many batches of `Steps`, or steps of another loop, a run is saved: also between two batches of a step."""
END = 14


class Steps:
    """A plain loop. Every second batch makes a step with clipped gradients, and every fourth batch ends a stage."""

    dropout, precision = 0.0, "no"

    def __init__(self, spec: lx.CascadeSpec, stage: int = 4) -> None:
        torch.manual_seed(3)
        self.cascade, self.stage, self.losses = adapted(spec, self.dropout), stage, list[float]()
        self.make()

    def make(self) -> None:
        self.optimizer: Any = torch.optim.AdamW(self.cascade.param_groups(lr=0.05))
        self.schedule: Any = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.1, 8)

    def batch(self, x: Tensor, labels: Tensor, number: int) -> Tensor:
        loss: Tensor = self.cascade(x, labels)["loss"]
        (loss / 2).backward()
        if number % 2:
            nn.utils.clip_grad_norm_(self.cascade.parameters(), 0.1)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
        return loss

    def save(self, folder: Path) -> None:
        parts = {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}
        torch.save({"model": self.cascade.state_dict(), **parts}, folder / "run.pt")

    def load(self, folder: Path) -> None:
        saved = torch.load(folder / "run.pt", weights_only=True)  # noqa: TID251 - as users do
        assert str(self.cascade.load_state_dict(saved["model"])) == "<All keys matched successfully>"
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])

    def go(self, start: int, folder: Path | None = None) -> None:
        self.cascade.train()
        for number in range(start, END):
            if folder and number in STOPS:
                (folder / str(number)).mkdir(parents=True)
                self.save(folder / str(number))
            self.losses.append(self.batch(*data(number), number).item())
            if number % self.stage == self.stage - 1:
                self.cascade.transition(self.optimizer)


def data(number: int) -> tuple[Tensor, Tensor]:
    """A batch of `Steps`."""
    chosen = torch.randint(16, (4,), generator=torch.Generator().manual_seed(number)).tolist()
    x, labels = (torch.stack([rows(16)[index][name] for index in chosen]) for name in ("x", "labels"))
    return x, labels


class Accelerated(Steps):
    dropout = 0.1

    def make(self) -> None:
        super().make()
        self.accelerator = Accelerator(cpu=True, mixed_precision=self.precision, gradient_accumulation_steps=2)
        prepared = self.accelerator.prepare(self.cascade, self.optimizer, self.schedule)
        self.model, self.optimizer, self.schedule = prepared

    def batch(self, x: Tensor, labels: Tensor, number: int) -> Tensor:
        with self.accelerator.accumulate(self.model):
            loss: Tensor = self.model(x, labels)["loss"]
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.model.parameters(), 0.1)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
        return loss

    def save(self, folder: Path) -> None:
        self.accelerator.save_state(str(folder))

    def load(self, folder: Path) -> None:
        self.accelerator.load_state(str(folder))


class AcceleratedHalf(Accelerated):
    precision = "bf16"


class Timm(Steps):
    """The loop of timm's training script, with its groups, scaler, schedule and checkpoints."""

    def make(self) -> None:
        self.optimizer = create_optimizer_v2(self.cascade, "adamw", lr=1e-2, weight_decay=0.05)
        self.schedule = CosineLRScheduler(self.optimizer, t_initial=24, t_in_epochs=False)
        self.scaler = NativeScaler(device="cpu")

    def batch(self, x: Tensor, labels: Tensor, number: int) -> Tensor:
        loss: Tensor = self.cascade(x, labels)["loss"]
        clipping = {"clip_grad": 1.0, "parameters": self.cascade.parameters()}
        self.scaler(loss, self.optimizer, need_update=bool(number % 2), **clipping)
        if number % 2:
            self.optimizer.zero_grad()
            self.schedule.step_update(number + 1)
        return loss

    def save(self, folder: Path) -> None:
        where = {"checkpoint_dir": str(folder), "recovery_dir": str(folder)}
        holder = nn.ModuleDict({"module": self.cascade})  # as DistributedDataParallel; the saver unwraps it
        CheckpointSaver(holder, self.optimizer, amp_scaler=self.scaler, **where).save_checkpoint(3, metric=1.0)

    def load(self, folder: Path) -> None:
        assert resume_checkpoint(self.cascade, str(folder / "last.pth.tar"), self.optimizer, self.scaler) == 4


Done = tuple[list[float], lx.Cascade]
Loop = Callable[[lx.CascadeSpec, Path, int], Done]


def by_steps(kind: type[Steps]) -> Loop:
    def run(spec: lx.CascadeSpec, folder: Path, at: int) -> Done:
        loop = kind(spec)
        if at:
            loop.load(folder / str(at))
        loop.go(at, None if at else folder)
        return loop.losses, loop.cascade

    return run


def by_trainer(how: dict[str, Any], **more: Any) -> Loop:
    """transformers' Trainer, which shuffles its data. `how` are arguments of the callback."""

    def run(spec: lx.CascadeSpec, folder: Path, at: int) -> Done:
        cascade = adapted(spec)
        trainer = Trainer(
            model=cascade, args=arguments(folder, **{"save_strategy": "steps", "save_steps": 1, **more}),
            train_dataset=rows(), eval_dataset=rows(7),
            callbacks=[lx.integrations.transformers.CascadeCallback(cascade, **how)],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{at}") if at else None)
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        return [entry["loss"] for entry in history if entry["step"] > at], cascade

    return run


LOOPS: dict[str, Loop] = {
    "plain": by_steps(Steps),
    "accelerate": by_steps(Accelerated),
    "accelerate, bf16": by_steps(AcceleratedHalf),
    "timm": by_steps(Timm),
    "trainer": by_trainer({"steps": 3}),
    "trainer, bf16": by_trainer({"steps": 3}, bf16=True),
    "trainer, epochs": by_trainer({"epochs": 1}),
    "trainer, accumulated": by_trainer({"steps": 2}, gradient_accumulation_steps=2, num_train_epochs=3),
}
