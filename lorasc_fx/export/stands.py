"""Which attributes of a module others read while the model runs, that peft's wrapper in its place does not have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from lorasc_fx.capture import copied, quiet, untouched
from lorasc_fx.undo import Block, isolated, raise_of_handler

__all__ = ["read_through"]

_KEPT = {"weight", "bias", "in_features", "out_features"}
"""What peft's layers answer for the module inside. Source: peft 0.21, `BaseTunerLayer`."""


def read_through(
    model: nn.Module, paths: Iterable[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, str]:
    """Run the model with a stand in place of each of these modules, and return what is wrong, by path.

    The model, its inputs and the random generators stay as they were.
    """
    read: dict[str, str] = {}
    paths = sorted(set(paths), key=lambda path: path.count("."), reverse=True)  # inner ones first
    inputs, named = copied(args, kwargs)
    try:
        with quiet(), torch.no_grad(), untouched(model), _stood_in(model, paths, read):
            model(*inputs, **named)
    except Exception as fault:  # the model's own code may do anything with a module that is not what it expects
        raise_of_handler(fault)
        told = f"the model does not run with a wrapper in place of its module ({type(fault).__name__}: {fault})"
        return {path: read.get(path, told) for path in paths}
    return read


@isolated
def _stood_in(undo: Block[Any], model: nn.Module, paths: list[str], read: dict[str, str]) -> None:
    for path in paths:
        holder, _, name = path.rpartition(".")
        parent = model.get_submodule(holder)
        undo(partial(parent._modules.__setitem__, name, parent._modules[name]))
        parent._modules[name] = _Stand(parent._modules[name], path, read)


class _Stand(nn.Module):
    """Calls the module inside, and notes what else it is asked for."""

    def __init__(self, inside: nn.Module | None, path: str, read: dict[str, str]) -> None:
        super().__init__()
        self.inside = inside
        self.__dict__["note"] = lambda name: read.setdefault(
            path, f"the model reads {name} of its module, and peft's wrapper in its place has no {name}"
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._modules["inside"](*args, **kwargs)  # type: ignore[misc]

    def __getattr__(self, name: str) -> Any:
        inside = self.__dict__["_modules"].get("inside")
        if name not in _KEPT and not name.startswith("__"):
            self.__dict__["note"](name)
        return getattr(inside, name)
