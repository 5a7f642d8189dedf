"""A run as a list of events. It can be stopped between any two events, saved, and resumed in a new cascade."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lorasc_fx as lx
from tests.errors.models import Net, inputs
from tests.errors.state import of_model, of_optimizer, of_slow, raw
from tests.kit.models import loss_of
from tests.kit.state import variant_count

X = inputs(5, 3, 4, 4)
THREE_STAGES = (*("step",) * 3, "fold", *("step",) * 2, "fold", *("step",) * 2, "fold", "step")


def adamw(cascade: lx.Cascade) -> torch.optim.Optimizer:
    return torch.optim.AdamW(cascade.param_groups(lr=0.02), betas=(0.8, 0.99))


@dataclass
class Run:
    """The functions and settings with which a new process would build everything again."""

    spec: lx.CascadeSpec
    build: Callable[[], nn.Module] = Net
    x: torch.Tensor = field(default_factory=lambda: X)
    optimizer: Callable[[lx.Cascade], torch.optim.Optimizer] = adamw
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None
    frontend: str = "auto"
    keep: int = 1
    waits: bool = False  # loaded without inputs

    def started(self) -> Training:
        torch.manual_seed(7)
        random.seed(7)
        cascade = lx.adapt(self.build(), args=(self.x,), spec=self.spec, frontend=self.frontend)
        optimizer = self.optimizer(cascade)
        return Training(self, cascade, optimizer, self.scheduler(optimizer) if self.scheduler else None)

    def resumed(self, folder: Path) -> Training:
        """Go on from a folder, in a process whose random generators are somewhere else."""
        torch.manual_seed(12345)
        random.seed(54321)
        cascade = lx.load(folder, self.build(), args=() if self.waits else (self.x,))
        assert variant_count(cascade) == (0 if self.waits else 1)
        optimizer = self.optimizer(cascade)
        scheduler = self.scheduler(optimizer) if self.scheduler else None
        torch.rand(3)
        extra = cascade.resume(optimizer, scheduler)
        return Training(self, cascade, optimizer, scheduler, extra["losses"])


@dataclass
class Training:
    """A running training. JSON stores its losses exactly."""

    run: Run
    cascade: lx.Cascade
    optimizer: torch.optim.Optimizer
    scheduler: Any
    losses: list[float] = field(default_factory=list)

    def step(self) -> None:
        self.backward()
        self.update()
        self.zero()

    def backward(self) -> None:
        shift = torch.rand(()) + random.random()  # data that depends on both generators
        loss = loss_of(self.cascade(self.run.x + shift.to(self.run.x.dtype)).float())
        loss.backward()
        self.losses.append(loss.item())

    def update(self) -> None:
        self.optimizer.step()

    def zero(self) -> None:
        self.optimizer.zero_grad()

    def fold(self) -> None:
        self.cascade.transition(self.optimizer)
        if self.scheduler is not None:
            self.scheduler.step()

    def loop(self) -> None:
        for _ in self.cascade.stages(2, self.optimizer, self.scheduler):
            self.step()

    def back(self) -> None:
        self.cascade.rewind(1, self.optimizer)

    def judge(self) -> None:
        """Go on in eval mode, and train the branches of the sites that the first call in this mode adds."""
        known = set(self.cascade.branches)
        self.cascade.eval()(self.run.x)
        for name in set(self.cascade.branches) - known:
            self.optimizer.add_param_group({"params": list(self.cascade.branches[name].parameters())})

    def train(self) -> None:
        self.cascade.train()

    def save(self, folder: Path) -> Path:
        return lx.save(
            self.cascade,
            folder,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            extra={"losses": self.losses},
            keep=self.run.keep,
        )

    def result(self) -> dict[str, Any]:
        """All numbers of the run, bit for bit, without objects."""
        model = of_model(self.cascade)
        values: dict[str, Any] = {
            name: value[1:] for name, value in model.items() if name.startswith(("param", "buffer"))
        }
        values |= of_slow(self.cascade) | of_optimizer(self.optimizer)
        values |= {"losses": self.losses, "torch": raw(torch.get_rng_state()), "python": random.getstate()}
        values["sites"] = self.cascade.sites
        if self.scheduler is not None:
            values["scheduler"] = self.scheduler.state_dict()
        values["folded"] = {name: raw(value) for name, value in self.cascade.folded_state_dict().items()}
        return values


def whole(run: Run, events: Sequence[str]) -> dict[str, Any]:
    training = run.started()
    for event in events:
        getattr(training, event)()
    return training.result()


def interrupted(run: Run, events: Sequence[str], stops: Sequence[int], folder: Path) -> dict[str, Any]:
    """Run the same events, but discard and load everything again before the events at these positions."""
    training = run.started()
    for index, event in enumerate(events):
        if index in stops:
            training.save(folder)
            mode = training.cascade.training
            training = run.resumed(folder)
            training.cascade.train(mode)
        getattr(training, event)()
    return training.result()
