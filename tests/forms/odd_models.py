"""Models in the style of published code: random numbers, loops over values, control flow, running statistics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lorasc_fx.plan import Reason
from tests.kit.operators.case import Case, linear, of, rand


class Generator(nn.Module):
    """A generator with spectral norm, noise in forward, and pixel norm."""

    def __init__(self) -> None:
        super().__init__()
        self.start = parametrizations.spectral_norm(nn.Linear(5, 24))
        self.up = parametrizations.spectral_norm(nn.ConvTranspose2d(6, 4, 4, 2, 1))
        self.strength, self.out = nn.Parameter(torch.ones(1, 4, 1, 1)), nn.Conv2d(4, 3, 1)

    def forward(self, code: Tensor) -> Tensor:
        x = self.start(code * torch.rsqrt(code.square().mean(1, keepdim=True) + 1e-8)).view(-1, 6, 2, 2)
        x = self.up(F.leaky_relu(x, 0.2))
        x = x + self.strength * torch.randn(x.shape[0], 1, *x.shape[2:], dtype=x.dtype, device=x.device)
        return torch.tanh(self.out(x))


class Decoder(nn.Module):
    """Decodes greedily until a token or a length, in a Python loop that reads values."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.cell, self.head = nn.Embedding(6, 4), nn.GRUCell(4, 5), nn.Linear(5, 6)

    def forward(self, context: Tensor) -> Tensor:
        state, tokens, logits = context, torch.zeros(context.shape[0], dtype=torch.long), []
        while len(logits) < 5:
            state = self.cell(self.table(tokens), state)
            logits.append(self.head(state))
            tokens = logits[-1].argmax(-1)
            if bool((tokens == 5).all()):
                break
        return torch.stack(logits, 1)


class Loose(nn.Module):
    """Arguments by position, by name, in any number."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(5, 3) for name in ("text", "image", "sound")})

    def forward(self, *others: Tensor, scale: float = 1.0, **named: Tensor) -> dict[str, Tensor]:
        base = sum(others)
        return {name: self.layers[name](value) * scale + base for name, value in named.items()}


TRAINS_COND = torch.__version__ >= (2, 13)
"""Whether weights that a body of torch.cond reads get gradients outside of compilers; in 2.9 they get none."""


class ControlFlow(nn.Module):
    """Calls `torch.cond`, whose bodies read weights of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.either, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(
            torch.cond(x.sum() > 0, lambda x: self.either(x).sin(), lambda x: self.either(-x).tanh(), (x,))
        )


class Droppers(nn.Module):
    """The random layers of torch, and stochastic depth of torchvision."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.ops import StochasticDepth

        self.conv, self.depth, self.head = nn.Conv2d(3, 4, 1), StochasticDepth(0.4, "row"), nn.Linear(4, 2)
        self.drops = nn.Sequential(nn.Dropout2d(0.3), nn.AlphaDropout(0.2), nn.FeatureAlphaDropout(0.2), nn.RReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = (x + self.depth(self.drops(x))).mean((2, 3))
        return self.head(x + torch.bernoulli(torch.full_like(x, 0.5)) * torch.rand_like(x))


class Norms(nn.Module):
    """Norms with running statistics: averaged over all calls, of instances, without affine, and without statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(3, 3, 1) for _ in range(4))
        self.norms = nn.ModuleList(
            [
                nn.BatchNorm1d(3, momentum=None),
                nn.InstanceNorm1d(3, track_running_stats=True),
                nn.BatchNorm1d(3, affine=False),
                nn.BatchNorm1d(3, track_running_stats=False),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x))
        return x


def _data(x: Tensor, w0: Tensor, w1: Tensor) -> Tensor:
    hidden = F.linear(x, w0) * F.linear(x, w0.data).sigmoid()
    return F.linear(hidden, w1) + hidden @ w1.detach().T


def convs(*names: str) -> dict[str, str]:
    return {f"{name}.weight": "conv" for name in names}


def lin(*names: str) -> dict[str, str]:
    return linear(*(f"{name}.weight" for name in names))


X = rand((4, 5))
ORIGINAL = "parametrizations.weight.original"

# fmt: off
ODD: list[Case] = [
    Case("generator", Generator, rand((3, 5)), linear(f'start.{ORIGINAL}') | {f'up.{ORIGINAL}': "conv"} | convs("out"),
        {"strength": (Reason.NO_FORM, Reason.VECTOR)}),
    Case("decoder", Decoder, rand((3, 5)),
        {"table.weight": "embedding", "cell.weight_ih": "recurrent", "cell.weight_hh": "recurrent"} | lin("head"),
        has_graph=False),
    Case("loose", Loose, lambda: (rand((4, 3), (4, 3))(), {"scale": 2.0, "image": X()[0], "text": X()[0]}),
        lin("layers.text", "layers.image"), unreached=("layers.sound.weight",)),
    Case(
        "control_flow", ControlFlow, X, lin("either", "head") if TRAINS_COND else lin("head"), modes=(True,),
        has_graph=TRAINS_COND, unreached=() if TRAINS_COND else ("either.weight",),
    ),
    Case("weight_data", of(_data, (6, 5), (3, 6)), X, linear("w0", "w1"), has_graph=False),
    Case("droppers", Droppers, rand((3, 3, 4, 5)), convs("conv") | lin("head")),
    Case("norms", Norms, rand((4, 3, 6)), convs(*(f'convs.{index}' for index in range(4))),
        has_graph=False),
]
# fmt: on
