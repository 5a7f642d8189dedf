"""Code that runs again in backward computes with the branches, and activation checkpointing still saves memory."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import lorasc_fx as lx
from tests.kit.compare import saved_storages
from tests.kit.errors import raises
from tests.kit.models import batches, branches, loss_of, merged, randomize
from tests.kit.state import oldest_variant

SPEC = lx.CascadeSpec(rank=2, lora_alpha=3.0)
X = batches(1, 4, 5)[0]
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Block(nn.Module):
    """A residual block. With `breaks`, it causes a graph break."""

    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.breaks = breaks
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.breaks and x.sum().item() > 1e9:
            x = -x
        return x + self.down(torch.tanh(self.up(x)))


class Checkpointed(nn.Module):
    """Blocks under torch.utils.checkpoint: one after another with one used twice, nested, or in segments."""

    def __init__(self, how: str, breaks: bool, reentrant: bool) -> None:
        super().__init__()
        self.how, self.reentrant = how, reentrant
        self.blocks = nn.ModuleList(Block(breaks) for _ in range(2))
        self.stem, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def kept(self, call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return checkpoint(call, x, use_reentrant=self.reentrant)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, (inside, outside) = self.stem(x), self.blocks
        if self.how == "nested":
            x = self.kept(lambda inner: outside(self.kept(inside, inner)), x)
        elif self.how == "segments":
            x = checkpoint_sequential(nn.Sequential(inside, outside), 2, x, use_reentrant=self.reentrant)
        else:
            for block in (inside, outside, inside):
                x = self.kept(block, x)
        return self.head(x)


class Recurrent(nn.Module):
    """A recurrent layer, which collects its weights in a list, checkpointed twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(5, 6), nn.LSTM(6, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.stem(x)[None]
        for _ in range(2):
            hidden = checkpoint(lambda states: self.layer(states)[0], hidden, use_reentrant=True)
        return self.head(hidden[0])


HOW = [("twice", True), ("nested", False), ("segments", False)]
MODELS: dict[str, Callable[[], nn.Module]] = {
    f"{how}{'-breaks' if breaks else ''}-{'reentrant' if reentrant else 'hooks'}": partial(
        Checkpointed, how, breaks, reentrant
    )
    for how, breaks in HOW
    for reentrant in (True, False)
} | {"Recurrent": Recurrent}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(3)
    return MODELS[name]().double().train()


def gradients(model: nn.Module, x: torch.Tensor = X) -> None:
    loss_of(model(x)).backward()


def assert_gradients(cascade: lx.Cascade, merged: nn.Module) -> None:
    """Check that the factors have the gradients that follow from the eager model with weights W + s B A."""
    for name, branch in branches(cascade).items():
        right = torch.autograd.grad(
            branch.dense_delta(merged.get_parameter(name).detach()),
            (branch.lora_A, branch.lora_B),
            merged.get_parameter(name).grad,
        )
        assert right[0].any()
        for factor, expected in zip((branch.lora_A, branch.lora_B), right, strict=True):
            torch.testing.assert_close(factor.grad, expected, rtol=0, atol=1e-12)


def merged_twin(model: nn.Module, cascade: lx.Cascade) -> nn.Module:
    twin = copy.deepcopy(model)
    twin.load_state_dict(merged(cascade, model), strict=False)
    return twin.requires_grad_(True)


@pytest.mark.parametrize("name", MODELS)
def test_what_backward_runs_again_computes_with_the_branches(name: str) -> None:
    """In two training steps, and in a call of the cascade inside the backward of another call.

    A call of the model itself has no branches.
    """
    model = model_of(name)
    original = copy.deepcopy(model)
    cascade = lx.adapt(model, (X,), spec=SPEC)
    assert len(cascade.sites) == sum(parameter.dim() > 1 for parameter in model.parameters())
    randomize(cascade)
    twin = merged_twin(original, cascade)
    for _ in range(2):
        for module in (cascade, twin):
            module.zero_grad()
            gradients(module)
        assert_gradients(cascade, twin)
    x, z = (X.clone().requires_grad_() for _ in range(2))
    later = cascade(X)
    loss_of(model(x)).backward()
    loss_of(original(z)).backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=0, atol=1e-12)
    cascade.zero_grad()
    loss_of(later).backward()
    assert_gradients(cascade, twin)
    cascade.zero_grad()
    torch.save(model, io.BytesIO())
    torch.testing.assert_close(copy.deepcopy(cascade)(X), twin(X), rtol=0, atol=1e-12)
    released = cascade.release()
    assert all(type(module._parameters) is dict for module in released.modules())


def test_a_raw_and_an_adapted_call_in_one_backward() -> None:
    """Each call recomputes its own values, with or without branches."""
    model = model_of("twice-breaks-hooks")
    original = copy.deepcopy(model)
    cascade = lx.adapt(model, (X,), spec=SPEC)
    randomize(cascade)
    twin = merged_twin(original, cascade)
    x, z = (X.clone().requires_grad_() for _ in range(2))
    (loss_of(model(x)) + loss_of(cascade(x)) + loss_of(model(x))).backward()
    (loss_of(original(z)) + loss_of(twin(z)) + loss_of(original(z))).backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=0, atol=1e-12)
    assert_gradients(cascade, twin)


class Region(torch.autograd.Function):
    """Custom gradient checkpointing, as in diffusion models: it differentiates by all parameters of a region."""

    @staticmethod
    def forward(ctx: Any, region: Callable[..., Any], x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.region, ctx.x, ctx.parameters = region, x, list(parameters)
        with torch.no_grad():
            return region(x)

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x = ctx.x.detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.region(x)
        return (None, *torch.autograd.grad(output, [x, *ctx.parameters], slope))


class Regional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(Region.apply(self.body, self.stem(x), *self.body.parameters()))


def test_a_region_that_differentiates_by_its_parameters_is_refused() -> None:
    """A read in forward and a read in backward are different tensors. A model that is refused is left unchanged."""
    model = Regional().double()
    model.body.bias.grad = torch.ones(6, dtype=torch.float64)
    with raises(lx.CaptureError, "not-captured", "Regional", "stem.weight", "body.weight"):
        lx.adapt(model, (X,), spec=lx.CascadeSpec(rank=2, train=("body.bias",)))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.body.bias.grad.eq(1).all()


# ---- memory


class Stack(nn.Module):
    """Blocks with optional activation checkpointing, as in transformers and timm."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.gradient_checkpointing, self.reentrant = False, reentrant
        self.stem, self.head = nn.Linear(5, 16), nn.Linear(16, 3)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 16)) for _ in range(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            kept = self.gradient_checkpointing and self.training
            x = x + (checkpoint(block, x, use_reentrant=self.reentrant) if kept else block(x))
        return self.head(x)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_gradient_checkpointing_keeps_its_memory(reentrant: bool, before: bool) -> None:
    """Checkpointing is enabled before or after `adapt`, and disabled again."""
    torch.manual_seed(4)
    model, x = Stack(reentrant), torch.randn(256, 5)
    model.gradient_checkpointing = True
    eager = sum(saved_storages(lambda: model(x)).values())
    model.gradient_checkpointing = before
    cascade = lx.adapt(model, (x,), spec=SPEC)
    assert len(cascade.sites) == 10
    for on in (before, True, False, True):
        model.gradient_checkpointing = on
        cascade(x)
        factors = sum(4 * parameter.numel() for parameter in cascade.branches.parameters())
        low = 10 * 4 * 2 * 256  # A x of each site outside
        assert (sum(saved_storages(lambda: cascade(x)).values()) <= eager + factors + low) == on
    randomize(cascade)
    model.eval()
    expected = cascade(x)
    cascade.train()
    torch.manual_seed(0)
    gradients(cascade, x)
    with_regions = [parameter.grad.clone() for parameter in cascade.branches.parameters()]
    cascade.zero_grad()
    model.gradient_checkpointing = False
    torch.manual_seed(0)
    gradients(cascade, x)
    without = [parameter.grad for parameter in cascade.branches.parameters()]
    torch.testing.assert_close(with_regions, without, rtol=1e-4, atol=1e-7)
    assert torch.allclose(cascade.eval()(x), expected, atol=1e-6)


def test_a_whole_graph_is_refused() -> None:
    model = Stack()
    model.gradient_checkpointing = True
    with raises(lx.CaptureError, "not-captured", "gradient checkpointing"):
        lx.adapt(model, (X.float(),), spec=SPEC, frontend="export")
    cascade = lx.adapt(model, (X.float(),), spec=SPEC)
    with raises(lx.CaptureError, "no-graph", "gradient checkpointing"):
        cascade.folded_graph()
    cascade.eval()
    cascade.folded_graph()


@pytest.mark.parametrize("bits", ["bf16", "autocast"])
def test_few_bits_are_no_reason_to_leave_the_graphs(bits: str) -> None:
    """A rounded gradient does not count as a wrong one. Branches are beside their ops in checkpointed regions too."""
    torch.manual_seed(4)
    model, x = Stack(), torch.randn(64, 5)
    model.gradient_checkpointing = True
    if bits == "bf16":
        model, x = model.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=bits == "autocast"):
        cascade = lx.adapt(model, (x,), spec=SPEC)
    assert set(oldest_variant(cascade).placements.values()) == {"beside"}
