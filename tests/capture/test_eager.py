"""A model that runs eagerly computes the same with its branches as the eager model with merged weights."""

from __future__ import annotations

import copy
import ctypes
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lorasc_fx as lx
from tests.kit.models import TwoLayers, assert_merged, batches, loss_of, merged, randomize
from tests.kit.state import variant_count

SPEC = lx.CascadeSpec(rank=2, lora_alpha=3.0, pace=0.5)
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Branchy(nn.Module):
    """Values decide which layer runs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.positive, self.negative = nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.body(x))
        return self.positive(hidden) if x.sum() > 0 else self.negative(hidden)


class Items(TwoLayers):
    """Computes with numpy, and with a number from item(), between layers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.body(x))
        size = float(np.log1p(abs(x.detach().sum().item())))
        order = torch.from_numpy(np.argsort(x.detach().numpy().sum(1)))
        return self.head(hidden[order] * size)


MODELS: dict[str, Callable[[], nn.Module]] = {model.__name__: model for model in (Branchy, Items)}
ALL = pytest.mark.parametrize("name", MODELS)


def model_of(name: str) -> nn.Module:
    torch.manual_seed(17)
    return MODELS[name]().double()


def inputs(rows: int = 6, seed: int = 2) -> torch.Tensor:
    return batches(1, rows, 5, seed=seed)[0]


def adapted(model: nn.Module, spec: lx.CascadeSpec = SPEC) -> lx.Cascade:
    return lx.adapt(model, (inputs(),), spec=spec, frontend="eager")


def run(model: Any, x: torch.Tensor, seed: int = 3) -> torch.Tensor:
    torch.manual_seed(seed)
    random.seed(seed)
    return model(x)


def reach_all(cascade: lx.Cascade) -> None:
    """Call the cascade with inputs that together run every layer."""
    for seed in range(8):
        for sign in (1, -1):
            cascade(sign * inputs(seed=seed))


@ALL
@pytest.mark.parametrize("training", [False, True])
def test_it_computes_the_eager_model_and_with_branches_the_merged_model(name: str, training: bool) -> None:
    """With B = 0 and no noise, it computes the bits of the eager model, including buffers and random numbers.

    With any B, outputs and gradients agree with the eager model with merged weights.
    """
    model = model_of(name).train(training)
    eager = copy.deepcopy(model)
    cascade = adapted(model)
    assert cascade.frontend == "eager"
    for rows, sign in ((6, 1), (4, -1), (9, 1), (6, -1)):
        x = sign * inputs(rows)
        assert torch.equal(run(cascade, x), run(eager, x))
    assert all(map(torch.equal, model.buffers(), eager.buffers()))
    reach_all(cascade)
    matrices = {key for key, value in model.named_parameters() if value.dim() > 1}
    assert {site.weight for site in cascade.sites} == matrices
    assert cascade.unreached == ()
    randomize(cascade)
    eager.load_state_dict(model.state_dict())
    for seed in (2, 3, 4):
        x = inputs(5, seed)
        assert_merged(cascade, eager, x, every=False)


@ALL
def test_copies_read_their_own_branches(name: str) -> None:
    """Training a copy does not change the original."""
    cascade = adapted(model_of(name))
    reach_all(cascade)
    randomize(cascade)
    expected = run(cascade, inputs())
    copied = copy.deepcopy(cascade)
    kept = {key: value.clone() for key, value in copied.state_dict().items()}
    torch.testing.assert_close(run(copied, inputs()), expected, rtol=0, atol=1e-12)
    assert all(torch.equal(value, kept[key]) for key, value in copied.state_dict().items() if "/lora" in key)
    randomize(copied, seed=8)
    assert not torch.allclose(run(copied, inputs()), expected, atol=1e-3)
    assert_merged(copied, copied.model, inputs(), every=False)
    assert torch.equal(run(cascade, inputs()), expected)


class Doubled(torch.autograd.Function):
    """A linear layer that computes twice its product. Its backward reads the weight that forward has saved."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return 2 * x @ weight.t()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        return 2 * gradient @ weight, 2 * gradient.t() @ x


class LateFunction(TwoLayers):
    """Computes by a custom autograd.Function for some inputs only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.body(x))
        return self.head(hidden) if x.sum() > 0 else Doubled.apply(hidden, self.head.weight)


@pytest.mark.parametrize("example", [1, -1], ids=["later call", "first call"])
def test_a_custom_function_gives_its_branch_the_right_gradient(example: int) -> None:
    """Also if it comes only in a later call, in a mode whose gradients were compared before."""
    torch.manual_seed(17)
    model, x = LateFunction().double(), inputs().abs()
    cascade = lx.adapt(model, (example * x,), spec=SPEC)
    assert cascade.frontend == "eager"
    assert cascade.placements == {"body.weight": "beside", "head.weight": "beside" if example > 0 else "weight"}
    randomize(cascade)
    for sign in (1, -1):
        assert_merged(cascade, copy.deepcopy(model), sign * x)


class Addresses(TwoLayers):
    """For some inputs, reads a weight by its address and as a numpy array."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.body(x))
        if x.sum() > 0:
            return self.head(hidden)
        weight = self.head.weight
        entries = (ctypes.c_double * weight.numel()).from_address(weight.data_ptr())
        copied = torch.tensor(list(entries), dtype=x.dtype).view(weight.shape)
        assert np.array_equal(copied.numpy(), weight.detach().numpy())
        return hidden @ copied.t()


class NoGradients(Addresses):
    """Computes without gradients, so only outputs tell a wrong branch."""

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


@pytest.mark.parametrize("kind", [Addresses, NoGradients])
def test_code_that_reads_the_memory_of_a_weight_gets_the_merged_weight(kind: type[nn.Module]) -> None:
    torch.manual_seed(17)
    model, x = kind().double(), inputs().abs()
    cascade = lx.adapt(model, (x,), spec=SPEC)
    assert (cascade.frontend, cascade.placements) == ("eager", {"body.weight": "beside", "head.weight": "beside"})
    randomize(cascade)
    twin = copy.deepcopy(model)
    twin.load_state_dict(merged(cascade), strict=False)
    for sign in (1, -1):
        torch.testing.assert_close(cascade(sign * x), twin(sign * x), rtol=0, atol=1e-12)


def test_dropout_of_branches() -> None:
    """The generator of torch draws it in each call, and there is none in eval mode."""
    cascade = adapted(model_of("Branchy").train(), lx.CascadeSpec(rank=2, dropout=0.5))
    randomize(cascade)
    x = inputs()
    assert torch.equal(run(cascade, x), run(cascade, x))
    assert not torch.equal(run(cascade, x), run(cascade, x, seed=4))
    assert_merged(cascade.eval(), copy.deepcopy(cascade.model), x)


class Recomputing(nn.Module):
    """Only gradient checkpointing prevents a graph of this model, so each kind of call has a separate variant."""

    def __init__(self) -> None:
        super().__init__()
        layers = (nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5, bias=False)) for _ in range(2))
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.training else layer(x)
        return self.head(x)


def test_calls_of_several_kinds_share_their_reads() -> None:
    """A backward runs after a call of another kind, and the first kind of call is repeated."""
    torch.manual_seed(17)
    model = Recomputing().double()
    eager = copy.deepcopy(model).eval()  # without checkpointing, which would recompute with the original weights
    calls = [inputs(), batches(1, 2, 3, 5)[0], inputs(seed=4)]
    cascade = lx.adapt(model, (calls[0],), spec=SPEC)
    assert cascade.frontend == "eager"
    randomize(cascade)
    for x in calls:
        assert_merged(cascade, eager, x)
    assert variant_count(cascade) == 2
    parameters = list(cascade.branches.parameters())
    losses = [sum(loss_of(cascade(x)) for x in order) for order in (calls, calls[::-1])]
    computed = [torch.autograd.grad(loss, parameters) for loss in losses]
    merged_weights = merged(cascade, eager)
    loss = sum(loss_of(torch.func.functional_call(eager, merged_weights, (x,))) for x in calls)
    expected = torch.autograd.grad(loss, parameters)
    for gradients in computed:
        torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-12)
