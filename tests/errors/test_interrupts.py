"""Ctrl-C at any line of ours, and a file call that fails: afterwards all is as it was.

`test_all_or_nothing` has the operations of torch.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lorasc_fx as lx
from lorasc_fx.capture import capture
from lorasc_fx.util.undo import AllOrNothing, Block, commit, isolated
from tests.errors.inject import EVERY, FailAt, FileCallAt, LineAt, failing, in_turn, python_answers, sigint
from tests.errors.models import Late, inputs, mlp, step
from tests.errors.state import assert_same, numbers, of, unchanged
from tests.errors.test_all_or_nothing import SPECS, X, made, prepared, result
from tests.kit.errors import raises
from tests.kit.state import end_idle, variant_for

Call = tuple[Callable[[], Any], tuple[Any, ...]]
"""What is called, and what it may not change unless it goes through."""

SMALL = inputs(2, 5)
SPEC = lx.CascadeSpec(targets=("0", "2"), train=("3.*",), rank=2, pace=0.5, noise=lx.Noise(0.1))


def trained(spec: lx.CascadeSpec = SPEC) -> tuple[lx.Cascade, torch.optim.Optimizer]:
    """A cascade of the mlp in its second stage, with its optimizer."""
    cascade = lx.adapt(mlp(), args=(SMALL,), spec=spec, frontend="symbolic")
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.02))
    step(cascade, optimizer)
    cascade.transition(optimizer)
    return cascade, optimizer


def transition(_: Path) -> Call:
    cascade, optimizer = trained()
    step(cascade, optimizer)
    return lambda: cascade.transition(optimizer), (cascade, optimizer)


def stage_of_a_loop(_: Path) -> Call:
    """What the first stage of a loop does before it is handed out."""
    cascade, optimizer = trained()
    list(cascade.stages(1, optimizer))
    return lambda: end_idle(cascade), (cascade, optimizer)


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


def late_site(_: Path) -> Call:
    """A call that brings a new graph with a new site, whose weight then gets noise."""
    cascade = lx.adapt(Late().eval(), args=(SMALL,), spec=lx.CascadeSpec(rank=2, noise=lx.Noise(0.1)))
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.02))
    step(cascade, optimizer, SMALL)
    cascade.train()
    return lambda: variant_for(cascade, (SMALL,), {}), (cascade, optimizer)


def rewind(_: Path) -> Call:
    cascade, optimizer = trained()
    step(cascade, optimizer)
    return lambda: cascade.rewind(0, optimizer), (cascade, optimizer)


def half(_: Path) -> Call:
    """Biases and what is trained in full are rounded for good."""
    cascade, optimizer = trained()
    step(cascade, optimizer)
    cascade(SMALL).sum().backward()
    return cascade.half, (cascade,)


class Normed(nn.Module):
    """A batch norm, dropout, and a branch in Python for `graph-breaks`."""

    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.norm, self.second = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.drop, self.breaks, self.seen = nn.Dropout(0.5), breaks, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(torch.tanh(self.norm(self.first(x))))
        if self.breaks:
            self.seen += 1
            torch._dynamo.graph_break()
        return self.second(x)


def capture_by(name: str) -> Callable[[Path], Call]:
    def captured(_: Path) -> Call:
        model = Normed(breaks=name == "graph-breaks")
        return lambda: capture(model, (inputs(4, 5),), {}, name), (model,)

    captured.__name__ = f"capture_{name}"
    return captured


def weights(_: Path) -> Call:
    cascade, optimizer = trained()
    step(cascade, optimizer)

    def call() -> None:
        with cascade.weights("base"):
            pass

    return call, (cascade, optimizer)


def weights_and_statistics(_: Path) -> Call:
    model = Normed()
    model.drop.p = 0.0  # what is drawn is drawn in the loop, and is not given back
    cascade = lx.adapt(model, args=(SMALL,), spec=lx.CascadeSpec(rank=2), frontend="symbolic")
    step(cascade, torch.optim.SGD(cascade.param_groups(lr=0.02)))

    def call() -> None:
        with cascade.weights("slow"):
            cascade.recalibrate([inputs(4, 5)])

    return call, (cascade,)


CHANGE = (
    transition,
    stage_of_a_loop,
    rewind,
    release,
    half,
    adapt,
    adapt_untied,
    load,
    late_site,
)
NEUTRAL = (weights, weights_and_statistics, *map(capture_by, ("export", "symbolic", "graph-breaks")))
"""Calls that leave everything as it was, also where they go through."""
CALLS: dict[str, Callable[[Path], Call]] = {each.__name__: each for each in (*CHANGE, *NEUTRAL)}
LONG = {"load", "late_site", "adapt", "adapt_untied", "capture_export", "capture_graph-breaks"}
"""Calls that take long: fewer lines are tried."""


def at_lines(name: str, times: Sequence[int], folder: Path, most: int | None) -> None:
    """Let a call be interrupted at each line, or at so many of them, each time at so many lines in a row; then it goes
    through, and does what it does on a twin that nothing has disturbed.
    """
    struck = 0
    twin, twins = CALLS[name](folder / "twin")
    with LineAt(EVERY, sigint) as counter:
        twin()
    call, things = CALLS[name](folder / "run")
    before, every = of(*things), max(1, counter.count // most) if most is not None else 1
    for at in range(1 + zlib.crc32(name.encode()) % every, counter.count + 1, every):
        with python_answers():
            try:
                with LineAt(at, sigint, times=times[struck % len(times)]):
                    call()
            except KeyboardInterrupt:
                struck += 1
            else:  # what the first call has found out, later ones know
                break
        assert_same(of(*things), before)
    else:
        call()
    assert struck >= min(most or 20, 20) // 2
    assert_same(numbers(*things), numbers(*twins))


@pytest.mark.filterwarnings("ignore::lorasc_fx.errors.LorascWarning")
@pytest.mark.parametrize("name", CALLS)
def test_a_signal_at_some_lines(name: str, tmp_path: Path) -> None:
    """Evenly over the call, once, and by an impatient user again at the next 29 lines."""
    at_lines(name, (1, 30), tmp_path, 3 if name in LONG else 6)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::lorasc_fx.errors.LorascWarning")
@pytest.mark.parametrize("name", CALLS)
def test_a_signal_at_many_lines(name: str, tmp_path: Path) -> None:
    """Every line of `weights`; of the others as many as time allows."""
    at_lines(name, (1,), tmp_path, 10 if name in LONG else None if name == "weights" else 40)


def test_no_memory_at_some_lines(tmp_path: Path) -> None:
    call, things = transition(tmp_path)
    faults = (MemoryError,)
    assert in_turn(lambda at: LineAt(at, failing(MemoryError("no more"))), call, things, faults, 97) > 5


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
        mode = FileCallAt(at, failing(fault))
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
        with unchanged(cascade, optimizer), raises(lx.CheckpointError, "base-differs", "second.weight"):
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
        with python_answers():
            held = cascade.weights("fast")
            held.__enter__()
            mode = FailAt(at, sigint if at % 2 else failing(MemoryError()))
            try:
                with mode:
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


# ---- the blocks themselves


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
    assert raised.value.__notes__ == ["and the rollback raised ValueError: two"]


def test_a_commit_defers_ctrl_c_and_is_rolled_back() -> None:
    done: list[str] = []

    def block() -> None:
        with AllOrNothing(), commit() as undo:
            undo(lambda: done.append("back"))
            with commit():
                sigint()
            done.append("written")

    with python_answers(), pytest.raises(KeyboardInterrupt):
        block()
    assert done == ["written", "back"]


def test_a_handler_that_does_not_raise_is_called_as_often_as_its_signal_came() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        with commit() as undo:
            undo(lambda: heard.append(-1))
            sigint()
            sigint()
            assert not heard
        assert heard == [signal.SIGINT, signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("fault", [KeyboardInterrupt, ZeroDivisionError])
def test_ctrl_c_during_a_rollback_waits_for_its_end(fault: type[BaseException]) -> None:
    done: list[int] = []

    def block() -> None:
        with AllOrNothing() as undo:
            for number in range(3):
                undo(partial(done.append, number))
                undo(sigint)
            raise fault

    with python_answers(), pytest.raises(KeyboardInterrupt):
        block()
    assert done == [2, 1, 0]


def test_what_is_isolated_is_restored_at_any_ctrl_c() -> None:
    state: list[str] = []

    @isolated
    def changed(undo: Block, where: str) -> None:
        undo(state.clear)
        state.append("changed")
        if where == "entered":
            sigint()
        undo(sigint if where == "left" else int)

    def block(where: str) -> None:
        with changed(where):
            assert state
            if where == "inside":
                sigint()

    for where in ("entered", "inside", "left"):
        with python_answers(), pytest.raises(KeyboardInterrupt):
            block(where)
        assert not state


def test_an_inner_block_that_is_whole_is_taken_back_by_the_outer_one() -> None:
    done: list[str] = []

    def block() -> None:
        with AllOrNothing() as outer:
            with commit() as inner:
                outer(lambda: done.append("outer"))
                inner(lambda: done.append("inner"))
            sigint()

    with python_answers(), pytest.raises(KeyboardInterrupt):
        block()
    assert done == ["outer"]


def test_other_threads_are_left_alone() -> None:
    handlers: list[Any] = []

    def work() -> None:
        with commit():
            handlers.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [before]
