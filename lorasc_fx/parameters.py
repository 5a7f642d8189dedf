"""Finds the places where a model holds parameters and buffers, and replaces tensors in all of them.

A module holds a tensor in its dictionaries of parameters and buffers, maybe under several names. It may also hold the
tensor in a plain list, as recurrent layers do with the weights that they pass to torch (`_flat_weights`).
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
    """One place that holds a tensor.

    Args:
        module: the module.
        leaf: name of the parameter or buffer in the module. "" for a tensor in a list without a name in this module.
        store: the dictionary or list.
        key: key or index in the store.
        value: the tensor in this place when it was found. None for an empty buffer.
        device: of the tensor, or of the model for an empty place.
    """

    module: nn.Module
    leaf: str
    store: Any
    key: Any
    value: torch.Tensor | None
    device: torch.device

    def put(self, value: torch.Tensor | None) -> None:
        """Put a tensor into the place."""
        self.store[self.key] = value

    @property
    def is_there(self) -> bool:
        """Whether the place still exists."""
        return self.key < len(self.store) if isinstance(self.store, list) else self.key in self.store


def holders(model: nn.Module) -> Iterator[Holder]:
    """Yield every place that holds a tensor: dictionaries of parameters and buffers, and lists that are attributes."""
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
    """Return all names of each parameter, by each name. A tied parameter has several."""
    names: dict[int, tuple[str, ...]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)] = (*names.get(id(parameter), ()), name)
    return {name: group for group in names.values() for name in group}


def holders_of(model: nn.Module, names: Iterable[str]) -> list[Holder]:
    """Return every place that holds one of the parameters of these names."""
    parameters = dict(model.named_parameters())
    meant = {id(parameters[name]) for name in names}
    return [holder for holder in holders(model) if id(holder.value) in meant]


def exchange(model: nn.Module, new: Callable[[Holder], torch.Tensor | None], undo: Undo) -> list[Holder]:
    """Replace tensors in all places of a model, and return the places that changed, with their old values.

    Args:
        model: the model.
        new: returns the new tensor for a place; None or the current one for no change.
        undo: gets the steps that restore the old tensors.
    """
    changes = [(holder, value) for holder in holders(model) if (value := new(holder)) is not None]
    changes = [(holder, value) for holder, value in changes if value is not holder.value]
    for holder, _ in changes:
        undo(partial(holder.put, holder.value))
    for holder, value in changes:
        holder.put(value)
    return [holder for holder, _ in changes]


def shallow(module: nn.Module) -> nn.Module:
    """Return a copy of a module that shares children and tensors, but has its own dictionaries."""
    new = object.__new__(type(module))
    new.__dict__ = dict(module.__dict__)
    for store in ("_modules", "_parameters", "_buffers"):
        new.__dict__[store] = dict(getattr(module, store))
    return new


@isolated
def substituted(undo: Block, model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Replace these parameters and buffers inside a `with`.

    torch.func.functional_call does not restore a module that has two names, and does not reach lists of parameters.
    """
    tensors = dict(model.named_buffers()) | dict(model.named_parameters())
    replacements = {id(tensors[name]): value for name, value in values.items()}
    exchange(model, lambda holder: replacements.get(id(holder.value)), undo)


def buffer_holders(model: nn.Module, more: Iterable[str] = ()) -> dict[str, Holder]:
    """Return the places of all buffers by name, including empty ones.

    Args:
        model: the model.
        more: names of buffers that forward registers and that may not exist yet.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    modules = dict(model.named_modules())
    places: dict[str, Holder] = {}
    for path, module in modules.items():
        for leaf, value in module._buffers.items():
            at = device if value is None else value.device
            places[f"{path}.{leaf}".lstrip(".")] = Holder(module, leaf, module._buffers, leaf, value, at)
    for name in more:
        path, _, leaf = name.rpartition(".")
        if name not in places and path in modules and not hasattr(modules[path], leaf):
            places[name] = Holder(modules[path], leaf, modules[path]._buffers, leaf, None, device)
    return places


def buffer_layout(model: nn.Module) -> dict[str, Any]:
    """Return, as JSON, which buffers are empty, and which share the tensor of an earlier one."""
    first: dict[int, str] = {}
    empty, shared = [], {}
    for name, holder in buffer_holders(model).items():
        if holder.value is None:
            empty.append(name)
        elif (other := first.setdefault(id(holder.value), name)) != name:
            shared[name] = other
    return {key: value for key, value in (("empty_buffers", empty), ("shared_buffers", shared)) if value}
