"""Calls in other modes, with other arguments and of other sizes are those of the eager model, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import lorasc_fx as lx

SPEC = lx.CascadeSpec(rank=2)


class Classifier(nn.Module):
    """Batch norm, dropout as module and function, attention with dropout, and a loss if there are labels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.drop, self.head = (
            *(nn.Linear(6, 8), nn.BatchNorm1d(8)),
            *(nn.Dropout(0.3), nn.Linear(8, 3)),
        )

    def forward(self, x: Tensor, labels: Tensor | None = None, scale: float | None = None, **unused: Any) -> Any:
        y = self.drop(self.norm(self.layer(x)))
        y = F.scaled_dot_product_attention(y[None], y[None], y[None], dropout_p=0.2 if self.training else 0.0)[0]
        logits = self.head(F.dropout(y, 0.1, self.training) + y) * (scale or 1.0)
        return logits if labels is None else (F.cross_entropy(logits, labels), logits)


class Branches(nn.Module):
    """Python code computes something else in train and eval mode, depending on `how`."""

    def __init__(self, how: Callable[[bool, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(6, 6), how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.training, self.layer(x))


def assert_same(cascade: lx.Cascade, eager: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Assert the same outputs, buffers and random numbers as in the eager model, bit for bit."""
    torch.manual_seed(3)
    computed, after = cascade(*args, **kwargs), torch.rand(2)
    torch.manual_seed(3)
    expected, stream = eager(*args, **kwargs), torch.rand(2)
    for one, other in zip(pytree.tree_leaves(computed), pytree.tree_leaves(expected), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(after, stream)
    for one, other in zip(cascade.model.buffers(), eager.buffers(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("training", [True, False])
def test_modes_unused_arguments_and_labels(training: bool) -> None:
    model = Classifier().train(training)
    eager, x, labels = copy.deepcopy(model), torch.randn(5, 6), torch.tensor([0, 2, 1, 1, 0])
    cascade = lx.adapt(model, (x, labels), spec=SPEC)
    for mode in (not training, training, True, False):
        cascade.train(mode)
        eager.train(mode)
        for kwargs in (
            {"labels": labels},
            {},
            {"scale": 1.0},
            {"return_dict": True},
            {"labels": labels, "flag": False},
        ):
            if kwargs != {"scale": 1.0}:
                assert_same(cascade, eager, x, **kwargs)
        with torch.no_grad():
            assert_same(cascade, eager, x)
    assert_same(cascade, eager, x, scale=2.0)


def test_gradients_of_another_mode() -> None:
    model = Classifier().eval()
    eager, x, labels = copy.deepcopy(model), torch.randn(5, 6), torch.tensor([0, 2, 1, 1, 0])
    cascade = lx.adapt(model, (x, labels), spec=lx.CascadeSpec(rank=2, train=("head.bias", "norm.*")))
    for module in (cascade.train(), eager.train()):
        torch.manual_seed(5)
        module(x, labels)[0].backward()
    for name in ("head.bias", "norm.weight"):
        torch.testing.assert_close(cascade.model.get_parameter(name).grad, eager.get_parameter(name).grad)


HOWS: dict[str, Callable[[bool, Tensor], Tensor]] = {
    "an op": lambda training, y: y.relu() if training else y.tanh(),
    "one more op": lambda training, y: y.relu() if training else y,
    "a number": lambda training, y: y * (2.0 if training else 3.0),
    "the input of dropout": lambda training, y: F.dropout(y, 0.5, training) * 0 + y if training else y + y * 0,
    "dropout of another rate": lambda training, y: F.dropout(y, 0.5 if training else 0.1, True),
    "noise": lambda training, y: y + torch.randn_like(y) if training else y,
    "a write": lambda training, y: y.mul_(2) if training else y,
    "no gradient": lambda training, y: y.detach() if training else y,
}


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("training", [True, False])
def test_a_model_that_branches_on_its_mode(how: str, training: bool) -> None:
    model = Branches(HOWS[how]).train(training)
    eager, x = copy.deepcopy(model), torch.randn(5, 6)
    cascade = lx.adapt(model, (x,), spec=SPEC)
    for mode in (not training, training):
        cascade.train(mode)
        eager.train(mode)
        assert_same(cascade, eager, x)
        assert cascade(x).requires_grad == eager(x).requires_grad


def test_a_mode_and_a_size_together() -> None:
    """The graph of one mode has no guard for a size that only the other mode reads."""
    model = Branches(lambda training, y: y if training or len(y) < 8 else y.tanh()).train()
    eager = copy.deepcopy(model)
    cascade = lx.adapt(model, (torch.randn(5, 6),), spec=SPEC)
    for mode, size in ((True, 7), (True, 9), (False, 5), (False, 7), (False, 9), (False, 12), (False, 6), (True, 12)):
        cascade.train(mode)
        eager.train(mode)
        assert_same(cascade, eager, torch.randn(size, 6))
