"""Running statistics for other weights: against torch's update_bn on the plain model with those weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

import lorasc_fx as lx
from tests.errors.state import unchanged
from tests.kit.errors import raises
from tests.kit.models import batches, loss_of, mlp, randomize

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


def plain(cascade: lx.Cascade, which: Any) -> nn.Module:
    """A model of torch's own with these weights, and statistics by update_bn."""
    model = net()
    model(IMAGES[0])
    with cascade.weights(which):
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


@pytest.mark.parametrize("which", ["slow", "fast", "base"])
def test_inside_weights_they_are_update_bns_until_its_end(which: Any) -> None:
    cascade = adapted()
    before, expected = statistics(cascade.model), plain(cascade, which)
    modes = {name: module.training for name, module in cascade.named_modules()}
    momenta = [module.momentum for module in cascade.model.modules() if isinstance(module, nn.BatchNorm2d)]
    with unchanged(cascade):
        with cascade.weights(which):
            cascade.recalibrate(IMAGES[:2])
            cascade.recalibrate(IMAGES)
            assert_equal(cascade.model, expected)
            assert any(not torch.equal(value, before[name]) for name, value in statistics(cascade.model).items())
            torch.testing.assert_close(cascade(IMAGES[0]), expected.eval()(IMAGES[0]), rtol=0, atol=1e-12)
            assert modes == {name: module.training for name, module in cascade.named_modules()}
        for name, value in statistics(cascade.model).items():
            assert torch.equal(value, before[name])
    assert momenta == [module.momentum for module in cascade.model.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize("frontend", ["export", "symbolic"])
def test_elsewhere_the_fast_weights_count_and_they_stay(frontend: str) -> None:
    cascade = adapted(frontend)
    expected = plain(cascade, "fast")
    cascade.recalibrate(IMAGES)
    assert_equal(cascade.model, expected)
    torch.testing.assert_close(cascade(IMAGES[0]), expected.eval()(IMAGES[0]), rtol=0, atol=1e-12)
    with cascade.weights("slow"):
        assert_equal(cascade.model, expected)
    loss_of(cascade(IMAGES[0])).backward()


def test_kinds_of_batches() -> None:
    cascade = adapted()
    expected = plain(cascade, "slow")
    labels = torch.zeros(4)
    kinds: list[tuple[Any, Any]] = [
        ([(image, labels) for image in IMAGES], None),
        ([[image, labels] for image in IMAGES], None),
        ([{"input": image} for image in IMAGES], None),
        ([{"image": image, "label": labels} for image in IMAGES], lambda held, batch: held(batch["image"])),
        (iter(IMAGES), None),
    ]
    for given, call in kinds:
        with cascade.weights("slow"):
            cascade.recalibrate(given, call)
            assert_equal(cascade.model, expected)


def test_what_raises_leaves_the_statistics_as_they_were() -> None:
    cascade = adapted()

    def broken() -> Iterator[torch.Tensor]:
        yield IMAGES[0]
        raise KeyError("the loader")

    with unchanged(cascade), pytest.raises(KeyError, match="the loader"):
        cascade.recalibrate(broken())
    with unchanged(cascade), cascade.weights("slow"), pytest.raises(KeyError, match="the loader"):
        cascade.recalibrate(broken())
    with unchanged(cascade), raises(lx.StateError, "invalid-data"):
        cascade.recalibrate([])
    with unchanged(cascade), cascade.weights("slow"), raises(lx.StateError, "invalid-data"):
        cascade.recalibrate([])
    assert not cascade.model.training


def test_a_model_without_batch_norm() -> None:
    x = batches(1, 4, 5)[0]
    cascade = lx.adapt(mlp(), (x,), spec=lx.CascadeSpec(rank=2))
    with raises(lx.StateError, "not-available"):
        cascade.recalibrate([x])
