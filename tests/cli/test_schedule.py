"""Steps of stages, and the order of the examples."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from lorasc_fx.cli.config import Config, TrainConfig
from lorasc_fx.cli.data import Splits, image_examples
from lorasc_fx.cli.training import Setup
from lorasc_fx.errors import SpecError
from tests.kit.errors import raises


def setup(count: int, **train: object) -> Setup:
    pixels = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    examples = image_examples(pixels, list(range(count)), 2)
    return Setup(Config(train=TrainConfig(**train)), Splits(examples, examples, examples, {}))  # type: ignore[arg-type]


@pytest.mark.parametrize(("steps", "stages", "expected"), [(11, 3, [4, 3, 4]), (12, 3, [4, 4, 4]), (2, 1, [2])])
def test_steps_are_divided_evenly_and_wholly(steps: int, stages: int, expected: list[int]) -> None:
    assert setup(40, steps=steps).stage_steps(stages) == expected


def test_steps_come_from_epochs_or_are_given() -> None:
    assert setup(43, epochs=1.5, batch_size=4).stage_steps(1) == [15]
    assert setup(43, epochs=1.5, batch_size=4, steps=7).stage_steps(1) == [7]
    assert setup(3, epochs=2.0, batch_size=4).stage_steps(1) == [2]


def test_more_stages_than_steps() -> None:
    with raises(SpecError, "invalid-value", "train.stages", "3", "2"):
        setup(40, steps=2).stage_steps(3)


def test_every_epoch_sees_every_example_once_and_goes_on_anywhere() -> None:
    labels = [batch.labels for batch in islice(setup(64, batch_size=16).batches(5), 8)]
    epochs = [torch.cat(labels[:4]), torch.cat(labels[4:])]
    assert all(epoch.sort().values.tolist() == list(range(64)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    assert next(setup(64, batch_size=16).batches(6)).labels.tolist() != labels[0].tolist()
    assert next(setup(64, batch_size=16).batches(5, 6)).labels.tolist() == labels[6].tolist()
