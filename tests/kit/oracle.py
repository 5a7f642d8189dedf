"""LoRASC in plain torch: dense tensors, the formulas of algorithm.md, torch.func. It imports nothing from lorasc_fx.

A weight with a branch is one dense tensor, `W0 + start + N + s * (B @ A).view_as(W0)`, and the model is called with it,
so that autograd differentiates the formula itself. Slow and fast weights are dense deltas.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

Tensors = Mapping[str, torch.Tensor]


@dataclass
class Branch:
    """The trainable pair of a weight, [r, columns] and [out, r]."""

    a: torch.Tensor
    b: torch.Tensor


@dataclass
class Cascade:
    """A cascade of `model` (copied) on the weights in `factors`: name to lora_A of the first stage."""

    model: nn.Module
    factors: Tensors
    scale: float
    pace: float = 1.0
    restart: str = "slow"
    noise: Tensors = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = copy.deepcopy(self.model).requires_grad_(False)
        parameters = dict(self.model.named_parameters())
        self.base = {name: parameters[name].clone() for name in self.factors}
        self.slow = {name: torch.zeros_like(value) for name, value in self.base.items()}
        self.start = dict(self.slow)
        self.begin(self.factors)

    def begin(self, factors: Tensors) -> None:
        """Start a stage: the given A, and B = 0."""
        self.branches = {
            name: Branch(a.detach().clone().requires_grad_(), a.new_zeros(self.base[name].shape[0], a.shape[0]))
            for name, a in factors.items()
        }
        for branch in self.branches.values():
            branch.b.requires_grad_()

    def parameters(self) -> list[torch.Tensor]:
        """Return the trained factors."""
        return [tensor for branch in self.branches.values() for tensor in (branch.a, branch.b)]

    def fast(self, name: str) -> torch.Tensor:
        """F_t = start + s B_t A_t."""
        branch = self.branches[name]
        return self.start[name] + self.scale * (branch.b @ branch.a).view_as(self.base[name])

    def weight(self, name: str) -> torch.Tensor:
        """W0 + F_t + N_t, that the stage computes with."""
        return self.base[name] + self.fast(name) + self.noise.get(name, 0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the model with these weights."""
        return functional_call(self.model, {name: self.weight(name) for name in self.base}, args, kwargs)

    def end(self) -> None:
        """S_t = S_{t-1} + pace * (F_t - S_{t-1}); the next stage starts from S_t, or under restart = fast from F_t."""
        with torch.no_grad():
            fast = {name: self.fast(name) for name in self.base}
            self.slow = {name: slow + self.pace * (fast[name] - slow) for name, slow in self.slow.items()}
            self.start = dict(self.slow if self.restart == "slow" else fast)

    def weights(self, view: str) -> dict[str, torch.Tensor]:
        """W0 + S, W0 + F or W0."""
        with torch.no_grad():
            if view == "base":
                return dict(self.base)
            return {n: w + (self.slow[n] if view == "slow" else self.fast(n)) for n, w in self.base.items()}
