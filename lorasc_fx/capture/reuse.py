"""Graphs of torch.export, kept to be used again for another model in the same state.

What an export reads is the key of its graph, `state_of`: the classes of the modules, all Python state that guards know
(guards.py), by what it holds; names, shapes and ties of parameters and buffers, and the buffers' values; the inputs but
for their values; the global variables that the code of the model's classes names, and the functions behind these;
torch's settings and the environment. Where something in it cannot be compared by value (a hook, a tensor that is
neither parameter nor buffer, an object of a foreign library that belongs to one model), there is no key, and nothing is
kept.

A kept graph has no weights and no model. It is held against the new model on the example, as a new one is.
"""

from __future__ import annotations

import enum
import functools
import os
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import fx, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.hooks import RemovableHandle

from lorasc_fx.check.guards import DEPTH, MISSING, OPAQUE, STORES, UNREAD, Held, is_followed, package_of, walk
from lorasc_fx.graph import Record, copy_graph, graph_module_like, set_record
from lorasc_fx.signature import whole
from lorasc_fx.util.accelerator import autocast_state
from lorasc_fx.util.fingerprint import checksum

MOST = 16
"""Graphs that are kept; the one used least recently goes first."""
FOLLOWED = 1 << 16
"""Objects behind classes and global variables that are followed, and functions that are followed to their globals."""
BYTES = 1 << 20
"""Constants of a graph that is kept."""

_KEPT: OrderedDict[Hashable, Kept] = OrderedDict()

_VALUES = (bool, int, str, bytes, complex, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_TENSORS = (torch.Tensor, nn.Parameter)


class _NoKey(Exception):
    """Something that cannot be compared by value."""


class _Same:
    """Equal to another one of the same object while that lives; does not keep it alive where it can be helped."""

    def __init__(self, value: Any) -> None:
        self._id = id(value)
        try:
            self._ref: Callable[[], Any] = ref(value)
        except TypeError:  # a builtin function, a descriptor
            if isinstance(value, (torch.Tensor, nn.Module)):
                raise
            self._ref = functools.partial(_given, value)

    def __hash__(self) -> int:
        return self._id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and (value := self._ref()) is other._ref() and id(value) == self._id


def _given(value: Any) -> Any:
    return value


def state_of(model: nn.Module, args: Any, kwargs: Mapping[str, Any], *more: Hashable) -> Hashable | None:
    """Return all that an export of a call depends on, to be compared; None where it cannot be compared.

    Args:
        model: as it is now.
        args, kwargs: of the call; of tensors all but the values.
        more: options of the export.
    """
    try:
        return (*more, _KeyBuilder(model).state(args, kwargs), _settings())
    except (_NoKey, RecursionError):
        return None


class _KeyBuilder:
    """Numbers the objects that a model holds, in the order in which they are reached, and makes a key of them."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tensors: dict[int, str] = {}
        self._memory: dict[int, str] = {}
        self._numbers: dict[int, int] = {}
        self._open: set[int] = set()  # what has been numbered and whose contents are still to come
        self._alive: list[Any] = []
        self._left = FOLLOWED

    def state(self, args: Any, kwargs: Mapping[str, Any]) -> Hashable:
        tensors = tuple(self._registered())
        inputs = self._inputs(args, kwargs)
        holders = tuple([self._holder(held) for held in walk(self._model)])
        attributes = tuple([self._attributes(module) for module in self._model.modules()])
        classes = dict.fromkeys(kind for module in self._model.modules() for kind in type(module).__mro__)
        forwards = tuple([(_Same(kind), _Same(vars(kind).get("forward", MISSING))) for kind in classes])
        if self._open:
            raise _NoKey("an object that is not followed")
        return (tensors, inputs, holders, attributes, forwards, tuple(self._globals(classes)))

    def _registered(self) -> Iterator[Hashable]:
        model = self._model
        parameters = model.named_parameters(remove_duplicate=False)
        buffers = model.named_buffers(remove_duplicate=False)
        for is_buffer, named in enumerate((parameters, buffers)):
            for name, value in named:
                same = self._tensors.setdefault(id(value), name)
                layout = self._layout(value)
                memory = self._memory.setdefault(value.untyped_storage().data_ptr(), name) if value.numel() else ""
                yield (name, same, memory, layout, value.storage_offset(), checksum(value) if is_buffer else None)

    def _layout(self, value: torch.Tensor) -> Hashable:
        if type(value) not in _TENSORS or value.layout is not torch.strided or value.is_meta or value.is_nested:
            raise _NoKey("a tensor of another kind")
        sizes = (tuple(value.shape), value.stride(), value.dtype, value.device)
        return (type(value), *sizes, value.requires_grad, value.is_leaf, value.is_conj(), value.is_neg())

    def _inputs(self, args: Any, kwargs: Mapping[str, Any]) -> Hashable:
        leaves, spec = pytree.tree_flatten((args, dict(kwargs)), is_leaf=whole)
        first: dict[int, int] = {}
        parts: list[Hashable] = []
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                if id(leaf) in self._tensors:
                    raise _NoKey("a weight as an input")
                parts.append((first.setdefault(id(leaf), index), self._layout(leaf)))
            else:
                parts.append(self._value(leaf))
        return (str(spec), tuple(parts))

    def _holder(self, held: Held) -> Hashable:
        where = held.where
        if held.ordered and len(where):
            raise _NoKey("a hook")
        of_class = isinstance(where, types.MappingProxyType)
        self._open.discard(id(where))
        number = None if of_class else self._number(where)
        self._open.discard(id(where))
        keys = tuple([(type(key), key) if isinstance(key, _VALUES) else _Same(key) for key in held.keys])
        key_of = self._shared if of_class else self._value
        values = tuple([key_of(held.read(key)) for key in held.keys])
        many = isinstance(where, (list, dict, deque, set)) and len(where) > len(held.keys) and not held.attributes
        more = self._plain(where) if many else None
        return (held.name, number, type(where), keys, values, more)

    def _number(self, where: Any) -> int:
        """Return the number of an object, by the first place where it was met."""
        if id(where) not in self._numbers:
            self._numbers[id(where)] = len(self._numbers)
            self._alive.append(where)
            self._open.add(id(where))
        return self._numbers[id(where)]

    def _plain(self, value: Any) -> Hashable:
        """Return the key of a container of plain values."""
        if isinstance(value, dict):
            return (type(value), tuple([(self._plain(key), self._plain(item)) for key, item in value.items()]))
        if isinstance(value, (list, tuple, deque)):
            return (type(value), tuple(map(self._plain, value)))
        if isinstance(value, (set, frozenset)):
            return (type(value), frozenset(map(self._plain, value)))
        if isinstance(value, float):
            return (type(value), value.hex())
        if isinstance(value, (slice, range)):
            return (type(value), repr(value))
        if isinstance(value, enum.Enum):
            return _Same(value)
        if type(value) in _VALUES:
            return (type(value), value)
        raise _NoKey(type(value).__name__)

    def _value(self, value: Any) -> Hashable:
        if value is MISSING or isinstance(value, (ReferenceType, RemovableHandle)):
            return type(value).__name__
        if isinstance(value, torch.Tensor):
            if id(value) not in self._tensors:
                raise _NoKey("a tensor")
            return ("tensor", self._tensors[id(value)])
        if isinstance(value, tuple):
            return (type(value), tuple(map(self._value, value)))
        if isinstance(value, (list, dict, set, deque)):
            more = self._number(vars(value)) if hasattr(value, "__dict__") else None
            return (type(value), self._number(value), more)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return ("method", self._value(value.__self__), self._value(value.__func__))
        if isinstance(value, functools.partial):
            return ("partial", *map(self._value, (value.func, value.args, value.keywords)))
        if isinstance(value, (type, types.BuiltinFunctionType, types.ModuleType)):
            return _Same(value)
        if isinstance(value, (*_VALUES, float, enum.Enum)) or not (isinstance(value, nn.Module) or is_followed(value)):
            return self._plain(value)
        attributes = self._number(vars(value)) if hasattr(value, "__dict__") else None
        slots = any(vars(kind).get("__slots__") for kind in type(value).__mro__)
        if attributes is None and not slots:
            raise _NoKey(type(value).__name__)
        return (_Same(type(value)), attributes, self._number(value) if slots else None)

    def _function(self, value: types.FunctionType) -> Hashable:
        cells = tuple([self._number(cell) for cell in value.__closure__ or ()])
        return (_Same(value.__code__), self._value(value.__defaults__), self._value(value.__kwdefaults__), cells)

    def _attributes(self, module: nn.Module) -> Hashable:
        """Return the keys of all attributes of a module, also of those that its own forward does not read."""
        parts: list[Hashable] = []
        for key, value in vars(module).items():
            if key not in STORES and key not in UNREAD:
                try:
                    parts.append((key, self._plain(value)))
                except _NoKey:
                    parts.append((key, self._value(value)))
        return tuple(parts)

    def _shared(self, value: Any, depth: int = DEPTH) -> Hashable:
        """Return the key of what is the same object for both models, a global variable or what a class holds: it may
        hold other things by now, or have been exchanged.
        """
        try:
            return self._plain(value)
        except _NoKey:
            pass
        if isinstance(value, torch.Tensor):
            return (_Same(value), value._version)
        self._left -= 1
        if self._left < 0:
            raise _NoKey("much that is shared")
        parts: list[Hashable] = [_Same(value), _code(value)]
        if depth and isinstance(value, (dict, types.MappingProxyType)):
            parts += [(self._shared(key, 0), self._shared(item, depth - 1)) for key, item in list(value.items())]
        elif depth and isinstance(value, (list, tuple, deque)):
            parts += [self._shared(item, depth - 1) for item in value]
        elif depth and not isinstance(value, (types.FunctionType, type)) and is_followed(value):
            members = [item for kind in type(value).__mro__ if _own(kind) for item in vars(kind).items()]
            parts += [(key, self._shared(item, depth - 1)) for key, item in members if not key.startswith("__")]
            parts.append(self._shared(vars(value), depth - 1) if hasattr(value, "__dict__") else None)
        return tuple(parts)

    def _globals(self, classes: Mapping[type, None]) -> Iterator[Hashable]:
        """Yield the keys of global variables that the code of classes, and of functions among them, names."""
        waiting: list[Any] = [
            function
            for kind in classes
            if _own(kind)
            for member in vars(kind).values()
            for function in _functions(member)
        ]
        waiting += [function for value in self._alive if isinstance(value, dict) for function in _patched(value)]
        seen = set[int]()
        while waiting:
            function = waiting.pop()
            if id(function) in seen or (function.__module__ or "").partition(".")[0] in OPAQUE:
                continue
            seen.add(id(function))
            self._alive.append(function)
            if len(seen) > FOLLOWED:
                raise _NoKey("many functions")
            names = dict.fromkeys(_names(function.__code__))
            for name in names:
                if name not in function.__globals__:
                    continue
                value = function.__globals__[name]
                items = [value]
                if isinstance(value, types.ModuleType) and value.__name__.partition(".")[0] not in OPAQUE:
                    items += [vars(value)[other] for other in names if other in vars(value)]
                for item in items:
                    yield (name, self._shared(item))
                    waiting += _functions(item)
            for value in map(_contents, function.__closure__ or ()):
                yield self._shared(value)
                waiting += _functions(value)


def _own(kind: type) -> bool:
    """Whether a class is of the model's author: neither torch's nor of Python itself."""
    return kind is not object and package_of(kind) not in OPAQUE


def _contents(cell: Any) -> Any:
    return getattr(cell, "cell_contents", None)


def _code(value: Any) -> Hashable:
    """Return the code of a function, which may be exchanged, and that of what it wraps."""
    return tuple([(_Same(function.__code__), _Same(function.__defaults__)) for function in _functions(value)])


def _functions(member: Any) -> list[types.FunctionType]:
    """Return the functions of a member of a class, a property among them, or of a module; with what they wrap."""
    if isinstance(member, (staticmethod, classmethod, types.MethodType)):
        member = member.__func__
    elif isinstance(member, property):
        member = member.fget
    elif isinstance(member, (functools.cached_property, functools.partial)):
        member = member.func
    functions = []
    while isinstance(member, types.FunctionType):
        functions.append(member)
        member = member.__dict__.get("__wrapped__")
    return functions


def _patched(attributes: dict[Any, Any]) -> list[types.FunctionType]:
    return [function for value in attributes.values() for function in _functions(value)]


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _settings() -> Hashable:
    """Return the settings of torch that decide what a model does."""
    if _get_current_function_mode_stack() or _get_current_dispatch_mode() is not None:
        raise _NoKey("a mode")
    backends = torch.backends
    return (
        *(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()),
        autocast_state(),
        *(torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()),
        *(backends.mha.get_fastpath_enabled(), backends.mkldnn.enabled, backends.cudnn.enabled),
        *(backends.cuda.flash_sdp_enabled(), backends.cuda.mem_efficient_sdp_enabled()),
        *(backends.cuda.math_sdp_enabled(), backends.cuda.cudnn_sdp_enabled()),
    )


def _environment() -> Hashable:
    """Return the environment, which a first export adds to."""
    return tuple(sorted(os.environ.items()))


@dataclass(frozen=True)
class Kept:
    """A graph of the names `model.*`, with what else an export gives.

    Args:
        graph: is copied for each model.
        constants: of the graph, by name; each model's graph has its own copies.
        training: mode of the model.
        guards, sizes: as in `Conditions`.
    """

    graph: fx.Graph
    constants: Mapping[str, torch.Tensor]
    training: bool
    guards: Callable[..., Any] | None
    sizes: tuple[tuple[int | None, ...] | None, ...]

    def on(self, model: nn.Module, owner: str) -> fx.GraphModule:
        """Return a graph module that reads this model."""
        holder = nn.Module()
        for name, value in self.constants.items():
            holder._buffers[name] = value.clone()
        holder._modules[owner] = model
        holder.training = self.training
        live = graph_module_like(holder, copy_graph(self.graph))
        live.meta = {}
        set_record(live, Record(owner=owner))
        return live


def kept(state: Hashable | None) -> Kept | None:
    """Return the graph that was kept for a state."""
    key = (state, _environment())
    graph = _KEPT.pop(key, None) if state is not None else None
    if graph is not None:
        _KEPT[key] = graph
    return graph


def keep(state: Hashable | None, live: fx.GraphModule, owner: str, guards: Any, sizes: Any) -> None:
    """Keep a graph for a state, unless it holds more than names and small constants."""
    if state is None:
        return
    constants = {**live._parameters, **live._buffers}
    names = {str(node.target) for node in live.graph.nodes if node.op in ("get_attr", "call_module")}
    if any(name not in constants and not name.startswith(f"{owner}.") for name in names):
        return
    if any(type(value) is not torch.Tensor or value.requires_grad for value in constants.values()):
        return
    if sum(value.nbytes for value in constants.values() if value is not None) > BYTES:
        return
    copies = {name: value.detach().clone() for name, value in constants.items() if value is not None}
    _KEPT[state, _environment()] = Kept(copy_graph(live.graph), copies, live.training, guards, sizes)
    while len(_KEPT) > MOST:
        _KEPT.popitem(last=False)


def forget() -> None:
    """Drop all graphs that are kept."""
    _KEPT.clear()
