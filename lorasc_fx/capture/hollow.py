"""Models without numbers here, on the meta device or in parts: fake tensors stand in for what they hold.

A fake tensor has a shape, a dtype and the device of the inputs, and no memory. With them the model's Python runs and is
traced as it will be with its numbers; what looks at a value (`.item()`, a branch on a sum) raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from lorasc_fx.capture.trees import whole
from lorasc_fx.capture.untouched import substituted
from lorasc_fx.undo import Block, isolated

__all__ = ["computing", "device_of", "faked", "has_numbers", "is_hollow"]


def is_hollow(model: nn.Module) -> bool:
    """Whether a parameter or buffer of the model is on the meta device."""
    return any(each.is_meta for each in (*model.parameters(), *model.buffers()))


def device_of(args: Any, kwargs: Mapping[str, Any]) -> torch.device:
    """Return the device of the first tensor among inputs that has one; the CPU where none has."""
    found = (leaf for leaf in pytree.tree_leaves((args, kwargs), is_leaf=whole) if isinstance(leaf, torch.Tensor))
    return next((leaf.device for leaf in found if not leaf.is_meta), torch.device("cpu"))


def has_numbers(model: nn.Module) -> bool:
    """Whether plain code can compute with the model: nothing is on the meta device, or in parts."""
    return not is_hollow(model) and not any(hasattr(each, "to_local") for each in model.parameters())


@isolated
def faked(
    undo: Block[Any], model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Let a model without numbers here hold fake tensors, of whole shapes, and return fake inputs; any other model and
    its inputs stay as they are.
    """
    if has_numbers(model):
        return args, dict(kwargs)
    mode, device = (
        FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(tracked_fakes=[])),
        device_of(args, kwargs),
    )

    def fake(value: torch.Tensor) -> torch.Tensor:
        with mode:
            made = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)
            return nn.Parameter(made, value.requires_grad) if isinstance(value, nn.Parameter) else made

    held = {name: fake(value) for name, value in [*model.named_parameters(), *model.named_buffers()]}
    inputs, named = pytree.tree_map_only(torch.Tensor, fake, (args, dict(kwargs)))
    undo.enter(substituted(model, held))
    return inputs, named


@isolated
def computing(undo: Block[Any], model: nn.Module) -> None:
    """Run what follows among fake tensors if the model holds such: what it makes itself is fake as well."""
    first = next((each for each in model.parameters() if isinstance(each, FakeTensor)), None)
    if first is not None:
        undo.enter(first.fake_mode)
