"""Numbers of steps per stage, and the order of the examples."""

from __future__ import annotations

from itertools import islice
from threading import Event

import pytest
import torch
from torch import nn

from lorasc_fx.cli.config import Config, TrainConfig
from lorasc_fx.cli.data import Splits, image_examples
from lorasc_fx.cli.training import Setup, train_steps
from lorasc_fx.errors import SpecError
from tests.kit.errors import raises


def setup(count: int, **train: object) -> Setup:
    pixels = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    examples = image_examples(pixels, list(range(count)), 2)
    return Setup(Config(train=TrainConfig(**train)), Splits(examples, examples, examples, {}))  # type: ignore[arg-type]


@pytest.mark.parametrize(("steps", "stages", "expected"), [(11, 3, [4, 3, 4]), (12, 3, [4, 4, 4]), (2, 1, [2])])
def test_steps_are_divided_evenly(steps: int, stages: int, expected: list[int]) -> None:
    assert setup(40, steps=steps).stage_steps(stages) == expected


def test_steps_come_from_epochs_or_are_given() -> None:
    assert setup(43, epochs=1.5, batch_size=4).stage_steps(1) == [15]
    assert setup(43, epochs=1.5, batch_size=4, steps=7).stage_steps(1) == [7]
    assert setup(3, epochs=2.0, batch_size=4).stage_steps(1) == [2]


def test_more_stages_than_steps() -> None:
    with raises(SpecError, "invalid-value", "train.stages", "3", "2"):
        setup(40, steps=2).stage_steps(3)


def test_every_epoch_has_every_example_once_from_any_step() -> None:
    labels = [batch.labels for batch in islice(setup(64, batch_size=16).batches(5), 8)]
    epochs = [torch.cat(labels[:4]), torch.cat(labels[4:])]
    assert all(epoch.sort().values.tolist() == list(range(64)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    assert next(setup(64, batch_size=16).batches(6)).labels.tolist() != labels[0].tolist()
    assert next(setup(64, batch_size=16).batches(5, 6)).labels.tolist() == labels[6].tolist()


@pytest.mark.parametrize("largest", [0.0, 0.01])
def test_gradients_are_scaled_down_to_a_norm_over_all_parameters(largest: float) -> None:
    """A step of SGD with rate 1 is the clipped gradient: torch's gradient, scaled down to the norm."""
    own = setup(8, steps=1, batch_size=8, warmup=0, floor=1.0, max_grad_norm=largest)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8))
    before = torch.cat([value.detach().flatten() for value in model.parameters()])
    (batch,) = islice(own.batches(0), 1)
    loss = nn.functional.cross_entropy(model(*batch.args), batch.labels)
    gradient = torch.cat([value.flatten() for value in torch.autograd.grad(loss, list(model.parameters()))])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    list(train_steps(model, optimizer, own.schedule(optimizer, None, [1]), own, 0, [1], interrupt=Event()))
    step = before - torch.cat([value.detach().flatten() for value in model.parameters()])
    assert gradient.norm() > 0.1
    wanted = gradient * (largest / gradient.norm()) if largest else gradient
    torch.testing.assert_close(step, wanted, rtol=1e-3, atol=1e-7)


def test_a_negative_norm() -> None:
    with raises(SpecError, "invalid-value", "train.max_grad_norm", "-1"):
        TrainConfig(max_grad_norm=-1.0)
