"""The Python state that a model's forward can read, and guards on it: is a graph still valid for this model?

A graph holds as constants what forward read from Python while it was traced: numbers, names, modes, what containers and
objects hold, tensors that are neither parameters nor buffers, hooks, submodules, a `forward` set on an instance.
`walk` yields the objects in which a model keeps such state, and `Guards` records their contents. docs/capture.md lists
what is guarded and what is not.
"""

from __future__ import annotations

import argparse
import enum
import functools
import itertools
import math
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

LARGE = 256
"""A container with more entries is guarded by its length alone: a vocabulary, a list of samples."""
DEPTH = 8
"""Levels of containers and objects that are compared where another object has come."""
MOST = 4096
"""Containers and objects beside the modules that are followed; what lies behind the rest is guarded by identity."""

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
STORES = {"_parameters", "_buffers", "_modules", *_HOOKS}
"""Dictionaries of a module that are never exchanged; each has a rule of its own for what it holds."""
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
"""Attributes of modules that no forward reads; the flags of hooks come and go with the hooks."""
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)

_PLAIN = (
    *(bool, int, float, complex, str, bytes, frozenset, slice, range, enum.Enum, types.MethodType),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
)
"""Types whose values are compared by `==` where they are not the same object."""
_VALUES = (bool, int, float, str, type(None), torch.dtype, torch.device, enum.Enum)
_OBJECTS = (nn.Module, torch.Tensor, dict, list, set, type, types.FunctionType, types.BuiltinFunctionType)
"""Types that dynamo can compare while it traces: by value, and by identity."""
OPAQUE = {"lorasc_fx", "torch", "numpy", "sympy", "lightning", "pytorch_lightning", *sys.stdlib_module_names}
"""Packages whose objects are guarded by identity alone: they count, log and lock, and hold no settings of a model."""
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)

MISSING = object()
"""Stands for an entry that is not there."""


@dataclass(frozen=True)
class Held:
    """One object that holds Python state.

    Args:
        name: of the object, as the model's Python would write it.
        where: a dict (that of an object's attributes as well), list, deque, set, the names of a class, or an object.
        keys: entries that forward may read.
        attributes: whether entries are attributes rather than items.
        restored: whether an isolated run gives it back.
        of_model: whether it is state of the model, and not of a function that the model calls.
        sized: whether it matters how many entries there are.
        ordered: whether the keys are places in the order of a dict: torch numbers hooks, and each has a new number.
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
        """Return an entry as it is now, MISSING where there is none; a defaultdict is not asked to make one."""
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
        """Return a copy of a container; of a module's attributes without parameters, buffers and modules."""
        if isinstance(self.where, dict):
            return {key: value for key, value in self.where.items() if not self.attributes or key not in STORES}
        return self.where.copy()


class Change(NamedTuple):
    """An entry that has changed; `key` is None where a whole container has other entries."""

    holder: str
    key: Any
    entry: str


def walk(model: nn.Module) -> Iterator[Held]:
    """Yield the objects in which the model keeps Python state, each once, and before those reached through it."""
    return _Walk(model).places()


def attribute_tensors(model: nn.Module, places: Iterable[Held] | None = None) -> list[tuple[str, torch.Tensor]]:
    """Return the tensors that Python state holds, by name, without parameters and buffers.

    Args:
        model: whose state it is.
        places: what `walk` has yielded, where that is known.
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
    """Return a value, or what a tuple holds."""
    return tuple(part for item in value for part in _parts(item)) if type(value) is tuple else (value,)


class _Walk:
    """Follows what a model holds, in the order of its modules."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen: set[int] = set()
        self._alive: list[Any] = []  # an id is only good while its object lives
        self._waiting: list[tuple[str, Any, bool]] = [("", model, True)]
        self._left = MOST
        self._keeps_mode = isinstance(model, fx.GraphModule)  # its modules are called whole

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
        skipped = UNREAD | STORES | ({"training"} if self._keeps_mode else set())
        plain = "forward" not in held and not any(held.get(store) for store in _HOOKS)
        kind: Any = type(module)
        read = _read_by(kind) if plain and module is not self._model else None
        keys = tuple(key for key in held if key not in skipped and (read is None or key in read))
        yield Held(name, held, keys, attributes=True, of_model=of_model)
        behind = [(f"{dot}{key}", held[key], of_model) for key in keys]
        for store in ("_parameters", "_buffers"):  # tensors there are read at each call
            if isinstance(values := held.get(store), dict):
                none = tuple(key for key, value in values.items() if value is None)
                yield Held(name, values, none, attributes=True, restored=False, of_model=of_model, sized=False)
        for store in _HOOKS:
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
                yield from self._behind(Held(f"{name}.{variable}", cell, ("cell_contents",), True, False, False))
        elif isinstance(value, (list, deque)):
            keys = range(len(value) if len(value) <= LARGE else 0)
            yield from self._behind(Held(name, value, tuple(keys), of_model=of_model))
        elif isinstance(value, dict):
            yield from self._behind(Held(name, value, tuple(value) if len(value) <= LARGE else (), of_model=of_model))
            if hasattr(value, "__dict__"):
                yield from self._behind(Held(name, vars(value), tuple(vars(value)), True, of_model=of_model))
        elif isinstance(value, set):
            yield from self._behind(Held(name, value, of_model=of_model))
        elif is_followed(value):
            if hasattr(value, "__dict__"):
                yield from self._behind(Held(name, vars(value), tuple(vars(value)), True, of_model=of_model))
            if slots := tuple(slot for kind in type(value).__mro__ for slot in _slots(kind)):
                yield from self._behind(Held(name, value, slots, True, False, of_model))

    def _behind(self, held: Held) -> Iterator[Held]:
        self._left -= 1
        if self._left >= 0:
            yield held
            self._waiting += reversed([(held.entry(key), held.read(key), held.of_model) for key in held.keys])


@functools.cache
def _read_by(kind: type[nn.Module]) -> frozenset[str] | None:
    """Return the names that forward of a module of torch.nn reads, by its code; None for all other classes.

    A linear layer does not read its numbers of features, nor its mode.
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


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return tuple(slot for slot in ((slots,) if isinstance(slots, str) else slots) if not slot.startswith("__"))


def is_followed(value: Any) -> bool:
    """Whether an object's attributes are state of the model: one of its author's classes, or a namespace."""
    if isinstance(value, (torch.Tensor, type, enum.Enum, types.ModuleType)):
        return False
    return isinstance(value, _NAMESPACES) or package_of(type(value)) not in OPAQUE


def _alike(now: Any, before: Any, depth: int = DEPTH) -> bool:
    """Whether a value that is another object may stand where the earlier one stood, by what it holds.

    What the earlier one holds has guards of its own, so that it is as it was.
    """
    if now is before:
        return True
    if type(now) is not type(before) or not depth:
        return False
    if isinstance(before, (tuple, list, deque)):
        return len(now) == len(before) and all(_alike(*pair, depth - 1) for pair in zip(now, before, strict=True))
    if isinstance(before, dict):
        return now.keys() == before.keys() and all(_alike(now[key], before[key], depth - 1) for key in before)
    if isinstance(before, (*_PLAIN, set)):
        return bool(now == before) or (isinstance(before, float) and math.isnan(now) and math.isnan(before))
    if isinstance(before, RemovableHandle):
        return True  # it removes a hook, which has a guard of its own
    if isinstance(before, functools.partial):
        return _alike((now.func, now.args, now.keywords), (before.func, before.args, before.keywords), depth - 1)
    if isinstance(before, types.FunctionType):
        return now.__code__ is before.__code__ and _alike(_bound(now), _bound(before), depth - 1)
    return is_followed(before) and hasattr(before, "__dict__") and _alike(vars(now), vars(before), depth - 1)


def _bound(function: types.FunctionType) -> tuple[Any, ...]:
    """Return what a function has beside its code: defaults, and the variables around it."""
    cells = [getattr(cell, "cell_contents", MISSING) for cell in function.__closure__ or ()]
    return (function.__defaults__, function.__kwdefaults__, *cells)


def _by_value(value: Any) -> bool:
    """Whether dynamo can compare a value by `==`."""
    if type(value) is dict:
        return all(map(_by_value, value.values())) and all(type(key) is str for key in value)
    return all(map(_by_value, value)) if type(value) in (list, tuple) else isinstance(value, _VALUES)


def _contents(held: Held, without: frozenset[Any]) -> Any:
    """Return what a container holds beside the values of its entries: its keys, its elements, or how many there are."""
    where = held.where
    if held.ordered:
        return range(len(where))
    if isinstance(where, dict):
        return where.keys() - without if without else tuple(where)
    return frozenset(where) if isinstance(where, set) else len(where) if isinstance(where, (list, deque)) else None


class Guards:
    """What a model's Python state was when a graph was made of it.

    `hold` is asked before each call of the graph. It compares identities in flat lists that were made once, and values
    only of plain ones that are other objects.

    Args:
        model: whose state is guarded.
        without: place and key of the entries that forward itself sets at each call.
        written: tensors that forward, and so the graph, writes into: they are read at each call.
    """

    def __init__(
        self,
        model: nn.Module,
        without: Collection[tuple[str, Any]] = (),
        written: Collection[torch.Tensor] = (),
    ) -> None:
        registered = {id(value) for value in (*model.parameters(), *model.buffers(), *written)}
        self._held: list[tuple[Held, frozenset[Any], Any, dict[Any, Any]]] = []
        self._empty: list[Any] = []
        self._filled: list[Any] = []
        self._sizes: list[int] = []
        self._entries: list[tuple[dict[Any, Any], Any, Any]] = []  # alone in their loop: Python is quicker so
        self._items: list[tuple[Any, Any, Any]] = []
        self._traced: list[tuple[Any, Any, Any, bool]] = []
        self._hooks: list[tuple[Any, int, Any]] = []  # by place
        self._keys: list[tuple[Callable[[], Any], Any]] = []
        self._others: list[tuple[Callable[[], Any], Any]] = []
        self._versions: list[tuple[torch.Tensor, int, str]] = []
        self._modules = list(model.modules())
        self._kinds = [type(module) for module in self._modules]
        unstable: dict[str, set[Any]] = {}  # by place
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
        self._held.append((held, skipped, _contents(held, skipped) if held.sized else None, values))
        if isinstance(where, set) or (skipped and isinstance(where, dict)):
            self._keys.append((functools.partial(_contents, held, skipped), _contents(held, skipped)))
        elif not held.sized:
            pass
        elif isinstance(where, (dict, list, deque)) and where:
            self._filled.append(where)
            self._sizes.append(len(where))
        elif isinstance(where, (dict, list, deque)):
            self._empty.append(where)
        for key, value in values.items():
            if isinstance(where, (dict, list)) and (_by_value(value) or isinstance(value, _OBJECTS)):
                if held.ordered:
                    self._hooks.append((where, key, value))
                else:
                    self._traced.append((where, key, value, _by_value(value)))
            if type(where) is dict and not held.ordered:
                self._entries.append((where, key, value))
            elif isinstance(where, (list, types.MappingProxyType)) and value is not MISSING:
                self._items.append((where, key, value))
            else:
                self._others.append((functools.partial(held.read, key), value))
            for part in _parts(value):
                if isinstance(part, torch.Tensor) and id(part) not in registered:
                    if not isinstance(part, FakeTensor) and not part.is_inference():
                        self._versions.append((part, part._version, held.entry(key)))
                elif type(part).__module__ == "numpy" and type(part).__name__ == "ndarray" and part.size <= LARGE:
                    self._others.append((part.tobytes, part.tobytes()))

    def hold(self) -> bool:
        """Whether the state is what it was."""
        try:
            for where, key, expected in self._entries:  # first, since modes are among them
                if where[key] is not expected and not _alike(where[key], expected):
                    return False
            if any(self._empty) or list(map(len, self._filled)) != self._sizes:
                return False
            for items, key, expected in self._items:
                if items[key] is not expected and not _alike(items[key], expected):
                    return False
        except KeyError:
            return False
        for read, expected in self._keys:
            if read() != expected:
                return False
        for read, expected in self._others:
            if (value := read()) is not expected and not _alike(value, expected):
                return False
        for tensor, version, _ in self._versions:
            if tensor._version != version:
                return False
        return list(map(type, self._modules)) == self._kinds

    def hold_traced(self) -> bool:
        """As `hold`, plain enough for dynamo to trace, which then guards what is read here.

        What it cannot compare is left out: in-place writes, entries of sets, classes and slots, rare types.
        """
        for where in self._empty:
            if len(where) != 0:
                return False
        for where, size in zip(self._filled, self._sizes, strict=True):
            if len(where) != size:
                return False
        for where, key, expected, by_value in self._traced:
            if isinstance(where, dict) and key not in where:
                return False
            now = where[key]
            if now is not expected and not (by_value and type(now) is type(expected) and now == expected):
                return False
        for where, index, expected in self._hooks:  # noqa: SIM110 - dynamo traces a loop
            if list(where.values())[index] is not expected:
                return False
        return True

    def changes(self) -> list[Change]:
        """Return what differs from what it was; for messages and the preflight, not for each call."""
        changes = []
        for held, skipped, contents, values in self._held:
            if contents is not None and (now := _contents(held, skipped)) != contents:
                added = [key for key in now if key not in contents] if isinstance(held.where, dict) else [None]
                changes += [Change(held.name, key, held.name if key is None else held.entry(key)) for key in added]
            for key, value in values.items():
                if not _alike(held.read(key), value):
                    changes.append(Change(held.name, key, held.entry(key)))
        changes += [Change(name, None, name) for tensor, version, name in self._versions if tensor._version != version]
        for module, kind in zip(self._modules, self._kinds, strict=True):
            if type(module) is not kind:
                changes.append(Change(kind.__qualname__, "__class__", f"{kind.__qualname__}.__class__"))
        return changes

    def written(self) -> list[torch.Tensor]:
        """Return the tensors that were written in place since."""
        return [tensor for tensor, version, _ in self._versions if tensor._version != version]
