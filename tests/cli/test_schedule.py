"""Stages and warm-up."""

from __future__ import annotations

from lorasc_fx.cli.config import TrainConfig
from lorasc_fx.cli.training import Schedule
from lorasc_fx.errors import SpecError
from tests.kit.errors import raises


def test_steps_are_divided_evenly_and_wholly() -> None:
    schedule = Schedule(steps=11, stages=3, warmup=0)
    stages = [schedule.stage(step) for step in range(11)]
    assert stages == [1] * 4 + [2] * 3 + [3] * 4
    assert [step for step in range(11) if schedule.ends_stage(step)] == [3, 6, 10]


def test_the_learning_rate_rises_after_each_restart() -> None:
    schedule = Schedule(steps=8, stages=2, warmup=3)
    assert [schedule.factor(step) for step in range(8)] == [0.25, 0.5, 0.75, 1.0] * 2
    assert Schedule(8, 2, 0).factor(4) == 1


def test_it_falls_over_the_run() -> None:
    schedule = Schedule(steps=8, stages=2, warmup=1, decay=True)
    assert [8 * schedule.factor(step) for step in range(8)] == [4, 7, 6, 5, 2, 3, 2, 1]


def test_steps_come_from_epochs_or_are_given() -> None:
    assert Schedule.of(TrainConfig(epochs=1.5), 10, 2).steps == 15
    assert Schedule.of(TrainConfig(epochs=1.5, steps=7), 10, 2).steps == 7


def test_more_stages_than_steps() -> None:
    with raises(SpecError, "invalid-value", "train.stages", "3", "2"):
        Schedule.of(TrainConfig(steps=2), 10, 3)
