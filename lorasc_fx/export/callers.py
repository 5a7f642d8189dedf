"""Who reads a weight while the model runs: its own module, or somebody who reaches into it.

An adapter stands in place of a module and computes when that module is called; a weight that others read it does not
reach. One run of the model on its example tells, as plain Python, whatever graphs were made of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lorasc_fx.capture import copied, quiet, untouched
from lorasc_fx.graph import LIKE_ANOTHER

__all__ = ["Call", "Calls", "calls_of"]


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass
class Calls:
    """What one run showed.

    Args:
        first: the first call of each module of interest, by its first path.
        reader: by weight, the class of a module that read it while none that holds it was running.
    """

    first: dict[str, Call] = field(default_factory=dict)
    reader: dict[str, str] = field(default_factory=dict)


def calls_of(model: nn.Module, names: Iterable[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Calls:
    """Run the model once, without a trace, and return who read the parameters of these names."""
    parameters = dict(model.named_parameters())
    known = {id(parameters[name]): name for name in names}
    seen = Calls()
    stack: list[nn.Module] = []

    def enter(path: str, holds: bool, module: nn.Module, args: Any, kwargs: Any) -> None:
        stack.append(module)
        if holds and path not in seen.first:
            seen.first[path] = Call(*copied(args, kwargs))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()

    inputs, named = copied(args, kwargs)
    with quiet(), torch.no_grad(), untouched(model), _Watcher(known, stack, seen):
        for path, module in model.named_modules():
            holds = any(id(value) in known for value in module._parameters.values())
            module.register_forward_pre_hook(partial(enter, path, holds), prepend=True, with_kwargs=True)
            module.register_forward_hook(leave, always_call=True)
        model(*inputs, **named)
    return seen


class _Watcher(TorchFunctionMode):
    """Notes, for each call to torch that makes a tensor out of a weight, which modules are running."""

    def __init__(self, known: Mapping[int, str], stack: list[nn.Module], seen: Calls) -> None:
        super().__init__()
        self._known, self._stack, self._seen = known, stack, seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        read = args[:1] if name in LIKE_ANOTHER else (args, kwargs or {})
        weights = [leaf for leaf in pytree.tree_leaves(read) if id(leaf) in self._known]
        if not weights or name == "requires_grad_":
            return output
        if any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(output)):
            for weight in weights:
                self._note(weight)
        return output

    def _note(self, weight: torch.Tensor) -> None:
        if any(value is weight for module in self._stack for value in module._parameters.values()):
            return
        reader = type(self._stack[-1]).__name__ if self._stack else "the model"
        self._seen.reader.setdefault(self._known[id(weight)], reader)
