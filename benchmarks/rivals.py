"""The rivals: one model, adapted by us, by peft or by nobody, each with a step over the same weights and batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

import lorasc_fx as lx

from .models import Work
from .transitions import train

__all__ = [
    "NOISE",
    "RANK",
    "RIVALS",
    "Rival",
    "adapted",
    "can_drop",
    "check_same_work",
    "entries",
    "make",
    "make_all",
    "wrapped",
]

RANK = 8
NOISE = 0.1
"""Of the starts with noise; its strength costs nothing."""

RIVALS = ("frozen", "ours", "peft", "full", "folded")


@dataclass(frozen=True)
class Rival:
    """A model with a batch of its own.

    Args:
        model: the user's own, a cascade, or peft's wrapper.
        work: whose loss is taken.
        inputs: leaves that need a gradient.
    """

    model: nn.Module
    work: Work
    inputs: Mapping[str, torch.Tensor]

    def loss(self) -> torch.Tensor:
        """Return the loss of a forward."""
        return self.work.loss(self.model(**self.inputs))

    def prepare(self) -> None:
        """Do what an optimizer would between steps: no gradients are left, and what is trained counts as changed."""
        for each in (*self.model.parameters(), *self.inputs.values()):
            each.grad = None
        torch.autograd.graph.increment_version(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        )

    def step(self) -> None:
        """Run forward and backward, down to the inputs."""
        self.loss().backward()


def can_drop() -> bool:
    """Return whether our branches have a dropout to ask for."""
    return any(field.name == "dropout" for field in fields(lx.CascadeSpec))


def adapted(
    work: Work, model: nn.Module, batch: Mapping[str, torch.Tensor], dropout: float = 0.0, **options: Any
) -> lx.Cascade:
    """Return the model adapted by us; `options` are of the spec, and `base` of `adapt`."""
    base = options.pop("base", "memory")
    spec = lx.CascadeSpec(**{"targets": work.targets, "rank": RANK, "lora_alpha": float(RANK), **options})
    if dropout:
        spec = replace(spec, dropout=dropout)
    return lx.adapt(model, kwargs=dict(batch), spec=spec, base=base)


def wrapped(work: Work, model: nn.Module, dropout: float = 0.0, **options: Any) -> nn.Module:
    """Return the model wrapped by peft; `options` are of its LoraConfig."""
    import peft

    config = peft.LoraConfig(**{"r": RANK, "lora_alpha": RANK, "lora_dropout": dropout, **work.peft, **options})
    return peft.get_peft_model(model, config)


def _folded(work: Work, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> nn.Module:
    cascade = adapted(work, model, batch, pace=1.0)
    train(cascade, torch.optim.AdamW(cascade.param_groups(lr=1e-3)))
    return cascade.release().requires_grad_(False)


def make(
    name: str,
    work: Work,
    model: nn.Module,
    batch: Mapping[str, torch.Tensor],
    dropout: float = 0.0,
    **options: Any,
) -> Rival:
    """Return the rival of this name; the model becomes its own. `options` are of `adapted`, for `ours`."""
    makers: dict[str, Callable[[], nn.Module]] = {
        "frozen": lambda: model.requires_grad_(False),
        "ours": lambda: adapted(work, model, batch, dropout, **options),
        "peft": lambda: wrapped(work, model, dropout),
        "full": lambda: model.requires_grad_(True),
        "folded": lambda: _folded(work, model, batch),
    }
    inputs = {key: value.clone().requires_grad_(True) for key, value in batch.items()}
    return Rival(makers[name](), work, inputs)


def make_all(work: Work, forced: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Rival]:
    """Return every rival, over the same weights and batch.

    Args:
        work: the model.
        forced: more rivals of ours, by name, with options of our spec.

    Raises:
        RuntimeError: ours and peft train different numbers of entries.
    """
    model, batch = work.build(), work.batch()
    rivals = {name: make(name, work, copy.deepcopy(model), batch) for name in RIVALS}
    for name, options in (forced or {}).items():
        rivals[name] = make("ours", work, copy.deepcopy(model), batch, **options)
        check_same_work(work, rivals[name].model, rivals["peft"].model)
    check_same_work(work, rivals["ours"].model, rivals["peft"].model)
    return rivals


def entries(model: nn.Module) -> int:
    """Return the number of trainable entries."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def check_same_work(work: Work, ours: nn.Module, theirs: nn.Module) -> None:
    """Raise RuntimeError where ours and peft train different numbers of entries."""
    if entries(ours) != entries(theirs):
        raise RuntimeError(
            f"{work.title}: ours trains {entries(ours)} entries, peft {entries(theirs)}: not the same work"
        )
