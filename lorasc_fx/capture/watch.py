"""Which weights a model multiplies by or looks up while it runs as plain Python, seen from its calls to torch.

The eager twin of graph/flow.py: a tensor made of weights alone is followed until it meets an input.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lorasc_fx.capture.live import quiet
from lorasc_fx.capture.signature import copied
from lorasc_fx.capture.untouched import untouched
from lorasc_fx.graph import ADDED_FIRST, CONTRACTIONS, LIKE_ANOTHER, SCALES, weighs
from lorasc_fx.graph.forms import own_form

__all__ = ["watch"]

_READS_NO_VALUE = {"__get__", "size", "dim", "numel", "stride", "is_floating_point", "detach", "requires_grad_"}


def watch(model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> dict[str, str]:
    """Run the model once and return each weight that it uses, with the kind of site that it makes of it.

    The kind is empty for a weight that is neither multiplied by nor looked up.

    The model, its inputs and the random generators stay as they were.
    """
    inputs, named = copied(args, kwargs)
    watcher = _Watcher(model, list(model.buffers()))
    with quiet(), untouched(model), watcher:
        model(*inputs, **named)
    return dict.fromkeys(sorted(watcher.seen), "") | watcher.kinds


class _Watcher(TorchFunctionMode):
    """Follows tensors that are made of weights, in the ways that graph/uses.py lists, the first of which counts."""

    def __init__(self, model: nn.Module, constants: list[torch.Tensor]) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self._found: tuple[dict[str, str], ...] = ({}, {}, {}, {})
        self._made_of: dict[int, set[str]] = {id(value): {name} for name, value in model.named_parameters()}
        self._made_of |= {id(value): set() for value in constants}
        self._scaled: dict[int, set[str]] = {}
        self._alive: list[Any] = []  # an id is only good while its tensor lives

    @property
    def kinds(self) -> dict[str, str]:
        """Kinds of sites by weight."""
        return {name: kind for found in reversed(self._found) for name, kind in found.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        read = args[:1] if name in LIKE_ANOTHER else (args, kwargs or {})
        tensors = [leaf for leaf in pytree.tree_leaves(read) if isinstance(leaf, torch.Tensor)]
        weights = self._weights(tensors)
        if name not in _READS_NO_VALUE:
            self.seen |= weights
        own = own_form(func)
        kind = CONTRACTIONS.get(name) if own is None else own.kind
        inputs = [tensor for tensor in tensors if id(tensor) not in self._made_of]
        if weights and (kind == "embedding" or any(each.is_floating_point() for each in inputs)):
            multiplied = self._weights([each for each in tensors if name not in ADDED_FIRST or each is not args[0]])
            self._note(0, multiplied, kind)
            if name in SCALES:
                self._follow(output, self._scaled, weights)
        elif weights:  # an index that depends on inputs only selects
            self._note(1, weights, kind)
            self._note(3, weights if inputs and id(args[0]) in self._made_of else (), "embedding")
            self._follow(output, self._made_of, weights)
        scaled = set().union(*(self._scaled.get(id(tensor), set()) for tensor in tensors))
        if scaled and kind is not None and len(args) > 1 and id(args[1]) in self._scaled and weighs(name):
            self._note(2, self._scaled[id(args[1])], kind)
        elif scaled and (name in SCALES or not any(id(each) not in self._scaled for each in inputs)):
            self._follow(output, self._scaled, scaled | weights)
        return output

    def _weights(self, tensors: list[torch.Tensor]) -> set[str]:
        return set().union(*(self._made_of.get(id(tensor), set()) for tensor in tensors))

    def _note(self, way: int, weights: Iterable[str], kind: str | None) -> None:
        for weight in weights if kind is not None else ():
            self._found[way].setdefault(weight, kind or "")

    def _follow(self, output: Any, into: dict[int, set[str]], weights: set[str]) -> None:
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                into.setdefault(id(leaf), weights)
                self._alive.append(leaf)
