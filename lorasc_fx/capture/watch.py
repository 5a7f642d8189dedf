"""Which weights a model multiplies by or looks up while it runs as plain Python, seen from its calls to torch.

The eager twin of graph/flow.py: a tensor made of weights alone is followed until it meets an input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lorasc_fx.capture.live import quiet
from lorasc_fx.capture.signature import copied
from lorasc_fx.graph import CONTRACTIONS

__all__ = ["watch"]


def watch(model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> dict[str, str]:
    """Run the model once and return the kind of site of each weight that it multiplies by or looks up.

    Buffers and inputs are copies for the time of the call; random generators stay as they were.
    """
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    inputs, named = copied(args, kwargs)
    watcher = _Watcher(model, list(buffers.values()))
    with quiet(), torch.no_grad(), watcher:
        torch.func.functional_call(model, buffers, inputs, named)
    return watcher.kinds


class _Watcher(TorchFunctionMode):
    def __init__(self, model: nn.Module, constants: list[torch.Tensor]) -> None:
        super().__init__()
        self.kinds: dict[str, str] = {}
        self._made_of: dict[int, set[str]] = {id(value): {name} for name, value in model.named_parameters()}
        self._made_of |= {id(value): set() for value in constants}
        self._alive: list[Any] = []  # an id is only good while its tensor lives

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs or {})) if isinstance(leaf, torch.Tensor)]
        weights = set().union(*(self._made_of.get(id(tensor), set()) for tensor in tensors))
        kind = CONTRACTIONS.get(getattr(func, "__name__", ""))
        inputs = [tensor for tensor in tensors if id(tensor) not in self._made_of and tensor.is_floating_point()]
        if weights and (kind == "embedding" or inputs):  # an index that depends on inputs only selects
            for weight in weights if kind is not None else ():
                self.kinds.setdefault(weight, kind or "")
        elif weights:
            for leaf in pytree.tree_leaves(output):
                if isinstance(leaf, torch.Tensor):
                    self._made_of.setdefault(id(leaf), weights)
                    self._alive.append(leaf)
        return output
