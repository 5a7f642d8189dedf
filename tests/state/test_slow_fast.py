"""Slow and fast weights over several stages, compared with W0, S and F in dense fp64 (algorithm.md, "One site").

The reference is trained too, with a separate optimizer, so a wrong start of a stage changes every later loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from tests.kit import oracle
from tests.kit.models import OPTIMIZERS, batches, by_hand, factors, mlp, optimizer_of, randomize, train

CLOSE = {"rtol": 0, "atol": 1e-10}
STEPS = 4


def wide() -> nn.Module:
    """Return a model with weights [24, 20], [18, 24/2, 2] and [3, 36], larger than a few experts of rank 1."""
    torch.manual_seed(8)
    body = nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.Unflatten(1, (24, 1)))
    tail = nn.Sequential(nn.Conv1d(24, 18, 2, groups=2, padding=1), nn.Flatten(1), nn.Linear(36, 3))
    return nn.Sequential(*body, *tail).double()


MODELS = {"dense": (mlp, (4, 5), 3), "factors": (wide, (4, 20), 1)}
"""Model, input shape, rank. The experts of two stages outgrow each weight of `dense`, but not of `factors`."""


def spec_of(rank: int, **options: Any) -> lx.CascadeSpec:
    return lx.CascadeSpec(rank=rank, lora_alpha=1.5 * rank, **options)


def assert_weights(model: nn.Module, expected: Mapping[str, torch.Tensor], **close: Any) -> None:
    parameters = dict(model.named_parameters())
    for name, value in expected.items():
        torch.testing.assert_close(parameters[name].detach(), value, **(close or CLOSE), msg=f"{name} differs")


def assert_all(cascade: lx.Cascade, reference: oracle.Cascade) -> None:
    """Check slow, fast and base weights, and that the start of the stage is restored bit for bit after each block."""
    before = {name: value.detach().clone() for name, value in cascade.model.named_parameters()}
    for view in ("slow", "fast", "base"):
        exact = {"rtol": 0, "atol": 0} if view == "base" else CLOSE
        with cascade.weights(view) as inside:
            assert inside is cascade
            assert_weights(cascade.model, reference.weights(view), **exact)
        assert_weights(cascade.model, before, rtol=0, atol=0)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("restart", ["slow", "fast"])
@pytest.mark.parametrize(("pace", "optimizer"), [(0.3, "adamw"), (0.75, "sgd"), (1.0, "adamw")])
def test_four_stages_are_the_formulas(model: str, restart: str, pace: float, optimizer: str) -> None:
    build, shape, rank = MODELS[model]
    for _, parameter in build().named_parameters():
        if parameter.dim() > 1:  # what the two names of MODELS say
            rows, columns = parameter.flatten(1).shape
            assert (2 * rank * (rows + columns) > rows * columns) == (model == "dense")
            assert (4 * rank * (rows + columns) > rows * columns) == (model == "dense") or rows == 3
    calls = batches(4 * STEPS, *shape)
    cascade = lx.adapt(build(), (calls[0],), spec=spec_of(rank, pace=pace, restart=restart))
    reference = by_hand(build(), cascade, pace=pace, restart=restart)
    own = optimizer_of(cascade, optimizer)
    for number in range(4):
        part = calls[number * STEPS : number * STEPS + STEPS]
        theirs = OPTIMIZERS[optimizer](reference.parameters())
        assert_weights(cascade.model, {n: w + reference.start[n] for n, w in reference.base.items()})
        torch.testing.assert_close(train(cascade, own, part), train(reference, theirs, part), **CLOSE)
        assert_all(cascade, reference)
        slow = {name: value.clone() for name, value in reference.slow.items()}
        cascade.transition(own)
        reference.end()
        reference.begin(factors(cascade))
        assert_all(cascade, reference)
        assert any((slow[name] - reference.slow[name]).abs().max() > 1e-3 for name in slow)
    assert_weights(cascade.release(), reference.weights("slow"))


@pytest.mark.parametrize("placement", ["beside", "merged", "weight"])
def test_other_weights_between_a_forward_and_its_backward(placement: str) -> None:
    """A preference loss calls a reference model in between. The earlier graph stays valid, with the same gradients."""
    calls = batches(2, 4, 20)
    spec = spec_of(2, placement=placement, noise=lx.Noise(0.2), train=("0.bias",))
    cascade = lx.adapt(wide(), (calls[0],), spec=spec)
    randomize(cascade, 1)
    cascade.transition(None)
    randomize(cascade, 2)
    trainable = [*cascade.branches.parameters(), cascade.model[0].bias]
    expected = torch.autograd.grad(cascade(calls[1]).square().mean(), trainable)
    output = cascade(calls[1])
    with torch.no_grad(), cascade.disable_adapter():
        assert not torch.equal(cascade(calls[1]), output)
    gradients = torch.autograd.grad(output.square().mean(), trainable)
    assert all(map(torch.equal, gradients, expected))


def test_a_graph_of_weights_that_are_not_in_place_any_more() -> None:
    """Its backward raises, because the weights have other values now."""
    (x,) = batches(1, 4, 20)
    cascade = lx.adapt(wide(), (x,), spec=spec_of(2))
    randomize(cascade, 1)
    x.requires_grad_()
    with cascade.weights("fast"):
        first = cascade(x).sum()
    outside = cascade(x).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.backward(retain_graph=True)
    with cascade.weights("base"):
        for loss in (first, outside):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward(retain_graph=True)
    outside.backward()
