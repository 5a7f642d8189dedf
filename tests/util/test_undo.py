"""Transactions: what is undone if a block raises or is interrupted by Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from lorasc_fx.util.undo import AllOrNothing, Block, commit, isolated
from tests.errors.inject import python_answers, sigint


def test_all_steps_run_in_reverse_order() -> None:
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


def test_isolated_changes_are_restored_at_any_ctrl_c() -> None:
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


def test_an_outer_block_rolls_back_a_finished_inner_block() -> None:
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


def test_other_threads_do_not_defer_signals() -> None:
    handlers: list[Any] = []

    def work() -> None:
        with commit():
            handlers.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [before]
