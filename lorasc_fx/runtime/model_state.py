"""State of the model that training moves besides its weights: buffers, and parameters that forward itself writes.

A forward may assign a new tensor to a buffer, of another shape or where there was none. What is saved and restored is
the tensor that the module holds, in its own shape and dtype, and which modules hold the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorasc_fx.shards import local
from lorasc_fx.undo import no_grad

__all__ = ["Slot", "layout", "restorer", "slots"]


@dataclass(frozen=True)
class Slot:
    """The place of one buffer: an entry in the table of a module's buffers."""

    table: dict[str, torch.Tensor | None]
    leaf: str
    device: torch.device

    @property
    def held(self) -> torch.Tensor | None:
        """The tensor in it."""
        return self.table.get(self.leaf)

    def put(self, value: torch.Tensor | None) -> None:
        """Let the module hold this tensor."""
        self.table[self.leaf] = value


def slots(model: nn.Module, more: Iterable[str] = ()) -> dict[str, Slot]:
    """Return the places of all buffers by name, of those without a tensor as well.

    Args:
        model: whose buffers.
        more: names of buffers that forward registers and that may not be there yet.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    modules = dict(model.named_modules())
    found = {}
    for path, module in modules.items():
        for leaf, held in module._buffers.items():
            found[f"{path}.{leaf}".lstrip(".")] = Slot(module._buffers, leaf, device if held is None else held.device)
    for name in more:
        path, _, leaf = name.rpartition(".")
        if name not in found and path in modules and not hasattr(modules[path], leaf):
            found[name] = Slot(modules[path]._buffers, leaf, device)
    return found


def layout(model: nn.Module) -> dict[str, Any]:
    """Return, as JSON, which buffers hold no tensor, and which hold that of another one before them."""
    first: dict[int, str] = {}
    empty, shared = [], {}
    for name, slot in slots(model).items():
        if slot.held is None:
            empty.append(name)
        elif (other := first.setdefault(id(slot.held), name)) != name:
            shared[name] = other
    return {key: value for key, value in (("empty_buffers", empty), ("shared_buffers", shared)) if value}


def restorer(model: nn.Module, parameters: Iterable[torch.Tensor] = ()) -> Callable[[], None]:
    """Return a function that gives the modules the buffers that they hold now, and these parameters their values."""
    tables = [(module._buffers, dict(module._buffers.items())) for module in model.modules()]
    tensors = [local(tensor) for tensor in (*model.buffers(), *parameters)]
    values = [tensor.detach().clone() for tensor in tensors]

    def restore() -> None:
        for table, held in tables:
            if isinstance(table, dict):  # a script module keeps its own
                table.clear()
                table.update(held)
        with no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)

    return restore
