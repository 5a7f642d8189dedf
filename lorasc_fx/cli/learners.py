"""What can be trained: a cascade, or a plain model of which some parameters move."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import lorasc_fx as lx
from lorasc_fx.cli.batches import Batch
from lorasc_fx.cli.models import logits_of, set_mode
from lorasc_fx.errors import UnknownTarget, listed, nearest
from lorasc_fx.graph import matches
from lorasc_fx.spec import CascadeSpec

__all__ = ["CascadeLearner", "Learner", "PlainLearner", "has_batch_norm"]


class Learner(ABC):
    """A model in training."""

    @abstractmethod
    def train(self, mode: bool) -> None:
        """Go to train or to eval mode."""

    @abstractmethod
    def logits(self, batch: Batch) -> Tensor:
        """Return logits [batch, classes]."""

    @abstractmethod
    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return what the optimizer is to move."""

    @abstractmethod
    def begin(self, optimizer: torch.optim.Optimizer, stages: int) -> None:
        """Start the first of so many stages, or go on with it."""

    @abstractmethod
    def end_stage(self) -> None:
        """End a stage; a plain model has one stage and nothing to do."""

    @abstractmethod
    def finish(self) -> nn.Module:
        """Return the trained model, the user's own class, with its final weights."""

    @property
    @abstractmethod
    def parameters(self) -> int:
        """Number of trained entries."""


class CascadeLearner(Learner):
    """A cascade: fast weights while it trains, slow ones at the end."""

    def __init__(self, cascade: lx.Cascade) -> None:
        self.cascade = cascade
        self._stages: Iterator[lx.Stage] = iter(())

    @classmethod
    def adapt(cls, model: nn.Module, sample: Batch, spec: CascadeSpec, *, train: bool) -> CascadeLearner:
        """Adapt a model that this batch can be given to, in train or in eval mode."""
        set_mode(model, train)
        return cls(lx.adapt(model, args=sample.args, kwargs=sample.kwargs, spec=spec))

    def train(self, mode: bool) -> None:
        """Go to train or to eval mode."""
        self.cascade.train(mode)

    def logits(self, batch: Batch) -> Tensor:
        """Return logits of the variant that fits the batch."""
        return logits_of(self.cascade(*batch.args, **batch.kwargs))

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return the branches, and what is trained in full."""
        return list(self.cascade.param_groups(lr=lr))

    def begin(self, optimizer: torch.optim.Optimizer, stages: int) -> None:
        """Enter the cascade's own loop over stages."""
        self._stages = self.cascade.stages(stages, optimizer)
        next(self._stages)

    def end_stage(self) -> None:
        """Fold the branches and start the next stage, or after the last one leave the slow weights in place."""
        next(self._stages, None)

    def finish(self) -> nn.Module:
        """Release the model with its slow weights."""
        model: nn.Module = self.cascade.release()
        return model

    @property
    def parameters(self) -> int:
        """Number of trained entries."""
        return sum(tensor.numel() for group in self.param_groups(1.0) for tensor in group["params"])


class PlainLearner(Learner):
    """A model whose parameters that match a pattern are trained, without any branch."""

    def __init__(self, model: nn.Module, patterns: Sequence[str], exclude: Sequence[str] = ()) -> None:
        self.model = model
        names = [name for name, _ in model.named_parameters()]
        for pattern in patterns:
            if not matches(pattern, names):
                raise UnknownTarget(
                    f"train: {pattern!r} matches no parameter{nearest(pattern, names) or listed(names)}"
                )
        for name, parameter in model.named_parameters():
            asked = any(matches(pattern, (name,)) for pattern in patterns)
            parameter.requires_grad_(asked and not any(matches(pattern, (name,)) for pattern in exclude))

    def train(self, mode: bool) -> None:
        """Go to train or to eval mode."""
        set_mode(self.model, mode)

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits of the model."""
        return logits_of(self.model(*batch.args, **batch.kwargs))

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return the parameters that are trained."""
        return [{"params": [each for each in self.model.parameters() if each.requires_grad], "lr": lr}]

    def begin(self, optimizer: torch.optim.Optimizer, stages: int) -> None:
        """Do nothing: there is one stage."""

    def end_stage(self) -> None:
        """Do nothing: there is one stage."""

    def finish(self) -> nn.Module:
        """Return the model."""
        return self.model

    @property
    def parameters(self) -> int:
        """Number of trained entries."""
        return sum(each.numel() for each in self.model.parameters() if each.requires_grad)


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether a model has running statistics that training would move."""
    return any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in model.modules())
