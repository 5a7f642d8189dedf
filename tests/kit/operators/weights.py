"""Weights that are computed before they multiply: norms, parametrizations, masks, weights made by weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from lorasc_fx.plan import Reason
from tests.kit.operators.case import Case, linear, rand, row

X, SIGNAL = rand((4, 5)), rand((2, 4, 11))


def hooked(hook: str, layer: Callable[[], nn.Module], width: int = 7) -> Callable[[], nn.Module]:
    """Return a maker of a layer with one of torch's old hooks, and a linear one behind."""

    def build() -> nn.Module:
        with warnings.catch_warnings(action="ignore"):
            return nn.Sequential(getattr(nn.utils, hook)(layer()), nn.Tanh(), nn.Linear(width, 3))

    return build


def parametrized(
    register: Callable[[nn.Module], nn.Module], layer: Callable[[], nn.Module], width: int = 5
) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(register(layer()), nn.Tanh(), nn.Linear(width, 3))


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).transpose(-1, -2)


def symmetric(layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Symmetric())


class Normalized(nn.Module):
    """A cosine classifier: the rows of the weight and of the input have norm one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.tensor(4.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(x), F.normalize(self.weight, dim=1))


class Hyper(nn.Module):
    """A network whose weights are another network's output, for a learned code."""

    def __init__(self) -> None:
        super().__init__()
        self.latent, self.maker = nn.Parameter(torch.randn(1, 4)), nn.Linear(4, 5 * 7 + 7)

    def forward(self, x: Tensor) -> Tensor:
        values = self.maker(self.latent)[0]
        return F.linear(x, values[:35].view(7, 5), values[35:])


class Dropped(nn.Linear):
    """DropConnect: the weight itself is dropped."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.dropout(self.weight, 0.4, self.training), self.bias)


def pruned() -> nn.Module:
    layer = nn.Linear(5, 7)
    prune.l1_unstructured(layer, "weight", amount=0.4)
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(7, 3))


def original(kind: str = "linear", *names: str) -> dict[str, str]:
    return {f"0.parametrizations.weight.{name}": kind for name in names or ("original",)} | {"2.weight": "linear"}


GAIN = (Reason.VECTOR, Reason.NO_FORM, Reason.OPAQUE)
# fmt: off
COMPUTED = [
    row("old_weight_norm", hooked("weight_norm", lambda: nn.Linear(5, 7)), X, linear("0.weight_v", "2.weight"),
        {"0.weight_g": GAIN}),
    row("old_weight_norm_conv", hooked("weight_norm", lambda: nn.Conv1d(4, 6, 3), 9), SIGNAL,
        {"0.weight_v": "conv", "2.weight": "linear"}, {"0.weight_g": GAIN}),
    row("old_spectral_norm", hooked("spectral_norm", lambda: nn.Linear(5, 7)), X,
        linear("0.weight_orig", "2.weight")),
    row("old_spectral_norm_transposed", hooked("spectral_norm", lambda: nn.ConvTranspose1d(4, 6, 3), 13), SIGNAL,
        {"0.weight_orig": "conv", "2.weight": "linear"}),
    row("weight_norm", parametrized(parametrizations.weight_norm, lambda: nn.Linear(5, 7), 7), X,
        original("linear", "original1"), {"0.parametrizations.weight.original0": GAIN},
        aten="0.parametrizations.weight.original1=* 2.weight=linear_1"),
    row("spectral_norm", parametrized(parametrizations.spectral_norm, lambda: nn.Linear(5, 7), 7), X, original(),
        aten="0.parametrizations.weight.original=* 2.weight=linear_1"),
    row("spectral_norm_conv", parametrized(parametrizations.spectral_norm, lambda: nn.Conv1d(4, 6, 7)), SIGNAL,
        original("conv"), aten="0.parametrizations.weight.original:conv=* 2.weight=linear"),
    row("orthogonal", parametrized(parametrizations.orthogonal, lambda: nn.Linear(5, 5)), X, original()),
    row("orthogonal_cayley", parametrized(lambda layer: parametrizations.orthogonal(layer, orthogonal_map="cayley"),
        lambda: nn.Linear(5, 5)), X, original()),
    row("symmetric", parametrized(symmetric, lambda: nn.Linear(5, 5)), X, original()),
    row("pruned", pruned, X, linear("0.weight_orig", "2.weight")),
    Case("normalized", Normalized, X, linear("weight")),
    Case("hyper", Hyper, X, linear("maker.weight"), {"latent": Reason.VECTOR}),
    Case("drop_connect", lambda: Dropped(5, 7), X, linear("weight")),
]
# fmt: on
