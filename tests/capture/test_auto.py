"""`auto` prefers the graph-break fallback to a symbolic graph in which a module with weights is one node."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lorasc_fx as lx
from tests.kit.errors import raises
from tests.kit.models import assert_merged, batches, build, randomize

SPEC = lx.CascadeSpec(rank=2, lora_alpha=3.0)
X = batches(1, 2, 4, 5)[0]
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def by_sign(x: torch.Tensor) -> torch.Tensor:
    """Branches on values, which export and dynamo refuse. For torch.fx it is one node."""
    return x if x.sum() > 0 else -x


def by_clock(x: torch.Tensor) -> torch.Tensor:
    """Returns another result in each call."""
    return by_sign(x) * (1.0 + os.urandom(1)[0] / 256 + os.urandom(1)[0])


torch.fx.wrap("by_sign")
torch.fx.wrap("by_clock")


class Plain(nn.Module):
    """A symbolic trace sees all weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 6), nn.Linear(4, 3)
        self.mid = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(by_sign(self.mid(torch.tanh(self.body(x)))))


class Recurrent(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.mid = nn.LSTM(6, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(by_sign(self.mid(torch.tanh(self.body(x)))[0]))


class Alone(nn.Module):
    """A symbolic graph has no site."""

    def __init__(self) -> None:
        super().__init__()
        self.mid = nn.LSTM(5, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return by_sign(self.mid(x)[0])


class Mixed(Plain):
    """The weight of a leaf module is also standardized by another module."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.mid(torch.tanh(self.body(x)))
        return self.head(by_sign(hidden) + F.linear(hidden.sin() @ self.mid.weight, self.mid.weight.tanh()))


class Clock(Recurrent):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(by_clock(self.mid(torch.tanh(self.body(x)))[0]))


@pytest.mark.parametrize(
    ("kind", "hidden", "reason"),
    [
        (Recurrent, ("mid.weight_ih_l0", "mid.weight_hh_l0"), lx.plan.Reason.OPAQUE),
        (Alone, ("mid.weight_ih_l0", "mid.weight_hh_l0"), lx.plan.Reason.OPAQUE),
        (Mixed, ("mid.weight",), lx.plan.Reason.MIXED_USES),
    ],
)
def test_graph_breaks_before_a_graph_that_hides_weights(
    kind: type[nn.Module], hidden: tuple[str, ...], reason: lx.plan.Reason
) -> None:
    if kind is Alone:
        with raises(lx.passes.NoSites, "no-sites", reason.value):
            lx.adapt(build(kind), (X,), spec=SPEC, frontend="symbolic")
    else:
        named = lx.adapt(build(kind), (X,), spec=SPEC, frontend="symbolic")
        assert named.frontend == "symbolic"  # if it is selected by name, it is used all the same
        assert {refusal.weight: refusal.reason for refusal in named.refusals} == dict.fromkeys(hidden, reason)

    model = build(kind)
    cascade = lx.adapt(model, (X,), spec=SPEC)
    assert cascade.frontend == "graph-breaks"
    assert [name for name, _ in cascade.refused_frontends] == ["export", "dynamo", "symbolic"]
    message = cascade.refused_frontends[-1][1]
    assert any(weight in message for weight in hidden)
    assert reason.value in message
    assert "\n" not in message
    assert {site.weight for site in cascade.sites} == {
        name for name, value in model.named_parameters() if value.dim() > 1
    }
    assert cascade.refusals == ()
    randomize(cascade)
    assert_merged(cascade, build(kind), X)


def test_a_graph_that_hides_nothing_is_taken() -> None:
    cascade = lx.adapt(build(Plain), (X,), spec=SPEC)
    assert cascade.frontend == "symbolic"
    assert len(cascade.sites) == 3


def test_weights_that_the_spec_refuses_do_not_count_as_hidden() -> None:
    spec = lx.CascadeSpec(rank=2, exclude=("mid",))
    cascade = lx.adapt(build(Recurrent), (X,), spec=spec)
    assert cascade.frontend == "symbolic"
    assert {site.weight for site in cascade.sites} == {"body.weight", "head.weight"}


def test_the_symbolic_graph_is_kept_if_the_fallback_fails() -> None:
    with raises(lx.CaptureError, "not-captured", "Clock"):
        lx.adapt(build(Clock), (X,), spec=SPEC, frontend="graph-breaks")
    cascade = lx.adapt(build(Clock), (X,), spec=SPEC)
    assert cascade.frontend == "symbolic"
    assert {site.weight for site in cascade.sites} == {"body.weight", "head.weight"}
