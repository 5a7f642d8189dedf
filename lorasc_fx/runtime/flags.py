"""What `release` gives back: the flags of the user's model, and the parameters that became ties."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from torch import nn

from lorasc_fx.undo import Undo

__all__ = ["Flags", "Joined", "give_back"]

Joined = tuple[tuple[nn.Module, str, nn.Parameter], ...]
"""Places, each with the parameter that stood there before it became a tie."""


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


def give_back(joined: Joined, undo: Undo) -> None:
    """Put the parameters that became ties back, on the memory that their tie has now."""
    for module, leaf, value in joined:
        shared = module._parameters[leaf]
        if shared is not None:
            undo(partial(setattr, value, "data", value.data))
            undo(partial(setattr, module, leaf, shared))
            value.data = shared.data
            setattr(module, leaf, value)
