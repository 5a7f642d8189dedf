"""Saves, copies, other weights, moves and interrupted calls between steps change no bit of a run (`random_runs`)."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from tests.property.random_runs import EVENTS, MODELS, OPTIMIZERS, OPTIONS, Draw, Going, check, draw_case, fault

QUICK, LONG, DRAWS = 8, 60, 150
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=() if seed < QUICK else pytest.mark.slow) for seed in range(LONG)]
)
def test_events_change_nothing(seed: int) -> None:
    check(seed)


def test_most_draws_are_valid_and_all_is_drawn() -> None:
    draws = [draw_case(Draw(seed)) for seed in range(DRAWS)]
    assert sum(refused for _, refused in draws) < DRAWS / 2
    cases = [case for case, _ in draws]
    counts = Counter(name for case in cases for name in (case.model, case.optimizer, *case.options))
    counts.update(event for case in cases for _, event, _ in case.events)
    assert min(counts[name] for name in (*MODELS, *OPTIMIZERS, *OPTIONS, *EVENTS)) > 5


def test_a_change_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(draw_case(Draw(0))[0], events=((3, "export", 0),))
    assert not fault(case)
    monkeypatch.setattr(Going, "export", lambda *_: torch.rand(1))
    assert "torch" in fault(case)
