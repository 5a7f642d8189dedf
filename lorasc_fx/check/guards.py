"""Guards on the Python state that a model's forward can read: is a graph still valid for this model?

A graph holds as constants what forward read from Python while it was traced: numbers, strings, modes, the contents of
containers and objects, tensors that are neither parameters nor buffers, hooks, submodules, and a `forward` set on an
instance. `walk` yields the objects that hold such state, and `Guards` records their contents. docs/capture.md lists
what is guarded and what is not.
"""

from __future__ import annotations

import argparse
import enum
import functools
import itertools
import math
import operator
import sys
import types
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import ReferenceType

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

MAX_ENTRIES = 256
"""A container with more entries, such as a vocabulary, is guarded by its length alone."""
MAX_DEPTH = 8
"""Levels of containers and objects that are compared if an object was replaced by another one."""
MAX_OBJECTS = 4096
"""Containers and objects that are followed, apart from modules. The others are guarded by identity."""

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
STORES = {"_parameters", "_buffers", "_modules", *HOOKS}
"""Dictionaries of a module that are never replaced. Each has its own rule for its contents."""
UNREAD = {
    "_non_persistent_buffers_set",
    "_is_full_backward_hook",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    "_flat_weight_refs",
    "_compiled_call_impl",
}
"""Attributes of modules that no forward reads. The flags of hooks change together with the hooks."""
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in HOOKS)

_PLAIN = (
    *(bool, int, float, complex, str, bytes, frozenset, slice, range, enum.Enum, types.MethodType),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
)
"""Types whose values are compared by `==`."""
_VALUES = (bool, int, float, str, type(None), torch.dtype, torch.device, enum.Enum)
_OBJECTS = (nn.Module, torch.Tensor, dict, list, set, type, types.FunctionType, types.BuiltinFunctionType)
"""Types that dynamo can compare while it traces: `_VALUES` by value, `_OBJECTS` by identity."""
OPAQUE = {"lorasc_fx", "torch", "numpy", "sympy", "lightning", "pytorch_lightning", *sys.stdlib_module_names}
"""Packages whose objects are guarded by identity alone: they count, log and lock, but hold no settings of a model."""
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)

MISSING = object()
"""Stands for an entry that does not exist."""


@dataclass(frozen=True)
class Held:
    """One object that holds Python state.

    Args:
        name: of the object, as the model's Python would write it.
        where: a dict (also the `__dict__` of an object), list, deque, set, the namespace of a class, or an object.
        keys: entries that forward may read.
        attributes: whether the entries are attributes rather than items.
        restored: whether an isolated run restores it.
        of_model: whether it is state of the model, and not of a function that the model calls.
        sized: whether the number of entries matters.
        ordered: whether the keys are positions in a dict. Torch gives each hook a new number as its key.
    """

    name: str
    where: Any
    keys: tuple[Any, ...] = ()
    attributes: bool = False
    restored: bool = True
    of_model: bool = True
    sized: bool = True
    ordered: bool = False

    def entry(self, key: Any) -> str:
        """Return the name of an entry."""
        return f"{self.name}.{key}".lstrip(".") if self.attributes else f"{self.name}[{key!r}]"

    def read(self, key: Any) -> Any:
        """Return the current value of an entry, or MISSING. A defaultdict is not asked to make one."""
        if self.ordered:
            return next(itertools.islice(self.where.values(), key, None), MISSING)
        if isinstance(self.where, dict):
            return dict.get(self.where, key, MISSING)
        if isinstance(self.where, types.MappingProxyType):
            return self.where.get(key, MISSING)
        if isinstance(self.where, (list, deque)):
            return self.where[key] if key < len(self.where) else MISSING
        return getattr(self.where, key, MISSING)

    def contents(self) -> Any:
        """Return a copy of a container. Of a module's attributes, parameters, buffers and modules are left out."""
        if isinstance(self.where, dict):
            return {key: value for key, value in self.where.items() if not self.attributes or key not in STORES}
        return self.where.copy()

    def shape(self, without: frozenset[Any]) -> Any:
        """Return what a container holds besides the values of its entries: its keys, its elements, or its length."""
        if self.ordered:
            return range(len(self.where))
        if isinstance(self.where, dict):
            return self.where.keys() - without if without else tuple(self.where)
        if isinstance(self.where, set):
            return frozenset(self.where)
        return len(self.where) if isinstance(self.where, (list, deque)) else None


class Change(NamedTuple):
    """An entry that has changed.

    Args:
        holder, key: name of the holder, and key of the entry in it. The key is None for a container as a whole.
        entry: name of the entry.
        is_new: whether state of the model has another value, and not only another object of the same value.
    """

    holder: str
    key: Any
    entry: str
    is_new: bool


def walk(model: nn.Module) -> Iterator[Held]:
    """Yield the objects in which the model keeps Python state, each once, and before those reached through it."""
    return _Walk(model).places()


def attribute_tensors(model: nn.Module, places: Iterable[Held] | None = None) -> list[tuple[str, torch.Tensor]]:
    """Return the tensors in the model's Python state, by name, without parameters and buffers.

    Args:
        model: whose state it is.
        places: what `walk` yields, if the caller has it.
    """
    registered = {id(value) for value in (*model.parameters(), *model.buffers())}
    tensors: dict[int, tuple[str, torch.Tensor]] = {}
    for held in walk(model) if places is None else places:
        for key in held.keys:
            for part in _parts(held.read(key)):
                if isinstance(part, torch.Tensor) and id(part) not in registered:
                    tensors.setdefault(id(part), (held.entry(key), part))
    return list(tensors.values())


def _parts(value: Any) -> tuple[Any, ...]:
    """Return the items of a tuple, nested ones too, or the value itself."""
    return tuple(part for item in value for part in _parts(item)) if type(value) is tuple else (value,)


class _Walk:
    """Follows what a model holds, in the order of its modules."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen: set[int] = set()
        self._alive: list[Any] = []  # an id is valid only while its object lives
        self._waiting: list[tuple[str, Any, bool]] = [("", model, True)]
        self._left = MAX_OBJECTS
        self._is_graph = isinstance(model, fx.GraphModule)

    def places(self) -> Iterator[Held]:
        while self._waiting:
            name, value, of_model = self._waiting.pop()
            if id(value) not in self._seen:
                self._seen.add(id(value))
                self._alive.append(value)
                yield from (self._module if isinstance(value, nn.Module) else self._other)(name, value, of_model)
        for name in _GLOBAL_HOOKS:
            hooks = vars(torch_module)[name]
            places = tuple(range(len(hooks)))
            yield Held(f"torch.nn.modules.module.{name}", hooks, places, restored=False, of_model=False, ordered=True)
        for kind in dict.fromkeys(kind for module in self._model.modules() for kind in type(module).__mro__):
            if package_of(kind) not in OPAQUE:
                keys = dict.fromkeys(("forward", *(key for key in vars(kind) if not key.startswith("__"))))
                yield Held(kind.__qualname__, vars(kind), tuple(keys), attributes=True, restored=False, of_model=False)

    def _module(self, name: str, module: nn.Module, of_model: bool) -> Iterator[Held]:
        if package_of(type(module)) == "lorasc_fx":  # a cascade that a hook knows
            return
        held, dot = vars(module), f"{name}." if name else ""
        # The graph of a GraphModule does not depend on the mode: its modules are called, and read it then.
        skipped = UNREAD | STORES | ({"training"} if self._is_graph else set())
        # A module of torch.nn reads only some of its attributes, unless a hook or a new forward reads others.
        plain = "forward" not in held and not any(held.get(store) for store in HOOKS)
        kind: Any = type(module)
        read = _read_by(kind) if plain and module is not self._model else None
        keys = tuple(key for key in held if key not in skipped and (read is None or key in read))
        yield Held(name, held, keys, attributes=True, of_model=of_model)
        behind = [(f"{dot}{key}", held[key], of_model) for key in keys]
        for store in ("_parameters", "_buffers"):  # only which are None: the tensors are read at each call
            if isinstance(values := held.get(store), dict):
                none = tuple(key for key, value in values.items() if value is None)
                yield Held(name, values, none, attributes=True, restored=False, of_model=of_model, sized=False)
        for store in HOOKS:
            if isinstance(hooks := held.get(store), dict):
                yield Held(f"{dot}{store}", hooks, tuple(range(len(hooks))), of_model=of_model, ordered=True)
                behind += [(f"{dot}{store}", hook, of_model) for hook in hooks.values()]
        if isinstance(children := held.get("_modules"), dict):
            yield Held(name, children, tuple(children), attributes=True, of_model=of_model)
            behind += [(f"{dot}{key}", child, of_model) for key, child in children.items()]
        self._waiting += reversed(behind)

    def _other(self, name: str, value: Any, of_model: bool) -> Iterator[Held]:
        if isinstance(value, tuple):
            self._waiting += reversed([(f"{name}[{index}]", part, of_model) for index, part in enumerate(value)])
        elif isinstance(value, functools.partial):
            self._waiting += [(name, part, of_model) for part in (value.keywords, value.args, value.func)]
        elif isinstance(value, types.MethodType):
            self._waiting += [(name, value.__self__, of_model), (name, value.__func__, of_model)]
        elif isinstance(value, types.FunctionType):
            for variable, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
                yield from self._followed(Held(f"{name}.{variable}", cell, ("cell_contents",), True, False, False))
        elif isinstance(value, (list, deque, dict, set)):
            keys: Iterable[Any] = value if isinstance(value, dict) else range(len(value))
            unread = isinstance(value, set) or len(value) > MAX_ENTRIES
            yield from self._followed(Held(name, value, () if unread else tuple(keys), of_model=of_model))
            if isinstance(value, dict):
                yield from self._attributes(name, value, of_model)
        elif is_followed(value):
            yield from self._attributes(name, value, of_model)
            if slots := tuple(slot for kind in type(value).__mro__ for slot in slots_of(kind)):
                yield from self._followed(Held(name, value, slots, True, False, of_model))

    def _attributes(self, name: str, value: Any, of_model: bool) -> Iterator[Held]:
        if hasattr(value, "__dict__"):
            yield from self._followed(Held(name, vars(value), tuple(vars(value)), True, of_model=of_model))

    def _followed(self, held: Held) -> Iterator[Held]:
        self._left -= 1
        if self._left >= 0:
            yield held
            self._waiting += reversed([(held.entry(key), held.read(key), held.of_model) for key in held.keys])


@functools.cache
def _read_by(kind: type[nn.Module]) -> frozenset[str] | None:
    """Return the names that the forward of a class of torch.nn reads, from its code. None for all other classes.

    For example, a linear layer reads neither its numbers of features nor its mode.
    """
    if not kind.__module__.startswith("torch.nn.modules."):
        return None
    names, waiting = set[str](), ["forward"]
    while waiting:
        name = waiting.pop()
        codes = [_code(vars(base)[name]) for base in kind.__mro__ if base is not nn.Module and name in vars(base)]
        for code in (code for code in codes if code is not None):
            nested = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
            codes += nested
            waiting += [name for name in code.co_names if name not in names]
            names.update(code.co_names)
    return frozenset(names)


def _code(member: Any) -> types.CodeType | None:
    function = getattr(member, "fget", getattr(member, "__func__", member))
    return getattr(function, "__code__", None)


def package_of(kind: type) -> str:
    """Return the name of the package of a class."""
    return str(kind.__module__).partition(".")[0]


def slots_of(kind: type) -> tuple[str, ...]:
    """Return the names in `__slots__` of a class."""
    slots = vars(kind).get("__slots__", ())
    return tuple(slot for slot in ((slots,) if isinstance(slots, str) else slots) if not slot.startswith("__"))


def is_followed(value: Any) -> bool:
    """Whether an object is state of the model: an instance of a class of the model's author, or a namespace."""
    if isinstance(value, (torch.Tensor, type, enum.Enum, types.ModuleType)):
        return False
    return isinstance(value, _NAMESPACES) or package_of(type(value)) not in OPAQUE


def _alike(value: Any, before: Any, depth: int = MAX_DEPTH) -> bool:
    """Whether a value may replace an earlier object, because it holds the same.

    The earlier object itself is unchanged: what it holds has its own guards.
    """
    if value is before:
        return True
    if type(value) is not type(before) or not depth:
        return False
    if isinstance(before, (tuple, list, deque)):
        return len(value) == len(before) and all(_alike(*pair, depth - 1) for pair in zip(value, before, strict=True))
    if isinstance(before, dict):
        return value.keys() == before.keys() and all(_alike(value[key], before[key], depth - 1) for key in before)
    if isinstance(before, (*_PLAIN, set)):
        return bool(value == before) or (isinstance(before, float) and math.isnan(value) and math.isnan(before))
    if isinstance(before, RemovableHandle):
        return True  # the hook that it removes has its own guard
    if isinstance(before, functools.partial):
        return _alike((value.func, value.args, value.keywords), (before.func, before.args, before.keywords), depth - 1)
    if isinstance(before, types.FunctionType):
        return value.__code__ is before.__code__ and _alike(_bound(value), _bound(before), depth - 1)
    return is_followed(before) and hasattr(before, "__dict__") and _alike(vars(value), vars(before), depth - 1)


def same_value(value: Any, before: Any) -> bool:
    """Whether two values are equal. Unlike guards, this compares the values of tensors."""
    if isinstance(value, torch.Tensor) and isinstance(before, torch.Tensor) and value is not before:
        alike = type(value) is type(before) and value.shape == before.shape and value.dtype == before.dtype
        return alike and (isinstance(value, FakeTensor) or torch.equal(value, before))
    if isinstance(value, (list, tuple, deque)) and type(value) is type(before):
        return len(value) == len(before) and all(map(same_value, value, before))
    if isinstance(value, dict) and type(value) is type(before):
        return list(value) == list(before) and all(map(same_value, value.values(), before.values()))
    return _alike(value, before)


def _bound(function: types.FunctionType) -> tuple[Any, ...]:
    """Return what a function holds besides its code: defaults and closure."""
    cells = [getattr(cell, "cell_contents", MISSING) for cell in function.__closure__ or ()]
    return (function.__defaults__, function.__kwdefaults__, *cells)


def _by_value(value: Any) -> bool:
    """Whether dynamo can compare a value by `==`."""
    if type(value) is dict:
        return all(map(_by_value, value.values())) and all(type(key) is str for key in value)
    return all(map(_by_value, value)) if type(value) in (list, tuple) else isinstance(value, _VALUES)


class Guards:
    """A record of a model's Python state at the time when a graph was made.

    `hold` is asked before each call of the graph. It compares identities in flat lists, and values only of plain
    objects that were replaced.

    Args:
        model: whose state is guarded.
        without: holder and key of the entries that forward itself sets at each call.
        written: tensors that forward, and so the graph, writes into. They are read at each call.
    """

    def __init__(
        self,
        model: nn.Module,
        without: Collection[tuple[str, Any]] = (),
        written: Collection[torch.Tensor] = (),
    ) -> None:
        registered = {id(value) for value in (*model.parameters(), *model.buffers(), *written)}
        self._held: list[tuple[Held, frozenset[Any], Any, dict[Any, Any]]] = []
        self._shapes: list[tuple[Any, frozenset[Any], Any]] = []
        # `hold` runs before each call, after the model has evicted these objects from the processor's caches. Parallel
        # lists let it compare in C, without reading a tuple per entry or a length per empty container.
        self._empty: list[Any] = []
        self._sized: list[Any] = []
        self._sizes: list[int] = []
        self._holders: list[dict[Any, Any]] = []
        self._keys: list[Any] = []
        self._values: list[Any] = []
        self._items: list[tuple[Any, Any, Any]] = []
        self._others: list[tuple[Callable[[], Any], Any]] = []
        self._versions: list[tuple[torch.Tensor, int, str]] = []
        # What dynamo can compare, for `hold_traced`; hooks by their position.
        self._traced: list[tuple[Any, Any, Any, bool]] = []
        self._hooks: list[tuple[Any, int, Any]] = []
        self._modules = list(model.modules())
        self._kinds = [type(module) for module in self._modules]
        unstable: dict[str, set[Any]] = {}
        for holder, key in without:
            unstable.setdefault(holder, set()).add(key)
        for held in walk(model):
            skipped = unstable.get(held.name, set()) | ({"_compiled_call_impl"} if held.where is vars(model) else set())
            if None not in skipped:
                self._guard(held, frozenset(skipped), registered)

    def _guard(self, held: Held, skipped: frozenset[Any], registered: set[int]) -> None:
        where = held.where
        values = {
            key: value
            for key, value in ((key, held.read(key)) for key in held.keys if key not in skipped)
            if id(value) not in registered and not isinstance(value, ReferenceType)
        }
        self._held.append((held, skipped, held.shape(skipped) if held.sized else None, values))
        if isinstance(where, set) or (skipped and isinstance(where, dict)):
            self._shapes.append((where, skipped, held.shape(skipped)))
        elif held.sized and isinstance(where, (dict, list, deque)):
            if where:
                self._sized.append(where)
                self._sizes.append(len(where))
            else:
                self._empty.append(where)
        for key, value in values.items():
            if isinstance(where, (dict, list)) and (_by_value(value) or isinstance(value, _OBJECTS)):
                if held.ordered:
                    self._hooks.append((where, key, value))
                else:
                    self._traced.append((where, key, value, _by_value(value)))
            if type(where) is dict and not held.ordered:
                self._holders.append(where)
                self._keys.append(key)
                self._values.append(value)
            elif isinstance(where, (list, types.MappingProxyType)) and value is not MISSING:
                self._items.append((where, key, value))
            else:
                self._others.append((functools.partial(held.read, key), value))
            for part in _parts(value):
                if isinstance(part, torch.Tensor) and id(part) not in registered:
                    if not isinstance(part, FakeTensor) and not part.is_inference():
                        self._versions.append((part, part._version, held.entry(key)))
                elif type(part).__module__ == "numpy" and type(part).__name__ == "ndarray" and part.size <= MAX_ENTRIES:
                    self._others.append((part.tobytes, part.tobytes()))

    def hold(self) -> bool:
        """Whether the state is unchanged."""
        try:
            current = map(operator.getitem, self._holders, self._keys)
            if not all(map(operator.is_, current, self._values)):  # first, because they include the modes
                for where, key, expected in zip(self._holders, self._keys, self._values, strict=True):
                    if where[key] is not expected and not _alike(where[key], expected):
                        return False
            if any(self._empty) or list(map(len, self._sized)) != self._sizes:
                return False
            for items, key, expected in self._items:
                if items[key] is not expected and not _alike(items[key], expected):
                    return False
        except KeyError:
            return False
        for where, skipped, expected in self._shapes:  # dicts with unstable entries, and sets
            if (where.keys() - skipped if skipped else where) != expected:
                return False
        for read, expected in self._others:
            if (value := read()) is not expected and not _alike(value, expected):
                return False
        for tensor, version, _ in self._versions:
            if tensor._version != version:
                return False
        return list(map(type, self._modules)) == self._kinds

    def hold_traced(self) -> bool:
        """As `hold`, simple enough for dynamo to trace, which then guards what is read here.

        Leaves out what dynamo cannot compare: in-place writes, entries of sets, classes and slots, and rare types.
        """
        for where in self._empty:
            if len(where) != 0:
                return False
        for where, size in zip(self._sized, self._sizes, strict=True):
            if len(where) != size:
                return False
        for where, key, expected, by_value in self._traced:
            if isinstance(where, dict) and key not in where:
                return False
            value = where[key]
            if value is not expected and not (by_value and type(value) is type(expected) and value == expected):
                return False
        for where, index, expected in self._hooks:  # noqa: SIM110 - dynamo traces a loop
            if list(where.values())[index] is not expected:
                return False
        return True

    def changes(self) -> list[Change]:
        """Return the changes since. For messages and the preflight; too slow for each call."""
        changes = []
        for held, skipped, shape, before in self._held:
            if shape is not None and (current := held.shape(skipped)) != shape:
                added = [key for key in current if key not in shape] if isinstance(held.where, dict) else [None]
                names = [held.name if key is None else held.entry(key) for key in added]
                changes += [Change(held.name, *pair, held.of_model) for pair in zip(added, names, strict=True)]
            for key, value in before.items():
                if not _alike(current := held.read(key), value):
                    is_new = held.of_model and not same_value(current, value)
                    changes.append(Change(held.name, key, held.entry(key), is_new))
        written = [name for tensor, version, name in self._versions if tensor._version != version]
        changes += [Change(name, None, name, False) for name in written]
        for module, kind in zip(self._modules, self._kinds, strict=True):
            if type(module) is not kind:
                changes.append(Change(kind.__qualname__, "__class__", f"{kind.__qualname__}.__class__", False))
        return changes

    def written(self) -> list[torch.Tensor]:
        """Return the tensors that were written in place since."""
        return [tensor for tensor, version, _ in self._versions if tensor._version != version]
