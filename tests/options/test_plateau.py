"""Stages that end early, by the rule of torch's ReduceLROnPlateau: its first reduction is the end of a stage."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

import lorasc_fx as lx
from tests.kit.errors import raises
from tests.kit.models import batches, mlp, train


def theirs(metrics: list[float], patience: int, threshold: float, mode: str, threshold_mode: str) -> list[int]:
    """Return the ends of stages, by a new scheduler of torch for each stage."""
    ends: list[int] = []
    scheduler = None
    for index, metric in enumerate(metrics):
        if scheduler is None:
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
            scheduler = ReduceLROnPlateau(
                optimizer,
                mode,
                0.5,
                patience,
                threshold,
                threshold_mode,  # type: ignore[arg-type]
            )
        scheduler.step(metric)
        if optimizer.param_groups[0]["lr"] < 1:
            ends.append(index)
            scheduler = None
    return ends


@pytest.mark.parametrize("threshold_mode", ["rel", "abs"])
@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize(("patience", "threshold"), [(0, 0.0), (2, 1e-4), (1, 0.2), (4, 0.05)])
def test_stages_end_where_torch_reduces(patience: int, threshold: float, mode: str, threshold_mode: str) -> None:
    source = random.Random(patience)
    metrics = [math.exp(-index / 20) + source.uniform(-0.1, 0.1) for index in range(120)]
    metrics[30] = math.nan
    plateau = lx.schedules.Plateau(patience, threshold, mode, threshold_mode)  # type: ignore[arg-type]
    found = [index for index, metric in enumerate(metrics) if plateau.over(torch.tensor(metric, dtype=torch.float64))]
    assert found == theirs(metrics, patience, threshold, mode, threshold_mode)
    assert len(found) > 3


def test_in_a_loop_over_stages_and_resumed() -> None:
    cascade = lx.adapt(mlp(), (batches(1, 4, 5)[0],), spec=lx.CascadeSpec(rank=2))
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=1e-2))
    plateau, lengths = lx.schedules.Plateau(patience=1), []
    metrics = iter([3.0, 2.0, 2.0, 2.5, 9.0, 8.0, 7.0, 7.0, 7.0, 1.0, 1.0, 1.0])
    for _ in cascade.stages(3, optimizer):
        length = 0
        while True:
            length += 1
            train(cascade, optimizer, batches(1, 4, 5))
            state = json.loads(json.dumps(plateau.state_dict()))
            plateau = lx.schedules.Plateau(patience=1)
            plateau.load_state_dict(state)
            if plateau.over(next(metrics)):
                break
        lengths.append(length)
    assert lengths == [4, 5, 3]
    assert cascade.stage == 4


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"patience": -1}, ("invalid-value", "patience", "-1")),
        ({"patience": True}, ("invalid-value", "patience", "True")),
        ({"threshold": -0.1}, ("invalid-value", "threshold", "-0.1")),
        ({"threshold": math.nan}, ("invalid-value", "threshold")),
        ({"mode": "low"}, ("invalid-value", "mode", "low")),
        ({"threshold_mode": "relative"}, ("invalid-value", "threshold_mode", "relative")),
    ],
)
def test_what_it_refuses(options: dict[str, object], sentence: tuple[str, ...]) -> None:
    with raises(lx.SpecError, *sentence):
        lx.schedules.Plateau(**options)  # type: ignore[arg-type]
