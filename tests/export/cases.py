"""Small models for the tests of exports, and functions that make their inputs for any batch size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn

import lorasc_fx as lx
from tests.kit import tiny
from tests.kit.models import randomize

SPEC = lx.CascadeSpec(rank=2, pace=0.5, noise=lx.Noise(0.2), restart_factors="B")


class Stated(nn.Module):
    """A model with convolutions, batch norm, dropout and buffers, which differs in train and eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.turn = nn.Conv2d(4, 6, 3, groups=2)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 5)
        self.register_buffer("shift", torch.linspace(0, 1, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norm(self.stem(x)))
        return self.head(self.drop(torch.relu(self.turn(hidden)).mean((2, 3)))) + self.shift


@dataclass(frozen=True)
class Exported:
    """A model, and a function that makes its inputs (args, kwargs) for a batch size."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]


def llama(**options: Any) -> nn.Module:
    """Return a language model with two layers and embeddings [30, 12]. Its head may be tied to them."""
    torch.manual_seed(52)
    return tiny.llama(vocab_size=30, num_hidden_layers=2, **options).eval()


def bert() -> nn.Module:
    torch.manual_seed(53)
    return tiny.bert(num_hidden_layers=2)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(54)
    return build()


def images(size: int) -> Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]:
    def make(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        source = torch.Generator().manual_seed(batch)
        return (torch.randn(batch, 3, size, size, generator=source),), {}

    return make


def texts(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return tokens [batch, 4 + batch]. The last tokens of the first text are masked."""
    source = torch.Generator().manual_seed(batch)
    ids = torch.randint(3, 30, (batch, 4 + batch), generator=source)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    return (), {"input_ids": ids, "attention_mask": mask}


CASES = {"stated": Exported(lambda: seeded(Stated), images(8))}
SLOW_CASES = {
    "bert": Exported(bert, texts),
    "resnet": Exported(lambda: seeded(lambda: timm.create_model("resnet10t", num_classes=5)), images(64)),
}


def trained_cascade(case: Exported, **options: Any) -> lx.Cascade:
    """Return a cascade in train mode with a folded stage and a trained running stage. The changes are large."""
    args, kwargs = case.inputs(3)
    cascade = lx.adapt(case.build().train(), args, kwargs, spec=SPEC, **options)
    randomize(cascade, 1, size=0.2)
    cascade.transition(None)
    randomize(cascade, 2, size=0.2)
    return cascade


def tensor_of(output: Any) -> torch.Tensor:
    logits = output["logits"] if isinstance(output, dict) else output
    assert isinstance(logits, torch.Tensor)
    return logits
