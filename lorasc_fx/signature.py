"""Input signatures: the canonical form of the arguments of a call, and a hashable key for the signature.

Each input signature has its own adapted graph, a variant (docs/algorithm.md). The signature consists of:

- the pytree structure of the arguments, and which of them are None,
- the dtype, device and number of axes of each tensor,
- all other values, such as numbers and strings,
- the autocast state.

Variants also depend on the Python state of the model, see check/guards.py.
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


def is_opaque_leaf(value: object) -> bool:
    """Whether a value must be a pytree leaf, because the flatten function that is registered for its type raises.

    Pass this as `is_leaf` to the functions of torch's pytree. Some key-value caches of transformers are such values.
    """
    node = pytree.SUPPORTED_NODES.get(type(value))
    if node is None or type(value) in (dict, list, tuple):
        return False
    try:
        node.flatten_fn(value)
    except RuntimeError:  # transformers: "should be applied to DynamicCache containing only ..."
        return True
    return False


def register_cache_pytrees(model: nn.Module) -> None:
    """Register the key-value caches of transformers as pytrees, if transformers is imported and has such a function."""
    if "transformers.cache_utils" in sys.modules and importlib.util.find_spec("transformers.exporters") is not None:
        exporter = importlib.import_module("transformers.exporters.exporter_dynamo")  # noqa: TID251 - not a name from a file
        exporter.register_cache_pytrees_for_model(model)


def bind(
    signature: inspect.Signature, args: Sequence[object], kwargs: Mapping[str, object]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments in canonical form: positional if possible, the others in the order of the signature.

    Arguments that go to `**kwargs` come last, sorted by name. An argument is dropped if its default is None and its
    value is None, so that `f(x)` and `f(x, mask=None)` are the same call.

    Raises:
        TypeError: the signature does not accept these arguments.
    """
    bound = _without_nones(signature, signature.bind(*args, **kwargs))
    return bound.args, bound.kwargs


def _without_nones(
    signature: inspect.Signature, bound: inspect.BoundArguments, values: Sequence[object] | None = None
) -> inspect.BoundArguments:
    """Drop arguments whose default and value are None, and sort the arguments in `**kwargs` by name. Changes `bound`.

    If `values` is given, `bound` contains indices into `values` instead of values.
    """
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    has_varargs = any(
        kinds[name] is inspect.Parameter.VAR_POSITIONAL and value for name, value in bound.arguments.items()
    )
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD and name in bound.arguments:
            bound.arguments[name] = dict(sorted(bound.arguments[name].items()))
        # Dropping an argument before `*args` would shift the values of `*args`.
        if has_varargs and parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        if parameter.default is None and name in bound.arguments:
            value = bound.arguments[name]
            if (value if values is None else values[value]) is None:
                del bound.arguments[name]
    return bound


def signature_of(model: nn.Module) -> inspect.Signature:
    """Return the signature of the forward of a module."""
    return inspect.signature(model.forward)


def bind_inputs(
    model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs in canonical form, like `bind`.

    Raises:
        CaptureError: forward does not accept them, args is not a sequence, or kwargs is not a mapping.
    """
    if not isinstance(args, Sequence) or isinstance(args, (str, bytes)):
        remedy = "kwargs=..." if isinstance(args, Mapping) else "args=(x,) for a single input x"
        raise CaptureError(
            f"args is a {type(args).__name__}, not a sequence of positional inputs. Give {remedy}",
            code="invalid-value",
        )
    if not isinstance(kwargs, Mapping):
        raise CaptureError(f"kwargs is a {type(kwargs).__name__}. Give a dict of inputs by name", code="invalid-value")
    args = tuple(args)
    try:
        return bind(signature_of(model), args, kwargs)
    except TypeError as fault:
        raise CaptureError(
            f"{type(model).__name__}.forward does not accept these example inputs: {fault}. Its signature is "
            f"{signature_of(model)}",
            code="invalid-value",
        ) from fault


def leaves(args: object, kwargs: object) -> list[Any]:
    """Return the pytree leaves of arguments in canonical form. The placeholders of a graph have the same order."""
    return pytree.tree_leaves((args, kwargs), is_leaf=is_opaque_leaf)


def requires_grad(leaves: Sequence[object]) -> tuple[bool, ...]:
    """Return for each leaf whether it is a tensor that requires gradients."""
    return tuple([isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves])


def copy_inputs(args: Any, kwargs: Mapping[str, object]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return copies of arguments, for a run that must not change the originals, such as a cache that grows in place."""

    def copy_leaf(leaf: object) -> Any:
        if isinstance(leaf, torch.Tensor):
            copied_leaf = leaf.detach().clone().requires_grad_(leaf.requires_grad)
            if leaf.is_leaf:
                return copied_leaf
            with torch.enable_grad():
                return copied_leaf.clone()  # not a leaf of autograd either, so forward may write to it in place
        return copy.deepcopy(leaf)

    copies: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(
        copy_leaf, (tuple(args), dict(kwargs)), is_leaf=is_opaque_leaf
    )
    return copies


class Call(NamedTuple):
    """A call in canonical form.

    Args:
        args, kwargs: as returned by `bind`.
        leaves: pytree leaves of the arguments, in the order of the placeholders of a graph.
        key: input signature. Calls with equal keys can use the same graph.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: list[Any]
    key: Hashable


class Calls:
    """Converts calls of a model to canonical form. This runs at every call, so the order of arguments is cached.

    Args:
        signature: signature of the forward of the model.
        one_key: True if the model itself is a GraphModule. All calls then run one graph, so they have one key.
    """

    def __init__(self, signature: inspect.Signature, one_key: bool = False) -> None:
        self.signature, self._one_key = signature, one_key
        # {way to pass arguments: (indices of the positional arguments, (name, index) of the keyword arguments)}
        self._orders: dict[Hashable, tuple[tuple[int, ...], tuple[tuple[str, int], ...]]] = {}

    def bind(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Call:
        """Return a call in canonical form.

        Raises:
            TypeError: the signature does not accept these arguments.
            CaptureError: torch.fx traces the call.
        """
        values = (*args, *kwargs.values()) if kwargs else args
        passing = (len(args), *kwargs, *map(_is_none, values))
        order = self._orders.get(passing)
        if order is None:
            order = self._orders[passing] = self._order(args, kwargs, values)
        positions, names = order
        bound = tuple(map(values.__getitem__, positions))
        named = {name: values[index] for name, index in names} if names else {}
        # Usually all arguments are leaves, so flatten a pytree only if one of them is not.
        leaves: list[Any] = [*bound, *named.values()] if names else list(bound)
        spec: Hashable = (len(bound), *named)
        for leaf in leaves:
            if type(leaf) not in _LEAVES:
                leaves, spec = pytree.tree_flatten((bound, named), is_leaf=is_opaque_leaf)
                if any(isinstance(leaf, torch.fx.Proxy) for leaf in leaves):
                    raise CaptureError(
                        "torch.fx cannot trace a cascade. Trace cascade.folded_graph(), or pass the cascade to "
                        "torch.export.export.",
                        code="not-available",
                    )
                break
        key = () if self._one_key else (spec, *map(_leaf, leaves), _autocast(leaves))
        return Call(bound, named, leaves, key)

    def _order(
        self, args: Sequence[object], kwargs: Mapping[str, object], values: Sequence[object]
    ) -> tuple[tuple[int, ...], tuple[tuple[str, int], ...]]:
        """Return the canonical order, as (indices into `values` of positional, (name, index) of keyword arguments)."""
        names = dict(zip(kwargs, range(len(args), len(values)), strict=True))
        bound = _without_nones(self.signature, self.signature.bind(*range(len(args)), **names), values)
        return bound.args, tuple(bound.kwargs.items())


_is_none = functools.partial(operator.is_, None)
_LEAVES = {torch.Tensor, nn.Parameter, bool, int, float, str, type(None)}
"""Types that are always pytree leaves."""


def _leaf(leaf: object) -> Hashable:
    """Return the part of the key that describes one leaf."""
    if isinstance(leaf, torch.Tensor):
        return (leaf.dtype, leaf.device, leaf.dim())
    return (type(leaf), leaf) if isinstance(leaf, Hashable) else (type(leaf), id(leaf))


def _autocast(leaves: list[object]) -> Hashable:
    """Return (device type, autocast dtype) for each device type of the leaves for which autocast is enabled."""
    kinds: set[str] = set()
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            kinds.add(leaf.device.type)
    casts: tuple[Any, ...] = ()
    for kind in sorted(kinds):
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            casts = (*casts, (kind, torch.get_autocast_dtype(kind)))
    return casts
