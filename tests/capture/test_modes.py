"""Calls in other modes, with other arguments and of other sizes agree with the eager model bit for bit."""

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
        self.layer, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(8, 3)

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


def adapted(model: nn.Module, *args: Any) -> tuple[lx.Cascade, nn.Module]:
    """Return a cascade, and a copy of the model as it was before."""
    eager = copy.deepcopy(model)
    return lx.adapt(model, args, spec=SPEC), eager


def assert_same(cascade: lx.Cascade, eager: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Assert the same outputs, buffers and random numbers as in the eager model in this mode, bit for bit."""
    torch.manual_seed(3)
    computed = [cascade(*args, **kwargs), torch.rand(2), *cascade.model.buffers()]
    torch.manual_seed(3)
    expected = [eager.train(cascade.training)(*args, **kwargs), torch.rand(2), *eager.buffers()]
    leaves, others = pytree.tree_leaves(computed), pytree.tree_leaves(expected)
    assert all(map(torch.equal, leaves, others))
    assert [leaf.requires_grad for leaf in leaves] == [leaf.requires_grad for leaf in others]


@pytest.mark.parametrize("training", [True, False])
def test_modes_unused_arguments_and_labels(training: bool) -> None:
    x, labels = torch.randn(5, 6), torch.tensor([0, 2, 1, 1, 0])
    cascade, eager = adapted(Classifier().train(training), x, labels)
    for mode in (not training, training, True, False):
        cascade.train(mode)
        for kwargs in ({"labels": labels}, {}, {"return_dict": True}, {"labels": labels, "flag": False}):
            assert_same(cascade, eager, x, **kwargs)
        with torch.no_grad():
            assert_same(cascade, eager, x)
    assert_same(cascade, eager, x, scale=2.0)


HOWS: dict[str, Callable[[bool, Tensor], Tensor]] = {
    "an op": lambda training, y: y.relu() if training else y.tanh(),
    "one more op": lambda training, y: y.relu() if training else y,
    "a number": lambda training, y: y * (2.0 if training else 3.0),
    "the input of dropout": lambda training, y: F.dropout(y, 0.5, training) * 0 + y if training else y + y * 0,
    "dropout of another rate": lambda training, y: F.dropout(y, 0.5 if training else 0.1, True),
    "noise": lambda training, y: y + torch.randn_like(y) if training else y,
    "a write": lambda training, y: y.mul_(2) if training else y,
    "no gradient": lambda training, y: y.detach() if training else y,
    "a tensor that needs no gradient": lambda training, y: y + y.detach().requires_grad_(training),
    "almost the same number": lambda training, y: y * (1.0 if training else 1.0 + 1e-6),
    "another operand of the same value": lambda training, y: y + (y * 1 if training else y),
}


class TwoBiases(nn.Module):
    """One bias for each mode. New ones are equal, so only the operands of the sum tell the modes apart."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.biases = nn.ParameterList([torch.zeros(6), torch.zeros(6)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.biases[int(self.training)]


class Plain(nn.Module):
    """Attention, norm and dropout of rate 0, so train and eval mode compute the same."""

    def __init__(self, how: Callable[[nn.Module, Tensor], Tensor] = lambda self, y: y) -> None:
        super().__init__()
        self.layer, self.norm, self.drop, self.how = nn.Linear(6, 8), nn.LayerNorm(8), nn.Dropout(0.0), how

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.drop(self.norm(self.layer(x)))
        y = F.scaled_dot_product_attention(y[None], y[None], y[None], dropout_p=0.0)[0]
        return self.how(self, y if scale is None else y * scale)


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The mode of the model in each call of torch.export."""
    modes: list[bool] = []
    export = torch.export.export

    def counted(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        modes.append(model.training)
        return export(model, *args, **kwargs)

    monkeypatch.setattr(torch.export, "export", counted)
    return modes


def adapted_in_both_modes(model: nn.Module, x: Tensor, training: bool) -> tuple[lx.Cascade, nn.Module]:
    """Adapt a model in one mode, and compare it with the eager model in both, with and without gradients."""
    cascade, eager = adapted(model.train(training), x)
    for mode in (not training, training):
        cascade.train(mode)
        with torch.no_grad():
            assert_same(cascade, eager, x)
        assert_same(cascade, eager, x)
    return cascade, eager


@pytest.mark.parametrize("training", [True, False])
def test_one_graph_for_both_modes(training: bool, exports: list[bool]) -> None:
    cascade, eager = adapted_in_both_modes(Plain(), torch.randn(5, 6), training)
    assert exports == [training]
    assert_same(cascade.train(not training), eager, torch.randn(7, 6))  # a new size needs a graph of this mode
    assert exports == [training, not training]


@pytest.mark.parametrize("training", [True, False])
def test_a_trained_branch_and_a_graph_of_both_modes(training: bool, exports: list[bool]) -> None:
    """The graph has branches, which compute in the other mode too, with their dropout only in train mode."""
    model, x = Plain().train(training), torch.randn(5, 6)
    cascade = lx.adapt(model, (x,), spec=lx.CascadeSpec(rank=2, dropout=0.5, pace=1.0))
    with torch.no_grad():
        for factor in cascade.parameters():
            if factor.requires_grad:
                factor.normal_()
    plain = Plain()
    plain.load_state_dict(cascade.folded_state_dict())
    torch.testing.assert_close(cascade.eval()(x), plain.eval()(x))
    assert not torch.allclose(cascade.train()(x), plain(x))
    assert exports == [training]


def test_two_parameters_of_equal_values() -> None:
    cascade, eager = adapted_in_both_modes(TwoBiases(), torch.randn(5, 6), training=True)
    for module in (cascade.model, eager):
        with torch.no_grad():
            module.biases[0].fill_(1.0)
    assert_same(cascade.eval(), eager, torch.ones(5, 6))


def clamped(self: nn.Module, y: Tensor) -> Tensor:
    """Read a value in eval mode."""
    return y.clamp(max=1.0) if not self.training and bool((y > 10).any()) else y


def counted(self: nn.Module, y: Tensor) -> Tensor:
    """Count the calls in eval mode."""
    vars(self)["calls"] = vars(self).get("calls", 0) + (not self.training)
    return y + self.calls


def reads_number(self: nn.Module, y: Tensor) -> Tensor:
    """Turn a value into a number, and branch on it in eval mode."""
    number = y.argmax().item()
    return y + 1 if not self.training and number > 3 else y


@pytest.mark.parametrize("how", [clamped, counted, reads_number])
def test_eval_mode_reads_what_a_graph_cannot(how: Callable[[nn.Module, Tensor], Tensor]) -> None:
    with torch.no_grad():
        cascade, eager = adapted(Plain(how).train(), torch.zeros(5, 6))
        for x in (torch.zeros(5, 6), torch.randn(5, 6), torch.randn(5, 6)):
            for scale in (1.0, 100.0):
                scales = torch.full((1,), scale)
                assert_same(cascade.eval(), eager, x, scales)
                assert_same(cascade.train(), eager, x, scales)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("training", [True, False])
def test_a_model_that_branches_on_its_mode(how: str, training: bool) -> None:
    cascade, eager = adapted(Branches(HOWS[how]).train(training), x := torch.randn(5, 6))
    for mode in (not training, training):
        assert_same(cascade.train(mode), eager, x)


def test_a_mode_and_a_size_together() -> None:
    """The graph of one mode has no guard for a size that only the other mode reads."""
    model = Branches(lambda training, y: y if training or len(y) < 8 else y.tanh()).train()
    cascade, eager = adapted(model, torch.randn(5, 6))
    for mode, size in ((True, 7), (True, 9), (False, 5), (False, 7), (False, 9), (False, 12), (False, 6), (True, 12)):
        assert_same(cascade.train(mode), eager, torch.randn(size, 6))
