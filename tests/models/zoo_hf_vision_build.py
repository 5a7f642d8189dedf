"""How the entries of transformers' vision, speech and multimodal models are made: by class name and small settings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from tests.models.entry import Call

Maker = Callable[[], Any]


def model(name: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    """Return a builder of a model class of a configuration class, by their names."""
    return lambda: getattr(transformers, name)(getattr(transformers, config)(**copy.deepcopy(settings)))


def real(*shape: int, scale: float = 1.0) -> Maker:
    """Return a maker of normal numbers."""
    return lambda: scale * torch.randn(*shape, dtype=torch.float64)


def whole(high: int, *shape: int, low: int = 0) -> Maker:
    """Return a maker of whole numbers below `high`."""
    return lambda: torch.randint(low, high, shape)


def fixed(value: Any) -> Maker:
    """Return a maker of always the same value."""
    return lambda: torch.tensor(value) if isinstance(value, list) else value


def given(labels: dict[str, Maker] | None = None, **always: Maker) -> Callable[[bool], Call]:
    """Return a maker of keyword arguments: `always`, and `labels` in train mode."""

    def make(training: bool) -> Call:
        makers = always | (labels or {} if training else {})
        return (), {name: maker() for name, maker in makers.items()}

    return make


def boxes(count: int, images: int = 2, classes: int = 3) -> Maker:
    """Return a maker of a detector's labels: classes, and boxes as relative centres and sizes."""

    def make() -> list[dict[str, torch.Tensor]]:
        drawn = [0.2 + 0.3 * torch.rand(count, 4, dtype=torch.float64) for _ in range(images)]
        return [{"class_labels": torch.randint(0, classes, (count,)), "boxes": each} for each in drawn]

    return make
