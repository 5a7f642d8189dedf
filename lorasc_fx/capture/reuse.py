"""A cache of exported graphs: a second model in the same state gets a copy of the first one's graph.

The key of a graph is everything that an export reads (`key_of`). Most of it is one pickle: the modules with their
Python state, the inputs without their values, and the classes, functions and global variables behind them. The pickler
writes a tensor by name, and a class or code object by its identity. A hook, a tensor that is neither parameter nor
buffer, and an object of a foreign library cannot be compared by value. If the model holds one, nothing is cached.

A cached graph holds no weights and no model. `capture` compares it with the new model, as it does with a new graph.
"""

from __future__ import annotations

import enum
import functools
import io
import os
import pickle  # noqa: TID251 - only writes keys, which nothing reads back
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import fx, nn
from torch._subclasses import FakeTensor
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode, is_traceable_wrapper_subclass
from torch.utils.hooks import RemovableHandle

from lorasc_fx.capture.captured import OWNER, Conditions, with_owner
from lorasc_fx.check.guards import HOOKS, OPAQUE, UNREAD, is_followed, package_of, slots_of
from lorasc_fx.graph import copy_graph
from lorasc_fx.signature import whole
from lorasc_fx.util.accelerator import autocast_state
from lorasc_fx.util.fingerprint import checksum

MAX_GRAPHS = 16
"""Graphs in the cache; the least recently used one is dropped first."""
MAX_OBJECTS = 1 << 16
"""Objects that the key of a graph may depend on."""
MAX_KEY = 1 << 24
"""Bytes of a key."""
MAX_BYTES = 1 << 20
"""Size of the constants of a cached graph."""

_CACHE: OrderedDict[Hashable, CachedGraph] = OrderedDict()


class _NoKey(Exception):
    """Something that cannot be compared by value."""


def key_of(model: nn.Module, args: Any, kwargs: Mapping[str, Any], *options: Hashable) -> Hashable | None:
    """Return all that an export of a call depends on, or None if it cannot be compared.

    Args:
        model: in its current state.
        args, kwargs: of the call; the values of tensors do not count.
        options: of the export.
    """
    try:
        return (*options, _Pickler(model).key(args, kwargs), _settings())
    except (_NoKey, RecursionError, pickle.PicklingError):
        return None


class _Identity:
    """Equal to another one of the same object, while that lives. Holds the object weakly if it can."""

    def __init__(self, value: Any) -> None:
        self._id = id(value)
        try:
            self._ref: Callable[[], Any] = ref(value)
        except TypeError:  # such as a builtin function
            self._ref = lambda: value

    def __hash__(self) -> int:
        return self._id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and (value := self._ref()) is other._ref() and id(value) == self._id


_BY_VALUE = frozenset(
    (bool, int, float, complex, str, bytes, type(None), tuple, list, dict, set, frozenset, slice, range, types.CellType)
)
_NUMBERS = (int, float, complex, str, bytes)
_BY_NAME = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_BY_IDENTITY = (type, types.BuiltinFunctionType, types.ModuleType, types.CodeType, enum.Enum)
_UNREAD = (ReferenceType, RemovableHandle)
_DESCRIPTORS = (property, staticmethod, classmethod, functools.cached_property)
_CONTAINERS = (list, tuple, dict, set, frozenset, deque)
_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
_FOLLOWED = (*_FUNCTIONS, *_DESCRIPTORS, *_CONTAINERS, types.MappingProxyType)
_TENSORS = (torch.Tensor, nn.Parameter)


class _Pickler(pickle.Pickler):
    """Writes what an export of a model reads. Nothing ever reads the pickle back.

    References between objects are written as such, so that equal keys mean equal ties. Names and code are compared by
    `identities`, in the order in which they were reached.
    """

    def __init__(self, model: nn.Module) -> None:
        self._file = io.BytesIO()
        super().__init__(self._file, pickle.HIGHEST_PROTOCOL)
        self._model = model
        self._names: dict[int, str] = {}  # of parameters and buffers
        self._identities: dict[int, tuple[int, Any]] = {}  # number and object, which lives as long as its id is used
        self._functions: list[types.FunctionType] = []
        self._of_model = True

    def key(self, args: Any, kwargs: Mapping[str, Any]) -> Hashable:
        """Return the key of a call."""
        if any(vars(torch_module)[f"_global{name}"] for name in HOOKS):
            raise _NoKey("a hook of all modules")
        tensors = tuple(self._registered())
        inputs = self._inputs(args, kwargs)
        self.dump(self._model)
        # What follows is shared by all models, and so the same object for each: its identity is a value.
        self._of_model = False
        self.clear_memo()
        kinds = dict.fromkeys(kind for module in self._model.modules() for kind in type(module).__mro__)
        waiting = [*self._functions]
        for kind in kinds:
            self.dump(vars(kind) if _is_own(kind) else vars(kind).get("forward"))
            waiting += [function for member in vars(kind).values() if _is_own(kind) for function in _functions(member)]
        seen = set[int]()
        while waiting:
            function = waiting.pop()
            if id(function) not in seen:
                seen.add(id(function))
                values = list(_globals_of(function))
                self.dump(values)
                waiting += [other for _, value in values for other in _functions(value)]
        if self._file.tell() > MAX_KEY:
            raise _NoKey("much that is shared")
        identities = tuple([_Identity(value) for _, value in self._identities.values()])
        return (tensors, inputs, self._file.getvalue(), identities)

    def _registered(self) -> Iterator[Hashable]:
        """Yield what an export reads of each parameter and buffer, and learn its name."""
        memory: dict[int, str] = {}
        parameters = self._model.named_parameters(remove_duplicate=False)
        buffers = self._model.named_buffers(remove_duplicate=False)
        for is_buffer, named in enumerate((parameters, buffers)):
            for name, value in named:
                if is_traceable_wrapper_subclass(value) or isinstance(value, FakeTensor):
                    raise _NoKey("a quantized or fake tensor, which has no memory of its own")
                tied = self._names.setdefault(id(value), name)
                shared = memory.setdefault(value.untyped_storage().data_ptr(), name) if value.numel() else ""
                yield name, tied, shared, _layout(value), value.storage_offset(), is_buffer and checksum(value)

    def _inputs(self, args: Any, kwargs: Mapping[str, Any]) -> Hashable:
        """Return the structure of the arguments. Other leaves than tensors are written as state of the model is."""
        leaves, spec = pytree.tree_flatten((args, dict(kwargs)), is_leaf=whole)
        first: dict[int, int] = {}
        layouts: list[Hashable] = []
        for index, leaf in enumerate(leaves):
            if not isinstance(leaf, torch.Tensor):
                self.dump(leaf)
            elif id(leaf) in self._names:
                raise _NoKey("a weight as an input")
            else:
                layouts.append((index, first.setdefault(id(leaf), index), _layout(leaf)))
        return str(spec), tuple(layouts)

    def persistent_id(self, value: Any) -> Any:
        """Return what is written in place of an object; None to write the object itself."""
        if type(value) in _BY_VALUE:
            return None
        if isinstance(value, torch.Tensor):
            if id(value) in self._names:
                return self._names[id(value)]
            if self._of_model:  # the graph reads it from the model, and a copy would not
                raise _NoKey("a tensor")
            return self._identity(value), value._version
        if isinstance(value, _BY_NAME):
            return repr(value)
        if isinstance(value, _UNREAD):
            return type(value).__name__
        return self._identity(value) if isinstance(value, _BY_IDENTITY) or self._is_opaque(value) else None

    def _is_opaque(self, value: Any) -> bool:
        """Whether nothing can be said of a shared object except which one it is."""
        return not (self._of_model or isinstance(value, _FOLLOWED) or is_followed(value))

    def _identity(self, value: Any) -> int:
        if len(self._identities) > MAX_OBJECTS:
            raise _NoKey("too many objects")
        return self._identities.setdefault(id(value), (len(self._identities), value))[0]

    def reducer_override(self, value: Any) -> Any:
        """Return how an object is written: as its type and its contents."""
        if type(value) in _BY_VALUE - {types.CellType}:
            return NotImplemented  # pickle knows these
        return tuple, (), self._contents(value)

    def _contents(self, value: Any) -> tuple[Any, ...]:
        """Return what an object holds, which may lead back to it."""
        kind = type(value)
        if isinstance(value, types.FunctionType):
            if self._of_model:
                self._functions += _functions(value)
            return value.__code__, value.__defaults__, value.__kwdefaults__, value.__closure__, vars(value)
        if isinstance(value, types.MethodType):
            return value.__self__, value.__func__
        if isinstance(value, functools.partial):
            return value.func, value.args, value.keywords
        if isinstance(value, types.CellType):
            return (_cell_contents(value),)
        if isinstance(value, _DESCRIPTORS):
            return kind, [getattr(value, name, None) for name in ("fget", "__func__", "func")]
        if isinstance(value, types.MappingProxyType):  # of a class; what torch and Python keep there does not count
            return ([(name, member) for name, member in value.items() if not name.startswith("__")],)
        if isinstance(value, nn.Module):
            if any(getattr(value, name, None) for name in HOOKS):
                raise _NoKey("a hook")
            return kind, [(name, held) for name, held in vars(value).items() if name not in UNREAD]
        if isinstance(value, dict):
            return kind, list(value.items()), getattr(value, "__dict__", None)
        if isinstance(value, _CONTAINERS):
            return kind, list(value), getattr(value, "__dict__", None)
        if isinstance(value, _NUMBERS):
            return kind, repr(value), getattr(value, "__dict__", None)
        if not is_followed(value):
            raise _NoKey(kind.__name__)
        slots = [slot for base in kind.__mro__ for slot in slots_of(base)]
        if not hasattr(value, "__dict__") and not slots:
            raise _NoKey(kind.__name__)
        members = [] if self._of_model else [vars(base) for base in kind.__mro__ if _is_own(base)]
        return kind, getattr(value, "__dict__", None), [getattr(value, slot, None) for slot in slots], members


def _layout(value: torch.Tensor) -> Hashable:
    if type(value) not in _TENSORS or value.layout is not torch.strided or value.is_meta or value.is_nested:
        raise _NoKey("a tensor of another kind")
    sizes = (tuple(value.shape), value.stride(), value.dtype, value.device)
    return (type(value), *sizes, value.requires_grad, value.is_leaf, value.is_conj(), value.is_neg())


def _is_own(kind: type) -> bool:
    """Whether a class is of the model's author: neither torch's nor Python's."""
    return kind is not object and package_of(kind) not in OPAQUE


def _cell_contents(cell: Any) -> Any:
    return getattr(cell, "cell_contents", None)


def _functions(member: Any) -> Iterator[types.FunctionType]:
    """Yield the function of a class member or of a variable, and those that it wraps."""
    for name in ("fget", "__func__", "func"):  # of a property, a method, a partial
        member = getattr(member, name, member) if isinstance(member, (*_DESCRIPTORS, *_FUNCTIONS)) else member
    while isinstance(member, types.FunctionType):
        yield member
        member = vars(member).get("__wrapped__")


def _globals_of(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the variables from outside that the code of a function names, also those of modules that it names."""
    if (function.__module__ or "").partition(".")[0] in OPAQUE:
        return
    yield from (("", _cell_contents(cell)) for cell in function.__closure__ or ())
    names = dict.fromkeys(_names_in(function.__code__))
    for name in names:
        if name not in function.__globals__:
            continue
        value = function.__globals__[name]
        yield name, value
        if isinstance(value, types.ModuleType) and value.__name__.partition(".")[0] not in OPAQUE:
            yield from ((other, vars(value)[other]) for other in names if other in vars(value))


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)


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


@dataclass(frozen=True)
class CachedGraph:
    """A graph that reads `model.*`.

    Args:
        graph: is copied for each model.
        constants: of the graph, by name. Each model's graph gets its own copies.
        conditions: the calls that the graph is valid for.
    """

    graph: fx.Graph
    constants: Mapping[str, torch.Tensor]
    conditions: Conditions

    def on(self, model: nn.Module) -> fx.GraphModule:
        """Return a graph module that reads this model."""
        holder = nn.Module()
        holder._buffers.update({name: value.clone() for name, value in self.constants.items()})
        return with_owner(holder, copy_graph(self.graph), model)


def _environment() -> Hashable:
    """Return the environment variables. A first export adds some, so they are read at the time of each access."""
    return tuple(sorted(os.environ.items()))


def cached(key: Hashable | None) -> CachedGraph | None:
    """Return the cached graph of a key, or None."""
    entry = (key, _environment())
    graph = _CACHE.get(entry) if key is not None else None
    if graph is not None:
        _CACHE.move_to_end(entry)
    return graph


def store(key: Hashable | None, live: fx.GraphModule, conditions: Conditions) -> None:
    """Cache a graph, unless it holds more than names and small constants."""
    constants = {
        name: value for name, value in (*live._parameters.items(), *live._buffers.items()) if value is not None
    }
    names = {str(node.target) for node in live.graph.nodes if node.op in ("get_attr", "call_module")}
    foreign = any(name not in constants and not name.startswith(f"{OWNER}.") for name in names)
    plain = all(type(value) is torch.Tensor and not value.requires_grad for value in constants.values())
    if key is None or foreign or not plain or sum(value.nbytes for value in constants.values()) > MAX_BYTES:
        return
    copies = {name: value.detach().clone() for name, value in constants.items()}
    _CACHE[key, _environment()] = CachedGraph(copy_graph(live.graph), copies, conditions)
    while len(_CACHE) > MAX_GRAPHS:
        _CACHE.popitem(last=False)


def forget() -> None:
    """Drop all cached graphs."""
    _CACHE.clear()
