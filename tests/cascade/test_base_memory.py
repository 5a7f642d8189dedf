"""W0 in the memory of the weights: it is copied just before their first write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import lorasc_fx as lx
from tests.errors.models import inputs, mlp, step
from tests.kit.seams import SEAMS, seam
from tests.kit.state import weight_states

X = inputs(2, 5)
SITES = ("0.weight", "2.weight", "3.weight")


def raises_midway(cascade: lx.Cascade) -> None:
    """Run out of memory in a transition, after one weight was written."""
    real, count = seam("redraw"), iter(range(99))

    def failing(*args: Any, **options: Any) -> None:
        if next(count) == 1:
            raise MemoryError("no more")
        real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*SEAMS["redraw"], failing)
        with pytest.raises(MemoryError, match=r"^no more$"):
            cascade.transition(None)


def inside(cascade: lx.Cascade) -> None:
    """Place other weights temporarily."""
    with cascade.weights("fast"):
        assert not torch.equal(cascade.model[0].weight, mlp()[0].weight)


def in_new_memory(cascade: lx.Cascade) -> None:
    """Move the weights, like `to(device)` or another library."""
    for parameter in cascade.model.parameters():
        parameter.data = parameter.data.clone()


WRITES: dict[str, Callable[[lx.Cascade], object]] = {
    "transition": lambda cascade: cascade.transition(None),
    "a transition that fails": raises_midway,
    "weights": inside,
    "memory": in_new_memory,
    "cast": lambda cascade: cascade.to(torch.float64),
}


@pytest.mark.parametrize("write", WRITES)
def test_w0_is_the_weights_own_memory_until_something_is_written(write: str) -> None:
    """It is copied at that moment and not earlier, with unchanged values."""
    original = dict(mlp().named_parameters())
    spec = lx.CascadeSpec(rank=2, lora_alpha=3.0, pace=0.5)
    cascade = lx.adapt(mlp(), (X,), spec=spec)
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.05))
    step(cascade, optimizer)
    parameters = dict(cascade.model.named_parameters())
    for name, state in weight_states(cascade).items():
        assert state.base.data_ptr() == parameters[name].data_ptr(), name
    WRITES[write](cascade)
    base = {name: state.base for name, state in weight_states(cascade).items()}
    assert base.keys() == set(SITES)
    if write == "a transition that fails":  # which has written one, and was about to write another
        assert sum(base[name].data_ptr() != parameters[name].data_ptr() for name in SITES) == 2
    else:
        assert all(base[name].data_ptr() != parameters[name].data_ptr() for name in SITES)
    cascade.transition(None)
    assert all(torch.equal(base[name], original[name]) for name in SITES)
    with cascade.weights("base"):
        assert all(torch.equal(parameters[name], original[name]) for name in SITES)
