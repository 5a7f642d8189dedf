"""The flags of the user's model, as `adapt` found them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

__all__ = ["Flags"]


@dataclass(frozen=True)
class Flags:
    """What `release` gives back: requires_grad of every parameter, training of every module."""

    requires_grad: Mapping[str, bool]
    training: Mapping[str, bool]

    @classmethod
    def of(cls, model: nn.Module) -> Flags:
        """Read the flags of a model."""
        return cls(
            {name: parameter.requires_grad for name, parameter in model.named_parameters()},
            {name: module.training for name, module in model.named_modules()},
        )

    def restore(self, model: nn.Module) -> None:
        """Give the flags back; what has come since keeps its own."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.requires_grad.get(name, parameter.requires_grad))
        for name, module in model.named_modules():
            module.training = self.training.get(name, module.training)
