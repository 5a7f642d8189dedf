"""Several threads use one cascade: calls that read or write its weights wait for each other, or raise."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from lorasc_fx.util.undo import PROCESS
from tests.kit.errors import raises
from tests.kit.state import branches_of, lock_of


def moved_cascade(seed: int) -> tuple[lx.Cascade, torch.Tensor, torch.Tensor]:
    """Return a cascade of pace 1 whose branches have moved, its first weight, and the delta of this weight."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(9, 14), nn.Tanh(), nn.Linear(14, 5))
    base = model[0].weight.detach().clone()
    spec = lx.CascadeSpec(rank=2, pace=1.0)
    cascade = lx.adapt(model, args=(torch.randn(2, 9),), spec=spec)
    with torch.no_grad():
        for branch in cascade.branches.values():
            branch.lora_B.normal_()
    branch = branches_of(cascade)["0.weight"]
    return cascade, base, (branch.scale * branch.lora_B @ branch.lora_A).detach()


def together(*calls: Callable[[], object]) -> list[BaseException]:
    """Run the calls at the same time, each in a thread, and return the exceptions that they raise."""
    raised: list[BaseException] = []
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], object]) -> None:
        start.wait()
        try:
            call()
        except lx.LorascError as fault:
            raised.append(fault)

    threads = [threading.Thread(target=run, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "a deadlock"
    return raised


@pytest.mark.parametrize("seed", range(4))
def test_transitions_and_readers(seed: int) -> None:
    """A folded state dict has the weights from before or after the transition, which are equal, and never a mixture."""
    cascade, base, delta = moved_cascade(seed)
    weights: list[torch.Tensor] = []

    def read() -> None:
        weights.append(cascade.folded_state_dict()["0.weight"])

    assert not together(*[lambda: cascade.transition(None)] * 2, read, read)
    assert cascade.stage == 3
    assert len(weights) == 2
    for weight in weights:
        torch.testing.assert_close(weight, base + delta)


def test_a_transition_inside_weights_of_another_thread_is_refused() -> None:
    cascade, base, delta = moved_cascade(0)
    with cascade.weights("base"):
        (refused,) = together(lambda: cascade.transition(None))
        assert isinstance(refused, lx.StateError)
        with raises(lx.StateError, "inside-weights"):
            raise refused
    cascade.transition(None)
    torch.testing.assert_close(cascade.release()[0].weight, base + delta)


@pytest.mark.parametrize("seed", range(4))
def test_a_new_variant_and_a_transition(seed: int) -> None:
    """There is no deadlock, and the graph belongs to the stage that runs afterwards."""
    cascade, base, delta = moved_cascade(seed)
    x = torch.randn(3, 2, 9)
    together(lambda: cascade.eval()(x), lambda: cascade.transition(None), lambda: cascade.folded_graph((x,)))
    assert cascade.stage == 2
    cascade.transition(None)
    torch.testing.assert_close(cascade.release()[0].weight, base + delta)


def test_a_transition_waits_for_a_capture() -> None:
    """A capture replaces parameters by tensors without values, and a check of the weights would read them.

    It waits without the lock of the cascade, which the capture needs to add its graph.
    """
    cascade, base, delta = moved_cascade(0)
    thread = threading.Thread(target=cascade.transition, args=(None,), daemon=True)
    with PROCESS:
        thread.start()
        thread.join(timeout=0.5)
        assert cascade.stage == 1
        assert lock_of(cascade).acquire(timeout=1)
        lock_of(cascade).release()
    thread.join(timeout=60)
    assert cascade.stage == 2
    torch.testing.assert_close(cascade.release()[0].weight, base + delta)
