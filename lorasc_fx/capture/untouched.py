"""Run a model without leaving a trace in it: buffers and the attributes that its Python sets are given back."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from lorasc_fx.branch import is_quantized
from lorasc_fx.capture.guards import Held, attribute_tensors, walk
from lorasc_fx.undo import Block, isolated

__all__ = ["Attributes", "same_attributes", "same_values", "substituted", "untouched", "written_by"]

_MISSING = object()

_WRITTEN: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()
"""Names of the parameters that each model's forward writes into, and of the buffers that it registers, of models that
have run on trial."""


def _plain_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield what a forward may write into: no quantized weights, which know few ops."""
    return ((name, value) for name, value in model.named_parameters() if not is_quantized(value))


def written_by(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that forward writes and of the buffers that it registers, of a model that has
    run on trial.
    """
    return _WRITTEN.get(model, frozenset())


@dataclass(frozen=True)
class Attributes:
    """What the places hold in which a model keeps Python state, and the values of the tensors among it."""

    places: list[tuple[Held, Any]]
    tensors: list[tuple[torch.Tensor, int, torch.Tensor]]

    @classmethod
    def of(cls, model: nn.Module) -> Attributes:
        """Return those of a model as they are."""
        places = [(held, held.contents()) for held in walk(model) if held.restored]
        tensors = [
            (tensor, tensor._version, tensor.detach().clone())
            for _, tensor in attribute_tensors(model)
            if type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided
            if not (tensor.is_inference() or tensor.is_meta or tensor.is_nested)
        ]
        return cls(places, tensors)

    def moved(self) -> list[str]:
        """Return the names of the attributes that are others by now, by value."""
        found = []
        for held, before in self.places:
            now = held.contents()
            if held.own and held.attributes:
                keys = dict.fromkeys((*before, *now))
                moved = [key for key in keys if not _same(now.get(key, _MISSING), before.get(key, _MISSING))]
                found += [held.entry(key) for key in moved]
            elif held.own and not _same(now, before):
                found.append(held.name)
        return sorted(found)

    def restore(self) -> None:
        """Give every place its contents back, and every tensor its values."""
        for held, before in self.places:
            where = held.where
            if isinstance(where, dict):
                for key in [key for key in held.contents() if key not in before]:
                    del where[key]
                if not held.attributes and list(where) != list(before):
                    where.clear()
                for key, value in before.items():
                    if where.get(key, _MISSING) is not value:
                        where[key] = value
            elif len(where) != len(before) or not _same(held.contents(), before):
                where.clear()
                where.extend(before) if isinstance(where, (list, deque)) else where.update(before)
        for tensor, version, value in self.tensors:
            if tensor._version != version and not torch.equal(tensor, value):
                with torch.no_grad():
                    tensor.copy_(value)


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        alike = one.shape == other.shape and one.dtype == other.dtype
        return alike and ((isinstance(one, FakeTensor) and isinstance(other, FakeTensor)) or torch.equal(one, other))
    if isinstance(one, (bool, int, float, str, bytes)):
        return bool(one == other)
    if isinstance(one, (list, tuple, deque)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(map(_same, one.values(), other.values()))
    return isinstance(one, (set, torch.Size, torch.dtype, torch.device)) and bool(one == other)


@isolated
def substituted(undo: Block[Any], model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Let the model hold other tensors in place of these parameters and buffers, at every place that holds one of them.

    (torch.func.functional_call leaves its values behind in a module that a model holds under two names, and does not
    reach lists of parameters, as recurrent layers keep.)
    """
    own = dict(model.named_buffers()) | dict(model.named_parameters())
    instead = {id(own[name]): value for name, value in values.items()}
    held: list[tuple[Any, Any, Any]] = []
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            held += [(tensors, leaf, value) for leaf, value in tensors.items() if id(value) in instead]
        for store in (each for each in vars(module).values() if type(each) is list):
            held += [(store, place, value) for place, value in enumerate(store) if id(value) in instead]

    def put_back() -> None:
        for store, key, value in held:
            store[key] = value

    undo(put_back)
    for store, key, value in held:
        store[key] = instead[id(value)]


@isolated
def same_attributes(undo: Block[Any], model: nn.Module) -> Attributes:
    """Give attributes back at the end; yields them as they were."""
    attributes = Attributes.of(model)
    undo(attributes.restore)
    return attributes


@isolated
def same_values(undo: Block[Any], model: nn.Module) -> None:
    """Give buffers back at the end, and parameters that forward writes into.

    Which ones these are is known after a first run, for which all are kept, in host memory.
    """
    paths = {module: path for path, module in model.named_modules()}
    buffers = [
        (
            module,
            dict(module._buffers),
            {name: value.clone() for name, value in module._buffers.items() if value is not None},
        )
        for module in model.modules()
    ]
    known = _WRITTEN.get(model)
    kept = {
        name: (parameter, parameter.data, parameter.detach().to("cpu", copy=True))
        for name, parameter in _plain_parameters(model)
        if (known is None or name in known) and not isinstance(parameter, FakeTensor)
    }
    versions = [(name, each, each._version) for name, each in model.named_parameters() if isinstance(each, FakeTensor)]
    written = set(known or ())

    def put_back() -> None:
        with torch.no_grad():
            for name, (parameter, memory, value) in kept.items():
                moved = parameter.data_ptr() != memory.data_ptr()
                if moved:
                    parameter.data = memory
                if moved or not torch.equal(parameter.cpu(), value):
                    parameter.copy_(value)
                    written.add(name)
            written.update(name for name, parameter, version in versions if parameter._version != version)
            for module, objects, values in buffers:
                if isinstance(module._buffers, dict):  # a script module keeps its own
                    added = module._buffers.keys() - objects.keys()
                    written.update(f"{paths[module]}.{leaf}".lstrip(".") for leaf in added)
                    module._buffers.clear()
                    module._buffers.update(objects)
                for name, value in values.items():
                    buffer = module._buffers[name]
                    if buffer is not None and buffer.shape == value.shape:
                        buffer.copy_(value)
        _WRITTEN[model] = frozenset(written)

    undo(put_back)


@isolated
def untouched(undo: Block[Any], model: nn.Module) -> None:
    """Leave the model as it was."""
    undo.enter(same_attributes(model))
    undo.enter(same_values(model))
