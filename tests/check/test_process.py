"""Captures restore the state of the process that they change, with several threads and in forked processes."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from lorasc_fx.check.process_state import eager, quiet
from tests.cascade.test_threads import together


def process_state() -> tuple[Any, ...]:
    """Return the state of the process that a capture, or a call of a model without a graph, changes."""
    loggers = [logging.getLogger(name).level for name in ("torch._dynamo", "torch._dynamo.variables.tensor")]
    fast, stance = torch.backends.mha.get_fastpath_enabled(), torch._dynamo.eval_frame._stance.stance
    return sys.stdout, sys.stderr, logging.root.manager.disable, list(warnings.filters), fast, stance, loggers


class Meets(nn.Module):
    """A model without a graph. If armed, its next forward signals that it runs, and waits for another thread."""

    def __init__(self, inside: threading.Event, other: threading.Event) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        object.__setattr__(self, "events", (inside, other))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.layer(x)
        meet(self)
        return self.layer(hidden)


ARMED: set[Meets] = set()


def meet(model: Meets) -> None:
    if model in ARMED:
        ARMED.discard(model)
        inside, other = model.events
        inside.set()
        other.wait(0.5)


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        return self.second(hidden)


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


def test_branches_are_used_under_every_stance_of_torch_compile() -> None:
    """A capture in another thread forces eager code in the process. This model would then run without branches."""
    model, x = Broken(), torch.randn(2, 3)
    cascade = eagerly(model)
    for branch in cascade.branches.values():
        nn.init.ones_(branch.lora_B)
    expected = cascade(x)
    with cascade.weights("base"):
        assert not torch.allclose(expected, model(x))
    for stance in ("force_eager", "eager_on_recompile"):
        with torch.compiler.set_stance(stance):
            assert torch.equal(cascade(x), expected)
            assert torch._dynamo.eval_frame._stance.stance == stance
    capturing, outputs = threading.Event(), list[torch.Tensor]()

    def capture() -> None:
        with quiet(), eager():
            capturing.set()
            time.sleep(0.2)

    def call() -> None:
        assert capturing.wait(10)
        outputs.append(cascade(x))

    assert not together(capture, call)
    assert torch.equal(outputs[0], expected)


# Python 3.12 warns about forks with several threads.
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def in_a_fork(call: Callable[[], object]) -> int:
    """Run a call in a forked process, and return the exit status: 0, or the signal of the alarm if it hangs."""
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10)
        try:
            call()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


@forks
@pytest.mark.parametrize("line", range(1, 46, 11))
def test_ctrl_c_inside_a_capture_does_not_abort_the_process(line: int) -> None:
    """SIGINT in a function that torch calls from C++ is a KeyboardInterrupt, and the model is unchanged."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh())
    state, left = {name: (value, value.clone()) for name, value in model.named_parameters()}, [line]

    def trace(frame: Any, event: str, arg: Any) -> Any:
        inside = "lorasc_fx" in frame.f_code.co_filename and frame.f_code.co_name.startswith("__torch_")
        if not inside:
            return None
        left[0] -= event == "line"
        if left[0] == 0:
            sys.settrace(None)
            signal.raise_signal(signal.SIGINT)
        return trace

    def child() -> None:
        signal.alarm(120)  # a trace function makes the capture slow
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.settrace(trace)
        with pytest.raises(KeyboardInterrupt):
            lx.adapt(model, (torch.randn(4, 6),), spec=lx.CascadeSpec(rank=1))
        sys.settrace(None)
        for name, value in model.named_parameters():
            assert value is state[name][0]
            assert torch.equal(value, state[name][1])

    assert in_a_fork(child) == 0
