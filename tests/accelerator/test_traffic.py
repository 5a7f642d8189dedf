"""What crosses the bus between host and device, in bytes and copies: counted by the simulated device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import lorasc_fx as lx
from tests.accelerator.kit import DEVICE, Side, counted, simulated_only
from tests.kit.state import weight_states

NOISE, EACH_STEP = {"noise": lx.Noise(0.1)}, {"noise": lx.Noise(0.1, redraw="step")}


def entered(name: str) -> Callable[[Side], None]:
    def inside(side: Side) -> None:
        with side.cascade.weights(name):
            pass

    return inside


ACTIONS: dict[str, Callable[[Side], object]] = {
    "transition": lambda side: side.cascade.transition(side.optimizer),
    "slow weights": entered("slow"),
    "fast weights": entered("fast"),
    "step": lambda side: side.step(),
}


def traffic(spec: dict[str, Any], base: str, action: str, dtype: torch.dtype) -> tuple[dict[str, int], int, int, int]:
    """What an action of the third stage copies; the bytes of W0, those of the factors, and the number of sites."""
    side = Side("llama", DEVICE, lx.CascadeSpec(rank=2, **spec), dtype, adapted=False)
    side.adopt(lx.adapt(*side.inputs, spec=side.spec, base=base))
    side.transition()
    side.transition()
    side.step()
    weights = [state.base.nbytes for state in weight_states(side.cascade).values()]
    factors = sum(factor.nbytes for branch in side.cascade.branches.values() for factor in branch.parameters())
    with counted() as counts:
        ACTIONS[action](side)
    return dict(counts), sum(weights), factors, len(weights)


SMALL = 64
"""Bytes a site: seeds of blocks, sizes of the noise, sums of factors."""


@simulated_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", [{}, NOISE], ids=["plain", "noise"])
@pytest.mark.parametrize("action", ["transition", "slow weights", "fast weights"])
def test_weights_travel_once_in_their_own_dtype(action: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """W0 to the device, twice where other weights come and go again; noise is made on the device."""
    found, weights, factors, sites = traffic(options, "memory", action, dtype)
    ways = 1 if action == "transition" else 2
    stages = 4  # the factors of two stages that ended, of the running one, and of the next
    assert found["to_device_bytes"] <= ways * (weights + stages * factors + SMALL * sites), found
    assert found["to_device"] <= ways * sites * (2 + 2 * stages), found
    assert found.get("to_host_bytes", 0) <= 2 * factors + SMALL * sites, found


@simulated_only
@pytest.mark.parametrize("options", [{}, NOISE, EACH_STEP], ids=["plain", "noise", "noise each step"])
@pytest.mark.parametrize("action", ACTIONS)
def test_with_the_base_on_the_device_nothing_travels(action: str, options: dict[str, Any]) -> None:
    found, _, factors, sites = traffic(options, "device", action, torch.bfloat16)
    new = factors if action == "transition" else 0  # the host draws the next ones, and compares the old ones
    assert found.get("to_device_bytes", 0) <= new + SMALL * sites, found
    assert found.get("to_host_bytes", 0) <= new + SMALL * sites, found


@simulated_only
def test_where_the_base_is_changes_no_bit() -> None:
    shown = []
    for base in ("memory", "device"):
        side = Side("llama", DEVICE, lx.CascadeSpec(rank=2, **NOISE), torch.bfloat16, adapted=False)
        side.adopt(lx.adapt(*side.inputs, spec=side.spec, base=base))
        side.transition()
        side.step()
        assert {state.base.device.type for state in weight_states(side.cascade).values()} == {
            "cpu" if base == "memory" else DEVICE
        }
        with side.cascade.weights("fast"):
            side.show("fast", dict(side.cascade.model.state_dict()))
        side.transition()
        side.show("state", dict(side.cascade.model.state_dict()))
        side.show("released", side.cascade.release().state_dict())
        shown.append(side.shown)
    for (label, one), (_, other) in zip(*shown, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items()), label
