"""Finds every reference that a model holds to its parameters and buffers, and replaces the tensors.

A module holds references in its dictionaries `_parameters` and `_buffers`, perhaps several to the same tensor. It may
also hold references in lists: a recurrent layer passes the weights in its list `_flat_weights` to the op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lorasc_fx.util.undo import Block, Undo, isolated


@dataclass(frozen=True)
class Holder:
    """One reference of a module to a tensor: an entry of a dictionary or a list.

    Args:
        module: the module.
        leaf: name of the parameter or buffer in the module. "" for a list entry that has no name in this module.
        store: the dictionary or list that contains the reference.
        key: key or index in the store.
        value: the tensor at the time when the reference was found. None for a buffer that is None.
        device: device of the tensor. For a buffer that is None, the device of the model.
    """

    module: nn.Module
    leaf: str
    store: Any
    key: Any
    value: torch.Tensor | None
    device: torch.device

    def put(self, value: torch.Tensor | None) -> None:
        """Replace the tensor."""
        self.store[self.key] = value

    @property
    def exists(self) -> bool:
        """Whether the store still has this key or index."""
        return self.key < len(self.store) if isinstance(self.store, list) else self.key in self.store


def holders(model: nn.Module) -> Iterator[Holder]:
    """Yield every reference to a tensor, in dictionaries of parameters and buffers and in attributes that are lists."""
    for module in model.modules():
        names: dict[int, str] = {}
        for store in (module._parameters, module._buffers):
            for leaf, value in store.items():
                if value is not None:
                    names.setdefault(id(value), leaf)
                    yield Holder(module, leaf, store, leaf, value, value.device)
        for name, attribute in vars(module).items():
            if type(attribute) is list:
                flat = getattr(module, "_flat_weights_names", ()) if name == "_flat_weights" else ()
                for index, value in enumerate(attribute):
                    if isinstance(value, torch.Tensor):
                        leaf = flat[index] if index < len(flat) else names.get(id(value), "")
                        yield Holder(module, leaf, attribute, index, value, value.device)


def names_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return {name: all names of the same parameter}. A tied parameter has several names."""
    names: dict[int, tuple[str, ...]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)] = (*names.get(id(parameter), ()), name)
    return {name: group for group in names.values() for name in group}


def holders_of(model: nn.Module, tensors: Iterable[torch.Tensor]) -> list[Holder]:
    """Return every reference to one of these tensors."""
    ids = {id(tensor) for tensor in tensors}
    return [holder for holder in holders(model) if id(holder.value) in ids]


def exchange(model: nn.Module, new: Callable[[Holder], torch.Tensor | None], undo: Undo) -> list[Holder]:
    """Replace tensors of a model in all references to them.

    Args:
        new: returns the new tensor for a reference. None, or the current tensor, means no change.
        undo: receives the steps that restore the old tensors.

    Returns:
        The references that changed. Their `value` is the old tensor.
    """
    changes = [(holder, value) for holder in holders(model) if (value := new(holder)) is not None]
    changes = [(holder, value) for holder, value in changes if value is not holder.value]
    for holder, _ in changes:
        undo(partial(holder.put, holder.value))
    for holder, value in changes:
        holder.put(value)
    return [holder for holder, _ in changes]


def shallow(module: nn.Module) -> nn.Module:
    """Return a copy of a module with new dictionaries of the same children, parameters and buffers."""
    new = object.__new__(type(module))
    new.__dict__ = dict(module.__dict__)
    for store in ("_modules", "_parameters", "_buffers"):
        new.__dict__[store] = dict(getattr(module, store))
    return new


@isolated
def substituted(undo: Block, model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Context manager: replace parameters and buffers inside the block. `values` is {name: replacement}.

    torch.func.functional_call would not restore a module that has two names, nor replace tensors in lists.
    """
    tensors = dict(model.named_buffers()) | dict(model.named_parameters())
    replacements = {id(tensors[name]): value for name, value in values.items()}
    exchange(model, lambda holder: replacements.get(id(holder.value)), undo)


def buffer_holders(model: nn.Module, more: Iterable[str] = ()) -> dict[str, Holder]:
    """Return {name: reference} for all buffers, also those that are None, and for names in `more` that do not exist."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    modules = dict(model.named_modules())
    references: dict[str, Holder] = {}
    for path, module in modules.items():
        for leaf, value in module._buffers.items():
            value_device = device if value is None else value.device
            references[f"{path}.{leaf}".lstrip(".")] = Holder(module, leaf, module._buffers, leaf, value, value_device)
    for name in more:
        path, _, leaf = name.rpartition(".")
        if name not in references and path in modules and not hasattr(modules[path], leaf):
            references[name] = Holder(modules[path], leaf, modules[path]._buffers, leaf, None, device)
    return references
