"""Guards on the Python state of a model. They tell whether a captured graph is still valid for the model.

While forward is traced, it reads state from Python, and the graph holds the values as constants. Examples are numbers
and strings in attributes, `training`, hooks, submodules, and the contents of containers. Tensors other than parameters
and buffers, and a `forward` that is set on an instance, are such state too.

`walk` yields the objects that hold the state, and `Guards` records their contents. docs/capture.md lists the state that
is guarded.
"""

from __future__ import annotations

import argparse
import contextlib
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
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from lorasc_fx.graph.function import HOOKS
from lorasc_fx.util.torch_private import FakeTensor

MAX_ENTRIES = 256
"""Maximum number of guarded entries of a container. A larger one, such as a vocabulary, is guarded by its length."""
MAX_DEPTH = 8
"""Maximum depth to which two containers or objects are compared, if one has replaced the other."""
MAX_OBJECTS = 4096
"""Maximum number of containers and objects whose contents are guarded. All others are guarded by identity."""

STORES = {"_parameters", "_buffers", "_modules", *HOOKS}
"""Attributes of a module that are dicts with a special rule for their contents."""
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
"""Attributes of modules that need no guard: forward does not read them, or (flags of hooks) they change with the hooks.
"""
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in HOOKS)

_PLAIN = (
    *(bool, int, float, complex, str, bytes, frozenset, slice, range, enum.Enum, types.MethodType),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
)
"""Types whose values are compared by `==`."""
_VALUES = (bool, int, float, str, type(None), torch.dtype, torch.device, enum.Enum)
_OBJECTS = (nn.Module, torch.Tensor, dict, list, set, type, types.FunctionType, types.BuiltinFunctionType)
"""Types that dynamo can compare while it traces: `_VALUES` by `==`, `_OBJECTS` by identity."""
OPAQUE = {"lorasc_fx", "torch", "numpy", "sympy", "lightning", "pytorch_lightning", *sys.stdlib_module_names}
"""Packages whose objects are guarded by identity alone. They are counters, loggers and locks, not settings of a model.
"""
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)

MISSING = object()
"""The value of an entry that does not exist."""


@dataclass(frozen=True)
class StateHolder:
    """An object that holds Python state, and the keys of its entries.

    Args:
        name: expression for the object in terms of the model, such as `layers.0.config`.
        store: a dict (perhaps the `__dict__` of an object), list, deque, set, namespace of a class, or object with
            slots.
        keys: keys of the entries that forward may read.
        attributes: whether the keys are attribute names of an object. Otherwise they are keys or indices of items.
        restored: whether a run in isolation restores the contents.
        of_model: whether the state belongs to the model. Otherwise it belongs to a function that the model calls.
        sized: whether the number of entries is guarded.
        ordered: whether `keys` are positions in a dict. It is used for hooks, whose keys are numbers that torch draws.
    """

    name: str
    store: Any
    keys: tuple[Any, ...] = ()
    attributes: bool = False
    restored: bool = True
    of_model: bool = True
    sized: bool = True
    ordered: bool = False

    def entry(self, key: object) -> str:
        """Return the expression for an entry, such as `layers.0.scale` or `sizes['q']`."""
        return f"{self.name}.{key}".lstrip(".") if self.attributes else f"{self.name}[{key!r}]"

    def read(self, key: Any) -> Any:
        """Return the current value of an entry, or MISSING."""
        if self.ordered:
            return next(itertools.islice(self.store.values(), key, None), MISSING)
        if isinstance(self.store, dict):
            return dict.get(self.store, key, MISSING)  # a subclass may override `get`
        if isinstance(self.store, types.MappingProxyType):
            return self.store.get(key, MISSING)
        if isinstance(self.store, (list, deque)):
            return self.store[key] if key < len(self.store) else MISSING
        return getattr(self.store, key, MISSING)

    def contents(self) -> Any:
        """Return a shallow copy of the container. For attributes of a module, the entries in STORES are left out."""
        if isinstance(self.store, dict):
            return {key: value for key, value in self.store.items() if not self.attributes or key not in STORES}
        return self.store.copy()

    def structure(self, skipped: frozenset[object]) -> Any:
        """Return the keys of a dict without the skipped ones, the elements of a set, or the length of a list."""
        if self.ordered:
            return range(len(self.store))
        if isinstance(self.store, dict):
            return self.store.keys() - skipped if skipped else tuple(self.store)
        if isinstance(self.store, set):
            return frozenset(self.store)
        return len(self.store) if isinstance(self.store, (list, deque)) else None


class Change(NamedTuple):
    """An entry that has changed since the guards were made.

    Args:
        holder: name of the StateHolder.
        key: key of the entry in it, or None if the container was changed in another way.
        entry: expression for the entry, for messages.
        is_new: whether the value differs. False if only its identity differs, or if it is no state of the model.
    """

    holder: str
    key: Any
    entry: str
    is_new: bool


def walk(model: nn.Module) -> Iterator[StateHolder]:
    """Yield the objects in which the model keeps Python state. Each is yielded once, before the objects inside it."""
    return _Walk(model).holders()


def attribute_tensors(model: nn.Module, holders: Iterable[StateHolder] | None = None) -> list[tuple[str, torch.Tensor]]:
    """Return names and tensors in the model's Python state, without its parameters and buffers.

    Args:
        model: the model.
        holders: the result of `walk`, if the caller already has it.
    """
    registered = {id(value) for value in (*model.parameters(), *model.buffers())}
    tensors: dict[int, tuple[str, torch.Tensor]] = {}
    for holder in walk(model) if holders is None else holders:
        for key in holder.keys:
            for part in _parts(holder.read(key)):
                if isinstance(part, torch.Tensor) and id(part) not in registered:
                    tensors.setdefault(id(part), (holder.entry(key), part))
    return list(tensors.values())


def _parts(value: object) -> tuple[Any, ...]:
    """Return the items of a tuple, with nested tuples flattened, or a 1-tuple of any other value."""
    return tuple(part for item in value for part in _parts(item)) if type(value) is tuple else (value,)


class _Walk:
    """Depth-first search of the objects that a model refers to."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen: set[int] = set()
        self._alive: list[Any] = []  # an id is valid only while its object lives
        self._waiting: list[tuple[str, Any, bool]] = [("", model, True)]  # a stack of (name, object, of_model)
        self._budget = MAX_OBJECTS
        self._is_graph = isinstance(model, fx.GraphModule)

    def holders(self) -> Iterator[StateHolder]:
        """Yield the holders: those reached from the model, then global hooks, then classes."""
        while self._waiting:
            name, value, of_model = self._waiting.pop()
            if id(value) not in self._seen:
                self._seen.add(id(value))
                self._alive.append(value)
                yield from (self._module if isinstance(value, nn.Module) else self._object)(name, value, of_model)
        outside = functools.partial(StateHolder, restored=False, of_model=False)
        for attribute in _GLOBAL_HOOKS:
            hooks = vars(torch_module)[attribute]
            yield outside(f"torch.nn.modules.module.{attribute}", hooks, tuple(range(len(hooks))), ordered=True)
        # Class attributes too: forward may be patched, or a setting be set on the class.
        for kind in dict.fromkeys(kind for module in self._model.modules() for kind in type(module).__mro__):
            if _package_of(kind) not in OPAQUE:
                keys = dict.fromkeys(("forward", *(key for key in vars(kind) if not key.startswith("__"))))
                yield outside(kind.__qualname__, vars(kind), tuple(keys), attributes=True)

    def _module(self, name: str, module: nn.Module, of_model: bool) -> Iterator[StateHolder]:
        """Yield the attributes, hooks and children of a module, and push the objects in them onto the stack."""
        if _package_of(type(module)) == "lorasc_fx":  # for example, a cascade that a hook refers to
            return
        attributes, prefix = vars(module), f"{name}." if name else ""
        # A GraphModule does not read its own mode. The modules that it calls do, when they are called.
        skipped = UNREAD | STORES | ({"training"} if self._is_graph else set())
        # The code of a torch.nn class tells which attributes it reads, unless hooks or a new forward read others.
        plain = "forward" not in attributes and not any(attributes.get(store) for store in HOOKS)
        kind: Any = type(module)
        read = _read_by(kind) if plain and module is not self._model else None
        keys = tuple(key for key in attributes if key not in skipped and (read is None or key in read))
        yield StateHolder(name, attributes, keys, attributes=True, of_model=of_model)
        inner = [(f"{prefix}{key}", attributes[key], of_model) for key in keys]
        # A graph reads tensors at each call. It is only constant which parameters and buffers are None.
        for store in ("_parameters", "_buffers"):
            if isinstance(values := attributes.get(store), dict):
                none = tuple(key for key, value in values.items() if value is None)
                yield StateHolder(name, values, none, attributes=True, restored=False, of_model=of_model, sized=False)
        for store in HOOKS:
            if isinstance(hooks := attributes.get(store), dict):
                yield StateHolder(f"{prefix}{store}", hooks, tuple(range(len(hooks))), of_model=of_model, ordered=True)
                inner += [(f"{prefix}{store}", hook, of_model) for hook in hooks.values()]
        if isinstance(children := attributes.get("_modules"), dict):
            yield StateHolder(name, children, tuple(children), attributes=True, of_model=of_model)
            inner += [(f"{prefix}{key}", child, of_model) for key, child in children.items()]
        self._waiting += reversed(inner)  # reversed, because the stack is popped from its end

    def _object(self, name: str, value: object, of_model: bool) -> Iterator[StateHolder]:
        """Yield the state of an object other than a module, and push the objects in it onto the stack."""
        if isinstance(value, tuple):
            self._waiting += reversed([(f"{name}[{index}]", part, of_model) for index, part in enumerate(value)])
        elif isinstance(value, functools.partial):
            self._waiting += [(name, part, of_model) for part in (value.keywords, value.args, value.func)]
        elif isinstance(value, types.MethodType):
            self._waiting += [(name, value.__self__, of_model), (name, value.__func__, of_model)]
        elif isinstance(value, types.FunctionType):
            # Variables of the closure. Globals are not guarded.
            for variable, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
                yield from self._followed(
                    StateHolder(f"{name}.{variable}", cell, ("cell_contents",), True, False, False)
                )
        elif isinstance(value, (list, deque, dict, set)):
            keys: Iterable[Any] = value if isinstance(value, dict) else range(len(value))
            no_entries = isinstance(value, set) or len(value) > MAX_ENTRIES  # elements of a set are its structure
            yield from self._followed(StateHolder(name, value, () if no_entries else tuple(keys), of_model=of_model))
            if isinstance(value, dict):  # a subclass of dict, such as ModelOutput, may have attributes too
                yield from self._attributes(name, value, of_model)
        elif _is_followed(value):
            yield from self._attributes(name, value, of_model)
            if slots := tuple(slot for kind in type(value).__mro__ for slot in _slots_of(kind)):
                yield from self._followed(StateHolder(name, value, slots, True, False, of_model))

    def _attributes(self, name: str, value: object, of_model: bool) -> Iterator[StateHolder]:
        if hasattr(value, "__dict__"):
            yield from self._followed(StateHolder(name, vars(value), tuple(vars(value)), True, of_model=of_model))

    def _followed(self, holder: StateHolder) -> Iterator[StateHolder]:
        """Yield a holder and push its entries onto the stack, unless MAX_OBJECTS is reached."""
        self._budget -= 1
        if self._budget >= 0:
            yield holder
            self._waiting += reversed([(holder.entry(key), holder.read(key), holder.of_model) for key in holder.keys])


@functools.cache
def _read_by(kind: type[nn.Module]) -> frozenset[str] | None:
    """Return all names in the code of a torch.nn class that forward can reach. None for any other class.

    An attribute whose name is not among them needs no guard. For example, nn.Linear does not read `training`.
    """
    if not kind.__module__.startswith("torch.nn.modules."):
        return None
    # Start at forward. Each name in its code may be a method or property of the class, whose code is read too.
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


def _code(member: object) -> types.CodeType | None:
    """Return the code of a method, property, class method or static method. None for any other member of a class."""
    function = getattr(member, "fget", getattr(member, "__func__", member))
    return getattr(function, "__code__", None)


def _package_of(kind: type) -> str:
    """Return the name of the top-level package of a class."""
    return str(kind.__module__).partition(".")[0]


def _slots_of(kind: type) -> tuple[str, ...]:
    """Return the names in `__slots__` of a class."""
    slots = vars(kind).get("__slots__", ())
    return tuple(slot for slot in ((slots,) if isinstance(slots, str) else slots) if not slot.startswith("__"))


def _is_followed(value: object) -> bool:
    """Whether the attributes of an object are guarded: its class is not of an opaque package, or it is a namespace."""
    if isinstance(value, (torch.Tensor, type, enum.Enum, types.ModuleType)):
        return False
    return isinstance(value, _NAMESPACES) or _package_of(type(value)) not in OPAQUE


def _alike(value: Any, before: Any, depth: int = MAX_DEPTH) -> bool:
    """Whether a new value is equivalent to the guarded one, so that a graph traced with the old one is still valid.

    Types without a rule are equivalent only if they are identical.
    """
    if value is before:  # its contents have separate guards
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
        return True  # the hook itself is guarded
    if isinstance(before, functools.partial):
        return _alike((value.func, value.args, value.keywords), (before.func, before.args, before.keywords), depth - 1)
    if isinstance(before, types.FunctionType):
        return value.__code__ is before.__code__ and _alike(_bound(value), _bound(before), depth - 1)
    return _is_followed(before) and hasattr(before, "__dict__") and _alike(vars(value), vars(before), depth - 1)


def same_value(value: object, before: object) -> bool:
    """Whether two values are equal. Unlike `_alike`, this compares the values of tensors."""
    if isinstance(value, torch.Tensor) and isinstance(before, torch.Tensor) and value is not before:
        alike = type(value) is type(before) and value.shape == before.shape and value.dtype == before.dtype
        return alike and (isinstance(value, FakeTensor) or torch.equal(value, before))
    if isinstance(value, (list, tuple, deque)) and type(value) is type(before):
        return len(value) == len(before) and all(map(same_value, value, before))
    if isinstance(value, dict) and type(value) is type(before):
        return list(value) == list(before) and all(map(same_value, value.values(), before.values()))
    return _alike(value, before)


def _bound(function: types.FunctionType) -> tuple[Any, ...]:
    """Return the defaults of a function and the values in its closure."""
    cells = [getattr(cell, "cell_contents", MISSING) for cell in function.__closure__ or ()]
    return (function.__defaults__, function.__kwdefaults__, *cells)


def _by_value(value: Any) -> bool:
    """Whether dynamo can compare a value by `==`."""
    if type(value) is dict:
        return all(map(_by_value, value.values())) and all(type(key) is str for key in value)
    return all(map(_by_value, value)) if type(value) in (list, tuple) else isinstance(value, _VALUES)


class Guards:
    """A record of a model's Python state when a graph was captured.

    `hold` runs before each call of the graph, so it must be fast. It compares identities in flat lists, and compares
    values only if an object was replaced.

    Args:
        model: the model.
        without: holder name and key of entries to leave out, because forward itself sets them in each call.
        written: tensors to leave out, because forward writes into them and the graph reads them in each call.
    """

    def __init__(
        self,
        model: nn.Module,
        without: Collection[tuple[str, object]] = (),
        written: Collection[torch.Tensor] = (),
    ) -> None:
        registered = {id(value) for value in (*model.parameters(), *model.buffers(), *written)}
        # For `changes`: holder, skipped keys, structure, and values by key.
        self._records: list[tuple[StateHolder, frozenset[Any], Any, dict[Any, Any]]] = []
        # `hold` runs before each call, when the model has evicted these objects from the caches of the processor. With
        # parallel lists, it compares in C, and reads no tuple per entry and no length per empty container.
        self._structures: list[tuple[Any, frozenset[Any], Any]] = []
        self._empty: list[Any] = []
        self._sized: list[Any] = []
        self._sizes: list[int] = []
        # Entries of plain dicts. Entries of other stores are (store, key, value), or (read function, value).
        self._stores: list[dict[Any, Any]] = []
        self._keys: list[Any] = []
        self._values: list[Any] = []
        self._items: list[tuple[Any, Any, Any]] = []
        self._others: list[tuple[Callable[[], Any], Any]] = []
        self._versions: list[tuple[torch.Tensor, int, str]] = []
        # For `hold_traced`: (store, key, value, whether to compare by `==`), and (hooks, position, hook).
        self._traced: list[tuple[Any, Any, Any, bool]] = []
        self._hooks: list[tuple[Any, int, Any]] = []
        self._without, self._written = tuple(without), tuple(written)
        self._modules = list(model.modules())
        self._kinds = [type(module) for module in self._modules]
        self._modes = [module.training for module in self._modules]
        unguarded: dict[str, set[Any]] = {}
        for name, key in without:
            unguarded.setdefault(name, set()).add(key)
        for holder in walk(model):
            skipped = unguarded.get(holder.name, set())
            if holder.store is vars(model):
                skipped = skipped | {"_compiled_call_impl"}
            if None not in skipped:
                self._guard(holder, frozenset(skipped), registered)

    def _guard(self, holder: StateHolder, skipped: frozenset[object], registered: set[int]) -> None:
        """Record a holder and its entries."""
        store = holder.store
        values = {
            key: value
            for key, value in ((key, holder.read(key)) for key in holder.keys if key not in skipped)
            if id(value) not in registered and not isinstance(value, ReferenceType)
        }
        self._records.append((holder, skipped, holder.structure(skipped) if holder.sized else None, values))
        # A dict with skipped keys may change its size, and a set may change with the same size.
        if isinstance(store, set) or (skipped and isinstance(store, dict)):
            self._structures.append((store, skipped, holder.structure(skipped)))
        elif holder.sized and isinstance(store, (dict, list, deque)):
            if store:
                self._sized.append(store)
                self._sizes.append(len(store))
            else:
                self._empty.append(store)
        for key, value in values.items():
            if isinstance(store, (dict, list)) and (_by_value(value) or isinstance(value, _OBJECTS)):
                if holder.ordered:
                    self._hooks.append((store, key, value))
                else:
                    self._traced.append((store, key, value, _by_value(value)))
            if type(store) is dict and not holder.ordered:
                self._stores.append(store)
                self._keys.append(key)
                self._values.append(value)
            elif isinstance(store, (list, types.MappingProxyType)) and value is not MISSING:
                self._items.append((store, key, value))
            else:
                self._others.append((functools.partial(holder.read, key), value))
            # The graph may hold the values of these tensors and arrays as constants.
            for part in _parts(value):
                if isinstance(part, torch.Tensor) and id(part) not in registered:
                    if not isinstance(part, FakeTensor) and not part.is_inference():  # they have no version counter
                        self._versions.append((part, part._version, holder.entry(key)))
                elif type(part).__module__ == "numpy" and type(part).__name__ == "ndarray" and part.size <= MAX_ENTRIES:
                    self._others.append((part.tobytes, part.tobytes()))

    def hold(self) -> bool:
        """Whether the state is equivalent to the recorded one."""
        try:
            # These entries come first, because they include `training`. Compare by value only if an identity differs.
            if not all(map(operator.is_, map(operator.getitem, self._stores, self._keys), self._values)):
                for store, key, expected in zip(self._stores, self._keys, self._values, strict=True):
                    if store[key] is not expected and not _alike(store[key], expected):
                        return False
            if any(self._empty) or list(map(len, self._sized)) != self._sizes:
                return False
            # The lists have their recorded sizes, so no index is out of range.
            for items, key, expected in self._items:
                if items[key] is not expected and not _alike(items[key], expected):
                    return False
        except KeyError:
            return False
        for store, skipped, expected in self._structures:
            if (store.keys() - skipped if skipped else store) != expected:
                return False
        for read, expected in self._others:
            if (value := read()) is not expected and not _alike(value, expected):
                return False
        for tensor, version, _ in self._versions:
            if tensor._version != version:
                return False
        return list(map(type, self._modules)) == self._kinds

    def hold_traced(self) -> bool:
        """Like `hold`, but written so that dynamo can trace it. Dynamo then guards the state that is read here.

        State that dynamo cannot compare is not checked: in-place writes, entries of sets, classes and slots, and values
        of rare types.
        """
        for store in self._empty:
            if len(store) != 0:
                return False
        for store, size in zip(self._sized, self._sizes, strict=True):
            if len(store) != size:
                return False
        for store, key, expected, by_value in self._traced:
            if isinstance(store, dict) and key not in store:
                return False
            value = store[key]
            if value is not expected and not (by_value and type(value) is type(expected) and value == expected):
                return False
        for hooks, index, expected in self._hooks:  # noqa: SIM110 - dynamo traces a loop
            if list(hooks.values())[index] is not expected:
                return False
        return True

    def changes(self) -> list[Change]:
        """Return the changes since the record was made. Slower than `hold`: for messages and the preflight."""
        changes = []
        for holder, skipped, structure, values in self._records:
            if structure is not None and (current := holder.structure(skipped)) != structure:
                # The loop over the values finds removed entries. Only added ones have no recorded value.
                added = [key for key in current if key not in structure] if isinstance(holder.store, dict) else [None]
                names = [holder.name if key is None else holder.entry(key) for key in added]
                changes += [Change(holder.name, *pair, holder.of_model) for pair in zip(added, names, strict=True)]
            for key, value in values.items():
                if not _alike(current := holder.read(key), value):
                    is_new = holder.of_model and not same_value(current, value)
                    changes.append(Change(holder.name, key, holder.entry(key), is_new))
        written = [name for tensor, version, name in self._versions if tensor._version != version]
        changes += [Change(name, None, name, False) for name in written]
        for module, kind in zip(self._modules, self._kinds, strict=True):
            if type(module) is not kind:
                changes.append(Change(kind.__qualname__, "__class__", f"{kind.__qualname__}.__class__", False))
        return changes

    def renewed(self, model: nn.Module) -> Guards:
        """Return guards of the current state, with the same exceptions."""
        return Guards(model, self._without, self._written)

    @contextlib.contextmanager
    def modes_restored(self) -> Iterator[None]:
        """Set the mode of each module, train or eval, to the recorded one inside the block."""
        current = [module.training for module in self._modules]
        try:
            for module, training in zip(self._modules, self._modes, strict=True):
                module.training = training
            yield
        finally:
            for module, training in zip(self._modules, current, strict=True):
                module.training = training

    def written(self) -> list[torch.Tensor]:
        """Return the guarded tensors that were written in place since the record was made."""
        return [tensor for tensor, version, _ in self._versions if tensor._version != version]
