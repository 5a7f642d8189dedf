"""Experts from elsewhere in the slow state: all or nothing, under noise, beside experts that are there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from tests.errors.state import unchanged
from tests.kit.errors import raises
from tests.kit.models import batches, mlp, randomize
from tests.kit.seams import SEAMS, seam
from tests.kit.state import Factors, install_experts, weight_states


def pairs(rank: int = 2, seed: int = 0) -> dict[str, Factors]:
    source = torch.Generator().manual_seed(seed)
    found = {}
    for name, value in mlp().named_parameters():
        if value.dim() > 1:
            rows, columns = value.shape
            b, a = (torch.randn(shape, generator=source).double() for shape in ((rows, rank), (rank, columns)))
            found[name] = Factors(b, a)
    return found


def cascade_of(model: nn.Module, **spec: Any) -> lx.Cascade:
    return lx.adapt(model, (batches(1, 4, 5)[0],), spec=lx.CascadeSpec(rank=2, **spec))


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("begun", [False, True])
def test_slow_weights_are_the_sum(noise: float, begun: bool) -> None:
    one, two = pairs(1, seed=1), pairs(1, seed=2)
    cascade = cascade_of(mlp(), noise=lx.Noise(noise))
    if begun:
        randomize(cascade)
        cascade.transition(None)
    before = cascade.folded_state_dict()
    start = {name: value.detach().clone() for name, value in cascade.model.named_parameters()}
    install_experts(cascade, {name: [(0.5, one[name]), (2.0, two[name])] for name in one})
    after = cascade.folded_state_dict()
    for name in one:
        change = 0.5 * one[name].b @ one[name].a + 2 * two[name].b @ two[name].a
        torch.testing.assert_close(after[name], before[name] + change, rtol=0, atol=1e-12)
        assert (start[name] - cascade.model.get_parameter(name)).abs().max() > 0.1
    if not noise:
        for name, value in cascade.model.named_parameters():
            torch.testing.assert_close(value.detach(), after[name], rtol=0, atol=0)
    cascade.transition(None)  # the weights are as the cascade left them
    for name, value in cascade.folded_state_dict().items():
        torch.testing.assert_close(value, after[name], rtol=0, atol=1e-12)


def test_values_trained_in_full_and_buffers() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    cascade = cascade_of(model, train=("1",))
    new = {"1.weight": torch.arange(4.0).double()}
    install_experts(cascade, {}, new, {"1.running_mean": torch.ones(4)})
    assert torch.equal(cascade.model[1].weight.detach(), new["1.weight"])
    assert torch.equal(cascade.model[1].running_mean, torch.ones(4).double())
    folded = cascade.folded_state_dict()
    assert torch.equal(folded["1.weight"], new["1.weight"])
    with cascade.weights("base"):
        assert torch.equal(cascade.model[1].weight.detach(), torch.ones(4).double())


def test_many_experts_collapse() -> None:
    cascade, given = cascade_of(mlp()), pairs(4)
    before = cascade.folded_state_dict()
    install_experts(cascade, {name: [(1.0, pair)] for name, pair in given.items()})
    assert all(state.is_dense for state in weight_states(cascade).values())
    for name, pair in given.items():
        torch.testing.assert_close(
            cascade.folded_state_dict()[name], before[name] + pair.b @ pair.a, rtol=0, atol=1e-12
        )


@pytest.mark.parametrize(
    ("experts", "trained", "sentence"),
    [
        ({"5.weight": []}, {}, ("sites-differ", "5.weight")),
        ({}, {"0.weight": torch.zeros(7, 5)}, ("sites-differ", "0.weight")),
        ({}, {"4.bias": torch.zeros(3)}, ("sites-differ", "4.bias", "[2]", "[3]")),
        (
            {"0.weight": [(1.0, Factors(torch.zeros(7, 2), torch.zeros(3, 5)))]},
            {},
            ("sites-differ", "0.weight", "[7", "5]"),
        ),
        ({"0.weight": [(1.0, Factors(torch.zeros(7), torch.zeros(5)))]}, {}, ("sites-differ", "0.weight", "[7", "5]")),
    ],
)
def test_what_does_not_fit(experts: Any, trained: Any, sentence: tuple[str, ...]) -> None:
    cascade = cascade_of(mlp(), train=("4.bias",))
    with unchanged(cascade), raises(lx.StateError, *sentence):
        install_experts(cascade, experts, trained)


def test_a_write_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cascade, plain, failed = cascade_of(mlp(), train=("4.bias",)), seam("rest a weight"), []

    def fails(slow: Any, name: str, *rest: Any) -> None:
        if name == "4.weight" and not failed:
            failed.append(name)
            raise RuntimeError("no more")
        plain(slow, name, *rest)

    monkeypatch.setattr(*SEAMS["rest a weight"], fails)
    with unchanged(cascade), pytest.raises(RuntimeError, match="no more"):
        install_experts(cascade, {name: [(1.0, pair)] for name, pair in pairs().items()}, {"4.bias": torch.zeros(2)})
    cascade.transition(None)
