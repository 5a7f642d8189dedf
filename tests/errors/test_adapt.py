"""`adapt` refuses before it changes anything: model, flags, modes, graph and random generators are unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import accelerate
import pytest
import torch
from torch import nn

import lorasc_fx as lx
from tests.errors.models import adapted, inputs, mlp
from tests.errors.state import unchanged
from tests.kit.errors import raises

X = inputs(2, 5)


class NoSite(nn.Module):
    """One weight that is only added, and one that no graph reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(inputs(5, 3))
        self.spare = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :3] + self.table[:2]


class NoGradients(nn.Module):
    """Runs under `no_grad` only, so that nothing can train it."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            raise ValueError("no gradients here")
        return self.one(x)


class Once(NoGradients):
    """Runs once."""

    calls: ClassVar[list[int]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(1)
        if len(self.calls) > 1:
            raise ValueError("once is enough")
        return self.one(x)


def with_a_count() -> nn.Module:
    model = mlp()
    model.register_parameter("count", nn.Parameter(torch.tensor([3]), requires_grad=False))
    return model


def scripted() -> Any:
    return torch.jit.script(mlp())


# fmt: off
REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], type[lx.LorascError], tuple[str, ...]]] = {
    "no site, export": (NoSite, {"frontend": "export"}, lx.passes.NoSites,
        ("no-sites", "table: no-form", "node add", "spare")),
    "no site, eager": (NoSite, {"frontend": "eager"}, lx.passes.NoSites, ("no-sites", "table: no-form", "spare")),
    "a tensor as args": (mlp, {"args": X}, lx.CaptureError, ("invalid-value", "args", "Tensor")),
    "a tuple as kwargs": (mlp, {"args": (), "kwargs": (X,)}, lx.CaptureError, ("invalid-value", "kwargs")),
    "too many inputs": (mlp, {"args": (X, X)}, lx.CaptureError, ("invalid-value", "Sequential.forward")),
    "an unknown keyword": (mlp, {"kwargs": {"mask": X}}, lx.CaptureError,
        ("invalid-value", "Sequential.forward", "'mask'", "(input)")),
    "a wrong shape": (mlp, {"args": (inputs(2, 6),)}, lx.CaptureError, ("model-refuses-inputs", "Sequential", "2x6")),
    "no gradients": (NoGradients, {}, lx.CaptureError, ("model-refuses-inputs", "NoGradients", "ValueError")),
    "no front end": (Once, {}, lx.CaptureError, ("not-captured", "Once", "export: ValueError", "eager: ValueError")),
    "a front end": (mlp, {"frontend": "exprot"}, lx.CaptureError, ("unknown-name", "frontend", "exprot", "export")),
    "a dictionary as spec": (mlp, {"spec": {"rank": 8}}, lx.SpecError, ("invalid-value", "spec", "dict")),
    "integers in full": (with_a_count, {"spec": lx.CascadeSpec(train=("count",))}, lx.SpecError,
        ("not-trainable", "count", "torch.int64")),
    "no values": (lambda: mlp().to("meta"), {}, lx.CaptureError, ("meta-model", "0.weight")),
    "a buffer without values": (lambda: nn.Sequential(mlp(), nn.BatchNorm1d(2, affine=False, device="meta")), {},
        lx.CaptureError, ("meta-model", "1.running_mean")),
    "W0 in a file": (mlp, {"base_memory": "base.safetensors"}, lx.SpecError,
        ("invalid-value", "base_memory", "'device'")),
    "a function": (lambda: mlp, {}, lx.CaptureError, ("not-a-model", "function")),
    "TorchScript": (scripted, {}, lx.CaptureError, ("not-a-model", "TorchScript", "nn.Module")),
}
# fmt: on


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(name: str) -> None:
    make, options, kind, expected = REFUSED[name]
    Once.calls.clear()
    model = make()
    if not isinstance(model, nn.Module) or name == "TorchScript" or "meta-model" in expected:
        with raises(kind, *expected):
            lx.adapt(model, **{"args": (X,), **options})
        return
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() and not parameter_name.endswith("bias"))
    model.eval()
    next(model.children(), model).train()
    with unchanged(model), raises(kind, *expected):
        lx.adapt(model, **{"args": (X,), **options})


def test_a_model_whose_weights_accelerate_offloads() -> None:
    model = mlp()
    accelerate.cpu_offload(model, execution_device="cpu")
    output = model(X)
    with raises(lx.CaptureError, "meta-model", "0.weight", "device_map"):
        lx.adapt(model, (X,))
    assert torch.equal(model(X), output)


def test_adapting_twice() -> None:
    """A part of an adapted model, a model around it, and one that shares a parameter with it are refused too."""
    model = mlp()
    cascade, _ = adapted(model=model)
    shared = nn.Linear(6, 2)
    shared.bias = model[3].bias
    for candidate, name in (
        (model, "0.weight"),
        (model[3], "weight"),
        (nn.Sequential(nn.Identity(), model), "1.0.weight"),
        (shared, "bias"),
        (cascade, "This model"),
        (nn.Sequential(cascade), "This model"),
    ):
        with unchanged(cascade), raises(lx.StateError, "already-adapted", name):
            lx.adapt(candidate, args=(X,))
