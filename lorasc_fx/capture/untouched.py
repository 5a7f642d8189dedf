"""Run a model without leaving a trace in it: buffers and the attributes that its Python sets are given back."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from lorasc_fx.branch import is_quantized
from lorasc_fx.undo import Block, isolated

__all__ = ["Attributes", "same_attributes", "same_values", "substituted", "untouched", "written_by"]

_OWN = frozenset(("_parameters", "_buffers", "_modules", "training"))
"""What is looked at elsewhere. Hooks are attributes as well: transformers installs some at a first call."""

_CONTAINERS = (dict, OrderedDict, defaultdict, Counter, list, deque, set)

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
    """The plain attributes of every module, and what the containers among them hold."""

    values: dict[nn.Module, dict[str, Any]]
    contents: dict[nn.Module, dict[str, Any]]

    @classmethod
    def of(cls, model: nn.Module) -> Attributes:
        """Return those of a model as they are."""
        values = {
            module: {name: value for name, value in vars(module).items() if name not in _OWN}
            for module in model.modules()
        }
        contents = {
            module: {name: value.copy() for name, value in held.items() if type(value) in _CONTAINERS}
            for module, held in values.items()
        }
        return cls(values, contents)

    def moved(self, model: nn.Module) -> list[str]:
        """Return the dotted names of those that are others by now."""
        now = Attributes.of(model)
        names = {module: name for name, module in model.named_modules()}
        found = []
        for module, held in now.values.items():
            before, contents = self.values.get(module, {}), self.contents.get(module, {})
            for name in held.keys() | before.keys():
                same = name in held and name in before and _same(held[name], before[name])
                if not same or (name in contents and not _same(now.contents[module][name], contents[name])):
                    found.append(f"{names[module]}.{name}".lstrip("."))
        return sorted(found)

    def restore(self) -> None:
        """Give every module its attributes back."""
        for module, held in self.values.items():
            own = vars(module)
            for name in [name for name in own if name not in _OWN and name not in held]:
                del own[name]
            own.update(held)
            for name, content in self.contents[module].items():
                if not _same(held[name], content):
                    held[name].clear()
                    held[name].extend(content) if isinstance(content, (list, deque)) else held[name].update(content)


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
