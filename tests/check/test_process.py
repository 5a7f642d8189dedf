"""Captures in several threads restore the state of the process that they change."""

from __future__ import annotations

import logging
import random
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

import lorasc_fx as lx
from lorasc_fx.check.process_state import ObserverMode, eager, quiet
from lorasc_fx.util.torch_private import higher_order
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


@pytest.mark.parametrize("grad", [True, False])
def test_a_quiet_block_sets_and_restores_the_state_of_the_process(
    grad: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def draws() -> tuple[float, ...]:
        return random.random(), np.random.rand(), float(torch.rand(()))

    states, before = (random.getstate(), np.random.get_state(), torch.get_rng_state()), process_state()
    expected = draws()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    with torch.set_grad_enabled(not grad):
        with quiet(grad):
            draws()
            print("out")
            print("err", file=sys.stderr)
            warnings.warn("suppressed", stacklevel=1)
            logging.getLogger("test").critical("suppressed")
            assert (torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled()) == (grad, False)
        assert torch.is_grad_enabled() is not grad
    assert (process_state(), draws(), tuple(capsys.readouterr())) == (before, expected, ("", ""))


class _Function(ObserverMode, TorchFunctionMode):
    pass


class _Dispatch(ObserverMode, TorchDispatchMode):
    pass


def test_control_flow_ops_compile_outside_of_observer_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo compiles their bodies in its default stance, with the original functions of torch."""
    original = torch.is_grad_enabled

    def state(*args: object) -> tuple[Any, ...]:
        modes = _get_current_function_mode(), _get_current_dispatch_mode()
        return *modes, torch._dynamo.eval_frame._stance.stance, torch.is_grad_enabled, args

    monkeypatch.setattr(higher_order, "_hop_compile_and_call", state)
    with eager(), TorchFunctionMode() as outer, _Function(), _Function(), _Dispatch() as dispatch:
        monkeypatch.setattr(torch, "is_grad_enabled", read := lambda: False)
        inside = state()
        assert higher_order._hop_compile_and_call(1) == (outer, None, "default", original, (1,))
        assert state() == inside
        assert (inside[1], inside[2], inside[3]) == (dispatch, "force_eager", read)
    assert higher_order._hop_compile_and_call is state
