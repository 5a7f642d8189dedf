"""Captures in several threads restore the state of the process that they change."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import lorasc_fx as lx
from tests.cascade.test_threads import together


def process_state() -> tuple[Any, ...]:
    """Return the state of the process that a capture, or a call of a model without a graph, changes."""
    loggers = [logging.getLogger(name).level for name in ("torch._dynamo", "torch._dynamo.variables.tensor")]
    fast, stance = torch.backends.mha.get_fastpath_enabled(), torch._dynamo.eval_frame._stance.stance
    return sys.stdout, sys.stderr, logging.root.manager.disable, list(warnings.filters), fast, stance, loggers


class Meets(nn.Module):
    """A model without a graph. If armed, its next forward signals that it runs, and waits for another thread."""

    def __init__(self, inside: threading.Event, awaited: threading.Event) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        object.__setattr__(self, "events", (inside, awaited))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.layer(x)
        meet(self)
        return self.layer(hidden)


ARMED: set[Meets] = set()


def meet(model: Meets) -> None:
    if model in ARMED:
        ARMED.discard(model)
        inside, awaited = model.events
        inside.set()
        awaited.wait(0.5)


def eagerly(model: nn.Module) -> lx.Cascade:
    return lx.adapt(model, (torch.randn(2, 3),), spec=lx.CascadeSpec(rank=1), frontend="eager")


def test_two_threads_restore_the_state_of_the_process() -> None:
    """The second thread starts while the first one is inside."""
    entered, both, ended = (threading.Event() for _ in range(3))
    models = [Meets(entered, both), Meets(both, ended)]
    runs: list[Callable[[], object]] = [lambda: eagerly(models[0]), lambda: eagerly(models[1])]
    before = process_state()
    ARMED.update(models)

    def first() -> None:
        runs[0]()
        ended.set()

    def second() -> None:
        assert entered.wait(30)
        runs[1]()

    assert not together(first, second)
    assert both.is_set()
    assert process_state() == before
