"""restart_A = "gradient": lora_A of a stage starts on the leading right singular vectors of the weight's gradient.

The gradient is that of the first optimizer step of the stage, over all batches that the step accumulates. As B = 0
until then, the branch's own gradients under the new A are known exactly: dB = c s G A^T and dA = 0, where c is what
clipping or loss scaling made of dB. So the first step is the one that the new A would have made. Costs one full
gradient per site for that one step. Relative: LoRA-GA (2407.05000).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lorasc_fx.branch import Branch

__all__ = ["start_from_gradient"]


def start_from_gradient(
    parameters: Mapping[str, nn.Parameter], branches: Mapping[str, Branch], optimizer: torch.optim.Optimizer
) -> None:
    """Let the sites' weights gather gradients until the optimizer's next step, then turn lora_A to them."""
    weights = {name: parameters[name] for name in branches}
    for weight in weights.values():
        weight.requires_grad_(True)

    def before_step(_optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        handle.remove()
        for name, weight in weights.items():
            weight.requires_grad_(False)
            gradient, weight.grad = weight.grad, None
            if gradient is not None:
                _turn(branches[name], gradient.detach())

    handle = optimizer.register_step_pre_hook(before_step)


@torch.no_grad()
def _turn(branch: Branch, gradient: torch.Tensor) -> None:
    a, b = branch.lora_A, branch.lora_B
    matrix = gradient.reshape(b.shape[0], a.shape[1]).to(a.dtype)
    if b.grad is None or not torch.isfinite(matrix).all():
        return
    old = branch.scale * matrix @ a.t()
    weight = old.square().sum()
    share = (b.grad * old).sum() / weight if weight > 0 else torch.ones_like(weight)
    _, _, right = torch.linalg.svd(matrix, full_matrices=False)
    count = min(a.shape[0], right.shape[0])
    norm = a.norm(dim=1).mean()
    a[:count] = right[:count] * norm
    b.grad.copy_(share * branch.scale * matrix @ a.t())
    if a.grad is not None:
        a.grad.zero_()
