"""What makes two calls the same variant: arguments in one canonical shape, and a hashable key for them.

A variant is one adapted graph for one input signature (docs/design.md): modes and settings of every module, tree of
arguments, which are None, values that are not tensors, dtypes, devices and numbers of axes, autocast.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lorasc_fx.capture.trees import whole
from lorasc_fx.errors import CaptureError

__all__ = ["bind", "copied", "key_of", "leaves"]


def bind(
    signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments in canonical shape: as many as possible positional, the rest in the signature's order.

    An argument that is None where None is the default is left out, so that `f(x)` and `f(x, mask=None)` are one call.

    Raises:
        TypeError: the signature does not take these arguments.
    """
    bound = signature.bind(*args, **kwargs)
    for name, parameter in signature.parameters.items():
        if parameter.default is None and name in bound.arguments and bound.arguments[name] is None:
            del bound.arguments[name]
    return bound.args, bound.kwargs


def signature_of(model: nn.Module) -> inspect.Signature:
    """Return the signature of a module's forward."""
    return inspect.signature(model.forward)


def check_binds(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Bind, with our error.

    Raises:
        CaptureError: the model's forward does not take these arguments.
    """
    try:
        return bind(signature_of(model), args, kwargs)
    except TypeError as fault:
        raise CaptureError(
            f"{type(model).__name__}.forward does not take these example inputs: {fault}; "
            f"its signature is {signature_of(model)}"
        ) from fault


def leaves(args: Any, kwargs: Any) -> list[Any]:
    """Return the leaves of the arguments in the order of a graph's placeholders."""
    return pytree.tree_leaves((args, kwargs), is_leaf=whole)


def copied(args: Any, kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return copies of a call's arguments, for a run that must leave no trace: a cache, say, grows in place."""

    def copy_leaf(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            copied_leaf = leaf.detach().clone().requires_grad_(leaf.requires_grad)
            if leaf.is_leaf:
                return copied_leaf
            with torch.enable_grad():
                return copied_leaf.clone()  # what is no leaf may be written in place
        return copy.deepcopy(leaf)

    copies: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(
        copy_leaf, (tuple(args), dict(kwargs)), is_leaf=whole
    )
    return copies


def key_of(model: nn.Module, args: Any, kwargs: Any) -> Hashable:
    """Return a key that is equal for two calls which one variant can serve."""
    flat, spec = pytree.tree_flatten((args, kwargs), is_leaf=whole)
    return (tuple(map(_settings, model.modules())), spec, tuple(_leaf(leaf) for leaf in flat), _autocast(flat))


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """Return what a graph of a module holds as constants: mode, numbers and names that it keeps, and its hooks."""
    kept = tuple(value for value in vars(module).values() if type(value) in (bool, int, float, str))
    return (len(module._forward_hooks), len(module._forward_pre_hooks), *kept)


def _leaf(leaf: Any) -> Hashable:
    if isinstance(leaf, torch.Tensor):
        return (leaf.dtype, leaf.device, leaf.dim())
    return (type(leaf), leaf) if isinstance(leaf, Hashable) else (type(leaf), id(leaf))


def _autocast(flat: list[Any]) -> Hashable:
    kinds = {leaf.device.type for leaf in flat if isinstance(leaf, torch.Tensor)}
    return tuple(
        (kind, torch.get_autocast_dtype(kind))
        for kind in sorted(kinds)
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    )
