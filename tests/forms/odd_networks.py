"""Models in the style of published code: networks that read sizes and values, keep state and return their own types."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations


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


class GraphNetwork(nn.Module):
    """Messages along edges, summed by index_add and averaged by scatter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.message, self.update = nn.Embedding(4, 5), nn.Linear(12, 6), nn.GRUCell(6, 5)
        self.read = nn.Linear(5, 2)

    def forward(self, kinds: Tensor, edges: Tensor, features: Tensor, batch: Tensor) -> Tensor:
        x = self.embed(kinds)
        source, target = edges
        for _ in range(2):
            sent = F.relu(self.message(torch.cat([x[source], x[target], features], -1)))
            found = torch.zeros(x.shape[0], 6, dtype=x.dtype, device=x.device).index_add_(0, target, sent)
            x = self.update(found, x)
        pooled = x.new_zeros(2, 5).scatter_reduce(0, batch[:, None].expand(-1, 5), x, "mean", include_self=False)
        return self.read(pooled)


def graph() -> tuple[Tensor, ...]:
    edges = torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 0, 4, 3, 2]])
    return (torch.tensor([0, 1, 2, 3, 1]), edges, torch.randn(6, 2, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 1]))


class Quantized(nn.Module):
    """A codebook that is a buffer, moved by forward in train mode, and a straight-through estimator."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(6, 4), nn.Linear(4, 6)
        self.register_buffer("book", torch.randn(7, 4))
        self.register_buffer("counts", torch.ones(7))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code = self.encode(x)
        chosen = torch.cdist(code.detach(), self.book).argmin(-1)
        hot = F.one_hot(chosen, 7).to(code.dtype)
        if self.training:
            with torch.no_grad():
                self.counts.mul_(0.9).add_(hot.sum(0), alpha=0.1)
                self.book.lerp_((hot.T @ code.detach()) / self.counts[:, None], 0.1)
        found = self.book[chosen]
        return self.decode(code + (found - code).detach()), F.mse_loss(code, found.detach())


class Decoder(nn.Module):
    """Decodes greedily until a token or a length, in a Python loop that reads values."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.cell, self.head = nn.Embedding(6, 4), nn.GRUCell(4, 5), nn.Linear(5, 6)

    def forward(self, context: Tensor) -> Tensor:
        state, tokens, found = context, torch.zeros(context.shape[0], dtype=torch.long), []
        while len(found) < 5:
            state = self.cell(self.table(tokens), state)
            found.append(self.head(state))
            tokens = found[-1].argmax(-1)
            if bool((tokens == 5).all()):
                break
        return torch.stack(found, 1)


@dataclass
class Detections:
    """What a detector returns."""

    boxes: list[dict[str, Tensor]]
    losses: dict[str, Tensor]
    count: int = 0


class Detector(nn.Module):
    """Deep supervision: a dataclass that holds lists of dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleDict({"p3": nn.Conv2d(3, 4, 3, padding=1), "p4": nn.Conv2d(4, 4, 3, 2, 1)})
        self.boxes, self.scores = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Detections:
        found, losses = [], {}
        for name, level in self.levels.items():
            x = F.relu(level(x))
            found.append({"boxes": self.boxes(x).sigmoid(), "scores": self.scores(x)})
            losses[f"loss_{name}"] = found[-1]["scores"].logsumexp(1).mean()
        return Detections(found, losses, len(found))


class Loose(nn.Module):
    """Arguments by position, by name, in any number."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(5, 3) for name in ("text", "image", "sound")})

    def forward(self, *others: Tensor, scale: float = 1.0, **named: Tensor) -> dict[str, Tensor]:
        base = sum(others)
        return {name: self.layers[name](value) * scale + base for name, value in named.items()}


class AdaptiveSoftmax(nn.Module):
    """A softmax in clusters, whose forward branches on values."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.loss = nn.Linear(5, 8), nn.AdaptiveLogSoftmaxWithLoss(8, 9, [3, 6], div_value=2.0)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.body(x), target)
