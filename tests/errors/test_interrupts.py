"""Ctrl-C, a fault in any line of ours, and a file call that fails: each in turn, everywhere, and all is as it was.

`test_all_or_nothing` has the operations of torch; here are SIGINT as Python delivers it, an impatient second one, every
line that runs between the operations, and every call on a file.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lorasc_fx as lx
from lorasc_fx.runtime.transition import unpark
from lorasc_fx.undo import AllOrNothing
from tests.errors.inject import FailAt, FileCallAt, LineAt, in_turn, python_answers, raises, sigint
from tests.errors.models import inputs, mlp, step
from tests.errors.state import assert_same, of, unchanged
from tests.errors.test_all_or_nothing import SPECS, X, made, prepared, result

RUNTIME = ("lorasc_fx/runtime", "lorasc_fx/adapt", "lorasc_fx/branch")
Call = tuple[Callable[[], Any], tuple[Any, ...]]
"""What is called, and what it may not change unless it goes through."""

SMALL = inputs(2, 5)
SPEC = lx.CascadeSpec(targets=("0", "2"), train=("3.*",), rank=2, pace=0.5, noise=lx.Noise(0.1), restart_A="gradient")


def trained(spec: lx.CascadeSpec = SPEC) -> tuple[lx.Cascade, torch.optim.Optimizer]:
    """A cascade of the mlp in its second stage, with the optimizer that waits for the gradient of the first step."""
    cascade = lx.adapt(mlp(), args=(SMALL,), spec=spec, frontend="symbolic")
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.02))
    step(cascade, optimizer)
    cascade.transition(optimizer)
    return cascade, optimizer


def transition(_: Path) -> Call:
    cascade, optimizer = trained()
    step(cascade, optimizer)
    return lambda: cascade.transition(optimizer), (cascade, optimizer)


def transition_that_waits(_: Path) -> Call:
    """The gradient start is armed, and has seen a gradient, when the next transition comes."""
    cascade, optimizer = trained()
    output = cascade(inputs(4, 5, seed=3))
    output.sum().backward()
    for parameter in cascade.core.trainable().values():
        parameter.grad = None
    assert cascade.core.turning.armed
    assert cascade.core.turning.gathered
    return lambda: cascade.transition(optimizer), (cascade, optimizer)


def stage_of_a_loop(_: Path) -> Call:
    """What the first stage of a loop does before it is handed out."""
    cascade, optimizer = trained()
    list(cascade.stages(1, optimizer))
    return lambda: unpark(cascade.core), (cascade, optimizer)


def release(_: Path) -> Call:
    cascade, optimizer = trained()
    step(cascade, optimizer)
    return cascade.release, (cascade, optimizer)


def adapt(_: Path) -> Call:
    model = prepared()
    return lambda: lx.adapt(model, args=(X,), spec=SPECS["noise, train"], frontend="symbolic"), (model,)


class Tied(nn.Module):
    """A head that is the table as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.table, self.head = nn.Embedding(9, 5), nn.Linear(5, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.table(ids)))


def adapt_untied(_: Path) -> Call:
    model, ids = Tied(), torch.tensor([[1, 2, 3]])
    spec = lx.CascadeSpec(rank=2, untie=("head.weight",), noise=lx.Noise(0.1))
    return lambda: lx.adapt(model, args=(ids,), spec=spec, frontend="symbolic"), (model,)


def load(folder: Path) -> Call:
    saved, optimizer = made(SPECS["noise, train"])
    lx.save(saved, folder, optimizer=optimizer)
    model = prepared()
    return lambda: lx.load(folder, model, args=(X,)), (model,)


class Late(nn.Module):
    """`second` is used in train mode only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        return self.second(x) if self.training else x


def late_site(_: Path) -> Call:
    """A call that brings a new graph with a new site, whose weight then gets noise."""
    cascade = lx.adapt(Late().eval(), args=(SMALL,), spec=lx.CascadeSpec(rank=2, noise=lx.Noise(0.1)))
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.02))
    step(cascade, optimizer, SMALL)
    cascade.train()
    return lambda: cascade.variant((SMALL,), {}), (cascade, optimizer)


CALLS: dict[str, Callable[[Path], Call]] = {
    each.__name__: each
    for each in (
        transition,
        transition_that_waits,
        stage_of_a_loop,
        release,
        adapt,
        adapt_untied,
        load,
        late_site,
    )
}
OFTEN = {"transition": 3, "adapt": 11, "adapt_untied": 7, "load": 17, "late_site": 11}
"""A prime number of operations from one try to the next, where a try is slow."""


@pytest.mark.parametrize("impatient", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_ctrl_c_at_each_operation(name: str, impatient: bool, tmp_path: Path) -> None:
    """Also where it is pressed again and again, while what was written is being put back."""
    call, things = CALLS[name](tmp_path)
    often = OFTEN.get(name, 1) * (3 if impatient else 1)
    faults = (
        (KeyboardInterrupt, ValueError) if name == "load" else (KeyboardInterrupt,)
    )  # safetensors says so of its own
    failures = in_turn(lambda at: FailAt(at, sigint, again=impatient), call, things, faults, often)
    assert failures >= 3


LINES = {"transition": 31, "transition_that_waits": 47, "stage_of_a_loop": 19, "release": 37}
SLOW_LINES = {"adapt": 53, "adapt_untied": 37, "load": 71, "late_site": 37}


@pytest.mark.parametrize("kind", ["memory", "ctrl-c"])
@pytest.mark.parametrize("name", LINES)
def test_a_fault_between_the_operations(name: str, kind: str, tmp_path: Path) -> None:
    """At every n-th line; every line is the slow test's."""
    assert at_lines(name, kind, tmp_path, LINES[name]) > 10


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["memory", "ctrl-c"])
@pytest.mark.parametrize("name", CALLS)
def test_a_fault_in_every_line(name: str, kind: str, tmp_path: Path) -> None:
    assert at_lines(name, kind, tmp_path, 1 if name in LINES else SLOW_LINES[name] // 10) > 50


def at_lines(name: str, kind: str, folder: Path, often: int) -> int:
    call, things = CALLS[name](folder)
    act = sigint if kind == "ctrl-c" else raises(MemoryError("no more"))
    told = (lx.CheckpointError,) if name == "load" else ()  # a file for which there is no memory is named
    return in_turn(lambda at: LineAt(at, act, RUNTIME), call, things, (MemoryError, KeyboardInterrupt, *told), often)


@pytest.mark.parametrize("fault", [OSError(5, "Input/output error"), KeyboardInterrupt()], ids=["disk", "interrupt"])
@pytest.mark.parametrize("name", ["load", "load_by_file", "adapt_by_file"])
def test_a_file_call_that_fails(name: str, fault: BaseException, tmp_path: Path) -> None:
    """Each in turn, whatever it then raises."""
    folder, base = tmp_path / "run", tmp_path / "base.safetensors"
    save_file({name: value.detach() for name, value in prepared().named_parameters()}, base)
    saved, optimizer = made(SPECS["noise, train"])
    lx.save(saved, folder, optimizer=optimizer)
    model, names = prepared(), set[str]()

    def call() -> Any:
        if name == "adapt_by_file":
            return lx.adapt(model, args=(X,), spec=SPECS["noise, train"], frontend="symbolic", base=base)
        return lx.load(folder, model, args=(X,), base=base if name == "load_by_file" else "memory")

    def place(at: int) -> FileCallAt:
        mode = FileCallAt(at, raises(fault))
        mode.names = names
        return mode

    failures = in_turn(place, call, (model,), (lx.CheckpointError, OSError, KeyboardInterrupt))
    assert failures >= 3
    assert names & {"safe_open", "load_file", "open"}


def test_a_late_site_that_the_base_file_lacks(tmp_path: Path) -> None:
    """The call is refused as often as it is made, and changes nothing; the first mode goes on."""
    tensors = {name: value for name, value in Late().state_dict().items() if name.startswith("first")}
    save_file(tensors, tmp_path / "first.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "first.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    spec = lx.CascadeSpec(rank=2, noise=lx.Noise(0.1))
    cascade = lx.adapt(Late().eval(), (SMALL,), spec=spec, base=tmp_path)
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.02))
    step(cascade, optimizer, SMALL)
    cascade.train()
    for _ in range(2):
        with unchanged(cascade, optimizer), pytest.raises(lx.CheckpointError, match=r"holds no second\.weight"):
            cascade(SMALL)
    assert [site.weight for site in cascade.sites] == ["first.weight"]
    cascade.eval()
    step(cascade, optimizer, SMALL)
    cascade.transition(optimizer)
    assert torch.equal(cascade.release().second.weight, Late().second.weight)


def test_a_scheduler_that_raises_takes_the_transition_back() -> None:
    cascade, optimizer = trained()

    class Broken:
        def step(self) -> None:
            raise ZeroDivisionError

    stages = cascade.stages(2, optimizer, Broken())
    next(stages)
    step(cascade, optimizer)
    with unchanged(cascade, optimizer), pytest.raises(ZeroDivisionError):
        next(stages)
    cascade.transition(optimizer)
    assert cascade.stage == 3


def test_leaving_weights_is_done_even_where_it_fails() -> None:
    """An error on the way out is raised, and the weights are those of the stage all the same."""
    cascade, optimizer = trained()
    before = of(cascade, optimizer)
    for at in range(1, 10_000):
        held = cascade.weights("fast")
        held.__enter__()
        with python_answers(), FailAt(at, sigint if at % 2 else raises(MemoryError())) as mode:
            try:
                held.__exit__(None, None, None)
            except (KeyboardInterrupt, MemoryError):
                pass
            else:
                assert mode.count < at
                break
        assert_same(of(cascade, optimizer), before)
    assert at > 10


def test_a_model_that_has_grown_since_is_released() -> None:
    cascade, _ = trained()
    cascade.model.add_module("new", nn.Linear(2, 2))
    assert cascade.release().new.weight.requires_grad


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # one that hits a weakref's callback
def test_ctrl_c_at_any_moment() -> None:
    """From another thread, whenever: the transition is whole, or it is none; and its twin shows which."""
    cascade, optimizer = trained()
    twin, others = trained()
    step(cascade, optimizer)
    step(twin, others)
    twin.transition(others)
    before, after = result(cascade, optimizer), result(twin, others)
    everything, source, struck = of(cascade, optimizer), random.Random(1), 0
    assert before != after
    for _ in range(400):
        timer = threading.Timer(source.uniform(0, 0.02), os.kill, (os.getpid(), signal.SIGINT))
        with python_answers():
            try:
                timer.start()
                try:
                    cascade.transition(optimizer)
                finally:
                    timer.join()
            except KeyboardInterrupt:
                struck += 1
        if result(cascade, optimizer) == before:
            assert_same(of(cascade, optimizer), everything)
            continue
        assert_same(result(cascade, optimizer), after)
        cascade, optimizer = trained()
        step(cascade, optimizer)
        everything = of(cascade, optimizer)
    assert struck > 50


# ---- the block itself


def test_steps_run_backwards_and_none_is_left_out() -> None:
    done: list[int] = []

    def step_of(number: int) -> Callable[[], None]:
        def undo() -> None:
            done.append(number)
            if number == 2:
                raise ValueError("two")

        return undo

    def block() -> None:
        with AllOrNothing() as undo:
            for number in (1, 2, 3):
                undo(step_of(number))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as raised:
        block()
    assert done == [3, 2, 1]
    assert raised.value.__notes__ == ["and what was written could not be put back: ValueError: two"]


def test_a_handler_of_ones_own_is_asked_and_may_go_on() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        with AllOrNothing() as undo:
            undo(lambda: heard.append(-1))
            sigint()
            sigint()
        assert heard == [signal.SIGINT, signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_inner_block_that_is_whole_is_taken_back_by_the_outer_one() -> None:
    done: list[str] = []

    def block() -> None:
        with AllOrNothing() as outer:
            with AllOrNothing() as inner:
                outer(lambda: done.append("outer"))
                inner(lambda: done.append("inner"))
            sigint()

    with python_answers(), pytest.raises(KeyboardInterrupt):
        block()
    assert done == ["outer"]


def test_other_threads_are_left_alone() -> None:
    found: list[Any] = []

    def work() -> None:
        with AllOrNothing():
            found.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]
