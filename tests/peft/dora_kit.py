"""Models, specs and formulas for the tests of DoRA."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import lorasc_fx as lx
from tests.kit.models import SCALE, batches, branches, mlp

RANK = 3
PLAIN: dict[str, Any] = {"rank": RANK, "lora_alpha": 4.5, "pace": 1.0, "adapter": "dora"}


def conv_net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 4, (3, 2), stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(4, 6, 1, bias=False),
        nn.Flatten(2),
        nn.Conv1d(6, 5, 3, padding=1),
        nn.Unflatten(2, (2, 2, -1)),
        nn.Conv3d(5, 2, (2, 1, 2)),
    ).double()


def wide() -> nn.Module:
    """No weight that four experts of rank 1 fill."""
    torch.manual_seed(6)
    convs = nn.Sequential(nn.Conv2d(3, 9, (3, 2), stride=2), nn.Tanh(), nn.Conv2d(9, 12, 3, padding=1, bias=False))
    return nn.Sequential(convs, nn.Tanh(), nn.Flatten(), nn.Linear(144, 11), nn.Tanh(), nn.Linear(11, 10)).double()


CASES = {
    "mlp": (mlp, lambda count: batches(count, 4, 5), ("0", "2", "4")),
    "conv": (conv_net, lambda count: batches(count, 3, 3, 8, 6), ("0", "2", "4", "6")),
}
FEW = {**CASES, "wide": (wide, lambda count: batches(count, 3, 3, 9, 7), ())}


def adapted(model: nn.Module, x: torch.Tensor, frontend: str = "auto", **options: Any) -> lx.Cascade:
    return lx.adapt(model, (x,), spec=lx.CascadeSpec(**{**PLAIN, **options}), frontend=frontend)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.dim() > 1}


def norms(weight: torch.Tensor) -> torch.Tensor:
    return weight.flatten(1).norm(dim=1).view(-1, *(1 for _ in weight.shape[1:]))


def trained(cascade: lx.Cascade, name: str, weight: torch.Tensor, noise: torch.Tensor | float = 0.0) -> torch.Tensor:
    """`diag(m / |W + N + s B A|) (W + s B A)` with the branch's present numbers."""
    branch = branches(cascade)[name]
    delta = SCALE * (branch.lora_B @ branch.lora_A).detach().view_as(weight)
    magnitude = branch.lora_magnitude_vector.detach().view(-1, *(1 for _ in weight.shape[1:]))
    return magnitude / norms(weight + delta + noise) * (weight + delta)
