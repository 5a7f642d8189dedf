"""How the zoo builds an architecture of timm: by its registered name, or its class where the name leaves no knob."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import nn

from tests.models.entry import Entry, images


class Passed(nn.Module):
    """In place of a repeated block: gives back the input that has the block's shape."""

    def __init__(self, position: int) -> None:
        super().__init__()
        self.position = position

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return inputs[self.position]


def net(
    name: str,
    size: int,
    *,
    label: str = "",
    unused: Mapping[str, str] | None = None,
    passed: tuple[str, ...] = (),
    position: int = 0,
    batch: int = 2,
    **kwargs: Any,
) -> Entry:
    """Return the entry of what timm registers under `name`, or of a class `file.Class`, for images of `size` pixels.

    Args:
        name: a registered name, or file and class where the registered function fixes what must be small.
        size: height and width of the images.
        label: name of the entry, where a file has several of one class.
        unused: as in Entry.
        passed: blocks that repeat another one and are left out, where depth has no knob.
        position: which input of a block that is left out goes on.
        batch: images in a call.
        kwargs: arguments of the model.
    """
    file, _, cls = name.rpartition(".")
    source = file or timm.models.model_entrypoint(name).__module__.rpartition(".")[2]

    def build() -> nn.Module:
        own = {"num_classes": 5, **copy.deepcopy(kwargs)}  # the builder of EfficientNets takes its arguments apart
        model: nn.Module
        if file:
            model = getattr(importlib.import_module(f"timm.models.{file}"), cls)(**own)  # noqa: TID251
        else:
            model = timm.create_model(name, pretrained=False, **own)
        for each in passed:
            model.set_submodule(each, Passed(position))
        return model

    return Entry(label or cls or name, source, build, images(batch, 3, size, size), unused=unused or {})
