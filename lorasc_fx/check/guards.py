"""Guards on the Python state of a model. They tell whether a captured graph is still valid for the model.

While forward is traced, it reads Python state, and the graph holds the values as constants. Examples are numbers and
strings in attributes, `training`, hooks, submodules, the contents of containers, tensors other than parameters and
buffers, and a `forward` that is set on an instance.

`walk` yields the containers that hold the state, and `Guards` records their contents. docs/adapt.md lists the state
that is guarded.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import functools
import operator
import sys
import types
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import ReferenceType

import torch
from torch import fx, nn
from torch.utils.hooks import RemovableHandle

from lorasc_fx.graph.function import HOOKS
from lorasc_fx.util.torch_private import FakeTensor

MAX_ENTRIES = 256
"""Maximum length of a container whose entries are guarded. Of a longer one, such as a vocabulary, they are not."""
MAX_DEPTH = 8
"""Maximum depth to which a container or object is compared with the one that it has replaced."""
MAX_OBJECTS = 4096
"""Maximum number of containers and objects whose contents are guarded. All others are guarded by identity."""

STORES = {"_parameters", "_buffers", "_modules", *HOOKS}
"""Attributes of a module that are not guarded as attributes. Their contents are guarded as submodules or hooks, or (for
parameters and buffers) read by the graph in each call."""
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
"""Attributes of modules that need no guard: forward does not read them, or (flags of hooks) the hooks are guarded."""
_PLAIN = (
    *(bool, int, float, complex, str, bytes, set, frozenset, slice, range, enum.Enum, types.MethodType),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
)
"""Types whose values are compared by `==`."""
_VALUES = (bool, int, float, str, type(None), torch.dtype, torch.device, enum.Enum)
_OBJECTS = (nn.Module, torch.Tensor, dict, list, set, type, types.FunctionType, types.BuiltinFunctionType)
"""Types that dynamo can compare while it traces: `_VALUES` by `==`, `_OBJECTS` by identity."""
OPAQUE = {"lorasc_fx", "torch", "numpy", "sympy", *sys.stdlib_module_names}
"""Packages whose objects (such as counters, loggers and locks) are guarded by identity alone."""

MISSING = object()
"""Stands for the value of an entry that does not exist."""


@dataclass(frozen=True)
class StateHolder:
    """A container that holds Python state.

    Args:
        name: path from the model to the container, or to the object with this `__dict__`, such as `layers.0.config`.
        store: the container: a dict (perhaps the `__dict__` of an object), list, deque or set.
        keys: keys of the entries that forward may read. Empty for a set.
        attributes: whether the keys are attribute names of an object. Otherwise they are keys or indices of items.
        guarded: whether the state belongs to the model. Otherwise it belongs to a function that the model calls.
        hooks: whether the values are hooks. Their keys are numbers that torch counts up.
    """

    name: str
    store: Any
    keys: tuple[Any, ...]
    attributes: bool = False
    guarded: bool = True
    hooks: bool = False

    def entry(self, key: object) -> str:
        """Return the path of an entry, such as `layers.0.scale` or `sizes['q']`."""
        return f"{self.name}.{key}".lstrip(".") if self.attributes else f"{self.name}[{key!r}]"

    def read(self, key: Any) -> Any:
        """Return the current value of an entry, or MISSING."""
        if isinstance(self.store, dict):
            return dict.get(self.store, key, MISSING)  # a subclass may override `get`
        return self.store[key] if key < len(self.store) else MISSING

    def contents(self) -> Any:
        """Return a shallow copy of the container. A `__dict__` is copied without the attributes in STORES."""
        if isinstance(self.store, dict):
            return {key: value for key, value in self.store.items() if not self.attributes or key not in STORES}
        return self.store.copy()

    def structure(self, skipped: frozenset[object] = frozenset()) -> Any:
        """Return the keys of a dict or the elements of a set, except the skipped ones, or the length of a list."""
        return frozenset(self.store) - skipped if isinstance(self.store, (dict, set)) else len(self.store)


class Change(NamedTuple):
    """An entry that has changed since the guards were made.

    Args:
        holder: name of the StateHolder. For a tensor that was written in place, the same as `entry`.
        key: key of the entry in the holder. None for such a tensor, for a list of another length, and for a set.
        entry: path of the entry, for messages.
        is_new: whether the value differs. False if only its identity differs, and for a tensor written in place.
    """

    holder: str
    key: Any
    entry: str
    is_new: bool = True


def walk(model: nn.Module) -> Iterator[StateHolder]:
    """Yield the containers in which the model keeps Python state. Each is yielded once, before those inside it."""
    seen, budget = set[int](), MAX_OBJECTS
    # Objects that only a function or method refers to come last. Their state is restored, but not guarded.
    waiting: list[tuple[str, Any]] = [("", model)]
    functions: list[tuple[str, Any]] = []
    guarded = True
    while waiting or functions:
        if not waiting:
            waiting, functions, guarded = functions, [], False
        name, value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, (types.MethodType, types.FunctionType, functools.partial)):
            functions += [(name, part) for part in _parts_of_function(value)]
        elif isinstance(value, tuple):
            waiting += reversed([(f"{name}[{index}]", part) for index, part in enumerate(value)])
        else:
            holders = list(_holders(name, value, guarded, isinstance(model, fx.GraphModule)))
            budget -= 0 if isinstance(value, nn.Module) else len(holders)
            if budget >= 0:
                yield from holders
                inner = [(holder.entry(key), holder.read(key)) for holder in holders for key in holder.keys]
                waiting += reversed(inner)  # reversed, because the stack is popped from its end


def _holders(name: str, value: object, guarded: bool, is_graph: bool) -> Iterator[StateHolder]:
    """Yield the containers of one object: its `__dict__`, hooks and children of a module, or the object itself.

    Args:
        is_graph: whether the model is a GraphModule. Then the modules that the graph calls read `training` in each
            call, so it needs no guard.
    """
    if isinstance(value, nn.Module):
        if _package_of(value) == "lorasc_fx":  # for example, a cascade that a hook refers to
            return
        attributes, prefix = vars(value), f"{name}." if name else ""
        skipped = UNREAD | STORES | ({"training"} if is_graph else set())
        keys = tuple(key for key in attributes if key not in skipped)
        yield StateHolder(name, attributes, keys, attributes=True, guarded=guarded)
        for store in HOOKS:
            if isinstance(hooks := attributes.get(store), dict):
                yield StateHolder(f"{prefix}{store}", hooks, tuple(hooks), guarded=guarded, hooks=True)
        if isinstance(children := attributes.get("_modules"), dict):
            yield StateHolder(name, children, tuple(children), attributes=True, guarded=guarded)
        return
    if isinstance(value, (list, deque, dict, set)):
        count = len(value) if len(value) <= MAX_ENTRIES and not isinstance(value, set) else 0
        indices = tuple(value)[:count] if isinstance(value, dict) else tuple(range(count))
        yield StateHolder(name, value, indices, guarded=guarded)
    if hasattr(value, "__dict__") and (isinstance(value, dict) or _is_followed(value)):  # a ModelOutput is both
        yield StateHolder(name, vars(value), tuple(vars(value)), attributes=True, guarded=guarded)


def _parts_of_function(value: Any) -> list[Any]:
    """Return the objects to which a method, function or partial function refers."""
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    cells = [getattr(cell, "cell_contents", None) for cell in value.__closure__ or ()]
    return [*cells, value.__defaults__, value.__kwdefaults__]


def attribute_tensors(
    model: nn.Module, holders: Collection[StateHolder] | None = None
) -> list[tuple[str, torch.Tensor]]:
    """Return (path, tensor) for each tensor in the model's Python state, except parameters and buffers.

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


def _package_of(value: object) -> str:
    """Return the name of the top-level package of the class of an object."""
    return str(type(value).__module__).partition(".")[0]


def _is_followed(value: object) -> bool:
    """Whether the attributes of an object are guarded: it is a namespace, or its class is from no OPAQUE package."""
    if isinstance(value, (torch.Tensor, type, enum.Enum, types.ModuleType)):
        return False
    return isinstance(value, (types.SimpleNamespace, argparse.Namespace)) or _package_of(value) not in OPAQUE


def _alike(value: Any, before: Any, by_value: bool = False, depth: int = MAX_DEPTH) -> bool:
    """Whether a new value is equivalent to the guarded one, so that a graph traced with the old one is still valid.

    Values of a type without a rule are equivalent only if they are identical.

    Args:
        by_value: whether tensors are compared by value. Otherwise they are compared by identity.
    """
    if value is before:  # the contents have separate guards
        return True
    if type(value) is not type(before) or not depth:
        return False
    if isinstance(before, torch.Tensor):
        same = by_value and value.shape == before.shape and value.dtype == before.dtype
        return same and (isinstance(value, FakeTensor) or torch.equal(value, before))
    if isinstance(before, (tuple, list, deque)):
        pairs = zip(value, before, strict=False)
        return len(value) == len(before) and all(_alike(*pair, by_value, depth - 1) for pair in pairs)
    if isinstance(before, dict):
        return value.keys() == before.keys() and all(
            _alike(value[key], before[key], by_value, depth - 1) for key in before
        )
    if isinstance(before, _PLAIN):
        return bool(value == before or (value != value and before != before))  # both may be nan
    if isinstance(before, RemovableHandle):
        return True  # the hook itself is guarded
    if isinstance(before, types.FunctionType):  # defined again, such as a hook of gradient checkpointing
        same = value.__code__ is before.__code__
        return same and _alike(_parts_of_function(value), _parts_of_function(before), by_value, depth - 1)
    if isinstance(before, functools.partial):
        return _alike(_parts_of_function(value), _parts_of_function(before), by_value, depth - 1)
    if not _is_followed(before) or not hasattr(before, "__dict__"):
        return False
    return _alike(vars(value), vars(before), by_value, depth - 1)


def _can_compare(value: Any) -> bool:
    """Whether dynamo can compare a value by `==`."""
    if type(value) is dict:
        return all(map(_can_compare, value.values())) and all(type(key) is str for key in value)
    return all(map(_can_compare, value)) if type(value) in (list, tuple) else isinstance(value, _VALUES)


class Guards:
    """A record of a model's Python state when a graph was captured.

    `hold` runs before each call of the graph, so it must be fast. It compares identities in flat lists, and compares
    values only if an object was replaced.

    Args:
        model: the model.
        without: (holder name, key) of each entry to leave out, because forward itself sets it in each call.
        written: tensors to leave out, because forward writes into them and the graph reads them in each call.
    """

    def __init__(
        self,
        model: nn.Module,
        without: Collection[tuple[str, object]] = (),
        written: Collection[torch.Tensor] = (),
    ) -> None:
        self._without, self._written = tuple(without), tuple(written)
        self._modules = list(model.modules())
        self._modes = [module.training for module in self._modules]
        # The state, in parallel lists: then `hold` compares in C, and reads neither a tuple per entry nor the length
        # of an empty container. Such reads are slow, because each call of the model evicts the processor's caches.
        self._records: list[tuple[StateHolder, frozenset[Any], Any]] = []  # holder, skipped keys, structure
        self._holders: list[StateHolder] = []
        self._stores: list[Any] = []
        self._keys: list[Any] = []
        self._values: list[Any] = []
        self._empty: list[Any] = []
        self._sized: list[Any] = []
        self._sizes: list[int] = []
        # Hooks, keys of dicts whose size may change, and elements of sets.
        self._hooks: list[tuple[dict[int, Any], list[Any]]] = []
        self._structures: list[tuple[Any, frozenset[Any], Any]] = []
        self._versions: list[tuple[torch.Tensor, int, str]] = []
        registered = {id(value) for value in (*model.parameters(), *model.buffers(), *written)}
        for holder in walk(model):
            skipped = frozenset(key for name, key in without if name == holder.name)
            if holder.store is vars(model):
                skipped |= {"_compiled_call_impl"}  # a cascade sets it
            if holder.guarded and None not in skipped:
                self._guard(holder, skipped, registered)
        # A graph reads parameters and buffers at each call. Only those that are None are constants of the graph.
        for name, module in model.named_modules():
            for store in (module._parameters, module._buffers):
                for key in [key for key, value in store.items() if value is None]:
                    self._record(StateHolder(name, store, (), attributes=True), key, None)
        # Entries that dynamo can compare, and whether to compare them by `==`.
        self._traced = [
            (store, key, value, _can_compare(value))
            for store, key, value in zip(self._stores, self._keys, self._values, strict=True)
            if isinstance(store, (dict, list)) and (_can_compare(value) or isinstance(value, _OBJECTS))
        ]

    def _guard(self, holder: StateHolder, skipped: frozenset[object], registered: set[int]) -> None:
        """Record a holder and its entries."""
        store = holder.store
        self._records.append((holder, skipped, holder.structure(skipped)))
        if not store:
            self._empty.append(store)
        elif holder.hooks:
            self._hooks.append((store, list(store.values())))
            return
        elif isinstance(store, set) or (skipped and isinstance(store, dict)):
            self._structures.append((store, skipped, holder.structure(skipped)))
        else:
            self._sized.append(store)
            self._sizes.append(len(store))
        for key in holder.keys:
            value = holder.read(key)
            if key not in skipped and id(value) not in registered and not isinstance(value, ReferenceType):
                self._record(holder, key, value)
                # The graph may hold the values of these tensors as constants.
                tensors = [part for part in _parts(value) if isinstance(part, torch.Tensor)]
                self._versions += [
                    (part, part._version, holder.entry(key))
                    for part in tensors
                    if not (id(part) in registered or isinstance(part, FakeTensor) or part.is_inference())
                ]

    def _record(self, holder: StateHolder, key: object, value: object) -> None:
        self._holders.append(holder)
        self._stores.append(holder.store)
        self._keys.append(key)
        self._values.append(value)

    def hold(self) -> bool:
        """Whether the state is equivalent to the recorded one."""
        if any(self._empty) or list(map(len, self._sized)) != self._sizes:
            return False
        try:
            # Compare by value only if an identity differs.
            if not all(map(operator.is_, map(operator.getitem, self._stores, self._keys), self._values)):
                for store, key, expected in zip(self._stores, self._keys, self._values, strict=True):
                    if not _alike(store[key], expected):
                        return False
        except (KeyError, IndexError):
            return False
        if not all(_alike(list(hooks.values()), expected) for hooks, expected in self._hooks):
            return False
        if any(frozenset(store) - skipped != expected for store, skipped, expected in self._structures):
            return False
        return all(tensor._version == version for tensor, version, _ in self._versions)

    def hold_traced(self) -> bool:
        """Like `hold`, but written so that dynamo can trace it. Dynamo then guards the state that is read here.

        State that dynamo cannot compare is not checked: in-place writes, elements of sets, and values of rare types.
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
        for hooks, expected_hooks in self._hooks:
            if len(hooks) != len(expected_hooks):
                return False
            for hook, expected in zip(list(hooks.values()), expected_hooks, strict=True):
                if hook is not expected:
                    return False
        return True

    def changes(self) -> list[Change]:
        """Return the changes since the record was made. Slower than `hold`, so only for messages and the preflight."""
        changes = []
        for holder, skipped, structure in self._records:
            if (current := holder.structure(skipped)) != structure:
                # Only added entries are listed here, because the loop over the values finds removed ones.
                added = sorted(current - structure, key=str) if isinstance(holder.store, dict) else [None]
                names = [holder.name if key is None else holder.entry(key) for key in added]
                changes += [Change(holder.name, *pair) for pair in zip(added, names, strict=True)]
        for holder, key, value in zip(self._holders, self._keys, self._values, strict=True):
            if not _alike(current := holder.read(key), value):
                is_new = not _alike(current, value, by_value=True)
                changes.append(Change(holder.name, key, holder.entry(key), is_new))
        written = [name for tensor, version, name in self._versions if tensor._version != version]
        return changes + [Change(name, None, name, False) for name in written]

    def renewed(self, model: nn.Module) -> Guards:
        """Return guards on the current state that leave out the same entries and tensors."""
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
