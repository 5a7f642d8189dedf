"""Runs drawn at random have the bits of the CPU, whatever happens between their steps, moves to and fro included."""

from __future__ import annotations

import pytest

from tests.accelerator.kit import DEVICE, simulated_only
from tests.property.random_runs import check

QUICK, LONG = 2, 12
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@simulated_only  # other hardware rounds differently
@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=() if seed < QUICK else pytest.mark.slow) for seed in range(LONG)]
)
def test_events_change_nothing(seed: int) -> None:
    check(1000 + seed, device=DEVICE)


@simulated_only
@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=() if seed < QUICK else pytest.mark.slow) for seed in range(LONG)]
)
def test_a_run_of_the_cpu_that_moves_to_the_device(seed: int) -> None:
    check(2000 + seed, elsewhere=DEVICE, wanted=lambda case: any(event == "move" for _, event, _ in case.events))
