"""Running statistics for other weights, compared with torch's update_bn on a plain model with these weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

import lorasc_fx as lx
from tests.errors.state import unchanged
from tests.kit.models import batches, randomize

IMAGES = batches(5, 4, 3, 6, 5)


def net() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6, momentum=0.3), nn.SiLU(), nn.Conv2d(6, 4, (1, 2)),
        nn.BatchNorm2d(4, momentum=None), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.LazyLinear(2),
    ).double()  # fmt: skip


def adapted(frontend: str = "export") -> lx.Cascade:
    """A cascade whose slow, fast and base weights differ."""
    model = net().eval()
    model(IMAGES[0])
    cascade = lx.adapt(model, (IMAGES[0],), spec=lx.CascadeSpec(rank=2, pace=0.5), frontend=frontend)
    for seed in range(2):
        randomize(cascade, seed)
        if seed == 0:
            cascade.transition(None)
    return cascade


def plain(cascade: lx.Cascade, view: Any) -> nn.Module:
    """Return a plain model with these weights, and statistics by update_bn."""
    model = net()
    model(IMAGES[0])
    with cascade.weights(view):
        model.load_state_dict(cascade.model.state_dict())
    update_bn(IMAGES, model)
    return model


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_equal(model: nn.Module, expected: nn.Module) -> None:
    found = statistics(model)
    assert found.keys() == statistics(expected).keys()
    for name, value in statistics(expected).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("view", ["slow", "fast", "base"])
def test_update_bn_inside_weights_counts_until_its_end(view: Any) -> None:
    cascade = adapted()
    before, expected = statistics(cascade.model), plain(cascade, view)
    with unchanged(cascade):
        with cascade.weights(view):
            update_bn(IMAGES[:2], cascade)
            update_bn(IMAGES, cascade)
            assert_equal(cascade.model, expected)
            assert any(not torch.equal(value, before[name]) for name, value in statistics(cascade.model).items())
            torch.testing.assert_close(cascade(IMAGES[0]), expected.eval()(IMAGES[0]), rtol=0, atol=1e-12)
        for name, value in statistics(cascade.model).items():
            assert torch.equal(value, before[name])


@pytest.mark.parametrize("frontend", ["export", "symbolic"])
def test_update_bn_of_the_released_model(frontend: str) -> None:
    cascade = adapted(frontend)
    model = cascade.release()
    expected = net()
    expected(IMAGES[0])
    expected.load_state_dict(model.state_dict())
    update_bn(IMAGES, expected)
    update_bn(IMAGES, model)
    assert_equal(model, expected)
