"""The variants that are compared, on the same batch: a model frozen, trained in full, or adapted by either library."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import lorasc_fx as lx

from .models import Work

RANK = 8
RIVALS = ("frozen", "ours", "peft", "full", "folded")


@dataclass(frozen=True)
class Rival:
    """A model with a batch.

    Args:
        model: the user's model, a cascade, or peft's wrapper.
        work: the work, which defines the loss.
        inputs: arguments of forward, all of them leaf tensors that need a gradient.
    """

    model: nn.Module
    work: Work
    inputs: Mapping[str, torch.Tensor]

    def loss(self) -> torch.Tensor:
        """Run forward and return the loss."""
        return self.work.loss(self.model(**self.inputs))

    def prepare(self) -> None:
        """Clear gradients, and mark the trained parameters as written, as an optimizer step does."""
        for tensor in (*self.model.parameters(), *self.inputs.values()):
            tensor.grad = None
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        torch.autograd.graph.increment_version(trained)

    def step(self) -> None:
        """Run forward, and backward to the inputs."""
        self.loss().backward()


def adapted(work: Work, model: nn.Module, batch: Mapping[str, torch.Tensor], **options: Any) -> lx.Cascade:
    """Return the model adapted by lorasc-fx. `options` are fields of the spec."""
    spec = lx.CascadeSpec(**{"targets": work.targets, "rank": RANK, "lora_alpha": float(RANK), **options})
    return lx.adapt(model, kwargs=dict(batch), spec=spec)


def wrapped(work: Work, model: nn.Module, **options: Any) -> Any:
    """Return the model wrapped by peft. `options` are fields of its LoraConfig."""
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(**{"r": RANK, "lora_alpha": RANK, **work.peft, **options}))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW over the trainable parameters."""
    if isinstance(model, lx.Cascade):
        return torch.optim.AdamW(model.param_groups(lr=1e-3))
    return torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)


def train(optimizer: torch.optim.Optimizer) -> None:
    """Take a step with random gradients."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def _folded(work: Work, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> nn.Module:
    cascade = adapted(work, model, batch, pace=1.0)
    train(optimizer_of(cascade))
    return cascade.release().requires_grad_(False)


def make(name: str, work: Work, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Rival:
    """Return the variant of this name. It adapts `model` itself, not a copy."""
    makers: dict[str, Callable[[], nn.Module]] = {
        "frozen": lambda: model.requires_grad_(False),
        "ours": lambda: adapted(work, model, batch),
        "peft": lambda: wrapped(work, model),
        "full": lambda: model.requires_grad_(True),
        "folded": lambda: _folded(work, model, batch),
        "ours, dropout": lambda: adapted(work, model, batch, dropout=0.1),
        "peft, dropout": lambda: wrapped(work, model, lora_dropout=0.1),
    }
    return Rival(makers[name](), work, {key: value.clone().requires_grad_(True) for key, value in batch.items()})


def make_all(work: Work, names: tuple[str, ...] = RIVALS) -> dict[str, Rival]:
    """Return {name: variant} with the same weights and batch."""
    model, batch = work.build(), work.batch()
    rivals = {name: make(name, work, copy.deepcopy(model), batch) for name in names}
    check_same_work(work.title, rivals["ours"].model, rivals["peft"].model)
    return rivals


def entries(model: nn.Module) -> int:
    """Return the number of trainable entries."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def check_same_work(title: str, ours: nn.Module, theirs: nn.Module) -> None:
    """Raise RuntimeError if ours and peft train different numbers of entries."""
    if entries(ours) != entries(theirs):
        raise RuntimeError(f"{title}: ours trains {entries(ours)} entries, peft {entries(theirs)}: not the same work")
