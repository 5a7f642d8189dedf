"""Models in the style of published code: complex numbers, own gradients, hooks, patches, chance."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Spectral(nn.Module):
    """A Fourier operator: complex weights, as such and as pairs of reals."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.pair = nn.Linear(1, 4), nn.Parameter(torch.randn(4, 5, 3, 2) / 4)
        self.local, self.lower = nn.Conv1d(4, 5, 1), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x.unsqueeze(-1)).mT
        waves = torch.fft.rfft(x)
        mixed = torch.einsum("bik,iok->bok", waves[..., :3], torch.view_as_complex(self.pair))
        full = torch.zeros(x.shape[0], 5, waves.shape[-1], dtype=waves.dtype, device=x.device)
        full[..., :3] = mixed
        return self.lower(F.gelu(torch.fft.irfft(full, n=x.shape[-1]) + self.local(x)).mT).squeeze(-1)


class Sparse(nn.Module):
    """A graph convolution by a sparse adjacency."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(5, 6)), nn.Linear(6, 3)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return torch.sparse.mm(adjacency, self.second(torch.relu(torch.sparse.mm(adjacency, x @ self.first))))


class ControlFlow(nn.Module):
    """Torch's operator for branches, whose bodies read weights of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.either, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(
            torch.cond(x.sum() > 0, lambda x: self.either(x).sin(), lambda x: self.either(-x).tanh(), (x,))
        )


class Droppers(nn.Module):
    """Every kind of chance that torch has a layer for, and torchvision's stochastic depth."""

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
    """Running statistics: averaged over all calls, of instances, without affine, in eval mode for good."""

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


def adjacency() -> tuple[Tensor, Tensor]:
    dense = (torch.rand(4, 4) > 0.4).double() + torch.eye(4).double()
    return torch.randn(4, 5, dtype=torch.float64), dense.to_sparse()


class Raw(nn.Module):
    """Reads a weight's data, behind the back of autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x) * F.linear(x, self.body.weight.data).sigmoid()
        return self.head(hidden) + hidden @ self.head.weight.detach().T


class Nested(nn.Module):
    """Sequences of several lengths in one nested tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.nested.nested_tensor([x[0], x[1, :2]], layout=torch.jagged)
        return self.head(self.body(parts).sin().values())
