"""Input signatures: the arguments of a call in canonical form, and a hashable key for them.

A variant is one adapted graph for one input signature (docs/design.md): the tree of arguments, which of them are None,
values that are not tensors, dtypes, devices, numbers of axes, and autocast. The model's Python state counts too, see
guards.py. Trees of other libraries (key-value caches) are registered with torch's pytree first.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import inspect
import operator
import sys
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lorasc_fx.errors import CaptureError


def whole(value: Any) -> bool:
    """Whether a value is one leaf because its flatten function fails, although its type is registered (some caches)."""
    node = pytree.SUPPORTED_NODES.get(type(value))
    if node is None or type(value) in (dict, list, tuple):
        return False
    try:
        node.flatten_fn(value)
    except RuntimeError:  # transformers: "should be applied to DynamicCache containing only ..."
        return True
    return False


def know_trees(model: nn.Module) -> None:
    """If transformers is in use, let it register its caches with torch's pytree, as for its own exports."""
    if "transformers.cache_utils" in sys.modules and importlib.util.find_spec("transformers.exporters") is not None:
        exporter = importlib.import_module("transformers.exporters.exporter_dynamo")  # noqa: TID251 - our own name
        exporter.register_cache_pytrees_for_model(model)


def bind(
    signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments in canonical form: as many as possible positional, the others in the signature's order.

    An argument that is None by default and here is left out, so that `f(x)` and `f(x, mask=None)` are the same call.

    Raises:
        TypeError: the signature does not accept these arguments.
    """
    bound = _without_nones(signature, signature.bind(*args, **kwargs))
    return bound.args, bound.kwargs


def _without_nones(
    signature: inspect.Signature, bound: inspect.BoundArguments, values: Sequence[Any] | None = None
) -> inspect.BoundArguments:
    """Drop arguments that are None by default and here. With `values`, arguments are bound to indices into it.

    Arguments before those for `*args` must stay.
    """
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    full = any(kinds[name] is inspect.Parameter.VAR_POSITIONAL and given for name, given in bound.arguments.items())
    for name, parameter in signature.parameters.items():
        if full and parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        if parameter.default is None and name in bound.arguments:
            value = bound.arguments[name]
            if (value if values is None else values[value]) is None:
                del bound.arguments[name]
    return bound


def signature_of(model: nn.Module) -> inspect.Signature:
    """Return the signature of a module's forward."""
    return inspect.signature(model.forward)


def argument_names(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """Return a name for each argument of a bound call. Those of `*args` are numbered."""
    names: list[str] = []
    for name, parameter in signature.parameters.items():
        variadic = parameter.kind is inspect.Parameter.VAR_POSITIONAL
        count = len(args) - len(names)
        names += [f"{name}_{index}" for index in range(count)] if variadic else [name] * (count > 0)
    return [*names, *kwargs]


def check_binds(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Bind example inputs to the model's forward.

    Raises:
        CaptureError: forward does not accept them, args is not a sequence, or kwargs is not a mapping.
    """
    if not isinstance(args, Sequence) or isinstance(args, (str, bytes)):
        give = "kwargs=..." if isinstance(args, Mapping) else "args=(x,) for a single input x"
        raise CaptureError(
            f"args is a {type(args).__name__}, not a sequence of positional inputs. Give {give}",
            code="invalid-value",
        )
    if not isinstance(kwargs, Mapping):
        raise CaptureError(f"kwargs is a {type(kwargs).__name__}. Give a dict of inputs by name", code="invalid-value")
    args = tuple(args)
    try:
        return bind(signature_of(model), args, kwargs)
    except TypeError as fault:
        raise CaptureError(
            f"{type(model).__name__}.forward does not take these example inputs: {fault}; "
            f"its signature is {signature_of(model)}",
            code="invalid-value",
        ) from fault


def leaves(args: Any, kwargs: Any) -> list[Any]:
    """Return the leaves of the arguments in the order of a graph's placeholders."""
    return pytree.tree_leaves((args, kwargs), is_leaf=whole)


def requires_grad(flat: Sequence[Any]) -> tuple[bool, ...]:
    """Return for each leaf whether it is a tensor that requires gradients."""
    return tuple([isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in flat])


def copied(args: Any, kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return copies of a call's arguments, for a run without side effects: a cache, for example, grows in place."""

    def copy_leaf(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            copied_leaf = leaf.detach().clone().requires_grad_(leaf.requires_grad)
            if leaf.is_leaf:
                return copied_leaf
            with torch.enable_grad():
                return copied_leaf.clone()  # a clone: tensors that are not leaves may be written in place
        return copy.deepcopy(leaf)

    copies: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(
        copy_leaf, (tuple(args), dict(kwargs)), is_leaf=whole
    )
    return copies


class Call(NamedTuple):
    """A call in canonical form.

    Args:
        args, kwargs: as returned by `bind`.
        leaves: the leaves of the arguments, in the order of a graph's placeholders.
        key: equal for calls whose inputs one graph can serve. None while torch.fx traces the call.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: list[Any]
    key: Hashable | None


class Calls:
    """Brings the calls of a model into canonical form. The order is cached for each way of passing arguments.

    Args:
        signature: of the model's forward.
        alike: whether one graph serves all calls, independent of their inputs.
    """

    def __init__(self, signature: inspect.Signature, alike: bool = False) -> None:
        self.signature, self._alike = signature, alike
        self._orders: dict[Hashable, tuple[tuple[int, ...], tuple[tuple[str, int], ...]]] = {}

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Return a call in canonical form.

        Raises:
            TypeError: the signature does not take these arguments.
        """
        given = (*args, *kwargs.values()) if kwargs else args
        way = (len(args), *kwargs, *map(_is_none, given))
        order = self._orders.get(way)
        if order is None:
            order = self._orders[way] = self._order(args, kwargs, given)
        positions, names = order
        bound = tuple(map(given.__getitem__, positions))
        named = {name: given[index] for name, index in names} if names else {}
        leaves: list[Any] = [*bound, *named.values()] if names else list(bound)
        spec: Hashable = (len(bound), *named)
        for leaf in leaves:
            if type(leaf) not in _LEAVES:
                leaves, spec = pytree.tree_flatten((bound, named), is_leaf=whole)
                if any(isinstance(leaf, torch.fx.Proxy) for leaf in leaves):
                    return Call(bound, named, leaves, None)
                break
        key = () if self._alike else (spec, *map(_leaf, leaves), _autocast(leaves))
        return Call(bound, named, leaves, key)

    def _order(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], given: Sequence[Any]
    ) -> tuple[tuple[int, ...], tuple[tuple[str, int], ...]]:
        """Return the canonical order as indices into the given arguments."""
        names = dict(zip(kwargs, range(len(args), len(given)), strict=True))
        bound = _without_nones(self.signature, self.signature.bind(*range(len(args)), **names), given)
        return bound.args, tuple(bound.kwargs.items())


_is_none = functools.partial(operator.is_, None)
_LEAVES = {torch.Tensor, nn.Parameter, bool, int, float, str, type(None)}
"""Types that are always leaves."""


def _leaf(leaf: Any) -> Hashable:
    if isinstance(leaf, torch.Tensor):
        return (leaf.dtype, leaf.device, leaf.dim())
    return (type(leaf), leaf) if isinstance(leaf, Hashable) else (type(leaf), id(leaf))


def _autocast(flat: list[Any]) -> Hashable:
    """Return the device types with autocast enabled, and its dtypes."""
    kinds: set[str] = set()
    for leaf in flat:
        if isinstance(leaf, torch.Tensor):
            kinds.add(leaf.device.type)
    casts: tuple[Any, ...] = ()
    for kind in sorted(kinds):
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            casts = (*casts, (kind, torch.get_autocast_dtype(kind)))
    return casts
